"""A byte-level transformer whose MLPs are mixtures of experts spread over the ranks.

Shape suffixes: B samples, S bytes per sample, T = B * S tokens of this rank, H hidden size,
V vocabulary, E experts, L layers, K choices per token, N received rows, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertlink import DispatchLayout, DispatchOutput, MoECommunicator
from expertlink.demo.clock import PhaseClock

VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model."""

    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    sequence: int = 64
    num_experts: int = 16
    topk: int = 2
    expert_width: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Routing:
    """The routing of this rank's tokens in one layer.

    Attributes:
        topk_ids: `[T, K]` int64 chosen experts.
        load: `[E]` float32 choices of each expert.
        probability: `[E]` float32 router probability of each expert, summed over tokens;
            differentiable.
    """

    topk_ids: Tensor
    load: Tensor
    probability: Tensor


class Experts(nn.Module):
    """SwiGLU MLPs of the experts on this rank, for any receive layout."""

    def __init__(self, config: ModelConfig, experts: list[int], *, layer: int) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.expert_width
        # Seeded by the expert's global id: every placement yields the same model.
        ups = [_normal(config.seed, (layer, e, 0), hidden, 2 * width) for e in experts]
        downs = [_normal(config.seed, (layer, e, 1), width, hidden) for e in experts]
        self.up = nn.Parameter(_stack(ups, hidden, 2 * width))
        self.down = nn.Parameter(_stack(downs, width, hidden))

    def forward(self, received: DispatchOutput) -> Tensor:
        """Expert outputs in the shape of `received.tokens`, ready for combine."""
        counts = received.num_tokens_per_expert_list
        if counts is None:
            counts = received.num_tokens_per_expert.tolist()
        if received.layout is DispatchLayout.FLAT:
            return self._grouped(received.tokens, counts)
        if received.layout is DispatchLayout.EXPERT_MAJOR:
            return self._batched(received.tokens, counts)
        return self._deduplicated(received, counts)

    def _grouped(self, rows_NH: Tensor, counts: list[int]) -> Tensor:
        """FLAT: rows lie grouped by expert, one MLP per group."""
        if not counts:  # more ranks than experts: none is local
            return rows_NH
        ends = list(accumulate(counts))
        up, down = self.up.to(rows_NH.dtype), self.down.to(rows_NH.dtype)
        outputs = [
            _swiglu(rows_NH[end - count : end] @ up[e]) @ down[e]
            for e, (end, count) in enumerate(zip(ends, counts, strict=True))
        ]
        return torch.cat(outputs)

    def _batched(self, rows_ECH: Tensor, counts: list[int]) -> Tensor:
        """EXPERT_MAJOR: one batched matmul over as many rows as the busiest expert has."""
        capacity, busiest = rows_ECH.shape[1], max(counts, default=0)
        rows = rows_ECH[:, :busiest]
        slots = torch.arange(busiest, device=rows.device)
        filled_EC = slots < torch.tensor(counts, device=rows.device)[:, None]
        rows = rows.masked_fill(~filled_EC[..., None], 0.0)  # unfilled slots may hold anything
        up, down = self.up.to(rows.dtype), self.down.to(rows.dtype)
        return F.pad(_swiglu(rows @ up) @ down, (0, 0, 0, capacity - busiest))

    def _deduplicated(self, received: DispatchOutput, counts: list[int]) -> Tensor:
        """TOKEN_MAJOR, RANK_MAJOR: every local expert of a row reads it; weights apply here."""
        assert received.topk_ids is not None and received.topk_weights is not None
        rows_NH = received.tokens.flatten(0, -2)
        ids_NK, weights_NK = received.topk_ids.flatten(0, -2), received.topk_weights.flatten(0, -2)
        row, choice = (ids_NK >= 0).nonzero(as_tuple=True)
        order = ids_NK[row, choice].argsort(stable=True)  # groups the choices by expert
        row, choice = row[order], choice[order]
        outputs = self._grouped(rows_NH[row], counts) * weights_NK[row, choice, None]
        summed_NH = torch.zeros_like(rows_NH, dtype=torch.float32)
        summed_NH = summed_NH.index_add(0, row, outputs.float())
        return summed_NH.to(rows_NH.dtype).view_as(received.tokens)


