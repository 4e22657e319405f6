"""What mode "ht" alone can do, on one GPU, bit for bit against the oracle: see test_modes.py."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch

from expertlink import ConfigurationError, DispatchLayout, MoECommunicator
from support import decode, jobs, payloads
from support.cases import (
    LAYOUTS,
    ROWS_IN_POOL,
    blocks_of_scales,
    long_spans,
    routings,
    special,
    usual,
)
from support.hosted import Fleet, HostedCommunicator, fleet_of, run_cases, run_hosted
from support.oracle import inputs_of

pytestmark = pytest.mark.gpu(1)
DEDUPLICATED = pytest.mark.parametrize(
    "layout",
    [layout for layout in DispatchLayout if not layout.expanded],
    ids=lambda layout: layout.value,
)


@LAYOUTS
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_any_number_of_blocks(blocks: int, layout: DispatchLayout) -> None:
    """Spans that a block counts in several passes, and blocks without any token."""
    shape = long_spans(layout)
    cases = [shape.case((700, 0, 65, 1), seed=1), shape.case((3, 260, 0, 129), masked=0.5, seed=2)]
    fleet = fleet_of("ht", cases[0], num_sms_dispatch=blocks, num_sms_combine=blocks)
    run_hosted(fleet, jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_static_shapes(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    run_hosted(fleet_of("ht", cases[0], static_shapes=True), jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_buffers(ranks: int, static: bool, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    fleet = fleet_of("ht", cases[0], static_shapes=static)
    run_hosted(fleet, decode.buffers_of_every_call, cases)
    run_cases(fleet, decode.buffers, cases[:3])
    run_cases(fleet, decode.stale_handles, cases[:1])


@LAYOUTS
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_statistics(ranks: int, static: bool, layout: DispatchLayout) -> None:
    for case in routings(usual(ranks, layout))[:3]:
        run_cases(fleet_of("ht", case, static_shapes=static), decode.statistics, [case])


@LAYOUTS
def test_statistics_of_packed_rows(layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(seed=1)
    fleet = fleet_of("ht", case, quantization="e4m3_pow2")
    run_cases(fleet, decode.statistics_of_packed_rows, [case])


@LAYOUTS
@pytest.mark.parametrize("order", ["row_major", "column_major"])
def test_buffers_of_packed_rows(order: str, layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(masked=0.2, weighted=False)
    fleet = fleet_of("ht", case, quantization="e4m3_pow2", scale_order=order)
    run_cases(fleet, payloads.buffers_of_packed_rows, [case])


@LAYOUTS
@pytest.mark.parametrize("static", [False, True])
def test_counts_of_a_cached_dispatch(static: bool, layout: DispatchLayout) -> None:
    """Its own copies: those of the dispatch before may have been written to."""
    case = usual(3, layout).case(seed=1)

    def job(comm: MoECommunicator) -> None:
        x_TH = inputs_of(case, comm.rank).x_TH.to(comm.device)
        first, handle = jobs.dispatch_case(comm, case)
        again, _ = comm.dispatch(x_TH, None, previous_handle=handle)
        for name in ("num_tokens_per_expert", "num_tokens_per_rank", "expert_offsets"):
            mine, others = getattr(again, name), getattr(first, name)
            if mine is None:
                assert others is None
                continue
            before = others.tolist()
            others.fill_(-5)
            assert mine.tolist() == before
            last, _ = comm.dispatch(x_TH, None, previous_handle=handle)
            assert getattr(last, name).tolist() == before

    run_hosted(fleet_of("ht", case, static_shapes=static), job)


@DEDUPLICATED
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_zero_copy(ranks: int, static: bool, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    fleet = fleet_of("ht", cases[0], zero_copy=True, static_shapes=static)
    run_hosted(fleet, jobs.contracts, cases)


@DEDUPLICATED
@pytest.mark.parametrize("name", ROWS_IN_POOL)
def test_zero_copy_at_the_edges(name: str, layout: DispatchLayout) -> None:
    shape = special(name, layout)
    cases = [shape.case(seed=1), shape.case(masked=0.4, seed=2)]
    run_hosted(fleet_of("ht", cases[0], zero_copy=True), jobs.contracts, cases)


@DEDUPLICATED
def test_zero_copy_views(layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    fleet = fleet_of("ht", cases[0], zero_copy=True)
    run_hosted(fleet, jobs.views_survive, cases)
    run_hosted(fleet, jobs.combine_views, cases[0])


# -- communicators that share an arena ------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("fields", [{}, {"static_shapes": True}], ids=["", "static"])
def test_communicators_that_share_memory(fields: dict[str, Any], layout: DispatchLayout) -> None:
    """Layers with different numbers of experts take turns, or have dispatches under way at once."""
    large = usual(3, layout)
    small = dataclasses.replace(large, experts=large.experts // 4)
    drawn = [routings(shape)[:4] for shape in (large, small)]
    host = fleet_of("ht", drawn[0][0], **fields)
    config = dataclasses.replace(host.config, num_experts=small.experts, num_sms_dispatch=2)
    guest = Fleet(config, 3, host=host)

    def job(first: MoECommunicator) -> None:
        assert isinstance(first, HostedCommunicator)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            second = HostedCommunicator(guest, first.rank, share_with=first)
            comms = [first, stack.enter_context(second)]
            for pair in zip(*drawn, strict=True):
                calls = list(zip(comms, pair, strict=True))
                for comm, case in calls:
                    jobs.check_contract(comm, case)
                sent = [jobs.dispatch_case(comm, case) for comm, case in calls]
                for (comm, case), (out, handle) in list(zip(calls, sent, strict=True))[::-1]:
                    static = jobs.counts_stay_on_device(comm)
                    jobs.check_output(case, comm.rank, out, static=static)
                    jobs.combine_case(comm, case, handle, "combine")

    run_hosted(host, job)


def test_memory_that_does_not_suit_is_not_shared() -> None:
    """Too small for more experts or longer rows, or that of the other mode; calls go on."""
    shape = usual(3, DispatchLayout.TOKEN_MAJOR)
    fleet = fleet_of("ht", shape.case(seed=1))
    config, plan_of = fleet.config, fleet.mode.plan
    experts = dataclasses.replace(config, num_experts=2 * shape.experts)
    hidden = dataclasses.replace(config, hidden_size=2 * shape.hidden)
    plans = [
        (plan_of(experts, 3), "the communicator with most experts comes first"),
        (plan_of(hidden, 3), "equal max_tokens_per_rank, hidden_size, dtype and topk"),
        (fleet_of("ll", shape.case(seed=1)).plan, "share_with: "),
    ]

    def job(comm: MoECommunicator) -> None:
        comm.initialize()
        engine: Any = comm._engine
        for plan, text in plans:
            with pytest.raises(ConfigurationError, match=text):
                engine.arena.check_fits(plan)
        jobs.contracts(comm, routings(shape)[:2])

    run_hosted(fleet, job)
