"""Low-latency calls that cannot happen, and ranks that are lost: what every other rank learns."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import latency_jobs
import latency_process_jobs
import nvlink_jobs
import pytest
import torch
from fault_jobs import (
    CULPRIT,
    FAULTY_IDS,
    OTHERS,
    RANKS,
    dispatch_with,
    judge,
    rows_of,
    with_ids,
)
from hosted import DEVICE, Fleet, HostedCommunicator, run_hosted
from nvlink_cases import LATENCY, SMS, Shape, exact, routings, usual
from oracle import Case, expected_of, inputs_of
from rank_jobs import config_of, dispatch_case, rows_for

from expertlink import (
    CapacityError,
    ConfigurationError,
    DispatchLayout,
    ExpertlinkError,
    InputError,
    MoECommunicator,
    PeerError,
    PeerTimeoutError,
)
from expertlink.launch import RankPool

pytestmark = pytest.mark.gpu(1)
FLAT, TOKEN_MAJOR = DispatchLayout.FLAT, DispatchLayout.TOKEN_MAJOR
RANK_MAJOR, EXPERT_MAJOR = DispatchLayout.RANK_MAJOR, DispatchLayout.EXPERT_MAJOR
LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
MASKABLE = [pytest.param(usual(RANKS, layout), id=layout.value) for layout in DispatchLayout]
SHAPES = [
    *MASKABLE,
    pytest.param(exact(usual(RANKS, FLAT)), id="flat-exact"),
    pytest.param(exact(usual(RANKS, EXPERT_MAJOR)), id="expert_major-exact"),
]
TIMEOUT_S = 0.5


def fleet_of(case: Case, **fields: Any) -> Fleet:
    return Fleet(config_of(case, DEVICE, **{**LATENCY, **SMS, **fields}), case.ranks)


def usual_case(layout: DispatchLayout, **fields: Any) -> Case:
    return usual(RANKS, layout).case((9, 4, 7), seed=1, **fields)


# -- refusals -------------------------------------------------------------------------------------


@LAYOUTS
def test_a_wrong_form_on_one_rank(layout: DispatchLayout) -> None:
    """Ranks that agree beforehand name it, and the next call works."""
    case = usual_case(layout)
    call = dispatch_with(case, input=lambda x_TH: x_TH[:, :3])
    errors = run_hosted(fleet_of(case, check_inputs=True), nvlink_jobs.fails_once, case, call)
    judge(errors, own="InputError", text="input has shape (4, 3)")


@LAYOUTS
@pytest.mark.parametrize(("first", "text"), FAULTY_IDS)
def test_faulty_ids_on_one_rank(first: list[int], text: str, layout: DispatchLayout) -> None:
    case = usual_case(layout)
    call = dispatch_with(case, topk_ids=with_ids(first))
    errors = run_hosted(fleet_of(case, check_inputs=True), nvlink_jobs.fails_once, case, call)
    judge(errors, own="InputError", text=text)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [first for first, _ in FAULTY_IDS])
def test_unchecked_ids_stay_memory_safe(first: list[int], shape: Shape) -> None:
    """An id that is out of range counts as no expert; a double one is the caller's affair."""
    case = shape.case((9, 4, 7), seed=1)
    change = dispatch_with(case, topk_ids=with_ids(first))

    def call(comm: MoECommunicator) -> None:
        result: Any = change(comm)
        rows = torch.zeros(result[1].rows_shape, dtype=case.dtype, device=DEVICE)
        comm.combine(rows, result[1])

    assert run_hosted(fleet_of(case), nvlink_jobs.fails_once, case, call) == [None] * RANKS


@LAYOUTS
def test_weights_on_some_ranks_only(layout: DispatchLayout) -> None:
    case = usual_case(layout)
    call = dispatch_with(case, weights=lambda _: None)
    errors = run_hosted(fleet_of(case, check_inputs=True), nvlink_jobs.fails_once, case, call)
    for error in errors:
        assert isinstance(error, InputError), errors
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

    errors = run_hosted(fleet_of(case, check_inputs=True), nvlink_jobs.fails_once, case, call)
    judge(errors, own="RoutingChangedError", text="topk_ids[0]=[-1, -1")


