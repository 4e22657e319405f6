"""Mode "ll" on one GPU: calls in halves, shared memory, buffers, ranges, statistics."""

from __future__ import annotations

import contextlib

import pytest
import torch

from expertlink import BlockFormat, DispatchLayout, MoECommunicator
from expertlink.engines.nvlink.ll.plan import LAST_NUMBER, SETS
from expertlink.engines.nvlink.shared import counters
from support import decode, jobs, oracle, payloads
from support.cases import (
    EXPANDED,
    LAYOUTS,
    ORDERS,
    aligned,
    blocks_of_scales,
    exact,
    routings,
    usual,
)
from support.hosted import DEVICE, HostedCommunicator, fleet_of, run_cases, run_hosted
from support.jobs import check_contract

pytestmark = pytest.mark.gpu(1)


# -- numbers of transfers -------------------------------------------------------------------------


def begin_after(comm: HostedCommunicator, transfers: int) -> None:
    """As if so many transfers had been: counted by 2^16, and granted by all peers."""
    arena = comm._engine.arena  # type: ignore[union-attr]
    layout = counters(comm.num_ranks, SETS)
    for half in ("sent", "received"):
        layout.member(arena.counters, half).fill_(transfers << 16)
    offset = arena.plan.offsets(comm.num_ranks)["kCreditsAt"]
    number = (transfers - 1) % LAST_NUMBER + 1
    words = arena.local[offset : offset + 4 * comm.num_ranks].view(torch.int32)
    words.fill_(number - (number >> 31 << 32))


@LAYOUTS
@pytest.mark.parametrize("transfers", [LAST_NUMBER, 2 * LAST_NUMBER, 1 << 32])
def test_numbers_begin_again(layout: DispatchLayout, transfers: int) -> None:
    """Calls and halves before and after the last number, and where words of four bytes wrap."""
    cases = routings(usual(3, layout))

    def job(comm: HostedCommunicator) -> None:
        comm.initialize()
        begin_after(comm, transfers - 5)
        jobs.contracts(comm, cases)
        decode.many_turns(comm, cases)

    run_hosted(fleet_of("ll", cases[0]), job)


# -- halves ---------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_halves(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    fleet = fleet_of("ll", cases[0])
    run_cases(fleet, decode.halves, cases[:3])
    run_cases(fleet, decode.in_turns, cases[:3])
    run_cases(fleet, decode.forgotten_hooks, cases[:2])
    run_cases(fleet, decode.three_in_flight, cases[:2])
    run_cases(fleet, decode.dropped_results, cases[:2])


@LAYOUTS
def test_micro_batches(layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    fleet = fleet_of("ll", cases[0])
    run_hosted(fleet, decode.many_turns, cases)
    run_hosted(fleet, decode.halves_and_whole_calls, cases)


@EXPANDED
def test_halves_of_exact_combines(layout: DispatchLayout) -> None:
    cases = routings(exact(usual(3, layout)))
    fleet = fleet_of("ll", cases[0])
    run_hosted(fleet, decode.many_turns, cases)
    run_hosted(fleet, decode.halves_and_whole_calls, cases)


@LAYOUTS
def test_halves_of_quantized_dispatches(layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(seed=1)
    fleet = fleet_of("ll", case, quantization="e4m3_ue8m0")

    def job(comm: MoECommunicator) -> None:
        with torch.no_grad():
            own = oracle.inputs_of(case, comm.rank)
            x_TH, ids_TK = own.x_TH.to(DEVICE), own.ids_TK.to(DEVICE)
            calls = [comm.dispatch(x_TH, ids_TK, return_recv_hook=True) for _ in range(2)]
            for out, _, hook in calls:
                hook()
                payloads.check_quantized(
                    case, comm.rank, out, BlockFormat.E4M3_UE8M0, order="row_major"
                )

    run_hosted(fleet, job)


@LAYOUTS
def test_communicators_that_share_memory(layout: DispatchLayout) -> None:
    """Their calls are one sequence, whole or in halves."""
    cases = routings(usual(3, layout))
    fleet = fleet_of("ll", cases[0])

    def job(first: MoECommunicator) -> None:
        assert isinstance(first, HostedCommunicator)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            second = stack.enter_context(
                HostedCommunicator(fleet, first.rank, share_with=first, num_sms_dispatch=2)
            )
            comms = [first, second]
            for case in cases[:4]:
                for comm in comms:
                    check_contract(comm, case)
            for case, other in ((cases[0], cases[1]), (cases[1], cases[3])):
                pairs = list(zip(comms, (case, other), strict=True))
                sent = [jobs.dispatch_case(comm, own, return_recv_hook=True) for comm, own in pairs]
                sent[1][2]()  # finishes the other communicator's call, too
                for (comm, own), (out, handle, _) in zip(pairs, sent, strict=True):
                    jobs.check_output(own, comm.rank, out, static=True)
                    jobs.combine_case(comm, own, handle, "combine")

    run_hosted(fleet, job)


# -- buffers, ranges, statistics ------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_buffers(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    fleet = fleet_of("ll", cases[0])
    run_hosted(fleet, decode.buffers_of_every_call, cases)
    run_cases(fleet, decode.buffers, cases[:3])
    run_cases(fleet, decode.stale_handles, cases[:1])


@LAYOUTS
@ORDERS
def test_buffers_of_packed_rows(order: str, layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(masked=0.2, weighted=False)
    fleet = fleet_of("ll", case, quantization="e4m3_pow2", scale_order=order)
    run_cases(fleet, payloads.buffers_of_packed_rows, [case])


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_ranges(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    run_cases(fleet_of("ll", cases[0]), decode.ranges, cases)
    if layout is DispatchLayout.FLAT and ranks > 1:
        case = aligned(ranks).case(seed=1)
        run_cases(fleet_of("ll", case), decode.ranges, [case])


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_statistics(ranks: int, layout: DispatchLayout) -> None:
    shapes = [usual(ranks, layout)]
    if layout.expanded:
        shapes.append(exact(shapes[0]))
    for shape in shapes:
        for case in routings(shape)[:3]:
            run_cases(fleet_of("ll", case), decode.statistics, [case])


@LAYOUTS
def test_statistics_of_packed_rows(layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(seed=1)
    fleet = fleet_of("ll", case, quantization="e4m3_ue8m0")
    run_cases(fleet, decode.statistics_of_packed_rows, [case])