class MoELayer(nn.Module):
    """Router, dispatch, experts, combine."""

    def __init__(self, config: ModelConfig, comm: MoECommunicator, *, layer: int) -> None:
        super().__init__()
        self.comm, self.dtype = comm, comm.config.dtype
        self.topk = config.topk
        self.router = _linear(config.seed, (layer, -1, 0), config.hidden_size, config.num_experts)
        self.experts = Experts(config, comm.local_experts, layer=layer)

    def forward(self, x_TH: Tensor, clock: PhaseClock) -> tuple[Tensor, Routing]:
        """Mixture of the chosen experts' outputs `[T, H]`, and the choices."""
        probability_TE = self.router(x_TH).softmax(dim=-1, dtype=torch.float32)
        weights_TK, ids_TK = probability_TE.topk(self.topk, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)

        with clock.phase("dispatch"):
            received, handle = self.comm.dispatch(x_TH.to(self.dtype), ids_TK, weights_TK)
        with clock.phase("experts"):
            outputs = self.experts(received)
        with clock.phase("combine"):
            y_TH = self.comm.combine(outputs, handle).to(x_TH.dtype)

        load_E = torch.bincount(ids_TK.flatten(), minlength=probability_TE.shape[1]).float()
        return y_TH, Routing(ids_TK, load_E, probability_TE.sum(dim=0))


class Block(nn.Module):
    """Causal self-attention, then the mixture of experts, each around a residual."""

    def __init__(self, config: ModelConfig, comm: MoECommunicator, *, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.attention_norm, self.moe_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = _linear(config.seed, (layer, -1, 1), hidden, 3 * hidden)
        self.out = _linear(config.seed, (layer, -1, 2), hidden, hidden)
        self.moe = MoELayer(config, comm, layer=layer)

    def forward(self, x_BSH: Tensor, clock: PhaseClock) -> tuple[Tensor, Routing]:
        """The next residual stream `[B, S, H]`, and the layer's routing."""
        heads = self.qkv(self.attention_norm(x_BSH)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, heads, S, H / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BSH = x_BSH + self.out(mixed.transpose(1, 2).flatten(2))
        y_TH, routing = self.moe(self.moe_norm(x_BSH).flatten(0, 1), clock)
        return x_BSH + y_TH.view_as(x_BSH), routing


class LanguageModel(nn.Module):
    """Predicts the next byte.

    Parameters under `experts` differ between ranks; all others are replicated.

    Args:
        config: its shape.
        comm: an open communicator with the same experts, hidden size and top-k; shared by all
            layers.
    """

    def __init__(self, config: ModelConfig, comm: MoECommunicator) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.byte = nn.Parameter(_normal(config.seed, (-1, -1, 0), hidden, VOCABULARY).T.clone())
        self.position = nn.Parameter(_normal(config.seed, (-1, -1, 1), hidden, config.sequence).T)
        self.blocks = nn.ModuleList(
            Block(config, comm, layer=layer) for layer in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(hidden)
        self.head = _linear(config.seed, (-1, -1, 2), hidden, VOCABULARY)

    def forward(
        self, bytes_BS: Tensor, clock: PhaseClock | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Logits `[B, S, V]` of every next byte, and the routing of every layer."""
        clock = clock or PhaseClock(bytes_BS.device)
        x_BSH = self.byte[bytes_BS] + self.position[: bytes_BS.shape[1]]
        routings: list[Routing] = []
        for block in self.blocks:
            x_BSH, routing = block(x_BSH, clock)
            routings.append(routing)
        return self.head(self.norm(x_BSH)), routings

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters that only this rank holds."""
        return [p for name, p in self.named_parameters() if ".experts." in name]

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that every rank holds alike."""
        return [p for name, p in self.named_parameters() if ".experts." not in name]


def _swiglu(gate_and_value: Tensor) -> Tensor:
    gate, value = gate_and_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def _normal(seed: int, key: tuple[int, int, int], fan_in: int, fan_out: int) -> Tensor:
    """`[fan_in, fan_out]` weights with variance 1 / fan_in, fixed by seed and key.

    The key is (layer, expert, which), -1 where there is none.
    """
    generator = torch.Generator().manual_seed(crc32(repr((seed, *key)).encode()))
    return torch.randn(fan_in, fan_out, generator=generator) * fan_in**-0.5


def _stack(matrices: list[Tensor], fan_in: int, fan_out: int) -> Tensor:
    return torch.stack(matrices) if matrices else torch.empty(0, fan_in, fan_out)


def _linear(seed: int, key: tuple[int, int, int], fan_in: int, fan_out: int) -> nn.Linear:
    linear = nn.Linear(fan_in, fan_out, bias=False)
    with torch.no_grad():
        linear.weight.copy_(_normal(seed, key, fan_in, fan_out).T)
    return linear
