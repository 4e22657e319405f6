"""A layer of experts, whole on one rank: what every framework's calls must amount to."""

from __future__ import annotations

import torch
from torch import Tensor

from support.drop_in.inputs import Shapes, Tokens
from support.drop_in.place import Place


def factor(expert: Tensor | int, device: torch.device) -> Tensor:
    """Expert e multiplies by this."""
    return 0.5 + 0.125 * torch.as_tensor(expert, device=device, dtype=torch.float32)


def dense(own: Tokens) -> Tensor:
    """float32 `[T, H]`: every token through all of its experts, weighted."""
    factors = torch.where(own.ids >= 0, factor(own.ids, own.x.device), 0.0)
    return own.x.float() * (factors * own.weights).sum(dim=1, keepdim=True)


def first_expert(place: Place, shapes: Shapes) -> int:
    """Global number of a rank's expert 0."""
    return place.rank * (shapes.experts // place.num_ranks)


def by_token(place: Place, shapes: Shapes, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Rows `[N, H]`, local ids and weights `[N, K]`: the weighted sum of the local experts."""
    numbers = ids + first_expert(place, shapes)
    factors = torch.where(ids >= 0, factor(numbers, rows.device) * weights, 0.0)
    return (rows.float() * factors.sum(dim=1, keepdim=True)).to(torch.bfloat16)


def by_expert(place: Place, shapes: Shapes, rows: Tensor, counts: list[int]) -> Tensor:
    """Rows in groups of experts `[sum(counts), H]`, each through its expert."""
    made = [
        group.float() * factor(first_expert(place, shapes) + number, rows.device)
        for number, group in enumerate(rows.split(counts))
    ]
    return torch.cat(made).to(torch.bfloat16)


def by_slab(place: Place, shapes: Shapes, slabs: Tensor, counts: Tensor) -> Tensor:
    """`[E_loc, slots, H]`: as a masked GEMM, which leaves rows past the counts as they are."""
    made = torch.full_like(slabs, float("nan"), dtype=torch.bfloat16)
    for number, count in enumerate(counts.tolist()):
        scale = factor(first_expert(place, shapes) + number, slabs.device)
        made[number, :count] = (slabs[number, :count].float() * scale).to(torch.bfloat16)
    return made


def close(result: Tensor, own: Tokens) -> None:
    """A layer's output is the dense one, up to roundings to bfloat16."""
    torch.testing.assert_close(result.float(), dense(own), rtol=0.03, atol=0.03)


def close_fp8(result: Tensor, own: Tokens) -> None:
    """Likewise, where rows have travelled as e4m3."""
    expected = dense(own)
    error = (result.float() - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error < 0.05, float(error)
