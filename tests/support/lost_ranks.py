"""Ranks that do not come, or die: they are named, or the others go on without them.

Jobs compare with the oracle, and run on hosted ranks as well as in processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from expertlink import (
    CapacityError,
    DispatchHandle,
    DispatchLayout,
    ExpertlinkError,
    MoECommunicator,
    PeerTimeoutError,
)
from expertlink.launch import RankContext
from support import jobs
from support.cases import usual
from support.faults import error_of
from support.jobs import (
    ROUNDS,
    calls_with_all,
    check_contract,
    check_output,
    config_of,
    counts_stay_on_device,
    dispatch_case,
    filled_up,
    poison_memory,
    rows_for,
    same_bits,
)
from support.oracle import (
    Case,
    combined_of,
    expected_of,
    inputs_of,
    returned_grads,
    slot_grads,
    weights_of_combine,
    without_rank,
)
from support.processes import ll_communicator
from support.wrong_arguments import CULPRIT

# -- a rank that does not come is named -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lost:
    """What a rank saw of a call in which another one was missing.

    Attributes:
        error: what the call raised.
        later: classes of what later calls raised; the missing rank makes none.
        gpu_works: whether the CUDA context survived.
    """

    error: ExpertlinkError | None
    later: tuple[str, ...]
    gpu_works: bool


def check_lost(lost: Lost, phase: str, timeout_s: float) -> None:
    """The rank that is missing is named, after the time-out and not much later."""
    error = lost.error
    assert isinstance(error, PeerTimeoutError), error
    assert error.missing == (CULPRIT,), error
    assert error.phase == phase
    # How long the GPU waited, by its own clock.
    assert timeout_s <= error.waited_s < timeout_s + 2.0
    assert re.search(rf"in {phase} .*epoch \d+ expected, \d+ seen; missing: rank 1", str(error))
    assert lost.later == ("ClosedError", "ClosedError")
    assert lost.gpu_works


def lose_a_rank(
    comm: MoECommunicator,
    case: Case,
    phase: str,
    culprit: int,
    leave: Callable[[], object] = lambda: None,
) -> Lost:
    """Good calls, then one of `phase` ("dispatch", "cached dispatch", "combine") without a rank.

    Before that call every rank calls `leave`.
    """
    out, handle = dispatch_case(comm, case)
    rows = rows_for(case, comm.rank, handle)
    if phase != "combine":
        comm.combine(rows, handle)
    x_TH = inputs_of(case, comm.rank).x_TH.to(comm.device)
    check_output(case, comm.rank, out, static=comm.config.static_shapes)
    torch.cuda.synchronize(comm.device)
    leave()

    def call() -> None:
        if phase == "dispatch":
            dispatch_case(comm, case)
        elif phase == "combine":
            comm.combine(rows, handle)
        else:
            comm.dispatch(x_TH, None, previous_handle=handle)
        torch.cuda.synchronize(comm.device)
        comm.check_health()

    return lost_in(call, comm, case, ends=comm.rank == culprit)


def lost_in(
    call: Callable[[], object], comm: MoECommunicator, case: Case, *, ends: bool = False
) -> Lost:
    """What a rank sees of `call` and, unless it `ends` there, of later ones."""
    error = error_of(call)
    ones = torch.ones((64, 64), device=comm.device)
    works = bool(((ones @ ones) == 64).all())
    if ends:
        return Lost(error, (), works)
    later = (error_of(comm.check_health), error_of(lambda: dispatch_case(comm, case)))
    return Lost(error, tuple(type(item).__name__ for item in later), works)


def killed(
    ctx: RankContext, culprit: int, phase: str, layout: DispatchLayout, **fields: Any
) -> Lost:
    """`lose_a_rank` where the rank's process is killed."""
    case = usual(ctx.num_ranks, layout).case((24,) * ctx.num_ranks, seed=1)

    def leave() -> None:
        dist.barrier()
        if ctx.rank == culprit:
            os.kill(os.getpid(), signal.SIGKILL)

    settings: dict[str, Any] = {"engine": "nvlink", "timeout_s": 3.0, **fields}
    comm = MoECommunicator(config_of(case, ctx.device, **settings))
    comm.initialize()
    lost = lose_a_rank(comm, case, phase, culprit, leave)
    comm.close()
    return lost


