"""What both modes of the nvlink engine promise, on one GPU: up to 72 ranks in one process.

Results are compared bit for bit with the oracle. What one mode alone can do is in ht/ and ll/.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from expertlink import BlockFormat, DispatchLayout
from support import decode, jobs, payloads
from support.cases import (
    EXPANDED,
    LAYOUTS,
    MANY_RANKS,
    MODES,
    RANKS,
    SPECIAL,
    aligned,
    exact,
    routings,
    special,
    usual,
)
from support.hosted import fleet_of, run_cases, run_hosted
from support.jobs import check_contract
from support.oracle import expected_of

pytestmark = pytest.mark.gpu(1)
FORMS = pytest.mark.parametrize(
    ("mode", "fields"),
    [
        pytest.param("ht", {}, id="ht"),
        pytest.param("ht", {"static_shapes": True}, id="ht-static"),
        pytest.param("ll", {}, id="ll"),  # always static
    ],
)


@MODES
@LAYOUTS
@pytest.mark.parametrize("ranks", RANKS)
def test_bits_equal_the_oracle(mode: str, ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    # Hundreds of ranks' worth of Python take their time; the first cases differ most.
    cases = cases if ranks <= MANY_RANKS else cases[:4]
    run_hosted(fleet_of(mode, cases[0]), jobs.contracts, cases)


@MODES
@LAYOUTS
@pytest.mark.parametrize("name", SPECIAL)
def test_edges_of_what_the_kernels_take(mode: str, name: str, layout: DispatchLayout) -> None:
    shape = special(name, layout)
    cases = [shape.case(seed=1), shape.case(masked=0.4, weighted=False, seed=2)]
    run_hosted(fleet_of(mode, cases[0]), jobs.contracts, cases)


@FORMS
@EXPANDED
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_weights_of_the_tokens_ranks(
    mode: str, fields: dict[str, Any], ranks: int, layout: DispatchLayout
) -> None:
    shapes = [usual(ranks, layout)]
    if mode == "ll":
        shapes.append(exact(shapes[0]))
    for shape in shapes:
        cases = routings(shape)
        run_cases(fleet_of(mode, cases[0], **fields), decode.topk_weights, cases)


@MODES
@LAYOUTS
@pytest.mark.parametrize(
    ("ranks", "placement", "bare"),
    [(3, "scattered", False), (3, "bare", True), (72, "scattered", True)],
)
def test_any_placement(
    mode: str, ranks: int, placement: str, bare: bool, layout: DispatchLayout
) -> None:
    """Uneven blocks, and ranks without any expert."""
    tokens = tuple(min(count, 7) for count in usual(ranks, layout).case().tokens)
    case = usual(ranks, layout).case(tokens, placement=placement, seed=8)
    assert bare == any(not case.local_experts(rank) for rank in range(ranks))
    cases = [case, dataclasses.replace(case, masked=0.4)]
    fleet = fleet_of(mode, case)
    run_hosted(fleet, jobs.contracts, cases)
    if mode == "ll" and placement == "bare":
        run_hosted(fleet, decode.many_turns, cases)


@FORMS
@pytest.mark.parametrize("ranks", [3, 8])
def test_alignment(mode: str, fields: dict[str, Any], ranks: int) -> None:
    cases = routings(aligned(ranks))
    run_hosted(fleet_of(mode, cases[0], **fields), jobs.contracts, cases)


@FORMS
@LAYOUTS
def test_checked_inputs(mode: str, fields: dict[str, Any], layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    fleet = fleet_of(mode, cases[0], check_inputs=True, **fields)
    if mode == "ht":
        run_hosted(fleet, jobs.contracts, cases[:2])
    else:
        run_hosted(fleet, jobs.contracts, cases)
        run_cases(fleet, jobs.odd_addresses, cases[:1])


@MODES
@pytest.mark.parametrize(
    "layout", [layout for layout in DispatchLayout if not layout.padded], ids=lambda one: one.value
)
def test_a_limit(mode: str, layout: DispatchLayout) -> None:
    """Shapes as large as `max_recv_tokens_per_rank`, which padded layouts do not have."""
    case = usual(3, layout).case((9, 4, 0), seed=1)
    limit = max(expected_of(case, rank).shape[0] for rank in range(3))
    fleet = fleet_of(mode, case, static_shapes=True, max_recv_tokens_per_rank=limit)
    run_hosted(fleet, jobs.contracts, [case])


@MODES
@LAYOUTS
def test_padding_is_zero_where_gradients_may_be_tracked(mode: str, layout: DispatchLayout) -> None:
    case = usual(3, layout).case(seed=1)
    run_hosted(fleet_of(mode, case), check_contract, case)
    if layout.padded:
        run_hosted(fleet_of(mode, case), jobs.zero_padding, case)


@MODES
@LAYOUTS
@pytest.mark.parametrize("kind", [BlockFormat.E4M3_FLOAT32, BlockFormat.E4M3_UE8M0, "opaque"])
def test_rows_that_the_caller_quantized(mode: str, kind: str, layout: DispatchLayout) -> None:
    shape = usual(3, layout)
    for case in (shape.case(seed=1), shape.case(masked=0.5, weighted=False, seed=2)):
        run_hosted(fleet_of(mode, case), payloads.packed_rows, case, kind)
        if mode == "ht" and not layout.expanded:
            fleet = fleet_of(mode, case, zero_copy=True)
            run_hosted(fleet, payloads.packed_rows, case, kind)


@MODES
def test_gaps_of_quantized_rows_are_zero(mode: str) -> None:
    case = aligned(3).case(seed=1)
    run_hosted(fleet_of(mode, case), payloads.packed_rows, case, "opaque")
