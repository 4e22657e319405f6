"""Calls of the nvlink engine that cannot happen: all ranks learn it, and the next call works."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from expertlink import (
    DispatchLayout,
    MoECommunicator,
    PeerTimeoutError,
    RoutingChangedError,
)
from expertlink.engines.nvlink import watchdog
from expertlink.launch import RankPool
from support import faults, jobs
from support.cases import SMS, aligned, usual
from support.faults import (
    CULPRIT,
    FAULTY_IDS,
    OTHERS,
    RANKS,
    check_overflow,
    dispatch_with,
    judge,
    rows_of,
    with_ids,
)
from support.hosted import DEVICE, Fleet, run_hosted
from support.jobs import config_of, dispatch_case, rows_for
from support.oracle import Case, inputs_of

pytestmark = pytest.mark.gpu(1)
LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
LIMITED = pytest.mark.parametrize("layout", [DispatchLayout.FLAT, DispatchLayout.TOKEN_MAJOR])


def fleet_of(case: Case, **fields: Any) -> Fleet:
    return Fleet(config_of(case, DEVICE, engine="nvlink", **{**SMS, **fields}), case.ranks)


def usual_case(layout: DispatchLayout, **fields: Any) -> Case:
    return usual(RANKS, layout).case((9, 4, 7), seed=1, **fields)


# -- refusals -------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("check", [False, True])
def test_a_wrong_form_on_one_rank(check: bool, layout: DispatchLayout) -> None:
    case = usual_case(layout)
    call = dispatch_with(case, input=lambda x_TH: x_TH[:, :3])
    errors = run_hosted(fleet_of(case, check_inputs=check), faults.fails_once, case, call)
    judge(errors, own="InputError", text="input has shape (4, 3)")


@LAYOUTS
@pytest.mark.parametrize(("first", "text"), FAULTY_IDS)
def test_faulty_ids_on_one_rank(first: list[int], text: str, layout: DispatchLayout) -> None:
    case = usual_case(layout)
    call = dispatch_with(case, topk_ids=with_ids(first))
    errors = run_hosted(fleet_of(case, check_inputs=True), faults.fails_once, case, call)
    judge(errors, own="InputError", text=text)


@LAYOUTS
@pytest.mark.parametrize("first", [[96], [-2], [2**40 + 1], [5, 5]])
def test_unchecked_ids_stay_memory_safe(first: list[int], layout: DispatchLayout) -> None:
    """An id that is out of range counts as no expert; a double one is the caller's affair."""
    case = usual_case(layout)
    call = dispatch_with(case, topk_ids=with_ids(first))
    assert run_hosted(fleet_of(case), faults.fails_once, case, call) == [None] * RANKS


@LAYOUTS
def test_weights_on_some_ranks_only(layout: DispatchLayout) -> None:
    case = usual_case(layout)
    call = dispatch_with(case, weights=lambda _: None)
    errors = run_hosted(fleet_of(case), faults.fails_once, case, call)
    for error in errors:
        assert type(error).__name__ == "InputError", errors
        assert "either weights or none" in str(error)


@LAYOUTS
def test_one_rank_changes_its_routing(layout: DispatchLayout) -> None:
    case = usual_case(layout)

    def call(comm: MoECommunicator) -> object:
        own = inputs_of(case, comm.rank)
        _, handle = dispatch_case(comm, case)
        if comm.rank == CULPRIT:
            own.ids_TK[0] = -1
        x_TH, ids_TK = own.x_TH.to(DEVICE), own.ids_TK.to(DEVICE)
        return comm.dispatch(x_TH, ids_TK, previous_handle=handle)

    errors = run_hosted(fleet_of(case, check_inputs=True), faults.fails_once, case, call)
    judge(errors, own="RoutingChangedError", text="topk_ids[0]=[-1, -1")


def test_all_ranks_change_their_routing() -> None:
    case = usual_case(DispatchLayout.FLAT)

    def call(comm: MoECommunicator) -> object:
        own = inputs_of(case, comm.rank)
        _, handle = dispatch_case(comm, case)
        return comm.dispatch(
            own.x_TH.to(DEVICE), own.ids_TK.flip(0).to(DEVICE), previous_handle=handle
        )

    errors = run_hosted(fleet_of(case), faults.fails_once, case, call)
    assert all(isinstance(error, RoutingChangedError) for error in errors), errors