@LAYOUTS
def test_one_rank_refuses_its_combine(layout: DispatchLayout) -> None:
    case = usual_case(layout)

    def call(comm: MoECommunicator) -> object:
        _, handle = dispatch_case(comm, case)
        rows = rows_for(case, comm.rank, handle)
        return comm.combine(rows.float() if comm.rank == CULPRIT else rows, handle)

    errors = run_hosted(fleet_of(case, check_inputs=True), nvlink_jobs.fails_once, case, call)
    judge(errors, own="InputError", text="expert_output has dtype torch.float32")


# -- disagreement that only the kernels see -------------------------------------------------------


def packed_of_width(case: Case) -> Callable[[MoECommunicator], object]:
    """A dispatch of bytes; those of one rank are fewer."""

    def call(comm: MoECommunicator) -> object:
        count, width = case.tokens[comm.rank], 32 if comm.rank == CULPRIT else 48
        rows = torch.zeros((count, width), dtype=torch.uint8, device=DEVICE)
        ids_TK = inputs_of(case, comm.rank).ids_TK.to(DEVICE)
        return comm.dispatch(rows, ids_TK, scales=rows[:, :4].contiguous())

    return call


DISAGREEMENTS: list[tuple[str, Callable[[Case], Callable[..., object]]]] = [
    ("refused", lambda case: dispatch_with(case, input=lambda x_TH: x_TH[:, :3])),
    ("weights", lambda case: dispatch_with(case, weights=lambda _: None)),
    ("width", packed_of_width),
]


@LAYOUTS
@pytest.mark.parametrize(("what", "make"), DISAGREEMENTS, ids=[name for name, _ in DISAGREEMENTS])
def test_disagreement_without_agreement(
    what: str, make: Callable[[Case], Callable[..., object]], layout: DispatchLayout
) -> None:
    """All ranks learn of it at their next call; from then on only `clear_mask` helps."""
    case = usual_case(layout)
    call = make(case)

    def job(comm: MoECommunicator) -> tuple[ExpertlinkError | None, ...]:
        with torch.no_grad():
            nvlink_jobs.contracts(comm, [case])
            own = nvlink_jobs.error_of(lambda: call(comm))
            torch.cuda.synchronize(DEVICE)
            later = [nvlink_jobs.error_of(comm.check_health) for _ in range(2)]
            later.append(nvlink_jobs.error_of(lambda: dispatch_case(comm, case)))
            comm.clear_mask()
            nvlink_jobs.contracts(comm, [case])
        return (own, *later)

    for rank, (own, *later) in enumerate(run_hosted(fleet_of(case), job)):
        refused = rank == CULPRIT and what == "refused"
        assert isinstance(own, InputError) if refused else own is None, own
        assert isinstance(later[0], PeerError), later
        assert "not in the same call" in str(later[0])
        assert [type(error).__name__ for error in later[1:]] == ["ClosedError"] * 2


# -- capacity -------------------------------------------------------------------------------------


def combine_anyway(comm: MoECommunicator, rows: torch.Tensor, handle: Any) -> CapacityError | None:
    """A combine, and what the call before it is found to have lacked meanwhile."""
    try:
        comm.combine(rows, handle)
    except CapacityError as error:
        comm.combine(rows, handle)
        return error
    return None


