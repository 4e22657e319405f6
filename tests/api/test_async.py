"""Asynchronous calls, several communicators, long mixed runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertlink import DispatchLayout
from expertlink.engines.base import CombineCall
from expertlink.engines.collective.exchange import Splits
from expertlink.engines.collective.route import Route
from expertlink.layouts import LayoutPlan
from expertlink.overlap import tensors_in
from support import jobs
from support.oracle import Case

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)


@LAYOUTS
def test_operations_in_flight(rank_pools, layout: DispatchLayout) -> None:
    case = Case((6, 0, 5), 20, experts=5, topk=2, layout=layout, masked=0.2)
    pool = rank_pools(3)
    assert all(pool.run(jobs.overlapping, case, timeout_s=60))
    assert all(pool.run(jobs.finished_later, case, timeout_s=60))


@LAYOUTS
def test_gradients_through_requests(rank_pools, layout: DispatchLayout) -> None:
    case = Case((6, 2), 8, experts=5, topk=2, layout=layout, dtype=torch.float64)
    assert all(rank_pools(2).run(jobs.gradients_through_requests, case, timeout_s=60))


def test_two_communicators_on_one_group(rank_pools) -> None:
    pair = [
        Case((6, 3), 8, experts=5, topk=2, layout=DispatchLayout.FLAT, seed=1),
        Case((2, 9), 20, experts=4, topk=3, layout=DispatchLayout.RANK_MAJOR, seed=2),
    ]
    assert all(rank_pools(2).run(jobs.two_communicators, pair, timeout_s=60))


@LAYOUTS
def test_many_calls_of_changing_shape(rank_pools, layout: DispatchLayout) -> None:
    base = Case((9, 9), 12, experts=6, topk=3, layout=layout)
    shapes = [(9, 9), (0, 4), (7, 0), (1, 1), (0, 0), (9, 2)]
    cases = [
        dataclasses.replace(base, tokens=shape, seed=i, masked=0.2 * (i % 3), skew=float(i % 2))
        for i, shape in enumerate(shapes)
    ]
    # Padded layouts take their size from the communicator's maximum: the largest case comes first.
    fixed = [case for case in cases if case.max_tokens == base.max_tokens or not layout.padded]
    assert all(rank_pools(2).run(jobs.many_calls, fixed, 60, timeout_s=120))


def test_side_streams_see_every_tensor() -> None:
    """Memory is recorded per tensor: the search must reach into records inside of records."""

    class Marked(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    def marked() -> torch.Tensor:
        return torch.zeros(1).as_subclass(Marked)

    plan = LayoutPlan(DispatchLayout.FLAT, (1,), marked(), None, marked())
    route = Route(
        call=1,
        maker=1,
        num_tokens=1,
        splits=Splits([1], [1]),
        rows_per_rank=marked(),
        token_of_row=marked(),
        rows_of_token=marked(),
        row_of_choice=marked(),
        tokens_per_expert=[1],
        tokens_per_source=[[1]],
        choices=Splits([1], [1]),
        plan=plan,
    )
    call = CombineCall(rows=marked(), state=route, weighted=True, out_TH=marked())
    assert len(list(tensors_in(call))) == 8
