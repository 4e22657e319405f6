"""Inputs of all ranks, which every rank can draw, and arithmetic that DeepEP's tests use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from support.drop_in.place import Place

FP8_MAX = 448.0


@dataclass(frozen=True)
class Shapes:
    """Sizes of a test.

    Attributes:
        tokens: T of every rank, or of rank 0.
        hidden: H.
        experts: E.
        topk: K.
        fewer: rank r has T - r * fewer tokens, at least 0.
        masked: share of choices that are -1.
        seed: of what is drawn.
    """

    tokens: int
    hidden: int
    experts: int
    topk: int
    fewer: int = 0
    masked: float = 0.0
    seed: int = 0

    def tokens_of(self, rank: int) -> int:
        return max(0, self.tokens - rank * self.fewer)


@dataclass(frozen=True)
class Tokens:
    """A rank's tokens.

    Attributes:
        x: `[T, H]` bfloat16.
        ids: `[T, K]` int64, distinct, -1 for none.
        weights: `[T, K]` float32, 0 where the id is -1.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor


def tokens_of(shapes: Shapes, rank: int) -> Tokens:
    """What a rank dispatches; on the CPU."""
    generator = torch.Generator().manual_seed(1000 * shapes.seed + rank)
    count = shapes.tokens_of(rank)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")

    x = drawn(count, shapes.hidden).to(torch.bfloat16)
    ids = (drawn(count, shapes.experts).abs() + 1).topk(shapes.topk, dim=1).indices
    if shapes.masked:
        chosen = torch.rand(ids.shape, generator=generator, device="cpu", dtype=torch.float32)
        ids = torch.where(chosen < shapes.masked, -1, ids)
    weights = torch.where(ids >= 0, drawn(count, shapes.topk), 0.0)
    return Tokens(x, ids, weights)


def all_tokens(shapes: Shapes, place: Place) -> list[Tokens]:
    """What all ranks dispatch, on this rank's device."""
    found = []
    for rank in range(place.num_ranks):
        own = tokens_of(shapes, rank)
        found.append(Tokens(*(place.tensor(value) for value in (own.x, own.ids, own.weights))))
    return found


def members(ids_TK: Tensor, shapes: Shapes, num_ranks: int) -> Tensor:
    """`[T, R]` bool: which ranks a token goes to."""
    ranks_TK = ids_TK // (shapes.experts // num_ranks)
    return torch.stack([(ranks_TK == rank).any(dim=1) for rank in range(num_ranks)], dim=1)


def choices_per_expert(ids_TK: Tensor, shapes: Shapes) -> list[int]:
    """`[E]` how often each expert is chosen."""
    return [int((ids_TK == expert).sum()) for expert in range(shapes.experts)]


@dataclass(frozen=True)
class Arrivals:
    """What a rank must receive, in plain words: rows by source rank, then source token.

    Attributes:
        source_rank: `[N]`.
        source_token: `[N]`.
        x: `[N, H]`.
        ids: `[N, K]` local experts, -1 for those of other ranks.
        weights: `[N, K]`, 0 where the id is -1.
        per_expert: rows of each local expert.
    """

    source_rank: Tensor
    source_token: Tensor
    x: Tensor
    ids: Tensor
    weights: Tensor
    per_expert: list[int]


def arrivals(everyone: list[Tokens], shapes: Shapes, rank: int) -> Arrivals:
    """The rows that a rank must receive."""
    num_ranks = len(everyone)
    local = shapes.experts // num_ranks
    pairs = [
        (source, token)
        for source, tokens in enumerate(everyone)
        for token in range(len(tokens.x))
        if bool(((tokens.ids[token] // local) == rank).any())
    ]
    device = everyone[0].x.device
    x = torch.cat([tokens.x for tokens in everyone])
    ids = torch.cat([tokens.ids for tokens in everyone])
    weights = torch.cat([tokens.weights for tokens in everyone])
    starts = [sum(len(t.x) for t in everyone[:source]) for source in range(num_ranks)]
    rows = torch.tensor([starts[s] + t for s, t in pairs], dtype=torch.int64, device=device)
    here = (ids[rows] // local) == rank
    local_ids = torch.where(here, ids[rows] - rank * local, -1)
    return Arrivals(
        source_rank=torch.tensor([s for s, _ in pairs], dtype=torch.int64, device=device),
        source_token=torch.tensor([t for _, t in pairs], dtype=torch.int64, device=device),
        x=x[rows],
        ids=local_ids,
        weights=torch.where(here, weights[rows], 0.0),
        per_expert=[int((local_ids == expert).sum()) for expert in range(local)],
    )


def calc_diff(x: Tensor, y: Tensor) -> float:
    """1 - 2 sum(xy) / sum(x² + y²), after adding 1 to both; 0 where they are equal."""
    if x.numel() == 0:
        return 0.0
    a, b = x.double() + 1, y.double() + 1
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 rows and their scales, one for 128 elements."""
    blocks = x.float().view(x.shape[0], x.shape[1] // 128, 128)
    largest = blocks.abs().amax(dim=2).clamp(min=1e-4)
    rows = (blocks * (FP8_MAX / largest[:, :, None])).to(torch.float8_e4m3fn)
    return rows.view(x.shape), largest / FP8_MAX


def from_fp8(rows: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 rows of e4m3 ones; scales of float32, or packed exponents in int32."""
    scales = scales.contiguous()
    if scales.dtype is torch.int32:
        bytes_ = scales.reshape(-1).view(torch.uint8).view(*scales.shape[:-1], -1)
        scales = (bytes_.to(torch.int32) << 23).view(torch.float32)
    blocks = rows.float().view(*rows.shape[:-1], rows.shape[-1] // 128, 128)
    return (blocks * scales[..., None]).view(rows.shape).to(torch.bfloat16)


def column_major(scales: Tensor) -> Tensor:
    """The same scales, columns contiguous."""
    return scales.t().contiguous().t()
