"""Source tokens of the nvlink engine, on one GPU."""

from __future__ import annotations

from typing import Any

import pytest

from expertlink import DispatchLayout
from support import decode, jobs, source_tokens
from support.cases import LAYOUTS, Shape, aligned, routings, special, usual
from support.hosted import fleet_of, run_cases, run_hosted

pytestmark = pytest.mark.gpu(1)


def check(mode: str, shape: Shape, **fields: Any) -> None:
    """The contract, which asks every dispatch for them."""
    cases = routings(shape)[:5]
    fleet = fleet_of(mode, cases[0], source_tokens=True, **fields)
    run_hosted(fleet, jobs.contracts, cases)
    run_cases(fleet, source_tokens.buffers, cases[:2])


@LAYOUTS
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
def test_mode_ht(layout: DispatchLayout, static: bool) -> None:
    check("ht", usual(3, layout), static_shapes=static)


@pytest.mark.parametrize("layout", [DispatchLayout.TOKEN_MAJOR, DispatchLayout.RANK_MAJOR])
def test_rows_in_a_pool(layout: DispatchLayout) -> None:
    check("ht", usual(3, layout), zero_copy=True)


def test_alignment_gaps() -> None:
    check("ht", aligned(3))
    check("ll", aligned(3))


@LAYOUTS
def test_mode_ll(layout: DispatchLayout) -> None:
    shape = usual(3, layout)
    check("ll", shape)
    cases = routings(shape)[:3]
    fleet = fleet_of("ll", cases[0], source_tokens=True)
    run_cases(fleet, decode.halves, cases)
    run_cases(fleet_of("ll", cases[0]), source_tokens.afterwards, cases)


@pytest.mark.parametrize("mode", ["ht", "ll"])
def test_every_lane_has_a_choice(mode: str) -> None:
    """K = 32: no lane is left for the token."""
    shape = special("all_lanes", DispatchLayout.FLAT)
    check(mode, shape)