@LAYOUTS
def test_one_rank_refuses_its_combine(layout: DispatchLayout) -> None:
    case = usual_case(layout)

    def call(comm: MoECommunicator) -> object:
        _, handle = dispatch_case(comm, case)
        rows = rows_for(case, comm.rank, handle)
        return comm.combine(rows.float() if comm.rank == CULPRIT else rows, handle)

    errors = run_hosted(fleet_of(case, check_inputs=True), faults.fails_once, case, call)
    judge(errors, own="InputError", text="expert_output has dtype torch.float32")


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
    fleet = fleet_of(fits, max_recv_tokens_per_rank=room, zero_copy=zero_copy)
    errors = run_hosted(fleet, faults.fails_once, fits, lambda comm: dispatch_case(comm, large))
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
        fleet_of(case),
        faults.fails_once,
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

    errors = run_hosted(fleet_of(case, check_inputs=True), faults.fails_once, case, call)
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
    fleet = fleet_of(fits, static_shapes=True, **limit)
    errors = run_hosted(fleet, faults.fails_once, fits, call)
    check_overflow(errors, first, needed[first], room)


@pytest.mark.parametrize("layout", [DispatchLayout.FLAT, DispatchLayout.TOKEN_MAJOR])
def test_a_buffer_larger_than_anything_that_can_arrive(layout: DispatchLayout) -> None:
    case = usual_case(layout)
    buffer_rows = RANKS * case.max_tokens * case.topk + 5

    def job(comm: MoECommunicator) -> None:
        guard = torch.full((1 << 16,), 7, dtype=torch.int64, device=DEVICE)
        buffer = torch.zeros((buffer_rows, case.hidden), dtype=case.dtype, device=DEVICE)
        out, _ = dispatch_case(comm, case, output_buffer=buffer)
        torch.cuda.synchronize(DEVICE)
        jobs.check_output(case, comm.rank, out, static=True)
        assert (guard == 7).all()

    run_hosted(fleet_of(case, static_shapes=True), job)


def test_odd_addresses() -> None:
    """In a process of its own: a fault would end the CUDA context."""
    with RankPool(num_ranks=1, device="cuda") as pool:
        for layout in DispatchLayout:
            pool.run(jobs.ht_odd_addresses, usual(1, layout).case((9,), seed=1), timeout_s=60)


# -- ranks that do not come -----------------------------------------------------------------------


def check_lost(lost: faults.Lost, phase: str, timeout_s: float) -> None:
    error = lost.error
    assert isinstance(error, PeerTimeoutError), error
    assert error.missing == (CULPRIT,), error
    assert error.phase == phase
    # How long the GPU waited, by its own clock.
    assert timeout_s <= error.waited_s < timeout_s + 2.0
    assert re.search(rf"in {phase} .*epoch \d+ expected, \d+ seen; missing: rank 1", str(error))
    assert lost.later == ("ClosedError", "ClosedError")
    assert lost.gpu_works


VARIANTS = [
    *(("plain", layout) for layout in DispatchLayout),
    ("zero_copy", DispatchLayout.TOKEN_MAJOR),
    ("static_shapes", DispatchLayout.FLAT),
    ("static_shapes", DispatchLayout.RANK_MAJOR),
    ("one block", DispatchLayout.FLAT),
]


@pytest.mark.parametrize("phase", ["dispatch", "cached dispatch", "combine"])
@pytest.mark.parametrize(("variant", "layout"), VARIANTS)
def test_a_missing_rank_is_named(
    monkeypatch: pytest.MonkeyPatch, variant: str, layout: DispatchLayout, phase: str
) -> None:
    # The missing rank waits for its own GPU, which was never given the call.
    monkeypatch.setattr(watchdog, "_MARGIN_S", 0.5)
    case = usual(RANKS, layout).case((24, 24, 24), seed=1)
    fields: dict[str, Any] = {"timeout_s": 0.5}
    if variant == "one block":
        fields.update(num_sms_dispatch=1, num_sms_combine=1)
    elif variant != "plain":
        fields[variant] = True
    number = 1 if phase == "combine" else 2  # of the call that it misses
    fleet = fleet_of(case, **fields)
    fleet.skip = lambda launch: (CULPRIT,) if launch == number else ()
    results = run_hosted(fleet, faults.lose_a_rank, case, phase, CULPRIT)
    for rank in OTHERS:
        check_lost(results[rank], phase, 0.5)
    # New communicators find nothing of the failure.
    fleet.skip = lambda _: ()
    run_hosted(fleet, jobs.contracts, [case])


@pytest.mark.gpu(4)
@pytest.mark.parametrize("layout", [DispatchLayout.FLAT, DispatchLayout.TOKEN_MAJOR])
@pytest.mark.parametrize("phase", ["dispatch", "cached dispatch", "combine"])
def test_a_killed_rank_is_named(phase: str, layout: DispatchLayout) -> None:
    with RankPool(num_ranks=4, device="cuda") as pool:
        results = pool.run(
            faults.killed, CULPRIT, phase, layout, timeout_s=90, return_exceptions=True
        )
    for rank in (0, 2, 3):
        lost = results[rank]
        assert isinstance(lost, faults.Lost), lost
        check_lost(lost, phase, 3.0)
