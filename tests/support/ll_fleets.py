"""Hosted ranks in low-latency mode, and the parameters that their tests have in common."""

from __future__ import annotations

from typing import Any

import pytest

from expertlink import BlockFormat, DispatchLayout
from support import ll_jobs
from support.hosted import DEVICE, Fleet, run_hosted
from support.nvlink_cases import LATENCY, SMS
from support.oracle import Case
from support.rank_jobs import config_of

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
EXPANDED = pytest.mark.parametrize(
    "layout",
    [layout for layout in DispatchLayout if layout.expanded],
    ids=lambda layout: layout.value,
)
FORMATS = pytest.mark.parametrize("fmt", list(BlockFormat), ids=lambda fmt: fmt.value)
ORDERS = pytest.mark.parametrize("order", ["row_major", "column_major"])
MANY_RANKS = 8  # above it blocks have few warps, so that all ranks fit on a GPU


def fleet_of(case: Case, *, warps: int | None = None, **fields: Any) -> Fleet:
    """Hosted ranks for the configuration of a case."""
    config = config_of(case, DEVICE, **{**LATENCY, **SMS, **fields})
    if warps is None:
        warps = 16 if case.ranks <= MANY_RANKS else 4
    fleet = Fleet(config, case.ranks, latency_warps=warps)
    assert fleet.latency
    return fleet


def run(fleet: Fleet, job: Any, cases: list[Case], *args: Any) -> None:
    run_hosted(fleet, ll_jobs.without_gradients, job, cases, *args)
