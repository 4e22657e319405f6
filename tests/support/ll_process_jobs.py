"""What tests of low-latency mode run on ranks that are processes: engines, streams, deaths."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from expertlink import CapacityError, DispatchLayout, ExpertlinkError, MoECommunicator
from expertlink.launch import RankContext
from support import ll_jobs, ll_lost_jobs, nvlink_jobs
from support.hosted import Fleet, run_hosted
from support.nvlink_cases import LATENCY, usual
from support.nvlink_jobs import error_of
from support.oracle import Case, expected_of
from support.oracle_results import combined_of
from support.rank_jobs import (
    check_contract,
    check_output,
    config_of,
    counts_stay_on_device,
    dispatch_case,
    rows_for,
    same_bits,
)


def make(ctx: RankContext, case: Case, **fields: Any) -> MoECommunicator:
    """A communicator in low-latency mode."""
    return MoECommunicator(config_of(case, ctx.device, **{**LATENCY, **fields}))


def on_a_rank(
    ctx: RankContext, job: ll_jobs.Job, cases: list[Case], *args: Any, **fields: Any
) -> int:
    """Runs a job of ll_jobs.py or decode_jobs.py for each case."""
    with make(ctx, cases[0], **fields) as comm:
        ll_jobs.without_gradients(comm, job, cases, *args)
    return len(cases)


def with_all(ctx: RankContext, job: Callable[..., None], cases: list[Case], **fields: Any) -> int:
    """Runs a job that takes all cases at once."""
    with make(ctx, cases[0], **fields) as comm:
        job(comm, cases)
    return len(cases)


def no_room_at_all(ctx: RankContext, case: Case) -> int:
    """A buffer without rows: what `CapacityError` says of the rows."""
    with torch.no_grad(), make(ctx, case) as comm:
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


# -- several communicators and streams ------------------------------------------------------------


def mixed_modes(ctx: RankContext, cases: list[Case]) -> int:
    """Low latency and high throughput in one group, each with its own memory, calls in turns."""
    fields: list[dict[str, Any]] = [
        LATENCY,
        {"engine": "nvlink"},
        {"engine": "nvlink", "static_shapes": True},
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        comms = [
            stack.enter_context(MoECommunicator(config_of(cases[0], ctx.device, **own)))
            for own in fields
        ]
        for case in cases:
            handles = []
            for comm in comms:
                out, handle = dispatch_case(comm, case)
                check_output(case, ctx.rank, out, static=counts_stay_on_device(comm))
                handles.append(handle)
            for comm, handle in zip(comms[::-1], handles[::-1], strict=True):
                ll_jobs.combine_case(comm, case, handle, "combine in turns")
        for comm in comms:
            check_contract(comm, cases[0])
    return len(cases)


def shared_memory(ctx: RankContext, cases: list[Case]) -> int:
    """Layers of a model: communicators that share memory, whole calls and halves on two streams."""
    streams = [torch.cuda.current_stream(ctx.device), torch.cuda.Stream(ctx.device)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        first = stack.enter_context(make(ctx, cases[0]))
        second = MoECommunicator(
            config_of(cases[0], ctx.device, **{**LATENCY, "num_sms_dispatch": 5}),
            share_with=first,
        )
        comms = [first, stack.enter_context(second)]
        for round_ in range(2 * ll_jobs.ROUNDS):
            sent = []
            for i in range(2):
                case = cases[(round_ + i) % len(cases)]
                with torch.cuda.stream(streams[(round_ + i) % 2]):
                    call = dispatch_case(comms[i], case, return_recv_hook=True)
                sent.append((comms[i], case, streams[(round_ + i) % 2], call))
            for comm, case, stream, (out, handle, hook) in sent:
                with torch.cuda.stream(stream):
                    hook()
                    check_output(case, ctx.rank, out, static=True)
                    ll_jobs.combine_case(comm, case, handle, "combine on its stream")
    return len(cases)


def other_streams(ctx: RankContext, case: Case) -> bool:
    """A hook on another stream than its call; calls on streams that take turns."""
    streams = [torch.cuda.Stream(ctx.device) for _ in range(2)]
    with torch.no_grad(), make(ctx, case) as comm:
        kept: list[object] = []
        for round_ in range(4 * ll_jobs.ROUNDS):
            here, there = streams[round_ % 2], streams[(round_ + 1) % 2]
            with torch.cuda.stream(here):
                out, handle, hook = dispatch_case(comm, case, return_recv_hook=True)
            there.wait_stream(here)
            with torch.cuda.stream(there):
                hook()
                check_output(case, ctx.rank, out, static=True)
                rows = rows_for(case, ctx.rank, handle)
                result, hook = comm.combine(rows, handle, return_recv_hook=True)
            here.wait_stream(there)
            with torch.cuda.stream(here):
                hook()
                same_bits(result, combined_of(case, ctx.rank), "combine on two streams")
            # Memory of one stream that the other uses is the caller's to keep.
            kept += [out, handle, rows, result]
        torch.cuda.synchronize(ctx.device)
    return True


def longest_waits(ctx: RankContext, case: Case, late: int) -> list[int]:
    """`longest_wait_ns` where one rank's GPU is busy before its calls."""
    with torch.no_grad(), make(ctx, case) as comm:
        totals = comm.enable_statistics()
        ll_jobs.calls_with_all(comm, case)
        torch.cuda.synchronize(ctx.device)
        totals.longest_wait_ns.zero_()
        dist.barrier()
        for _ in range(2):
            if ctx.rank == late:
                torch.cuda._sleep(200_000_000)
            ll_jobs.calls_with_all(comm, case)
        return totals.longest_wait_ns.tolist()