@pytest.mark.parametrize(
    "shape",
    [usual(RANKS, FLAT), usual(RANKS, TOKEN_MAJOR), exact(usual(RANKS, FLAT))],
    ids=["flat", "token_major", "flat-exact"],
)
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("room_for", ["limit", "buffer"])
def test_what_found_no_room_is_reported(room_for: str, at_once: bool, shape: Shape) -> None:
    """Rows are dropped, nothing else is touched, nobody waits, and the rank itself is told."""
    fits, large = shape.case((9, 4, 7), seed=1), shape.case((40, 2, 40), seed=2)
    room = max(rows_of(fits)) + 3
    needed = rows_of(large)

    def job(comm: MoECommunicator) -> ExpertlinkError | None:
        with torch.no_grad():
            guarded = torch.full((room + 64, large.hidden), 7.0, dtype=large.dtype, device=DEVICE)
            options: dict[str, Any] = {}
            if room_for == "buffer":
                options["output_buffer"] = guarded[:room]
            _, handle = dispatch_case(comm, large, **options)
            rows = torch.zeros(handle.rows_shape, dtype=large.dtype, device=DEVICE)
            error: ExpertlinkError | None = None
            if not at_once:
                torch.cuda.synchronize(DEVICE)
                error = nvlink_jobs.error_of(comm.check_health)
            error = combine_anyway(comm, rows, handle) or error
            torch.cuda.synchronize(DEVICE)
            error = nvlink_jobs.error_of(comm.check_health) or error
            assert (guarded[room:] == 7.0).all()
            nvlink_jobs.contracts(comm, [fits])
            return error

    limit = {"max_recv_tokens_per_rank": room} if room_for == "limit" else {}
    fleet = fleet_of(fits, timeout_s=2.0, **limit)
    for rank, error in enumerate(run_hosted(fleet, job)):
        if needed[rank] <= room:
            assert error is None, error
            continue
        assert isinstance(error, CapacityError), error
        assert (error.rank, error.rows, error.capacity) == (rank, needed[rank], room)


def test_no_room_at_all() -> None:
    """In a process of its own: a fault would end the CUDA context."""
    with RankPool(num_ranks=1, device="cuda") as pool:
        for layout in (FLAT, TOKEN_MAJOR):
            case = usual(1, layout).case((9,), seed=1)
            assert pool.run(latency_process_jobs.no_room_at_all, case, timeout_s=60) == [9]


@pytest.mark.parametrize("layout", [FLAT, TOKEN_MAJOR], ids=lambda layout: layout.value)
def test_a_buffer_larger_than_anything_that_can_arrive(layout: DispatchLayout) -> None:
    case = usual_case(layout)
    buffer_rows = RANKS * case.max_tokens * case.topk + 5

    def job(comm: MoECommunicator) -> None:
        guard = torch.full((1 << 16,), 7, dtype=torch.int64, device=DEVICE)
        buffer = torch.zeros((buffer_rows, case.hidden), dtype=case.dtype, device=DEVICE)
        out, _ = dispatch_case(comm, case, output_buffer=buffer)
        torch.cuda.synchronize(DEVICE)
        nvlink_jobs.check_output(case, comm.rank, out, static=True)
        assert (guard == 7).all()

    run_hosted(fleet_of(case), job)


# -- ranks that do not come -----------------------------------------------------------------------


def check_lost(lost: nvlink_jobs.Lost, phase: str) -> None:
    error = lost.error
    assert isinstance(error, PeerTimeoutError), error
    assert error.missing == (CULPRIT,), error
    assert error.phase == phase
    # How long the GPU waited, by its own clock.
    assert TIMEOUT_S <= error.waited_s < TIMEOUT_S + 2.0
    assert re.search(rf"in {phase} .*epoch \d+ expected, \d+ seen; missing: rank 1", str(error))
    assert lost.later == ("ClosedError", "ClosedError")
    assert lost.gpu_works


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phase", ["dispatch", "cached dispatch", "combine"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_missing_rank_is_named(blocks: int, phase: str, shape: Shape) -> None:
    case = shape.case((24, 24, 24), seed=1)
    sms = {"num_sms_dispatch": blocks, "num_sms_combine": blocks}
    number = 1 if phase == "combine" else 2  # of the call that it misses
    fleet = fleet_of(case, timeout_s=TIMEOUT_S, **sms)
    fleet.skip = lambda launch: (CULPRIT,) if launch == number else ()
    results = run_hosted(fleet, nvlink_jobs.lose_a_rank, case, phase, CULPRIT)
    for rank in OTHERS:
        # The kernels do not know that a dispatch is a cached one.
        check_lost(results[rank], phase)
    # New communicators find nothing of the failure.
    fleet.skip = lambda _: ()
    run_hosted(fleet, nvlink_jobs.contracts, [case])


