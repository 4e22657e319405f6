"""What tests of low-latency mode run on every rank where one of them is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from expertlink import DispatchHandle, MoECommunicator
from support.ll_jobs import ROUNDS, calls_with_all
from support.oracle import Case, inputs_of
from support.oracle_results import combined_of, returned_grads, slot_grads
from support.rank_jobs import (
    check_output,
    counts_stay_on_device,
    dispatch_case,
    filled_up,
    poison_memory,
    rows_for,
    same_bits,
)


def lost(case: Case, rank: int) -> Case:
    """The case for those who go on without a rank: it sends nothing and its experts are gone."""
    tokens = tuple(0 if other == rank else count for other, count in enumerate(case.tokens))
    return dataclasses.replace(case, tokens=tokens, without=rank)


def calls_without(comm: MoECommunicator, case: Case, gone: int, what: str) -> DispatchHandle:
    """A dispatch and its combine after a rank has been lost; the lost one only makes the calls."""
    after, rank = lost(case, gone), comm.rank
    poison_memory(comm, case)
    out, handle = dispatch_case(comm, case)
    if rank != gone:
        check_output(after, rank, out, static=counts_stay_on_device(comm))
    rows = rows_for(after, rank, handle)
    grads = filled_up(slot_grads(after, rank), handle.rows_shape[:-1], comm.device)
    poison_memory(comm, case)
    result, grads_TK = comm.combine(rows, handle, weight_grads=grads)
    if rank != gone:
        same_bits(result, combined_of(after, rank), f"combine {what}")
        same_bits(grads_TK, returned_grads(after, rank), f"weight gradients {what}")
    return handle


def cached_without(
    comm: MoECommunicator, case: Case, handle: DispatchHandle, gone: int, what: str
) -> None:
    """A cached dispatch with a handle from before or after the loss, and its combine."""
    after, rank = lost(case, gone), comm.rank
    x_TH = inputs_of(case, rank).x_TH.to(comm.device)
    poison_memory(comm, case)
    out, cached = comm.dispatch(x_TH, None, previous_handle=handle)
    if rank != gone:
        check_output(after, rank, out, static=counts_stay_on_device(comm))
    result = comm.combine(rows_for(after, rank, cached), cached)
    if rank != gone:
        same_bits(result, combined_of(after, rank), f"cached combine {what}")


def combine_without(
    comm: MoECommunicator, case: Case, gone: int, leave: Callable[[], object]
) -> None:
    """A rank leaves between a dispatch and its combine: its sums do not come back."""
    rank = comm.rank
    out, handle = dispatch_case(comm, case)
    check_output(case, rank, out, static=counts_stay_on_device(comm))
    rows = rows_for(case, rank, handle)
    grads = filled_up(slot_grads(case, rank), handle.rows_shape[:-1], comm.device)
    leave()
    result, grads_TK = comm.combine(rows, handle, weight_grads=grads)
    if rank == gone:
        return
    same_bits(result, combined_of(case, rank, missing=gone), "combine without a rank")
    homes = torch.tensor([*case.rank_of_expert(), -1])[inputs_of(case, rank).ids_TK.long()]
    expected = returned_grads(case, rank).masked_fill(homes == gone, 0.0)
    same_bits(grads_TK, expected, "weight gradients without a rank")


def survivors_go_on(
    comm: MoECommunicator,
    cases: Sequence[Case],
    gone: int,
    phase: str,
    leave: Callable[[], object],
    timeout_ns: int,
) -> None:
    """A rank leaves for good; the others wait for it once, and then go on without it.

    Args:
        comm: with `mask_lost_peers`, or where the others mask the rank beforehand.
        cases: routings, in turn.
        gone: the rank.
        phase: first call that it does not take part in: "dispatch", "combine" or "halves".
        leave: called by every rank before that call.
        timeout_ns: time that the others will wait at least; 0: none.
    """
    rank = comm.rank
    with torch.no_grad():
        totals = comm.enable_statistics()
        handles = [calls_with_all(comm, case) for case in cases]
        totals.longest_wait_ns.zero_()
        if phase == "combine":
            combine_without(comm, cases[0], gone, leave)
        elif phase == "halves":
            leave()
            _halves_without(comm, cases[0], gone)
        else:
            leave()
            calls_without(comm, cases[0], gone, "of the first call")
        torch.cuda.synchronize(comm.device)
        masked = [other == gone for other in range(comm.num_ranks)]
        if rank != gone:
            assert comm.query_mask().tolist() == masked
            waited = totals.longest_wait_ns.tolist()[gone]
            assert waited >= timeout_ns // 2, f"waited {waited} ns"
        totals.longest_wait_ns.zero_()
        for round_ in range(ROUNDS):
            for case, before in zip(cases, handles, strict=True):
                handle = calls_without(comm, case, gone, f"in round {round_}")
                cached_without(comm, case, handle, gone, f"in round {round_}")
                cached_without(comm, case, before, gone, f"of an old handle in round {round_}")
            _halves_without(comm, cases[round_ % len(cases)], gone)
        torch.cuda.synchronize(comm.device)
        if rank != gone:
            comm.check_health()
            assert comm.query_mask().tolist() == masked
            assert totals.longest_wait_ns.tolist()[gone] == 0, "waited for it again"


def _halves_without(comm: MoECommunicator, case: Case, gone: int) -> None:
    """Two dispatches under way at once, then their combines."""
    after, rank = lost(case, gone), comm.rank
    sent = [dispatch_case(comm, case, return_recv_hook=True) for _ in range(2)]
    combines = []
    for index, (out, handle, hook) in enumerate(sent):
        hook()
        if rank != gone:
            check_output(after, rank, out, static=counts_stay_on_device(comm))
        rows = rows_for(after, rank, handle, round_=index)
        combines.append(comm.combine(rows, handle, return_recv_hook=True))
    for index, (result, hook) in enumerate(combines):
        hook()
        if rank != gone:
            expected = combined_of(after, rank, round_=index)
            same_bits(result, expected, "combine in halves without a rank")
