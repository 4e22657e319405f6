"""Situations for the nvlink engine, grouped by what its kernels are specialised on.

Compiling takes seconds, so many cases share a `Shape`; `precompile.py` compiles all shapes ahead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from expertlink import BlockFormat, DispatchLayout
from support.oracle import Case

RANKS = (1, 2, 3, 8, 33, 72)
MANY_RANKS = 8  # above it blocks have few warps, so that all ranks fit on a GPU
SMS = {"num_sms_dispatch": 3, "num_sms_combine": 3}  # of a hosted rank: 72 fit on one GPU
COUNTS = (5, 0, 7, 1, 16, 3, 40, 9)  # T by rank; the largest is as large as it may be
LL: dict[str, Any] = {"engine": "nvlink", "mode": "ll", "static_shapes": True}
"""Configuration of communicators in mode "ll", for every layout."""

MODES = pytest.mark.parametrize("mode", ["ht", "ll"])
LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
EXPANDED = pytest.mark.parametrize(
    "layout",
    [layout for layout in DispatchLayout if layout.expanded],
    ids=lambda layout: layout.value,
)
FORMATS = pytest.mark.parametrize("fmt", list(BlockFormat), ids=lambda fmt: fmt.value)
ORDERS = pytest.mark.parametrize("order", ["row_major", "column_major"])


def fields_of(mode: str) -> dict[str, Any]:
    """Configuration of communicators in a mode of the nvlink engine."""
    return LL if mode == "ll" else {"engine": "nvlink"}


@dataclass(frozen=True)
class Shape:
    """What a communicator fixes for its kernels."""

    ranks: int
    layout: DispatchLayout
    hidden: int = 272
    experts: int = 96
    topk: int = 8
    max_tokens: int = 40
    dtype: torch.dtype = torch.bfloat16
    alignment: int = 1
    precision: str = "wire"

    def case(self, tokens: tuple[int, ...] | None = None, **fields: Any) -> Case:
        """A case of this shape; without `tokens` every rank has another number of them."""
        if tokens is None:
            tokens = tuple(min(COUNTS[(r + 6) % 8], self.max_tokens) for r in range(self.ranks))
        return Case(
            tokens,
            self.hidden,
            self.experts,
            self.topk,
            self.layout,
            dtype=self.dtype,
            alignment=self.alignment,
            precision=self.precision,
            limit=self.max_tokens,
            **fields,
        )


def usual(ranks: int, layout: DispatchLayout) -> Shape:
    """The shape of most tests."""
    return Shape(ranks, layout)


def routings(shape: Shape) -> list[Case]:
    """Cases of one placement that differ in everything that a call may change."""
    full = (shape.max_tokens,) * shape.ranks
    none = (0,) * shape.ranks
    few = tuple(min(count, 5) for count in shape.case().tokens)
    return [
        shape.case(seed=1),
        shape.case(few, masked=0.3, skew=1.5, ids_dtype=torch.int32, weighted=False, seed=2),
        shape.case(few, only_rank=shape.ranks - 1, seed=3),
        shape.case(none, seed=4),
        shape.case(few, skew=30.0, seed=5),
        shape.case(full if shape.ranks <= 3 else few, masked=0.6, seed=6),
        shape.case(few, masked=1.0, seed=7),
    ]


SPECIAL = {
    "narrow": {"ranks": 3, "hidden": 8, "experts": 9, "topk": 3, "dtype": torch.float16},
    "wide": {"ranks": 3, "hidden": 16384, "experts": 12, "topk": 2, "max_tokens": 24},
    "model": {"ranks": 4, "hidden": 7168, "experts": 32, "topk": 8, "max_tokens": 24},
    "all_lanes": {"ranks": 8, "hidden": 16, "experts": 75, "topk": 32},
    "many_experts": {"ranks": 8, "hidden": 16, "experts": 2048, "topk": 8},
    "one_choice": {"ranks": 3, "hidden": 64, "experts": 8, "topk": 1},
}
"""Fields of shapes at the edges of what the kernels take."""


def special(name: str, layout: DispatchLayout) -> Shape:
    """A shape of `SPECIAL`."""
    fields: dict[str, Any] = SPECIAL[name]
    return Shape(layout=layout, **fields)


def aligned(ranks: int) -> Shape:
    """Groups of experts padded with zero rows."""
    return Shape(ranks, DispatchLayout.FLAT, alignment=16)


FEW = (5, 0, 7)
"""T by rank where communicators of unequal room share routings."""


def narrow(shape: Shape, *, max_tokens: int) -> Shape:
    """Short rows for the routings of another shape."""
    return dataclasses.replace(
        shape, hidden=16, dtype=torch.float16, max_tokens=max_tokens, precision="wire"
    )


def half(layout: DispatchLayout) -> Shape:
    """float16 rows."""
    return dataclasses.replace(usual(3, layout), dtype=torch.float16)


def half_shapes() -> list[Shape]:
    """Shapes that processes also run with float16 rows."""
    return [usual(2, DispatchLayout.FLAT), usual(2, DispatchLayout.RANK_MAJOR)]


# -- shapes of mode ht ----------------------------------------------------------------------------


def long_spans(layout: DispatchLayout) -> Shape:
    """More tokens than a block counts in one pass."""
    return Shape(4, layout, hidden=64, experts=16, topk=4, max_tokens=700)


ROWS_IN_POOL = ("narrow", "wide", "all_lanes", "many_experts", "one_choice")
"""Special shapes that are also tested with zero copy: how lanes share out rows depends on K."""


def large_rows(layout: DispatchLayout) -> Shape:
    """One rank whose rows take far more memory than all else of a call."""
    return Shape(1, layout, hidden=4096, experts=4, topk=2, max_tokens=512)


# -- shapes of mode ll ----------------------------------------------------------------------------

FEW_MASK_WORDS = 30
"""So that blocks of `usual` shapes look at 15 experts at a time."""

EXPANDED_LAYOUTS = tuple(layout for layout in DispatchLayout if layout.expanded)


def many_tokens(layout: DispatchLayout) -> Shape:
    """More tokens than threads, and more experts than a block has masks for at a time."""
    return Shape(3, layout, hidden=16, experts=1000, topk=4, max_tokens=1024)


def many_bytes(layout: DispatchLayout) -> Shape:
    """Calls long enough for whatever the engine does about long ones."""
    return Shape(4, layout, hidden=7168, experts=32, topk=8, max_tokens=96)


def blocks_of_scales(layout: DispatchLayout) -> Shape:
    """Rows of several quantized steps, the last block and the last step incomplete."""
    return Shape(3, layout, hidden=1104, experts=12, topk=3)


def quantized_shapes() -> list[Shape]:
    """Shapes whose rows are quantized on the way."""
    shapes = [aligned(3)]
    for layout in DispatchLayout:
        shapes += [blocks_of_scales(layout), half(layout), special("model", layout)]
        shapes.append(many_bytes(layout))
        shapes += [usual(ranks, layout) for ranks in (3, 4)]
    shapes += [exact(blocks_of_scales(layout)) for layout in EXPANDED_LAYOUTS]
    return shapes


def exact(shape: Shape) -> Shape:
    """The same with `combine_precision="exact"`."""
    return dataclasses.replace(shape, precision="exact")


EXACT_EDGES = ("narrow", "model", "all_lanes", "one_choice")


def exact_shapes() -> list[Shape]:
    """Shapes whose combines are exact."""
    plain = [usual(ranks, layout) for ranks in (1, 3, 8) for layout in EXPANDED_LAYOUTS]
    edges = [special(name, layout) for name in EXACT_EDGES for layout in EXPANDED_LAYOUTS]
    others = [many_bytes(layout) for layout in EXPANDED_LAYOUTS]
    others += [usual(4, layout) for layout in EXPANDED_LAYOUTS]
    return [exact(shape) for shape in (*plain, *edges, *others, aligned(3))]


# -- what is compiled -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """What is compiled for a test.

    Attributes:
        shape: what a communicator fixes.
        hosted: for several ranks in one process.
        zero_copy: as configured.
        mode: "ht" or "ll".
        quantized: they quantize rows on the way, to any format.
        mask_words: words of masks that a block may hold, where a test changes that.
        static_shapes: as configured; mode "ll" has it always.
        check_inputs: as configured; of no matter in mode "ll".
        mask_lost_peers: as configured.
        source_tokens: as configured; of no matter in mode "ll".
    """

    shape: Shape
    hosted: bool
    zero_copy: bool = False
    mode: str = "ht"
    quantized: bool = False
    mask_words: int | None = None
    static_shapes: bool = False
    check_inputs: bool = False
    mask_lost_peers: bool = False
    source_tokens: bool = False


def _views(shapes: list[Shape], *, hosted: bool) -> list[Kernels]:
    """Zero copy keeps its arena in another order."""
    return [Kernels(s, hosted, zero_copy=True) for s in shapes if not s.layout.expanded]


def ht_kernels() -> list[Kernels]:
    """Of every test with hosted ranks in mode "ht"."""
    common = [usual(ranks, layout) for ranks in (*RANKS, 4) for layout in DispatchLayout]
    edges = [special(name, layout) for name in SPECIAL for layout in DispatchLayout]
    others = [aligned(3), aligned(8), *(long_spans(layout) for layout in DispatchLayout)]
    for layout in EXPANDED_LAYOUTS:
        others += [half(layout), large_rows(layout)]
    views = [usual(ranks, layout) for ranks in (1, 3, 4, 8) for layout in DispatchLayout]
    views += [special(name, layout) for name in ROWS_IN_POOL for layout in DispatchLayout]
    plain = [Kernels(shape, hosted=True) for shape in (*common, *edges, *others)]
    plain += _views(views, hosted=True)
    few = [usual(ranks, layout) for ranks in (1, 3, 8) for layout in DispatchLayout]
    short = [
        narrow(usual(3, layout), max_tokens=most)
        for layout in DispatchLayout
        for most in ((40,) if layout.padded else (40, max(FEW)))
    ]
    plain += [Kernels(shape, hosted=True) for shape in short]
    few += short
    fixed = [Kernels(shape, True) for shape in (*few, aligned(3), aligned(8))]
    fixed += _views(few, hosted=True)
    static = [dataclasses.replace(kernels, static_shapes=True) for kernels in fixed]
    checked = [
        Kernels(usual(3, layout), True, static_shapes=static, check_inputs=True)
        for layout in DispatchLayout
        for static in (False, True)
    ]
    asked = [
        Kernels(usual(3, layout), True, static_shapes=static, source_tokens=True)
        for layout in DispatchLayout
        for static in (False, True)
    ]
    asked += [Kernels(aligned(3), True, source_tokens=True)]
    asked += [dataclasses.replace(kernels, zero_copy=True) for kernels in asked[:-1:2]]
    asked = [one for one in asked if not (one.zero_copy and one.shape.layout.expanded)]
    return [*plain, *static, *checked, *asked]


def ht_process_kernels() -> list[Kernels]:
    """Of every test with a process per rank in mode "ht"."""
    common = [usual(ranks, layout) for ranks in (1, 2, 4, 8) for layout in DispatchLayout]
    others = [dataclasses.replace(shape, dtype=torch.float16) for shape in half_shapes()]
    others += [long_spans(layout) for layout in DispatchLayout]
    # Of payloads.opaque_rows.
    packed: dict[str, Any] = {"hidden": 96, "experts": 4, "topk": 2, "max_tokens": 5}
    others += [Shape(2, layout, **packed) for layout in DispatchLayout]
    plain = [Kernels(s, hosted=False) for s in (*common, *others)]
    static = [Kernels(s, hosted=False, static_shapes=True) for s in common]
    return [*plain, *static, *_views(common, hosted=False)]


def ll_kernels() -> list[Kernels]:
    """Of every test with hosted ranks in mode "ll"."""
    shapes = [usual(ranks, layout) for ranks in (*RANKS, 4) for layout in DispatchLayout]
    shapes += [special(name, layout) for name in SPECIAL for layout in DispatchLayout]
    shapes += [aligned(3), aligned(8), *exact_shapes()]
    for layout in DispatchLayout:
        shapes += [many_tokens(layout), half(layout)]
    chunks = [
        Kernels(usual(3, layout), True, mode="ll", mask_words=FEW_MASK_WORDS)
        for layout in DispatchLayout
    ]
    shapes += [narrow(usual(3, layout), max_tokens=40) for layout in DispatchLayout]
    plain = [Kernels(shape, True, mode="ll") for shape in shapes]
    quantized = [Kernels(shape, True, mode="ll", quantized=True) for shape in quantized_shapes()]
    maskable = [usual(3, layout) for layout in DispatchLayout]
    maskable += [exact(usual(3, layout)) for layout in EXPANDED_LAYOUTS]
    masks = [Kernels(shape, True, mode="ll", mask_lost_peers=True) for shape in maskable]
    return [*plain, *quantized, *chunks, *masks]


def ll_process_kernels() -> list[Kernels]:
    """Of every test with a process per rank in mode "ll"."""
    shapes = [usual(ranks, layout) for ranks in (1, 2, 4, 8) for layout in DispatchLayout]
    shapes += [exact(usual(ranks, layout)) for ranks in (1, 2, 4) for layout in EXPANDED_LAYOUTS]
    plain = [Kernels(shape, False, mode="ll") for shape in shapes]
    packed = [usual(ranks, layout) for ranks in (2, 4) for layout in DispatchLayout]
    quantized = [Kernels(shape, False, mode="ll", quantized=True) for shape in packed]
    maskable = [*packed, *(exact(shape) for shape in packed if shape.layout.expanded)]
    masks = [Kernels(shape, False, mode="ll", mask_lost_peers=True) for shape in maskable]
    return [*plain, *quantized, *masks]
