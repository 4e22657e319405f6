"""Ranks that receive no rows take part in backward, whatever their experts return."""

from __future__ import annotations

import pytest
import torch

from expertlink import DispatchLayout
from support import training
from support.oracle import Case
from support.training import Setup

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)


def case_of(layout: DispatchLayout) -> Case:
    return Case((5, 4), 6, experts=6, topk=2, layout=layout, dtype=torch.float64)


def check(rank_pools, *setups: Setup) -> None:
    for worst in rank_pools(2).run(training.largest_gaps, setups, timeout_s=60):
        assert max(worst) < 1e-12, dict(zip(setups, worst, strict=True))


@LAYOUTS
@pytest.mark.parametrize("routes", [("first",), ("drawn", "first"), ("first", "drawn", "first")])
def test_experts_that_skip_empty_inputs(rank_pools, layout, routes) -> None:
    check(rank_pools, Setup(case_of(layout), routes))


@LAYOUTS
@pytest.mark.parametrize("form", ["request", "later"])
def test_with_asynchronous_calls(rank_pools, layout, form) -> None:
    check(rank_pools, Setup(case_of(layout), ("first", "first"), form=form))


@LAYOUTS
@pytest.mark.parametrize("leaves", [("rows",), ("weights",), ("experts",), ("experts", "weights")])
def test_whatever_requires_grad(rank_pools, layout, leaves) -> None:
    """Also where only experts do: a rank without rows cannot see that others have gradients."""
    check(rank_pools, Setup(case_of(layout), ("first", "drawn", "first"), leaves))


@LAYOUTS
@pytest.mark.parametrize("recompute", ["layers", "experts"])
def test_with_activation_checkpointing(rank_pools, layout, recompute) -> None:
    check(
        rank_pools,
        Setup(case_of(layout), ("first", "first"), recompute=recompute),
        Setup(case_of(layout), ("first", "drawn"), ("rows", "experts"), recompute),
        Setup(case_of(layout), ("first",), ("experts",), recompute),
    )
