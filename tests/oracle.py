"""What the contract says, in the plainest loops: the judge of every engine and layout.

Written against the contract's text, not against the library: nothing here imports its routing,
layout or reduction code.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink import DispatchLayout


@dataclass(frozen=True)
class Case:
    """One drawn situation; every rank can rebuild all ranks' inputs from it."""

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

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def max_tokens(self) -> int:
        return max(*self.tokens, 1) + 1

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def rank_of_expert(self) -> list[int]:
        """Placement: "even" blocks, or "scattered" anywhere, ranks without experts included."""
        if self.placement == "scattered":
            rng = random.Random(self.seed)
            return [rng.randrange(self.ranks) for _ in range(self.experts)]
        base, extra = divmod(self.experts, self.ranks)
        return [r for r in range(self.ranks) for _ in range(base + (r < extra))]

    def local_experts(self, rank: int) -> list[int]:
        return [e for e, owner in enumerate(self.rank_of_expert()) if owner == rank]

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))


@dataclass(frozen=True)
class Inputs:
    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor | None


def inputs_of(case: Case, rank: int) -> Inputs:
    gen = torch.Generator().manual_seed(case.seed * 1000 + rank)
    count = case.tokens[rank]
    x_TH = torch.randn((count, case.hidden), generator=gen, dtype=torch.float64).to(case.dtype)
    popularity = -case.skew * torch.arange(1, case.experts + 1, dtype=torch.float64).log()
    noise = torch.rand((count, case.experts), generator=gen, dtype=torch.float64)
    gumbel = -(-noise.clamp(1e-12).log()).log()
    ids_TK = (popularity + gumbel).topk(case.topk, dim=1).indices
    hidden = torch.rand((count, case.topk), generator=gen) < case.masked
    ids_TK = torch.where(hidden, -1, ids_TK).to(case.ids_dtype)
    weights_TK = None
    if case.weighted:
        weights_TK = torch.randn((count, case.topk), generator=gen, dtype=torch.float64)
        weights_TK = weights_TK.to(case.weight_dtype)
    return Inputs(x_TH, ids_TK, weights_TK)


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


def expected_of(case: Case, rank: int) -> Expected:
    """Where every row lands on `rank`, straight from the table of layouts."""
    owner = case.rank_of_expert()
    mine = case.local_experts(rank)
    ids = [inputs_of(case, source).ids_TK.tolist() for source in range(case.ranks)]

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


def expert_rows(case: Case, rank: int, *, round_: int = 0) -> Tensor:
    """Made-up expert outputs of a rank; slots that no row fills hold NaN, never to be read."""
    expected = expected_of(case, rank)
    gen = torch.Generator().manual_seed(case.seed * 1000 + 500 + rank + 17 * round_)
    rows = torch.full((*expected.shape, case.hidden), float("nan"), dtype=case.dtype)
    for copy in expected.copies:
        row = torch.randn(case.hidden, generator=gen, dtype=torch.float64)
        rows[copy.slot] = row.to(case.dtype)
    return rows


def combined_of(case: Case, rank: int, *, round_: int = 0) -> Tensor:
    """Result of combine on `rank`: the contract's sequence of roundings, term by term."""
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    own = inputs_of(case, rank)
    result = torch.zeros((case.tokens[rank], case.hidden), dtype=wide)
    for dest in range(case.ranks):
        rows = expert_rows(case, dest, round_=round_)
        partial: dict[int, Tensor] = {}
        copies = [c for c in expected_of(case, dest).copies if c.source == rank]
        for copy in sorted(copies, key=lambda c: (c.token, c.choice)):
            term = rows[copy.slot].to(wide)
            if case.layout.expanded and own.weights_TK is not None:
                term = term * own.weights_TK[copy.token, copy.choice].to(wide)
            start = partial.get(copy.token, torch.zeros(case.hidden, dtype=wide))
            partial[copy.token] = start + term
        for token, value in partial.items():
            result[token] = result[token] + value.to(case.dtype).to(wide)
    return result.to(case.dtype)
