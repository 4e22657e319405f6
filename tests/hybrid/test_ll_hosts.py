"""Mode "ll" across hosts on one GPU, bit for bit against the oracle: ranks of several hosts in one
process, rails that copy from thread to thread."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from expertlink import BlockFormat, DispatchLayout, InputError, MoECommunicator, PeerError
from expertlink.engines.nvlink import tuning
from support import decode, jobs, payloads, source_tokens, training
from support.cases import EXPANDED, FEW_MASK_WORDS, LAYOUTS, Shape, aligned, usual
from support.hosted import run_cases, run_hosted
from support.hosted_hosts import hosts_fleet_of
from support.jobs import dispatch_case, rows_for, same_bits
from support.oracle import Case, combined_of, inputs_of

pytestmark = pytest.mark.gpu(1)

TWO_BY_TWO = (0, 0, 1, 1)
HOSTS = {
    "2x1": (0, 1),
    "2x2": TWO_BY_TWO,
    "apart": (0, 1, 0, 1),
    "3x2": (0, 0, 1, 1, 2, 2),
    "2x4": (0, 0, 0, 0, 1, 1, 1, 1),
}


def cases_of(shape: Shape, domains: tuple[int, ...]) -> list[Case]:
    """Cases of one placement: uneven T, few tokens, hosts that receive or send nothing, none."""
    most, ranks = shape.max_tokens, shape.ranks
    first = domains.index(1)
    one_sided = tuple(0 if host else min(most, 5) for host in domains)
    cases = [
        shape.case(seed=1),
        shape.case((most,) * ranks, masked=0.3, seed=2),
        shape.case(one_sided, seed=3),
        shape.case((1,) + (0,) * (ranks - 1), seed=4),
        shape.case((0,) * first + (3,) + (0,) * (ranks - first - 1), weighted=False, seed=5),
        shape.case((7,) * ranks, masked=1.0, seed=6),
        shape.case((0,) * ranks, seed=7),
    ]
    return [dataclasses.replace(case, domains=domains) for case in cases]


def usual_cases(layout: DispatchLayout, domains: tuple[int, ...] = TWO_BY_TWO) -> list[Case]:
    return cases_of(usual(len(domains), layout), domains)


@LAYOUTS
@pytest.mark.parametrize("hosts", HOSTS)
def test_bits_equal_the_oracle(hosts: str, layout: DispatchLayout) -> None:
    cases = usual_cases(layout, HOSTS[hosts])
    run_hosted(hosts_fleet_of(cases[0]), jobs.contracts, cases)


@LAYOUTS
def test_one_placement_may_leave_a_host_without_experts(layout: DispatchLayout) -> None:
    shape = usual(4, layout)
    for placement in ("scattered", "bare"):
        case = dataclasses.replace(
            shape.case((5, 9, 1, 3), placement=placement, seed=8), domains=TWO_BY_TWO
        )
        run_hosted(hosts_fleet_of(case), jobs.contracts, [case])


@LAYOUTS
def test_many_tokens(monkeypatch: pytest.MonkeyPatch, layout: DispatchLayout) -> None:
    """Masks of several words for each source, and of a few experts at a time."""
    monkeypatch.setattr(tuning, "LL_MASK_WORDS", FEW_MASK_WORDS)
    shape = dataclasses.replace(usual(4, layout), max_tokens=150)
    case = dataclasses.replace(shape.case((150, 33, 0, 64), seed=1), domains=TWO_BY_TWO)
    run_hosted(hosts_fleet_of(case), jobs.contracts, [case])


@LAYOUTS
def test_sms_and_warps_do_not_change_bits(layout: DispatchLayout) -> None:
    cases = usual_cases(layout)[:3]
    for sms in (1, 5):
        fleet = hosts_fleet_of(cases[0], num_sms_dispatch=sms, num_sms_combine=sms)
        run_hosted(fleet, jobs.contracts, cases)


def test_alignment() -> None:
    cases = cases_of(aligned(4), TWO_BY_TWO)
    run_hosted(hosts_fleet_of(cases[0]), jobs.contracts, cases)


# -- the bound of tokens --------------------------------------------------------------------------


def bounded(comm: MoECommunicator, case: Case) -> None:
    """Dispatches that send no more tokens than some rank has; the next one sends another number."""
    handles = []
    for bound in (max(case.tokens), None, max(case.tokens) + 1):
        comm.set_tokens_bound(bound)
        out, handle = dispatch_case(comm, case)
        jobs.check_output(case, comm.rank, out, static=True)
        handles.append(handle)
    own = inputs_of(case, comm.rank)
    for handle in handles:
        rows = rows_for(case, comm.rank, handle)
        same_bits(comm.combine(rows, handle), combined_of(case, comm.rank), "combine")
        _, cached = comm.dispatch(own.x_TH.to(comm.device), None, previous_handle=handle)
        same_bits(comm.combine(rows, cached), combined_of(case, comm.rank), "cached")


@LAYOUTS
def test_fewer_tokens_than_there_may_be(layout: DispatchLayout) -> None:
    shape = usual(4, layout)
    cases = [shape.case((3, 0, 2, 1), seed=1), shape.case((33, 32, 1, 0), seed=2)]
    cases = [dataclasses.replace(case, domains=TWO_BY_TWO) for case in cases]
    run_cases(hosts_fleet_of(cases[0]), bounded, cases)


def exceeded(comm: MoECommunicator, case: Case) -> str:
    """What a rank learns where one rank has more tokens than the bound."""
    comm.set_tokens_bound(4)
    try:
        with torch.no_grad():
            dispatch_case(comm, case)
        torch.cuda.synchronize(comm.device)
        comm.check_health()
    except (InputError, PeerError) as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("fmt", [None, BlockFormat.E4M3_FLOAT32])
def test_more_tokens_than_the_bound_are_refused_on_all_ranks(fmt: BlockFormat | None) -> None:
    shape = usual(4, DispatchLayout.EXPERT_MAJOR)
    case = dataclasses.replace(shape.case((4, 1, 5, 0), seed=1), domains=TWO_BY_TWO)
    fleet = hosts_fleet_of(case, check_inputs=False, quantization=fmt)
    found = run_hosted(fleet, exceeded, case)
    assert found == ["PeerError", "PeerError", "InputError", "PeerError"]


# -- payloads -------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("fmt", list(BlockFormat), ids=lambda fmt: fmt.value)
def test_quantized_on_the_way(fmt: BlockFormat, layout: DispatchLayout) -> None:
    cases = usual_cases(layout)
    fleet = hosts_fleet_of(cases[0], quantization=fmt.value)
    run_cases(fleet, payloads.quantized, cases)


@LAYOUTS
@pytest.mark.parametrize("kind", [BlockFormat.E4M3_FLOAT32, BlockFormat.E4M3_UE8M0, "opaque"])
def test_rows_that_the_caller_quantized(kind: str, layout: DispatchLayout) -> None:
    case = usual_cases(layout)[0]
    run_hosted(hosts_fleet_of(case), payloads.packed_rows, case, kind)


@LAYOUTS
def test_any_bits(layout: DispatchLayout) -> None:
    """Rows that look as if they had not arrived."""
    cases = [dataclasses.replace(case, content="ones") for case in usual_cases(layout)[:2]]
    run_cases(hosts_fleet_of(cases[0]), payloads.any_bits, cases)


# -- calls ----------------------------------------------------------------------------------------


@LAYOUTS
def test_halves(layout: DispatchLayout) -> None:
    cases = usual_cases(layout)
    fleet = hosts_fleet_of(cases[0])
    run_cases(fleet, decode.halves, cases[:3])
    run_cases(fleet, decode.in_turns, cases[:2])
    run_cases(fleet, decode.three_in_flight, cases[:1])
    run_hosted(fleet, decode.many_turns, cases)
    run_hosted(fleet, decode.halves_and_whole_calls, cases)


@LAYOUTS
def test_buffers(layout: DispatchLayout) -> None:
    cases = usual_cases(layout)[:3]
    fleet = hosts_fleet_of(cases[0])
    run_cases(fleet, decode.buffers, cases)
    run_cases(fleet, decode.stale_handles, cases[:1])


@LAYOUTS
def test_source_tokens(layout: DispatchLayout) -> None:
    case = usual_cases(layout)[0]
    run_cases(hosts_fleet_of(case), source_tokens.afterwards, [case])


@EXPANDED
def test_weights_of_a_combine(layout: DispatchLayout) -> None:
    cases = usual_cases(layout)[:3]
    fleet = hosts_fleet_of(cases[0])
    run_cases(fleet, decode.own_weights, cases)
    run_cases(fleet, decode.topk_weights, cases)


@EXPANDED
def test_ranges(layout: DispatchLayout) -> None:
    case = usual_cases(layout)[0]
    run_cases(hosts_fleet_of(case), decode.ranges, [case])


@pytest.mark.parametrize(
    "layout", [DispatchLayout.EXPERT_MAJOR, DispatchLayout.RANK_MAJOR], ids=lambda one: one.value
)
def test_gradients(layout: DispatchLayout) -> None:
    case = dataclasses.replace(usual(4, layout).case(masked=0.2), domains=TWO_BY_TWO)

    def job(comm: MoECommunicator) -> dict[str, float]:
        with torch.autograd.set_multithreading_enabled(False):
            return training.gradients_on(comm, case)

    for worst in run_hosted(hosts_fleet_of(case), job):
        assert max(worst.values()) < 0.05, worst


def counted(comm: MoECommunicator, case: Case) -> tuple[Tensor, Tensor]:
    """Rows that a dispatch sent and received, by rank, by statistics and by the handle."""
    statistics = comm.enable_statistics()
    _, handle = dispatch_case(comm, case)
    sent, received = comm.wire_rows(handle)
    assert statistics.rows_sent.tolist() == sent
    assert statistics.rows_received.tolist() == received
    return torch.tensor(sent), torch.tensor(received)


def test_statistics() -> None:
    case = usual_cases(DispatchLayout.EXPERT_MAJOR)[0]
    fleet = hosts_fleet_of(case)
    run_cases(fleet, decode.rail_statistics, [case])
    found = run_hosted(fleet, counted, case)
    sent_RR = torch.stack([sent for sent, _ in found])
    received_RR = torch.stack([received for _, received in found])
    assert sent_RR.sum() > 0
    assert torch.equal(sent_RR, received_RR.t())


# -- failures -------------------------------------------------------------------------------------


def mixed_handles(comm: MoECommunicator, case: Case, culprit: int) -> str:
    """One rank combines another dispatch than the others: all learn of it at their next call."""
    _, first = dispatch_case(comm, case)
    _, second = dispatch_case(comm, case)
    handle = first if comm.rank == culprit else second
    comm.combine(rows_for(case, comm.rank, handle), handle)
    torch.cuda.synchronize(comm.device)
    try:
        comm.check_health()
    except Exception as error:
        return type(error).__name__
    return ""


def test_ranks_that_combine_different_dispatches() -> None:
    """Ranks of the culprit's host or of its rail know; the others have been told nothing yet."""
    case = usual_cases(DispatchLayout.EXPERT_MAJOR)[0]
    found = run_hosted(hosts_fleet_of(case, check_inputs=False), mixed_handles, case, 1)
    assert found == ["PeerError", "PeerError", "", "PeerError"]
