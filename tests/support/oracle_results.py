"""What comes of the rows that oracle.py places: sums, weights, ranges, gradients; plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink import DispatchLayout
from support.oracle import Case, Copy, expected_of, kept, kept_inputs, with_ones


def expert_rows(case: Case, rank: int, *, round_: int = 0) -> Tensor:
    """Made-up expert outputs of a rank; slots that no row fills hold NaN, never to be read."""
    return _expert_rows(case, rank, round_).clone()


@kept
def _expert_rows(case: Case, rank: int, round_: int) -> Tensor:
    expected = expected_of(case, rank)
    gen = torch.Generator().manual_seed(case.seed * 1000 + 500 + rank + 17 * round_)
    rows = torch.full((*expected.shape, case.hidden), float("nan"), dtype=case.dtype)
    made = torch.empty((len(expected.copies), case.hidden), dtype=case.dtype)
    for row_H in made:
        row_H.copy_(torch.randn(case.hidden, generator=gen, dtype=torch.float64))
    if case.content == "ones":
        made = with_ones(made)
    for copy, row_H in zip(expected.copies, made, strict=True):
        rows[copy.slot] = row_H
    return rows


@kept
def combined_of(
    case: Case,
    rank: int,
    *,
    round_: int = 0,
    own_weights: bool = False,
    missing: int | None = None,
) -> Tensor:
    """Result of combine on `rank`: the contract's sequence of roundings, term by term.

    `own_weights`: rows are multiplied by `slot_weights` instead of the routing weights.
    `missing`: a rank that was lost after the dispatch; its rows do not come back.
    """
    if case.precision == "exact":
        return _combined_exactly(case, rank, round_, own_weights, missing)
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    result = torch.zeros((case.tokens[rank], case.hidden), dtype=wide)
    for dest in range(case.ranks):
        if dest == missing:
            continue
        partial: dict[int, Tensor] = {}
        copies = [c for c in expected_of(case, dest).copies if c.source == rank]
        for copy in sorted(copies, key=lambda c: (c.token, c.choice)):
            start = partial.get(copy.token, torch.zeros(case.hidden, dtype=wide))
            partial[copy.token] = start + _term(case, dest, copy, round_, own_weights)
        for token, value in partial.items():
            result[token] = result[token] + value.to(case.dtype).to(wide)
    return result.to(case.dtype)


def _combined_exactly(
    case: Case, rank: int, round_: int, own_weights: bool, missing: int | None
) -> Tensor:
    """Every expert's row by itself, in top-k order, and one rounding at the end."""
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    result = torch.zeros((case.tokens[rank], case.hidden), dtype=wide)
    rows = [
        (copy.token, copy.choice, dest, copy)
        for dest in range(case.ranks)
        for copy in expected_of(case, dest).copies
        if copy.source == rank and dest != missing
    ]
    for token, _, dest, copy in sorted(rows, key=lambda row: row[:2]):
        result[token] = result[token] + _term(case, dest, copy, round_, own_weights)
    return result.to(case.dtype)


def _term(case: Case, dest: int, copy: Copy, round_: int, own_weights: bool) -> Tensor:
    """A row that `dest` returns, multiplied by its weight if there is one."""
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    term = _expert_rows(case, dest, round_)[copy.slot].to(wide)
    if own_weights:
        return term * slot_weights(case, dest)[copy.slot].to(wide)
    weights_TK = kept_inputs(case, copy.source).weights_TK
    if case.layout.expanded and weights_TK is not None:
        return term * weights_TK[copy.token, copy.choice].to(wide)
    return term


@kept
def slot_weights(case: Case, rank: int) -> Tensor:
    """Made-up `weights` of a combine, one per slot; NaN, never to be read, where no row is."""
    expected = expected_of(case, rank)
    gen = torch.Generator().manual_seed(case.seed * 1000 + 900 + rank)
    weights = torch.full(expected.shape, float("nan"), dtype=case.weight_dtype)
    for copy in expected.copies:
        weights[copy.slot] = torch.randn((), generator=gen, dtype=torch.float64)
    return weights


@kept
def ranges_of(case: Case, rank: int) -> tuple[list[list[int]], list[list[int]]]:
    """First slot, where there is one, and number of rows per (local expert, source rank)."""
    expected = expected_of(case, rank)
    counts = [[0] * case.ranks for _ in case.local_experts(rank)]
    starts = [[-1] * case.ranks for _ in counts]
    for copy in sorted(expected.copies, key=lambda copy: copy.slot):
        if case.layout is DispatchLayout.EXPERT_MAJOR:
            expert, slot = copy.slot
        else:
            (slot,) = copy.slot
            expert = sum(slot >= end for end in expected.offsets[1:])
        if not counts[expert][copy.source]:
            starts[expert][copy.source] = slot
        counts[expert][copy.source] += 1
    return starts, counts


@kept
def slot_grads(case: Case, rank: int) -> Tensor:
    """Made-up gradients of the slots' weights: the shape that combine's `weight_grads` has."""
    shape = expected_of(case, rank).shape
    if not case.layout.expanded:
        shape = (*shape, case.topk)
    gen = torch.Generator().manual_seed(case.seed * 1000 + 700 + rank)
    return torch.randn(shape, generator=gen, dtype=case.weight_dtype)


@kept
def returned_grads(case: Case, rank: int) -> Tensor:
    """`[T, K]` of `slot_grads` on all ranks: what belongs to each choice of this rank's tokens."""
    owner = case.rank_of_expert()
    ids = kept_inputs(case, rank).ids_TK.tolist()
    result = torch.zeros((case.tokens[rank], case.topk), dtype=case.weight_dtype)
    for dest in range(case.ranks):
        grads = slot_grads(case, dest)
        for copy in expected_of(case, dest).copies:
            if copy.source != rank:
                continue
            if case.layout.expanded:
                result[copy.token, copy.choice] = grads[copy.slot]
                continue
            for choice, expert in enumerate(ids[copy.token]):
                if expert >= 0 and owner[expert] == dest:
                    result[copy.token, choice] = grads[(*copy.slot, choice)]
    return result