def crossed_calls(ctx: RankContext, case: Case, timeout_s: float) -> Lost:
    """Rank 0 combines, rank 1, which has no tokens, dispatches: each waits for the other one."""
    with torch.no_grad():
        comm = ll_communicator(ctx, case, mask_lost_peers=True, timeout_s=timeout_s)
        jobs.calls_with_all(comm, case)
        _, handle = dispatch_case(comm, case)
        torch.cuda.synchronize(ctx.device)
        dist.barrier()

        def call() -> None:
            if ctx.rank == 0:
                comm.combine(rows_for(case, ctx.rank, handle), handle)
            else:
                dispatch_case(comm, case)
            torch.cuda.synchronize(ctx.device)
            comm.check_health()

        return lost_in(call, comm, case)


def missing_beside_ones(ctx: RankContext) -> list[tuple[int, ...]]:
    """Whom hosted ranks miss in a combine while other rows look like memory without any.

    The last row of the missing rank lies before the first one of another rank, whose bits are set.
    """
    from support.hosted import fleet_of, run_hosted  # the engine, which few of these jobs need

    ranks, culprit = 3, 1
    shape = usual(ranks, DispatchLayout.RANK_MAJOR)
    full = (shape.max_tokens,) * ranks
    drawn = (shape.case(full, seed=seed, content="ones") for seed in itertools.count())
    case = next(c for c in drawn if expected_of(c, culprit).rows_per_rank[0] == shape.max_tokens)
    fleet = fleet_of("ll", case, num_sms_dispatch=7, num_sms_combine=7, timeout_s=0.5)
    fleet.skip = lambda launch: (culprit,) if launch == 1 else ()
    seen = run_hosted(fleet, lose_a_rank, case, "combine", culprit)
    return [lost.error.missing for rank, lost in enumerate(seen) if rank != culprit]


# -- ranks that go on without another one ---------------------------------------------------------


def calls_without(comm: MoECommunicator, case: Case, gone: int, what: str) -> DispatchHandle:
    """A dispatch and its combine after a rank has been lost; the lost one only makes the calls."""
    after, rank = without_rank(case, gone), comm.rank
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
    if case.layout.expanded:
        # Weights of choices that are lost are not read: they are none.
        given = weights_of_combine(case if rank == gone else after, rank, 0).to(comm.device)
        result = comm.combine(rows, handle, topk_weights=given)
        if rank != gone:
            expected = combined_of(after, rank, topk_weights=0)
            same_bits(result, expected, f"combine with weights of the tokens' ranks {what}")
    return handle


def cached_without(
    comm: MoECommunicator, case: Case, handle: DispatchHandle, gone: int, what: str
) -> None:
    """A cached dispatch with a handle from before or after the loss, and its combine."""
    after, rank = without_rank(case, gone), comm.rank
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
    owners_TK = torch.tensor([*case.rank_of_expert(), -1])[inputs_of(case, rank).ids_TK.long()]
    expected = returned_grads(case, rank).masked_fill(owners_TK == gone, 0.0)
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
    after, rank = without_rank(case, gone), comm.rank
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


def killed_and_masked(
    ctx: RankContext, cases: Sequence[Case], gone: int, phase: str, **fields: Any
) -> tuple[str, ...]:
    """`survivors_go_on` where the rank's process is killed; ranks that are left report."""

    def leave() -> None:
        dist.barrier()
        if ctx.rank == gone:
            os.kill(os.getpid(), signal.SIGKILL)

    comm = ll_communicator(ctx, cases[0], mask_lost_peers=True, timeout_s=3.0, **fields)
    comm.initialize()
    survivors_go_on(comm, cases, gone, phase, leave, timeout_ns=3 * 10**9)
    engine = comm.engine_name
    comm.close()
    return (engine,)


