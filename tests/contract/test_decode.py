"""Decode features on CPU ranks: the `collective` engine is the reference of all others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import cases
from torch import Tensor

from expertlink import BlockFormat, DispatchLayout
from expertlink.engines.nvlink.ht.mode import with_slot_weights
from expertlink.engines.nvlink.tables import Route, TableLayout
from support import decode, payloads
from support.depth import deep
from support.jobs import config_of
from support.oracle import Case, expected_of, ranges_of, slot_weights

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
EXPANDED = pytest.mark.parametrize(
    "layout",
    [layout for layout in DispatchLayout if layout.expanded],
    ids=lambda layout: layout.value,
)


def run(rank_pools, job: decode.Job, drawn: list[Case], *args: Any, **fields: Any) -> None:
    ranks = drawn[0].ranks
    done = rank_pools(ranks).run(decode.on_a_rank, job, drawn, *args, timeout_s=120, **fields)
    assert done == [len(drawn)] * ranks


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 3])
def test_weights_of_the_combine(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    @settings(max_examples=deep(6))
    @given(st.lists(cases(ranks, layout), min_size=1, max_size=4))
    def check(drawn: list[Case]) -> None:
        run(rank_pools, decode.own_weights, drawn)

    check()


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_weights_of_the_tokens_ranks(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    run(rank_pools, decode.topk_weights, shapes(ranks, layout))

    @settings(max_examples=deep(6))
    @given(st.lists(cases(ranks, layout), min_size=1, max_size=4))
    def check(drawn: list[Case]) -> None:
        run(rank_pools, decode.topk_weights, drawn)

    check()


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_halves(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    drawn = shapes(ranks, layout)
    run(rank_pools, decode.halves, drawn)
    run(rank_pools, decode.in_turns, drawn)


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_buffers(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    drawn = shapes(ranks, layout)
    run(rank_pools, decode.buffers, drawn)
    run(rank_pools, decode.stale_handles, drawn[:1])


@LAYOUTS
def test_buffers_of_packed_rows(rank_pools, layout: DispatchLayout) -> None:
    case = Case((5, 0, 4), 300, experts=5, topk=2, layout=layout, masked=0.2, weighted=False)
    for order in ("row_major", "column_major"):
        run(
            rank_pools,
            payloads.buffers_of_packed_rows,
            [case],
            quantization="e4m3_pow2",
            scale_order=order,
        )


@LAYOUTS
@pytest.mark.parametrize("block_format", list(BlockFormat), ids=lambda fmt: fmt.value)
def test_order_of_scales(rank_pools, block_format: BlockFormat, layout: DispatchLayout) -> None:
    alignment = 4 if layout is DispatchLayout.FLAT else 1
    drawn = [
        Case((5, 0, 4), 1100, experts=5, topk=2, layout=layout, alignment=alignment, masked=0.2),
        Case((0, 0, 0), 1100, experts=5, topk=2, layout=layout),
    ]
    for order in ("row_major", "column_major"):
        run(
            rank_pools,
            payloads.scales_in_order,
            drawn,
            quantization=block_format,
            scale_order=order,
        )


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 4])
def test_ranges(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    @settings(max_examples=deep(6))
    @given(st.lists(cases(ranks, layout), min_size=1, max_size=4))
    def check(drawn: list[Case]) -> None:
        run(rank_pools, decode.ranges, drawn)

    check()


@LAYOUTS
def test_statistics(rank_pools, layout: DispatchLayout) -> None:
    drawn = shapes(3, layout)
    drawn += [dataclasses.replace(case, domains=(0, 1, 0)) for case in drawn]
    run(rank_pools, decode.statistics, drawn)


@EXPANDED
def test_weights_on_one_rank_only(rank_pools, layout: DispatchLayout) -> None:
    case = Case((3, 2), 8, experts=4, topk=2, layout=layout, precision="exact")
    run(rank_pools, decode.weights_on_one_rank, [case])


@EXPANDED
@pytest.mark.parametrize("precision", ["wire", "exact"])
def test_weights_of_one_tokens_rank_only(
    rank_pools, precision: str, layout: DispatchLayout
) -> None:
    case = Case((3, 2), 8, experts=4, topk=2, layout=layout, precision=precision)
    run(rank_pools, decode.topk_weights_on_one_rank, [case])


@EXPANDED
def test_tables_of_the_nvlink_engine(layout: DispatchLayout) -> None:
    """The same ranges and products from its tables. They are made here: kernels need a GPU."""
    case = Case((5, 3, 7), 8, experts=7, topk=3, layout=layout, masked=0.2, seed=3)
    for rank in range(case.ranks):
        tables, route = nvlink_route(case, rank)
        starts_ER, counts_ER = route.expert_ranges(layout, case.alignment)
        starts, counts = ranges_of(case, rank)
        assert counts_ER.tolist() == counts
        present = counts_ER > 0
        assert torch.equal(starts_ER[present], torch.tensor(starts, dtype=torch.int32)[present])
        given_S = slot_weights(case, rank).view(-1)
        weighted = with_slot_weights(route, given_S.view(route.shape))
        slots = tables["choices"].view(-1)
        expected = given_S[slots.clamp(min=0).long()]
        found = weighted.table("weights").view(-1)
        assert torch.equal(found[slots >= 0], expected[slots >= 0])
        assert weighted.weights_address() == weighted.table("weights").data_ptr()


def nvlink_route(case: Case, rank: int) -> tuple[dict[str, Tensor], Route]:
    """Tables as a dispatch of that engine leaves them, made from the oracle."""
    expected = expected_of(case, rank)
    stride = expected.shape[-1]
    num_local = len(case.local_experts(rank))
    layout = TableLayout(config_of(case, "cpu"), num_ranks=case.ranks, num_local=num_local)
    block = torch.full((layout.words(0),), -7, dtype=torch.int32)
    tables = {name: layout.view(block, name) for name in ("counts", "first_slot", "choices")}
    tables["choices"].fill_(-1)
    tables["counts"].copy_(torch.tensor(expected.counts))
    _, counts = ranges_of(case, rank)
    for expert, group in enumerate(counts):
        slot = expected.offsets[expert]
        if case.layout is DispatchLayout.EXPERT_MAJOR:
            slot = expert * stride
        for source, count in enumerate(group):
            tables["first_slot"][source, expert] = slot
            slot += count
    rows = sorted({(copy.source, copy.token) for copy in expected.copies})
    for copy in expected.copies:
        flat = copy.slot[0] if len(copy.slot) == 1 else copy.slot[0] * stride + copy.slot[1]
        tables["choices"][rows.index((copy.source, copy.token)), copy.choice] = flat
    route = Route(
        shape=expected.shape,
        num_tokens=0,
        ids_TK=torch.empty(0, case.topk, dtype=torch.int64),
        layout=layout,
        block=block,
        weights_block=None,
        weighted=False,
        counts=None,
        origin=0,
    )
    return tables, route


def shapes(ranks: int, layout: DispatchLayout) -> list[Case]:
    """An ordinary routing, a masked and scattered one, and nothing to send on any rank."""
    tokens = (5, 0, 7, 2)[:ranks]
    precision = "exact" if layout.expanded else "wire"
    scattered = Case(tokens, 20, 6, 3, layout, placement="scattered", precision=precision, seed=4)
    alignment = 4 if layout is DispatchLayout.FLAT else 1
    return [
        Case(tokens, 16, experts=6, topk=3, layout=layout, seed=1, alignment=alignment),
        dataclasses.replace(scattered, masked=0.4),
        Case((0,) * ranks, 8, experts=4, topk=2, layout=layout),
    ]