# -- ranks that die -------------------------------------------------------------------------------


def killed(
    ctx: RankContext, cases: Sequence[Case], gone: int, phase: str, **fields: Any
) -> tuple[str, ...]:
    """`survivors_go_on` where the rank's process is killed; ranks that are left report."""

    def leave() -> None:
        dist.barrier()
        if ctx.rank == gone:
            os.kill(os.getpid(), signal.SIGKILL)

    comm = make(ctx, cases[0], mask_lost_peers=True, timeout_s=3.0, **fields)
    comm.initialize()
    ll_lost_jobs.survivors_go_on(comm, cases, gone, phase, leave, timeout_ns=3 * 10**9)
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
        comm = make(ctx, cases[0], mask_lost_peers=True, timeout_s=2.0)
        comm.initialize()
        ll_jobs.calls_with_all(comm, cases[0])
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
            ll_lost_jobs.calls_without(comm, case, gone, "after the death")
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
    with torch.no_grad(), make(ctx, cases[0], mask_lost_peers=True, timeout_s=1.0) as comm:
        for case in cases:
            ll_jobs.calls_with_all(comm, case)
        dist.barrier()
        if ctx.rank == gone:
            dist.recv(word, src=first)  # the others have given it up
            for _ in range(ll_jobs.ROUNDS):
                for case in cases:
                    _late_pair(comm, case)
            dist.send(word, dst=first)
        else:
            ll_lost_jobs.calls_without(comm, cases[0], gone, "while it is awaited")
            torch.cuda.synchronize(ctx.device)
            done = threading.Event()
            if ctx.rank == first:
                dist.send(word, dst=gone)
                threading.Thread(target=_receive, args=(word, gone, done)).start()
            goes_on = torch.ones(1)
            while goes_on.item():
                for case in cases:
                    ll_lost_jobs.calls_without(comm, case, gone, "beside the late one")
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


def different_calls(ctx: RankContext, case: Case, timeout_s: float) -> nvlink_jobs.Lost:
    """Rank 0 combines, rank 1, which has no tokens, dispatches: each waits for the other one."""
    with torch.no_grad():
        comm = make(ctx, case, mask_lost_peers=True, timeout_s=timeout_s)
        ll_jobs.calls_with_all(comm, case)
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

        return nvlink_jobs.lost_in(call, comm, case)


def missing_beside_ones(ctx: RankContext) -> list[tuple[int, ...]]:
    """Whom hosted ranks miss in a combine while other rows look like memory without any.

    The last row of the missing rank lies before the first one of another rank, whose bits are set.
    """
    ranks, culprit = 3, 1
    shape = usual(ranks, DispatchLayout.RANK_MAJOR)
    full = (shape.max_tokens,) * ranks
    drawn = (shape.case(full, seed=seed, content="ones") for seed in itertools.count())
    case = next(c for c in drawn if expected_of(c, culprit).rows_per_rank[0] == shape.max_tokens)
    fields = {**LATENCY, "num_sms_dispatch": 7, "num_sms_combine": 7, "timeout_s": 0.5}
    fleet = Fleet(config_of(case, ctx.device, **fields), ranks)
    fleet.skip = lambda launch: (culprit,) if launch == 1 else ()
    seen = run_hosted(fleet, nvlink_jobs.lose_a_rank, case, "combine", culprit)
    return [lost.error.missing for rank, lost in enumerate(seen) if rank != culprit]
