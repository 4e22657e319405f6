"""A byte-level transformer whose MLPs are mixtures of experts spread over the ranks.

Shape suffixes: B samples, S bytes per sample, T = B * S tokens of this rank, H hidden size,
V vocabulary, E experts, L layers, K choices per token.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertlink import DispatchHandle, DispatchOutput, MoECommunicator
from expertlink.demo.clock import PhaseClock
from expertlink.nn import MoELayer

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


class RoutedExperts(nn.Module):
    """A router in front of a mixture of experts."""

    def __init__(self, config: ModelConfig, comm: MoECommunicator, *, layer: int) -> None:
        super().__init__()
        self.topk, width = config.topk, config.expert_width
        self.router = _linear(config.seed, (layer, -1, 0), config.hidden_size, config.num_experts)
        self.layer = MoELayer(comm, intermediate_size=width, dtype=torch.float32)
        experts = self.layer.experts
        with torch.no_grad():
            # Seeded by the expert's global id: every placement yields the same model.
            for slot, expert in enumerate(experts.expert_ids):
                for which, weights in enumerate((experts.gate_up, experts.down)):
                    key = (layer, expert, which)
                    fan_in, fan_out = weights[slot].shape
                    weights[slot] = _normal(config.seed, key, fan_in, fan_out)

    def forward(self, x_TH: Tensor, clock: PhaseClock) -> tuple[Tensor, Routing]:
        """Mixture of the chosen experts' outputs `[T, H]`, and the choices."""
        probability_TE = self.router(x_TH).softmax(dim=-1, dtype=torch.float32)
        weights_TK, ids_TK = probability_TE.topk(self.topk, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        y_TH = self.layer(x_TH, ids_TK, weights_TK, calls=TimedCalls(self.layer.comm, clock))
        load_E = torch.bincount(ids_TK.flatten(), minlength=probability_TE.shape[1]).float()
        return y_TH, Routing(ids_TK, load_E, probability_TE.sum(dim=0))


class TimedCalls:
    """Dispatch and combine with a clock: what lies between them are the experts."""

    def __init__(self, comm: MoECommunicator, clock: PhaseClock) -> None:
        self._comm, self._clock, self._experts = comm, clock, ExitStack()

    def dispatch(
        self, input: Tensor, topk_ids: Tensor, weights: Tensor
    ) -> tuple[DispatchOutput, DispatchHandle]:
        """As `MoECommunicator.dispatch`."""
        with self._clock.phase("dispatch"):
            received = self._comm.dispatch(input, topk_ids, weights)
        self._experts.enter_context(self._clock.phase("experts"))
        return received

    def combine(self, expert_output: Tensor, handle: DispatchHandle) -> Tensor:
        """As `MoECommunicator.combine`."""
        self._experts.close()
        with self._clock.phase("combine"):
            return self._comm.combine(expert_output, handle)


class Block(nn.Module):
    """Causal self-attention, then the mixture of experts, each around a residual."""

    def __init__(self, config: ModelConfig, comm: MoECommunicator, *, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.attention_norm, self.moe_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = _linear(config.seed, (layer, -1, 1), hidden, 3 * hidden)
        self.out = _linear(config.seed, (layer, -1, 2), hidden, hidden)
        self.moe = RoutedExperts(config, comm, layer=layer)

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


def _normal(seed: int, key: tuple[int, int, int], fan_in: int, fan_out: int) -> Tensor:
    """`[fan_in, fan_out]` weights with variance 1 / fan_in, fixed by seed and key.

    The key is (layer, expert, which), -1 where there is none.
    """
    generator = torch.Generator().manual_seed(crc32(repr((seed, *key)).encode()))
    return torch.randn(fan_in, fan_out, generator=generator) * fan_in**-0.5


def _linear(seed: int, key: tuple[int, int, int], fan_in: int, fan_out: int) -> nn.Linear:
    linear = nn.Linear(fan_in, fan_out, bias=False)
    with torch.no_grad():
        linear.weight.copy_(_normal(seed, key, fan_in, fan_out).T)
    return linear
