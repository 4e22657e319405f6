"""The nvlink engine on one GPU: up to 72 ranks in one process, bit for bit against the oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from expertlink import BlockFormat, DispatchLayout
from support import jobs, oracle, payloads
from support.cases import (
    RANKS,
    ROWS_IN_POOL,
    SMS,
    SPECIAL,
    aligned,
    long_spans,
    routings,
    special,
    usual,
)
from support.hosted import DEVICE, Fleet, run_hosted
from support.jobs import check_contract, config_of
from support.oracle import Case

pytestmark = pytest.mark.gpu(1)
LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
DEDUPLICATED = pytest.mark.parametrize(
    "layout",
    [layout for layout in DispatchLayout if not layout.expanded],
    ids=lambda layout: layout.value,
)


def fleet_of(case: Case, **fields: Any) -> Fleet:
    """Hosted ranks for the configuration of a case."""
    return Fleet(config_of(case, DEVICE, engine="nvlink", **{**SMS, **fields}), case.ranks)


@LAYOUTS
@pytest.mark.parametrize("ranks", RANKS)
def test_bits_equal_the_oracle(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    # Hundreds of ranks' worth of Python take their time; the first cases differ most.
    cases = cases if ranks <= 8 else cases[:4]
    run_hosted(fleet_of(cases[0]), jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize("name", SPECIAL)
def test_edges_of_what_the_kernels_take(name: str, layout: DispatchLayout) -> None:
    shape = special(name, layout)
    cases = [shape.case(seed=1), shape.case(masked=0.4, weighted=False, seed=2)]
    run_hosted(fleet_of(cases[0]), jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize(
    ("ranks", "placement", "bare"),
    [(3, "scattered", False), (3, "bare", True), (72, "scattered", True)],
)
def test_any_placement(ranks: int, placement: str, bare: bool, layout: DispatchLayout) -> None:
    """Uneven blocks, and ranks without any expert."""
    tokens = tuple(min(count, 7) for count in usual(ranks, layout).case().tokens)
    case = usual(ranks, layout).case(tokens, placement=placement, seed=8)
    assert bare == any(not case.local_experts(rank) for rank in range(ranks))
    cases = [case, dataclasses.replace(case, masked=0.4)]
    fleet = fleet_of(case)
    run_hosted(fleet, jobs.contracts, cases)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("ranks", [3, 8])
def test_alignment(ranks: int, static: bool) -> None:
    cases = routings(aligned(ranks))
    fleet = fleet_of(cases[0], static_shapes=static)
    run_hosted(fleet, jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_any_number_of_blocks(blocks: int, layout: DispatchLayout) -> None:
    """Spans that a block counts in several passes, and blocks without any token."""
    shape = long_spans(layout)
    cases = [shape.case((700, 0, 65, 1), seed=1), shape.case((3, 260, 0, 129), masked=0.5, seed=2)]
    fleet = fleet_of(cases[0], num_sms_dispatch=blocks, num_sms_combine=blocks)
    run_hosted(fleet, jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize("static", [False, True])
def test_checked_inputs(static: bool, layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))[:2]
    fleet = fleet_of(cases[0], check_inputs=True, static_shapes=static)
    run_hosted(fleet, jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_static_shapes(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    run_hosted(fleet_of(cases[0], static_shapes=True), jobs.contracts, cases)


@LAYOUTS
def test_static_shapes_with_a_limit(layout: DispatchLayout) -> None:
    if layout.padded:
        pytest.skip("padded layouts have no limit")
    case = usual(3, layout).case((9, 4, 0), seed=1)
    limit = max(oracle.expected_of(case, rank).shape[0] for rank in range(3))
    fleet = fleet_of(case, static_shapes=True, max_recv_tokens_per_rank=limit)
    run_hosted(fleet, jobs.contracts, [case])


@DEDUPLICATED
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_zero_copy(ranks: int, static: bool, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    fleet = fleet_of(cases[0], zero_copy=True, static_shapes=static)
    run_hosted(fleet, jobs.contracts, cases)


@DEDUPLICATED
@pytest.mark.parametrize("name", ROWS_IN_POOL)
def test_zero_copy_at_the_edges(name: str, layout: DispatchLayout) -> None:
    shape = special(name, layout)
    cases = [shape.case(seed=1), shape.case(masked=0.4, seed=2)]
    run_hosted(fleet_of(cases[0], zero_copy=True), jobs.contracts, cases)


@DEDUPLICATED
def test_zero_copy_views(layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    fleet = fleet_of(cases[0], zero_copy=True)
    run_hosted(fleet, jobs.views_survive, cases)
    run_hosted(fleet, jobs.combine_views, cases[0])


@LAYOUTS
def test_padding_is_zero_where_gradients_may_be_tracked(layout: DispatchLayout) -> None:
    case = usual(3, layout).case(seed=1)
    run_hosted(fleet_of(case), check_contract, case)
    if layout.padded:
        run_hosted(fleet_of(case), jobs.zero_padding, case)


@LAYOUTS
@pytest.mark.parametrize("kind", [BlockFormat.E4M3_FLOAT32, BlockFormat.E4M3_UE8M0, "opaque"])
def test_rows_that_the_caller_quantized(kind: str, layout: DispatchLayout) -> None:
    shape = usual(3, layout)
    for case in (shape.case(seed=1), shape.case(masked=0.5, weighted=False, seed=2)):
        run_hosted(fleet_of(case), payloads.packed_rows, case, kind)
        if not layout.expanded:
            run_hosted(fleet_of(case, zero_copy=True), payloads.packed_rows, case, kind)


def test_gaps_of_quantized_rows_are_zero() -> None:
    case = aligned(3).case(seed=1)
    run_hosted(fleet_of(case), payloads.packed_rows, case, "opaque")