def absences(fleet: Fleet) -> Callable[[MoECommunicator, Sequence[int]], None]:
    """What every rank calls to let some ranks, or none, miss all launches from then on."""
    absent: list[int] = []
    fleet.skip = lambda _: tuple(absent)

    def stay_away(comm: MoECommunicator, ranks: Sequence[int]) -> None:
        fleet.meeting.swap(comm.rank, "")
        absent[:] = ranks
        fleet.meeting.swap(comm.rank, "")

    return stay_away


@LAYOUTS
def test_a_missing_rank_is_named_beside_a_masked_one(layout: DispatchLayout) -> None:
    """A rank that was left out long ago is not the one that is missed."""
    case = usual(4, layout).case((9, 4, 7, 5), seed=1)
    fleet = fleet_of(case, timeout_s=TIMEOUT_S)
    stay_away = absences(fleet)

    def job(comm: MoECommunicator) -> ExpertlinkError | None:
        with torch.no_grad():
            latency_jobs.calls_with_all(comm, case)
            stay_away(comm, [2])
            if comm.rank != 2:
                comm.mask_peer(2)
            for _ in range(4):
                latency_jobs.calls_without(comm, case, 2, "without rank 2")
            stay_away(comm, [2, CULPRIT])
            dispatch_case(comm, case)
            torch.cuda.synchronize(DEVICE)
            return nvlink_jobs.error_of(comm.check_health)

    results = run_hosted(fleet, job)
    for rank in (0, 3):
        error = results[rank]
        assert isinstance(error, PeerTimeoutError), error
        assert error.missing == (CULPRIT,), error


def test_a_missing_rank_is_named_beside_rows_of_set_bits() -> None:
    """In a process of its own: a wait without an end would be one of the GPU."""
    with RankPool(num_ranks=1, device="cuda") as pool:
        found = pool.run(latency_process_jobs.missing_beside_ones, timeout_s=60)
    assert found == [[(CULPRIT,)] * 2]


# -- going on without a rank ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", MASKABLE)
@pytest.mark.parametrize("phase", ["dispatch", "combine", "halves"])
@pytest.mark.parametrize("gone", [CULPRIT, 2])
def test_lost_ranks_are_masked(gone: int, phase: str, shape: Shape) -> None:
    cases = [shape.case((9, 4, 7), seed=1), shape.case((5, 40, 0), masked=0.3, seed=2)]
    fleet = fleet_of(cases[0], timeout_s=TIMEOUT_S, mask_lost_peers=True)
    stay_away = absences(fleet)

    def job(comm: MoECommunicator) -> None:
        latency_jobs.survivors_go_on(
            comm,
            cases,
            gone,
            phase,
            lambda: stay_away(comm, [gone]),
            timeout_ns=int(TIMEOUT_S * 1e9),
        )
        # It comes back: as if no call had been made.
        stay_away(comm, [])
        comm.clear_mask()
        assert not comm.query_mask().any()
        nvlink_jobs.contracts(comm, cases)

    run_hosted(fleet, job)


@pytest.mark.parametrize("shape", MASKABLE)
def test_masks_on_request(shape: Shape) -> None:
    """Nobody waits for a rank that was named beforehand: a wait would fail the call."""
    cases = [shape.case((9, 4, 7), seed=1), shape.case((5, 40, 0), masked=0.3, seed=2)]
    fleet = fleet_of(cases[0], timeout_s=TIMEOUT_S)
    stay_away = absences(fleet)

    def job(comm: MoECommunicator) -> None:
        def leave() -> None:
            stay_away(comm, [CULPRIT])
            if comm.rank != CULPRIT:
                comm.mask_peer(CULPRIT)

        assert not comm.query_mask().any()
        latency_jobs.survivors_go_on(comm, cases, CULPRIT, "dispatch", leave, timeout_ns=0)
        stay_away(comm, [])
        comm.clear_mask()
        nvlink_jobs.contracts(comm, cases)

    run_hosted(fleet, job)


