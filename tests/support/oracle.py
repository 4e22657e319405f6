"""What the contract says, in the plainest loops: the judge of every engine and layout.

Written against the contract's text, not against the library: nothing here imports its routing,
layout or reduction code. Results are kept, because the threads of hosted ranks ask again and again.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from expertlink import DispatchLayout

Result = TypeVar("Result")
_KEPT = 512  # results of each function; more than 72 ranks ask for in one case
_lock = threading.RLock()


@dataclass(frozen=True)
class Case:
    """One drawn situation; every rank can rebuild all ranks' inputs from it.

    Attributes:
        tokens: T of every rank.
        masked: share of choices that are -1.
        skew: exponent of the experts' popularity; large: one expert is in every token.
        only_rank: choices of experts on other ranks become -1.
        limit: max_tokens_per_rank; None: one more than any rank has.
        weight_seed: draws other weights for the same routing and rows.
        precision: `combine_precision`.
        content: "random" numbers; "ones": rows of set bits, whole or in part; "extreme": numbers at
            the edges of what quantization takes.
        without: a rank that is lost: choices of its experts become -1.
        domains: host of every rank; None: they share one.
    """

    tokens: tuple[int, ...]
    hidden: int
    experts: int
    topk: int
    layout: DispatchLayout
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0
    skew: float = 0.0
    alignment: int = 1
    weighted: bool = True
    ids_dtype: torch.dtype = torch.int64
    placement: str = "even"
    seed: int = 0
    only_rank: int | None = None
    limit: int | None = None
    weight_seed: int | None = None
    precision: str = "wire"
    content: str = "random"
    without: int | None = None
    domains: tuple[int, ...] | None = None

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def max_tokens(self) -> int:
        return max(*self.tokens, 1) + 1 if self.limit is None else self.limit

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def rank_of_expert(self) -> list[int]:
        """Placement: "even" blocks, "bare" with none on the last rank, or "scattered" anywhere."""
        if self.placement == "scattered":
            rng = random.Random(self.seed)
            return [rng.randrange(self.ranks) for _ in range(self.experts)]
        ranks = max(1, self.ranks - (self.placement == "bare"))
        base, extra = divmod(self.experts, ranks)
        return [r for r in range(ranks) for _ in range(base + (r < extra))]

    def local_experts(self, rank: int) -> list[int]:
        return [e for e, owner in enumerate(self.rank_of_expert()) if owner == rank]

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))


def without_rank(case: Case, rank: int) -> Case:
    """The case for those who go on without a rank: it sends nothing and its experts are gone."""
    tokens = tuple(0 if other == rank else count for other, count in enumerate(case.tokens))
    return dataclasses.replace(case, tokens=tokens, without=rank)


def kept(function: Callable[..., Result]) -> Callable[..., Result]:
    """Makes each result once, whatever the number of threads that ask for it."""
    cached = functools.lru_cache(_KEPT)(function)

    @functools.wraps(function)
    def locked(*args: object, **options: object) -> Result:
        with _lock:
            return cached(*args, **options)

    return locked


@dataclass(frozen=True)
class Inputs:
    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor | None


def inputs_of(case: Case, rank: int) -> Inputs:
    """Tensors of the caller's own."""
    own = kept_inputs(case, rank)
    weights_TK = None if own.weights_TK is None else own.weights_TK.clone()
    return Inputs(own.x_TH.clone(), own.ids_TK.clone(), weights_TK)


@kept
def kept_inputs(case: Case, rank: int) -> Inputs:
    gen = torch.Generator().manual_seed(case.seed * 1000 + rank)
    count = case.tokens[rank]
    x_TH = torch.randn((count, case.hidden), generator=gen, dtype=torch.float64).to(case.dtype)
    popularity = -case.skew * torch.arange(1, case.experts + 1, dtype=torch.float64).log()
    noise = torch.rand((count, case.experts), generator=gen, dtype=torch.float64)
    gumbel = -(-noise.clamp(1e-12).log()).log()
    ids_TK = (popularity + gumbel).topk(case.topk, dim=1).indices
    hidden = torch.rand((count, case.topk), generator=gen) < case.masked
    owner_TK = torch.tensor(case.rank_of_expert())[ids_TK]
    if case.only_rank is not None:
        hidden |= owner_TK != case.only_rank
    if case.without is not None:
        hidden |= owner_TK == case.without
    ids_TK = torch.where(hidden, -1, ids_TK).to(case.ids_dtype)
    weights_TK = None
    if case.weighted:
        if case.weight_seed is not None:
            gen.manual_seed(case.weight_seed * 1000 + rank)
        weights_TK = torch.randn((count, case.topk), generator=gen, dtype=torch.float64)
        weights_TK = weights_TK.to(case.weight_dtype)
    return Inputs(_with_content(case, x_TH), ids_TK, weights_TK)


