"""One rank gives up and its process lives on: its experts raise, a signal comes, memory is gone.

Jobs for ranks in processes, with the small communicator of faults.py; they return what their rank
saw.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from expertlink import ExpertlinkError, MoECommunicator
from expertlink.launch import RankContext
from support.faults import good, outcome, small, works

_T = TypeVar("_T")
LONG_S = 60.0  # nobody is to wait so long


class Stopped(BaseException):
    """What a signal handler raises, as that of ctrl-C does."""


@contextlib.contextmanager
def stopped_soon() -> Iterator[None]:
    """Interrupts the main thread after half a second."""

    def stop(number: int, frame: object) -> None:
        del number, frame
        raise Stopped("by a signal")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_own_group(ctx: RankContext, job: Callable[[Any], _T], *, idle: int) -> _T:
    """Runs a job with a process group that may be lost.

    Rank `idle` has nothing under way in the end. It keeps its connections until all other ranks
    have let go of the group, which must not wait for it.
    """
    group: Any = dist.new_group(list(range(ctx.num_ranks)))
    result = job(group)
    dist.barrier()
    if ctx.rank == idle:
        dist.barrier()
    started = time.monotonic()
    dist.destroy_process_group(group)
    del group
    gc.collect()  # the destructor waits for what is under way
    assert time.monotonic() - started < LONG_S / 2
    if ctx.rank != idle:
        dist.barrier()
    return result


def patient(ctx: RankContext, group: Any, **fields: Any) -> MoECommunicator:
    defaults = {"group": group, "timeout_s": LONG_S, "startup_timeout_s": LONG_S}
    return small(ctx, **{**defaults, **fields})


def seen(call: Callable[[], object]) -> tuple[Any, ...]:
    """Class and text of an error, who aborted and why, and how long the call took."""
    started = time.monotonic()
    try:
        call()
    except ExpertlinkError as error:
        rank, reason = getattr(error, "rank", None), getattr(error, "reason", None)
        return type(error).__name__, str(error), rank, reason, time.monotonic() - started
    return "", "no error", None, None, 0.0


def experts_raise(ctx: RankContext, culprit: int, phase: str, fields: dict[str, Any]) -> Any:
    """One rank leaves its `with` block by an exception of its experts; others are in a call."""

    def job(group: Any) -> Any:
        comm = patient(ctx, group, **fields)
        mine: dict[str, Any] = good(comm)
        mine["input"].requires_grad_()
        y = mine["input"]
        try:
            with comm:
                out, handle = comm.dispatch(**mine)
                if phase != "combine":
                    y = comm.combine(out.tokens, handle)
                if ctx.rank == culprit:
                    raise ValueError("boom")
                if phase == "combine":
                    first = seen(lambda: comm.combine(out.tokens, handle))
                elif phase == "backward":
                    first = seen(lambda: y.sum().backward())
                else:
                    first = seen(lambda: comm.dispatch(**mine))
                return first, outcome(lambda: comm.dispatch(**mine)), outcome(comm.check_health)
        except ValueError as error:
            return str(error), outcome(lambda: comm.dispatch(**mine))

    return in_own_group(ctx, job, idle=culprit)


def interrupted(ctx: RankContext, culprit: int, phase: str) -> Any:
    """A signal ends the wait of one rank for another one, which never comes."""
    absent = (culprit + 1) % ctx.num_ranks

    def job(group: Any) -> Any:
        comm = patient(ctx, group)
        if phase != "initialize":
            comm.initialize()
        mine = good(comm)
        call = comm.initialize if phase == "initialize" else lambda: comm.dispatch(**mine)
        result: Any = None
        if ctx.rank == culprit:
            started = time.monotonic()
            try:
                with stopped_soon():
                    call()
            except Stopped:
                waited = time.monotonic() - started
                result = waited, outcome(comm.check_health) if phase == "dispatch" else None
        elif ctx.rank != absent:
            result = seen(call)
        comm.close()
        if phase == "initialize":  # nothing has been lost: all can try again
            dist.barrier()
            if ctx.rank == absent:  # the abort counts for a rank that comes late, too
                result = seen(lambda: patient(ctx, group).initialize())
            dist.barrier()
            with patient(ctx, group) as again:
                assert works(again)
        return result

    return in_own_group(ctx, job, idle=absent)


def fails_within(ctx: RankContext, culprit: int, name: str) -> Any:
    """One rank runs out of memory in the middle of a call."""

    def job(group: Any) -> Any:
        comm = patient(ctx, group)
        out, handle = comm.dispatch(**good(comm))

        def fail(*args: object) -> object:
            raise MemoryError("no room")

        if ctx.rank == culprit:
            comm._engine._workspace.take = fail  # type: ignore[union-attr]
        mine = good(comm)
        calls: dict[str, Callable[[], object]] = {
            "dispatch": lambda: comm.dispatch(**mine),
            "cached": lambda: comm.dispatch(mine["input"], None, previous_handle=handle),
            "combine": lambda: comm.combine(out.tokens, handle),
        }
        first: tuple[Any, ...]
        try:
            first = seen(calls[name])
        except MemoryError as error:
            first = type(error).__name__, str(error)
        again = outcome(calls[name])
        comm.close()
        return first, again

    return in_own_group(ctx, job, idle=culprit)
