"""Shapes and hosted ranks of the tests of low-latency faults."""

from __future__ import annotations

from typing import Any

import pytest

from expertlink import DispatchLayout
from support.fault_jobs import RANKS
from support.hosted import DEVICE, Fleet
from support.nvlink_cases import LATENCY, SMS, exact, usual
from support.oracle import Case
from support.rank_jobs import config_of

FLAT, EXPERT_MAJOR = DispatchLayout.FLAT, DispatchLayout.EXPERT_MAJOR
MASKABLE = [pytest.param(usual(RANKS, layout), id=layout.value) for layout in DispatchLayout]
SHAPES = [
    *MASKABLE,
    pytest.param(exact(usual(RANKS, FLAT)), id="flat-exact"),
    pytest.param(exact(usual(RANKS, EXPERT_MAJOR)), id="expert_major-exact"),
]


def fleet_of(case: Case, **fields: Any) -> Fleet:
    return Fleet(config_of(case, DEVICE, **{**LATENCY, **SMS, **fields}), case.ranks)


def usual_case(layout: DispatchLayout, **fields: Any) -> Case:
    return usual(RANKS, layout).case((9, 4, 7), seed=1, **fields)
