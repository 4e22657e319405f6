"""Ranks that do not come in mode "ll": the others name them, or go on without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from expertlink import (
    DispatchLayout,
    ExpertlinkError,
    InputError,
    MoECommunicator,
    PeerTimeoutError,
)
from expertlink.launch import RankPool
from support import faults, jobs, lost_ranks
from support.cases import LAYOUTS, Shape, exact, routings, usual
from support.hosted import DEVICE, Fleet, HostedCommunicator, fleet_of, run_hosted
from support.jobs import dispatch_case
from support.oracle import combined_of, expected_of, without_rank
from support.wrong_arguments import CULPRIT, RANKS, SHAPES, usual_case

pytestmark = pytest.mark.gpu(1)
FLAT = DispatchLayout.FLAT
RANK_MAJOR, EXPERT_MAJOR = DispatchLayout.RANK_MAJOR, DispatchLayout.EXPERT_MAJOR
TIMEOUT_S = 0.5


# -- ranks that do not come -----------------------------------------------------------------------


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
    fleet = fleet_of("ll", case, timeout_s=TIMEOUT_S)
    stay_away = absences(fleet)

    def job(comm: MoECommunicator) -> ExpertlinkError | None:
        with torch.no_grad():
            jobs.calls_with_all(comm, case)
            stay_away(comm, [2])
            if comm.rank != 2:
                comm.mask_peer(2)
            for _ in range(4):
                lost_ranks.calls_without(comm, case, 2, "without rank 2")
            stay_away(comm, [2, CULPRIT])
            dispatch_case(comm, case)
            torch.cuda.synchronize(DEVICE)
            return faults.error_of(comm.check_health)

    results = run_hosted(fleet, job)
    for rank in (0, 3):
        error = results[rank]
        assert isinstance(error, PeerTimeoutError), error
        assert error.missing == (CULPRIT,), error


def test_a_missing_rank_is_named_beside_rows_of_set_bits() -> None:
    """In a process of its own: a wait without an end would be one of the GPU."""
    with RankPool(num_ranks=1, device="cuda") as pool:
        found = pool.run(lost_ranks.missing_beside_ones, timeout_s=60)
    assert found == [[(CULPRIT,)] * 2]


# -- going on without a rank ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phase", ["dispatch", "combine", "halves"])
@pytest.mark.parametrize("gone", [CULPRIT, 2])
def test_lost_ranks_are_masked(gone: int, phase: str, shape: Shape) -> None:
    cases = [shape.case((9, 4, 7), seed=1), shape.case((5, 40, 0), masked=0.3, seed=2)]
    fleet = fleet_of("ll", cases[0], timeout_s=TIMEOUT_S, mask_lost_peers=True)
    stay_away = absences(fleet)

    def job(comm: MoECommunicator) -> None:
        lost_ranks.survivors_go_on(
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
        jobs.contracts(comm, cases)

    run_hosted(fleet, job)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_that_comes_back_disturbs_nobody(shape: Shape) -> None:
    """It is calls behind: its rows for one of them come where the others have long gone on."""
    cases = [shape.case((9, 4, 7), seed=1), shape.case((5, 40, 0), masked=0.3, seed=2)]
    fleet = fleet_of("ll", cases[0], timeout_s=TIMEOUT_S, mask_lost_peers=True)
    stay_away = absences(fleet)

    def job(comm: MoECommunicator) -> None:
        with torch.no_grad():
            for case in cases:
                jobs.calls_with_all(comm, case)
            _, handle = dispatch_case(comm, cases[0])
            rows = jobs.rows_for(cases[0], comm.rank, handle)
            expected = combined_of(cases[0], comm.rank, missing=CULPRIT)
            stay_away(comm, [CULPRIT])
            result = comm.combine(rows, handle)
            if comm.rank != CULPRIT:
                jobs.same_bits(result, expected, "the combine that it misses")
            for case in cases:
                lost_ranks.calls_without(comm, case, CULPRIT, "while it is away")
            stay_away(comm, [])
            # The late one goes on with the combine that it missed.
            result = comm.combine(rows, handle)
            if comm.rank != CULPRIT:
                jobs.same_bits(result, expected, "the same combine beside the late one")
            for _ in range(jobs.ROUNDS):
                for case in cases[::-1]:
                    lost_ranks.calls_without(comm, case, CULPRIT, "beside the late one")
            torch.cuda.synchronize(DEVICE)
            if comm.rank != CULPRIT:
                comm.check_health()
            comm.clear_mask()
        jobs.contracts(comm, cases)

    run_hosted(fleet, job)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_on_request(shape: Shape) -> None:
    """Nobody waits for a rank that was named beforehand: a wait would fail the call."""
    cases = [shape.case((9, 4, 7), seed=1), shape.case((5, 40, 0), masked=0.3, seed=2)]
    # Exact sums can do without a rank only where they are laid out for it.
    fields = {"mask_lost_peers": True} if shape.precision == "exact" else {}
    fleet = fleet_of("ll", cases[0], timeout_s=TIMEOUT_S, **fields)
    stay_away = absences(fleet)

    def job(comm: MoECommunicator) -> None:
        def leave() -> None:
            stay_away(comm, [CULPRIT])
            if comm.rank != CULPRIT:
                comm.mask_peer(CULPRIT)

        assert not comm.query_mask().any()
        lost_ranks.survivors_go_on(comm, cases, CULPRIT, "dispatch", leave, timeout_ns=0)
        stay_away(comm, [])
        comm.clear_mask()
        jobs.contracts(comm, cases)

    run_hosted(fleet, job)


@LAYOUTS
def test_all_others_are_lost(layout: DispatchLayout) -> None:
    """The last rank goes on alone."""
    case = usual_case(layout)
    fleet = fleet_of("ll", case, timeout_s=TIMEOUT_S, mask_lost_peers=True)
    stay_away = absences(fleet)
    alone = without_rank(without_rank(case, 1), 2)

    def job(comm: MoECommunicator) -> None:
        with torch.no_grad():
            jobs.calls_with_all(comm, case)
            stay_away(comm, [1, 2])
            for _ in range(jobs.ROUNDS):
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
    fleet = fleet_of("ll", case)
    stay_away = absences(fleet)
    after = without_rank(case, CULPRIT)

    def job(comm: MoECommunicator) -> None:
        with torch.no_grad():
            totals = comm.enable_statistics()
            stay_away(comm, [CULPRIT])
            if comm.rank != CULPRIT:
                comm.mask_peer(CULPRIT)
            garbage = torch.full((1 << 16,), -1, dtype=torch.int32, device=DEVICE)
            del garbage  # the tables of the next call are likely to lie here
            lost_ranks.calls_without(comm, case, CULPRIT, "without a rank")
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
    fleet = fleet_of("ll", case, timeout_s=TIMEOUT_S)
    stay_away = absences(fleet)

    def job(first: MoECommunicator) -> None:
        assert isinstance(first, HostedCommunicator)
        with torch.no_grad(), HostedCommunicator(fleet, first.rank, share_with=first) as second:
            for comm in (first, second):
                jobs.calls_with_all(comm, case)
            stay_away(first, [CULPRIT])
            if first.rank != CULPRIT:
                first.mask_peer(CULPRIT)
                assert second.query_mask().tolist() == [False, True, False]
            for comm in (second, first, second):
                lost_ranks.calls_without(comm, case, CULPRIT, "without a rank")

    run_hosted(fleet, job)


def test_exact_sums_need_slots_of_their_ranks_for_masks() -> None:
    """Without these a rank that came back would write into the slots of others."""
    case = exact(usual(RANKS, FLAT)).case((9, 4, 7), seed=1)

    def job(comm: MoECommunicator) -> None:
        with pytest.raises(InputError, match="'exact' and mask_lost_peers=False"):
            comm.mask_peer((comm.rank + 1) % RANKS)

    run_hosted(fleet_of("ll", case), job)


def test_ranks_that_cannot_be_masked() -> None:
    case = routings(usual(RANKS, FLAT))[0]

    def job(comm: MoECommunicator) -> None:
        for rank in (comm.rank, -1, RANKS):
            with pytest.raises(InputError):
                comm.mask_peer(rank)
        assert comm.query_mask().tolist() == [False] * RANKS

    run_hosted(fleet_of("ll", case), job)