def killed_in_the_middle(ctx: RankContext, cases: Sequence[Case], gone: int) -> int:
    """A rank is killed at any moment of a stream of calls: the others reach a call without it.

    Calls that were under way may lack some of its rows; nothing of other ranks may be wrong, which
    shows once it is out of all calls.
    """
    calls = 400
    with torch.no_grad():
        comm = ll_communicator(ctx, cases[0], mask_lost_peers=True, timeout_s=2.0)
        comm.initialize()
        jobs.calls_with_all(comm, cases[0])
        dist.barrier()
        for call in range(calls):
            case = cases[call % len(cases)]
            _, handle = dispatch_case(comm, case)
            rows = torch.zeros(handle.rows_shape, dtype=case.dtype, device=ctx.device)
            comm.combine(rows, handle)
            if ctx.rank == gone and call == 50:  # while the GPU is busy
                os.kill(os.getpid(), signal.SIGKILL)
        torch.cuda.synchronize(ctx.device)
        assert comm.query_mask().tolist() == [rank == gone for rank in range(ctx.num_ranks)]
        for case in cases:
            calls_without(comm, case, gone, "after the death")
        torch.cuda.synchronize(ctx.device)
        comm.check_health()
        comm.close()
    return calls


def late_beyond_the_timeout(ctx: RankContext, cases: Sequence[Case], gone: int) -> bool:
    """A rank that was given up comes back by itself: it must not disturb the others.

    What it does then is not theirs to answer; only `clear_mask` brings it back.
    """
    first, *others = [rank for rank in range(ctx.num_ranks) if rank != gone]
    word = torch.zeros(1)
    with (
        torch.no_grad(),
        ll_communicator(ctx, cases[0], mask_lost_peers=True, timeout_s=1.0) as comm,
    ):
        for case in cases:
            jobs.calls_with_all(comm, case)
        dist.barrier()
        if ctx.rank == gone:
            dist.recv(word, src=first)  # the others have given it up
            for _ in range(jobs.ROUNDS):
                for case in cases:
                    _late_pair(comm, case)
            dist.send(word, dst=first)
        else:
            calls_without(comm, cases[0], gone, "while it is awaited")
            torch.cuda.synchronize(ctx.device)
            done = threading.Event()
            if ctx.rank == first:
                dist.send(word, dst=gone)
                threading.Thread(target=_receive, args=(word, gone, done)).start()
            goes_on = torch.ones(1)
            while goes_on.item():
                for case in cases:
                    calls_without(comm, case, gone, "beside the late one")
                if ctx.rank != first:
                    dist.recv(goes_on, src=first)
                    continue
                goes_on.fill_(not done.is_set())
                for other in others:
                    dist.send(goes_on, dst=other)
            torch.cuda.synchronize(ctx.device)
            comm.check_health()
        comm.clear_mask()
        for case in cases:
            check_contract(comm, case)
    return True


def _receive(word: torch.Tensor, source: int, done: threading.Event) -> None:
    """Gloo's own requests know that they are complete only once somebody has waited for them."""
    dist.recv(word, src=source)
    done.set()


def _late_pair(comm: MoECommunicator, case: Case) -> None:
    """Calls whose results nobody looks at."""
    with contextlib.suppress(ExpertlinkError):
        _, handle = dispatch_case(comm, case)
        rows = torch.ones(handle.rows_shape, dtype=case.dtype, device=comm.device)
        comm.combine(rows, handle)
        torch.cuda.synchronize(comm.device)


# -- capacity -------------------------------------------------------------------------------------


def no_room_at_all(ctx: RankContext, case: Case) -> int:
    """A buffer without rows: what `CapacityError` says of the rows."""
    with torch.no_grad(), ll_communicator(ctx, case) as comm:
        buffer = torch.empty((0, case.hidden), dtype=case.dtype, device=ctx.device)
        _, handle = dispatch_case(comm, case, output_buffer=buffer)
        comm.combine(buffer, handle)
        torch.cuda.synchronize(ctx.device)
        found = error_of(comm.check_health)
        rows = case.tokens[0] if not case.layout.expanded else expected_of(case, 0).shape[0]
        assert isinstance(found, CapacityError)
        assert (found.rows, found.capacity) == (rows, 0)
        check_contract(comm, case)
    return case.tokens[0]