def _with_content(case: Case, rows: Tensor) -> Tensor:
    """Rows of random numbers, changed as `case.content` says."""
    if case.content == "ones":
        return with_ones(rows)
    if case.content == "extreme":
        return _with_extremes(rows)
    return rows


def with_ones(rows_NH: Tensor) -> Tensor:
    """Set bits where they are easily taken for something else; by the number of the row."""
    count = rows_NH.shape[1] * rows_NH.element_size()
    bytes_NB = rows_NH.clone().view(torch.uint8)
    for index, row_B in enumerate(bytes_NB):
        kind = index % 7
        if kind == 0:
            row_B[:] = 0xFF
        elif kind == 1:
            row_B[:4] = 0xFF
        elif kind == 2:
            row_B[-4:] = 0xFF
        elif kind == 3:  # a word here and there, and all of a piece of 16 bytes
            row_B[4 * index % count :: 52] = 0xFF
            middle = count // 32 * 16
            row_B[middle : middle + 16] = 0xFF
        elif kind == 4:  # four bytes, of two words
            row_B[2:6] = 0xFF
        elif kind == 5:
            row_B[: count // 2] = 0xFF
    return bytes_NB.view(rows_NH.dtype)


def _with_extremes(rows_NH: Tensor) -> Tensor:
    """No numbers, infinities, zeros of both signs, tiny and huge numbers; by the row."""
    rows_NH = rows_NH.clone()
    largest = torch.finfo(rows_NH.dtype).max
    tiny = torch.finfo(rows_NH.dtype).tiny
    for index, row_H in enumerate(rows_NH):
        kind = index % 11
        middle = (37 * index + 5) % len(row_H)
        if kind == 0:
            row_H.zero_()
        elif kind == 1:
            row_H.fill_(-0.0)
        elif kind == 2:
            row_H[middle] = float("nan")
        elif kind == 3:
            row_H[middle] = float("inf")
            row_H[0] = -float("inf")
        elif kind == 4:
            row_H *= tiny
        elif kind == 5:
            row_H.clamp_(-1, 1).mul_(largest)
        elif kind == 6:
            row_H[::2] = -0.0
            row_H[1::2] *= 1e-4
        elif kind == 7:  # one number decides the scale of all
            row_H[-1] = -largest
        elif kind == 8:
            row_H[middle:] = float("nan")
        elif kind == 9:
            row_H.sign_().mul_(448.0)
    return rows_NH


@dataclass(frozen=True)
class Copy:
    """A row that a rank must receive: which token, for which local expert (expanded layouts)."""

    slot: tuple[int, ...]
    source: int
    token: int
    choice: int


@dataclass(frozen=True)
class Expected:
    shape: tuple[int, ...]
    copies: list[Copy]
    counts: list[int]
    offsets: list[int]
    rows_per_rank: list[int]


@kept
def expected_of(case: Case, rank: int) -> Expected:
    """Where every row lands on `rank`, straight from the table of layouts."""
    owner = case.rank_of_expert()
    mine = case.local_experts(rank)
    ids = [kept_inputs(case, source).ids_TK.tolist() for source in range(case.ranks)]

    def here(source: int, token: int) -> bool:
        return any(e >= 0 and owner[e] == rank for e in ids[source][token])

    rows_per_rank = [sum(here(s, t) for t in range(case.tokens[s])) for s in range(case.ranks)]
    per_expert: list[list[tuple[int, int, int]]] = [
        [
            (source, token, ids[source][token].index(expert))
            for source in range(case.ranks)
            for token in range(case.tokens[source])
            if expert in ids[source][token]
        ]
        for expert in mine
    ]
    counts = [len(rows) for rows in per_expert]
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + -(-count // case.alignment) * case.alignment)

    copies: list[Copy] = []
    shape: tuple[int, ...]
    if case.layout is DispatchLayout.FLAT:
        shape = (offsets[-1],)
        for local, rows in enumerate(per_expert):
            copies += [Copy((offsets[local] + i,), *row) for i, row in enumerate(rows)]
    elif case.layout is DispatchLayout.EXPERT_MAJOR:
        shape = (len(mine), case.ranks * case.max_tokens)
        for local, rows in enumerate(per_expert):
            copies += [Copy((local, i), *row) for i, row in enumerate(rows)]
    else:
        for source in range(case.ranks):
            tokens = [t for t in range(case.tokens[source]) if here(source, t)]
            for index, token in enumerate(tokens):
                flat = sum(rows_per_rank[:source]) + index
                rank_major = case.layout is DispatchLayout.RANK_MAJOR
                slot = (source, index) if rank_major else (flat,)
                copies.append(Copy(slot, source, token, -1))
        shape = (sum(rows_per_rank),)
        if case.layout is DispatchLayout.RANK_MAJOR:
            shape = (case.ranks, case.max_tokens)
    return Expected(shape, copies, counts, offsets, rows_per_rank)


@dataclass(frozen=True)
class Received:
    """What a dispatch must return on a rank, as tensors.

    Attributes:
        filled: `[*shape]` bool: slots that hold a row.
        sources: `[rows]` rank that each row came from, in the order of the filled slots.
        token_of_row: `[rows]` its token there.
        ids: `[*shape, K]` local expert of each choice, -1 elsewhere; deduplicated layouts.
        weights: `[*shape, K]`, 0 where the id is -1; deduplicated layouts with weights.
    """

    filled: Tensor
    sources: Tensor
    token_of_row: Tensor
    ids: Tensor | None
    weights: Tensor | None

    def source_tokens(self) -> Tensor:
        """`[*shape]` int32 index of each slot's token at its source rank, -1 where no row is."""
        tokens = torch.full(self.filled.shape, -1, dtype=torch.int32)
        tokens[self.filled] = self.token_of_row.to(torch.int32)
        return tokens

    def gather(self, per_rank: list[Tensor]) -> Tensor:
        """`[rows, ...]`: what belongs to each row's token, of every rank's values by token."""
        starts = torch.tensor([0, *(len(values) for values in per_rank)]).cumsum(0)[:-1]
        return torch.cat(per_rank)[starts[self.sources] + self.token_of_row]


@kept
def received_of(case: Case, rank: int) -> Received:
    """`expected_of` in the form of the output's tensors."""
    expected = expected_of(case, rank)
    filled = torch.zeros(expected.shape, dtype=torch.bool)
    copies = sorted(expected.copies, key=lambda copy: copy.slot)
    for copy in copies:
        filled[copy.slot] = True
    ids = weights = None
    if not case.layout.expanded:
        local = {expert: index for index, expert in enumerate(case.local_experts(rank))}
        ids = torch.full((*expected.shape, case.topk), -1, dtype=torch.int64)
        if case.weighted:
            weights = torch.zeros((*expected.shape, case.topk), dtype=case.weight_dtype)
        for copy in copies:
            source = kept_inputs(case, copy.source)
            for choice, expert in enumerate(source.ids_TK[copy.token].tolist()):
                if expert in local:
                    ids[(*copy.slot, choice)] = local[expert]
                    if weights is not None and source.weights_TK is not None:
                        weights[(*copy.slot, choice)] = source.weights_TK[copy.token, choice]
    return Received(
        filled=filled,
        sources=torch.tensor([copy.source for copy in copies], dtype=torch.int64),
        token_of_row=torch.tensor([copy.token for copy in copies], dtype=torch.int64),
        ids=ids,
        weights=weights,
    )


# -- what comes of the rows: sums, weights, ranges, gradients -------------------------------------


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
    topk_weights: int | None = None,
    missing: int | None = None,
) -> Tensor:
    """Result of combine on `rank`: the contract's sequence of roundings, term by term.

    `own_weights`: rows are multiplied by `slot_weights` instead of the routing weights.
    `topk_weights`: by the `weights_of_combine` of this number.
    `missing`: a rank that was lost after the dispatch; its rows do not come back.
    """
    weighting = (own_weights, topk_weights)
    if case.precision == "exact":
        return _combined_exactly(case, rank, round_, weighting, missing)
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    result = torch.zeros((case.tokens[rank], case.hidden), dtype=wide)
    if case.domains is None:
        for dest in range(case.ranks):
            if dest != missing:
                _add_partials(result, case, rank, dest, round_, weighting)
        return result.to(case.dtype)
    lowest = {host: case.domains.index(host) for host in case.domains}
    for host in sorted(lowest, key=lambda host: lowest[host]):
        of_host = torch.zeros_like(result)
        for dest in range(case.ranks):
            if dest != missing and case.domains[dest] == host:
                _add_partials(of_host, case, rank, dest, round_, weighting)
        result = result + of_host.to(case.dtype).to(wide)
    return result.to(case.dtype)


def _add_partials(
    sums: Tensor,
    case: Case,
    rank: int,
    dest: int,
    round_: int,
    weighting: tuple[bool, int | None],
) -> None:
    """Adds what `dest` sums up of each token of `rank`, rounded to the wire type, in place."""
    partial: dict[int, Tensor] = {}
    copies = [c for c in expected_of(case, dest).copies if c.source == rank]
    for copy in sorted(copies, key=lambda c: (c.token, c.choice)):
        start = partial.get(copy.token, torch.zeros(case.hidden, dtype=sums.dtype))
        partial[copy.token] = start + _term(case, dest, copy, round_, weighting)
    for token, value in partial.items():
        sums[token] = sums[token] + value.to(case.dtype).to(sums.dtype)


def _combined_exactly(
    case: Case, rank: int, round_: int, weighting: tuple[bool, int | None], missing: int | None
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
        result[token] = result[token] + _term(case, dest, copy, round_, weighting)
    return result.to(case.dtype)


def _term(
    case: Case, dest: int, copy: Copy, round_: int, weighting: tuple[bool, int | None]
) -> Tensor:
    """A row that `dest` returns, multiplied by its weight if there is one."""
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    term = _expert_rows(case, dest, round_)[copy.slot].to(wide)
    own_weights, topk_weights = weighting
    if own_weights:
        return term * slot_weights(case, dest)[copy.slot].to(wide)
    weights_TK = kept_inputs(case, copy.source).weights_TK
    if topk_weights is not None:
        weights_TK = weights_of_combine(case, copy.source, topk_weights)
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
def weights_of_combine(case: Case, rank: int, number: int) -> Tensor:
    """Made-up `topk_weights` of a combine; NaN, never to be read, where a choice has no expert."""
    ids_TK = kept_inputs(case, rank).ids_TK
    gen = torch.Generator().manual_seed(case.seed * 1000 + 400 + rank + 31 * number)
    weights_TK = torch.randn(ids_TK.shape, generator=gen, dtype=torch.float64)
    weights_TK = torch.where(ids_TK >= 0, weights_TK, float("nan"))
    return weights_TK.to(case.weight_dtype)


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


@kept
def token_grads(case: Case, rank: int) -> Tensor:
    """Made-up gradients of what combine returned to a rank."""
    gen = torch.Generator().manual_seed(case.seed * 1000 + 300 + rank)
    grads = torch.randn((case.tokens[rank], case.hidden), generator=gen, dtype=torch.float64)
    return grads.to(case.dtype)


def input_grads(case: Case, rank: int) -> Tensor:
    """Gradients of a dispatch's input where `expert_rows` are those of what it delivered."""
    return combined_of(dataclasses.replace(case, weighted=False), rank)


@kept
def row_grads(case: Case, rank: int) -> Tensor:
    """Gradients of `expert_rows` that follow from `token_grads` on all ranks."""
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    expected = expected_of(case, rank)
    grads = torch.zeros((*expected.shape, case.hidden), dtype=case.dtype)
    for copy in expected.copies:
        grad = token_grads(case, copy.source)[copy.token]
        weights_TK = kept_inputs(case, copy.source).weights_TK
        if case.layout.expanded and weights_TK is not None:
            weight = weights_TK[copy.token, copy.choice]
            grad = (grad.to(wide) * weight.to(wide)).to(case.dtype)
        grads[copy.slot] = grad
    return grads


@kept
def weight_grads(case: Case, rank: int) -> Tensor:
    """`[T, K]` gradients of the routing weights; expanded layouts."""
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    grads_TK = torch.zeros((case.tokens[rank], case.topk), dtype=wide)
    for dest in range(case.ranks):
        for copy in expected_of(case, dest).copies:
            if copy.source == rank:
                grad = token_grads(case, rank)[copy.token].to(wide)
                row = _expert_rows(case, dest, 0)[copy.slot].to(wide)
                grads_TK[copy.token, copy.choice] = _in_256_parts(grad * row)
    return grads_TK


def _in_256_parts(terms: Tensor) -> Tensor:
    """The sum of a row in the order of the contract."""
    parts = [torch.zeros((), dtype=terms.dtype) for _ in range(256)]
    for index, term in enumerate(terms):
        parts[index % 256] = parts[index % 256] + term

    def total(first: int, count: int) -> Tensor:
        if count == 1:
            return parts[first]
        half = count // 2
        return total(first, half) + total(first + half, half)

    return total(0, 256)
