"""Calls that go wrong in mode "ht" alone: all ranks learn it, and the next call works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertlink import (
    DispatchLayout,
    MoECommunicator,
    RoutingChangedError,
)
from expertlink.launch import RankPool
from support import faults, jobs
from support.cases import aligned, usual
from support.hosted import DEVICE, fleet_of, run_hosted
from support.jobs import dispatch_case
from support.oracle import inputs_of
from support.wrong_arguments import (
    CULPRIT,
    RANKS,
    check_overflow,
    fails_once,
    judge,
    rows_of,
    usual_case,
)

pytestmark = pytest.mark.gpu(1)
LIMITED = pytest.mark.parametrize("layout", [DispatchLayout.FLAT, DispatchLayout.TOKEN_MAJOR])


# -- refusals -------------------------------------------------------------------------------------


def test_all_ranks_change_their_routing() -> None:
    case = usual_case(DispatchLayout.FLAT)

    def call(comm: MoECommunicator) -> object:
        own = inputs_of(case, comm.rank)
        _, handle = dispatch_case(comm, case)
        return comm.dispatch(
            own.x_TH.to(DEVICE), own.ids_TK.flip(0).to(DEVICE), previous_handle=handle
        )

    errors = run_hosted(fleet_of("ht", case), fails_once, case, call)
    assert all(isinstance(error, RoutingChangedError) for error in errors), errors


# -- capacity -------------------------------------------------------------------------------------


@LIMITED
@pytest.mark.parametrize("zero_copy", [False, True])
def test_more_rows_than_the_limit(zero_copy: bool, layout: DispatchLayout) -> None:
    if zero_copy and layout.expanded:
        pytest.skip("expanded layouts copy rows")
    fits, large = usual_case(layout), usual(RANKS, layout).case((40, 2, 40), seed=2)
    room = max(rows_of(fits))
    needed = rows_of(large)
    first = next(rank for rank, rows in enumerate(needed) if rows > room)
    fleet = fleet_of("ht", fits, max_recv_tokens_per_rank=room, zero_copy=zero_copy)
    errors = run_hosted(fleet, fails_once, fits, lambda comm: dispatch_case(comm, large))
    check_overflow(errors, first, needed[first], room)


@pytest.mark.parametrize("shape", [usual(3, layout) for layout in DispatchLayout] + [aligned(3)])
def test_a_small_buffer(shape: Any) -> None:
    if shape.layout.padded:
        pytest.skip("buffers of padded layouts have one shape")
    case = shape.case((9, 4, 7), seed=1)
    buffers = [
        torch.full((1 if rank == CULPRIT else 2000, case.hidden), 7.0, device=DEVICE)
        for rank in range(RANKS)
    ]
    buffers = [buffer.to(case.dtype) for buffer in buffers]
    errors = run_hosted(
        fleet_of("ht", case),
        fails_once,
        case,
        lambda comm: dispatch_case(comm, case, output_buffer=buffers[comm.rank]),
    )
    check_overflow(errors, CULPRIT, rows_of(case)[CULPRIT], 1)
    assert all((buffer == 7.0).all() for buffer in buffers), "nothing may be overwritten"


@LIMITED
def test_a_small_buffer_of_a_cached_dispatch(layout: DispatchLayout) -> None:
    case = usual_case(layout)

    def call(comm: MoECommunicator) -> object:
        _, handle = dispatch_case(comm, case)
        count = 1 if comm.rank == CULPRIT else 2000
        buffer = torch.empty((count, case.hidden), dtype=case.dtype, device=DEVICE)
        x_TH = inputs_of(case, comm.rank).x_TH.to(DEVICE)
        return comm.dispatch(x_TH, None, previous_handle=handle, output_buffer=buffer)

    errors = run_hosted(fleet_of("ht", case, check_inputs=True), fails_once, case, call)
    judge(errors, own="InputError", text="output_buffer has 1 rows")


@LIMITED
@pytest.mark.parametrize("with_buffer", [False, True])
def test_static_shapes_report_what_found_no_room(with_buffer: bool, layout: DispatchLayout) -> None:
    """Rows are dropped, nothing else is touched, and every rank is told afterwards."""
    fits, large = usual_case(layout), usual(RANKS, layout).case((40, 2, 40), seed=2)
    room = max(rows_of(fits)) + 3
    needed = rows_of(large)
    first = next(rank for rank, rows in enumerate(needed) if rows > room)

    def call(comm: MoECommunicator) -> None:
        guarded = torch.full((room + 64, large.hidden), 7.0, dtype=large.dtype, device=DEVICE)
        options: dict[str, Any] = {"output_buffer": guarded[:room]} if with_buffer else {}
        _, handle = dispatch_case(comm, large, **options)
        rows = torch.zeros(handle.rows_shape, dtype=large.dtype, device=DEVICE)
        torch.cuda.synchronize(DEVICE)
        comm.combine(rows, handle)  # which every rank makes, whatever it knows
        torch.cuda.synchronize(DEVICE)
        error = faults.error_of(comm.check_health)
        comm.check_health()
        assert (guarded[room:] == 7.0).all()
        assert error is not None
        raise error

    limit = {} if with_buffer else {"max_recv_tokens_per_rank": room}
    fleet = fleet_of("ht", fits, static_shapes=True, **limit)
    errors = run_hosted(fleet, fails_once, fits, call)
    check_overflow(errors, first, needed[first], room)


def test_odd_addresses() -> None:
    """In a process of its own: a fault would end the CUDA context."""
    with RankPool(num_ranks=1, device="cuda") as pool:
        for layout in DispatchLayout:
            pool.run(jobs.ht_odd_addresses, usual(1, layout).case((9,), seed=1), timeout_s=60)