@LAYOUTS
def test_all_others_are_lost(layout: DispatchLayout) -> None:
    """The last rank goes on alone."""
    case = usual_case(layout)
    fleet = fleet_of(case, timeout_s=TIMEOUT_S, mask_lost_peers=True)
    stay_away = absences(fleet)
    alone = latency_jobs.lost(latency_jobs.lost(case, 1), 2)

    def job(comm: MoECommunicator) -> None:
        with torch.no_grad():
            latency_jobs.calls_with_all(comm, case)
            stay_away(comm, [1, 2])
            for _ in range(latency_jobs.ROUNDS):
                out, handle = dispatch_case(comm, case)
                rows = torch.ones(handle.rows_shape, dtype=case.dtype, device=DEVICE)
                comm.combine(rows, handle)
                if comm.rank == 0:
                    torch.cuda.synchronize(DEVICE)
                    assert out.num_tokens_per_rank is not None
                    own = expected_of(alone, 0).rows_per_rank
                    assert out.num_tokens_per_rank.tolist() == own
            if comm.rank == 0:
                assert comm.query_mask().tolist() == [False, True, True]

    run_hosted(fleet, job)


def test_statistics_beside_a_masked_rank() -> None:
    """Nothing is counted that did not travel."""
    case = usual_case(RANK_MAJOR)
    fleet = fleet_of(case)
    stay_away = absences(fleet)
    after = latency_jobs.lost(case, CULPRIT)

    def job(comm: MoECommunicator) -> None:
        with torch.no_grad():
            totals = comm.enable_statistics()
            stay_away(comm, [CULPRIT])
            if comm.rank != CULPRIT:
                comm.mask_peer(CULPRIT)
            garbage = torch.full((1 << 16,), -1, dtype=torch.int32, device=DEVICE)
            del garbage  # the tables of the next call are likely to lie here
            latency_jobs.calls_without(comm, case, CULPRIT, "without a rank")
            torch.cuda.synchronize(DEVICE)
            if comm.rank == CULPRIT:
                return
            rows_of_rank = [expected_of(after, rank).rows_per_rank for rank in range(RANKS)]
            received = rows_of_rank[comm.rank]
            sent = [rows_of_rank[dest][comm.rank] for dest in range(RANKS)]
            sent[CULPRIT] = 0
            both = [a + b for a, b in zip(sent, received, strict=True)]
            assert totals.rows_sent.tolist() == both
            assert totals.rows_received.tolist() == both

    run_hosted(fleet, job)


def test_masks_of_a_shared_arena() -> None:
    """Communicators that share memory share what is known of the ranks."""
    case = usual_case(EXPERT_MAJOR)
    fleet = fleet_of(case, timeout_s=TIMEOUT_S)
    stay_away = absences(fleet)

    def job(first: MoECommunicator) -> None:
        assert isinstance(first, HostedCommunicator)
        with torch.no_grad(), HostedCommunicator(fleet, first.rank, share_with=first) as second:
            for comm in (first, second):
                latency_jobs.calls_with_all(comm, case)
            stay_away(first, [CULPRIT])
            if first.rank != CULPRIT:
                first.mask_peer(CULPRIT)
                assert second.query_mask().tolist() == [False, True, False]
            for comm in (second, first, second):
                latency_jobs.calls_without(comm, case, CULPRIT, "without a rank")

    run_hosted(fleet, job)


def test_exact_sums_cannot_do_without_a_rank() -> None:
    """Their slots have no owner: a rank that came back would write into those of others."""
    case = exact(usual(RANKS, FLAT)).case((9, 4, 7), seed=1)
    with pytest.raises(ConfigurationError, match="mask_lost_peers=True"):
        fleet_of(case, mask_lost_peers=True)

    def job(comm: MoECommunicator) -> None:
        with pytest.raises(InputError, match="exact"):
            comm.mask_peer((comm.rank + 1) % RANKS)

    run_hosted(fleet_of(case), job)


def test_ranks_that_cannot_be_masked() -> None:
    case = routings(usual(RANKS, FLAT))[0]

    def job(comm: MoECommunicator) -> None:
        for rank in (comm.rank, -1, RANKS):
            with pytest.raises(InputError):
                comm.mask_peer(rank)
        assert comm.query_mask().tolist() == [False] * RANKS

    run_hosted(fleet_of(case), job)
