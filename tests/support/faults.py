"""Calls that go wrong: a rank refuses, gives up, passes other arguments; what every rank sees then.

Jobs of the first two sections use a small communicator in processes; they return what their rank
saw. The others compare with the oracle and also run on hosted ranks.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from expertlink import (
    CapacityError,
    DispatchHandle,
    DispatchLayout,
    ExpertlinkError,
    InputError,
    MoECommunicator,
    MoECommunicatorConfig,
    PeerError,
    TooManyTokensError,
)
from expertlink.engines.ranks.handshake import handshake
from expertlink.engines.ranks.wire import Wire
from expertlink.launch import RankContext
from support.cases import exact, usual
from support.jobs import (
    contracts,
)
from support.oracle import (
    Case,
    expected_of,
    inputs_of,
)

# -- a small communicator -------------------------------------------------------------------------

T, H, K, E = 4, 8, 2, 8


def small(ctx: RankContext, **fields: Any) -> MoECommunicator:
    defaults: dict[str, Any] = {
        "num_experts": E,
        "hidden_size": H,
        "topk": K,
        "max_tokens_per_rank": T,
        "dtype": torch.float32,
        "device": ctx.device,
        "timeout_s": 20.0,
        "startup_timeout_s": 20.0,
    }
    return MoECommunicator(MoECommunicatorConfig(**{**defaults, **fields}))


def good(comm: MoECommunicator) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(comm.rank)
    ids_TK = torch.rand(T, E, generator=gen).topk(K).indices
    x_TH = torch.randn(T, H, generator=gen)
    return {
        "input": x_TH.to(comm.device),
        "topk_ids": ids_TK.to(comm.device),
        "weights": torch.ones(T, K, device=comm.device),
    }


def works(comm: MoECommunicator) -> bool:
    fields = good(comm)
    out, handle = comm.dispatch(**fields)
    rows = out.tokens
    if out.topk_weights is not None:
        rows = rows * out.topk_weights.sum(-1, keepdim=True)
    return torch.equal(comm.combine(rows, handle), K * fields["input"])


def error_of(call: Callable[[], object]) -> ExpertlinkError | None:
    """What the call raises, if it raises."""
    try:
        call()
    except ExpertlinkError as error:
        return error
    return None


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """Class and text of the error that the call raises."""
    error = error_of(call)
    return ("", "") if error is None else (type(error).__name__, str(error))


# -- one rank misbehaves --------------------------------------------------------------------------


def refused_dispatch(ctx: RankContext, culprit: int, fields: dict[str, Any]) -> Any:
    """One rank passes `fields` instead of good arguments."""
    with small(ctx) as comm:
        mine = good(comm)
        if ctx.rank == culprit:
            mine.update({k: v.to(ctx.device) for k, v in fields.items()})
        return outcome(lambda: comm.dispatch(**mine)), works(comm)


def refused_combine(ctx: RankContext, culprit: int, kind: str) -> Any:
    with small(ctx) as comm, small(ctx, expert_alignment=2) as other:
        out, handle = comm.dispatch(**good(comm))
        _, foreign = other.dispatch(**good(other))
        rows, used = out.tokens, handle
        if ctx.rank == culprit:
            if kind == "rows":
                rows = rows[:-1]
            elif kind == "dtype":
                rows = rows.half()
            else:
                used = foreign
        seen = outcome(lambda: comm.combine(rows, used))
        kept = comm.combine(out.tokens, handle)  # the refused call left the handle alone
        return seen, works(comm) and torch.isfinite(kept).all().item()


def too_many_tokens(
    ctx: RankContext, counts: Sequence[int], kind: str, fields: dict[str, Any]
) -> Any:
    """Ranks pass these numbers of tokens; then all make a communicator with room for them.

    `kind`: "plain", "later" (asynchronous) or "mixed": the one with fewest has wrong rows.
    """
    with small(ctx, **fields) as comm:
        comm.initialize()
        count = counts[ctx.rank]
        gen = torch.Generator().manual_seed(ctx.rank)
        x_TH = torch.randn(count, H, generator=gen).to(ctx.device)
        ids_TK = torch.rand(count, E, generator=gen).topk(K).indices.to(ctx.device)
        given = x_TH.half() if kind == "mixed" and count == min(counts) else x_TH
        call = comm.dispatch_async if kind == "later" else comm.dispatch
        error = error_of(lambda: call(given, ids_TK))
        assert isinstance(error, TooManyTokensError), error
        assert isinstance(error, InputError)
        copy = pickle.loads(pickle.dumps(error))
        seen = str(copy), copy.rank, copy.num_tokens, copy.capacity
        recovered = works(comm)
    # Nobody asks: what the error says is enough.
    with small(ctx, **fields, max_tokens_per_rank=error.num_tokens) as larger:
        out, handle = larger.dispatch(x_TH, ids_TK)
        return seen, recovered, torch.equal(larger.combine(out.tokens, handle), K * x_TH)


def changed_routing(ctx: RankContext, culprit: int) -> Any:
    with small(ctx) as comm:
        mine = good(comm)
        _, handle = comm.dispatch(**mine)
        ids_TK = mine["topk_ids"].clone()
        if ctx.rank == culprit:
            ids_TK[0] = -1
        seen = outcome(lambda: comm.dispatch(mine["input"], ids_TK, previous_handle=handle))
        return seen, works(comm)


def small_buffer(ctx: RankContext, culprit: int) -> Any:
    with small(ctx) as comm:
        buffer = torch.full((99, H), 7.0, device=ctx.device)
        if ctx.rank == culprit:
            buffer = buffer[:1]
        seen = outcome(lambda: comm.dispatch(**good(comm), output_buffer=buffer))
        return seen, works(comm) and bool((buffer == 7.0).all())


def different_calls(ctx: RankContext, culprit: int) -> Any:
    with small(ctx) as comm:
        out, handle = comm.dispatch(**good(comm))

        def call() -> object:
            if ctx.rank == culprit:
                return comm.dispatch(**good(comm))
            return comm.combine(out.tokens, handle)

        return outcome(call), works(comm)


def missing_weights(ctx: RankContext, culprit: int) -> Any:
    with small(ctx) as comm:
        mine: dict[str, Any] = good(comm)
        if ctx.rank == culprit:
            mine["weights"] = None
        return outcome(lambda: comm.dispatch(**mine)), works(comm)


def disagreement(ctx: RankContext, culprit: int, fields: dict[str, Any]) -> tuple[str, str]:
    """Configurations that differ on one rank, found in the handshake."""
    comm = small(ctx, **(fields if ctx.rank == culprit else {}))
    return outcome(comm.initialize)


def sharing(ctx: RankContext, culprit: int) -> tuple[str, str]:
    """Ranks that would share the memory of different communicators."""
    comm = small(ctx)
    wire = Wire(dist.group.WORLD, device=ctx.device, timeout_s=20.0)
    other = 8 if ctx.rank == culprit else 7
    return outcome(
        lambda: handshake(wire, comm.config, engine="any", check_inputs=True, shared_with=other)
    )


def blocks(ctx: RankContext, per_rank: list[dict[str, int]]) -> Any:
    """Placement by every rank's own block of experts."""
    comm = small(ctx, **per_rank[ctx.rank])
    seen = outcome(comm.initialize)
    return seen if seen[0] else (comm.local_experts, works(comm))


def absent(ctx: RankContext, culprit: int, phase: str, how: str) -> Any:
    """One rank does not come: it stays away, or dies. Returns what the others saw, and how fast."""
    comm = small(ctx, timeout_s=2.0, startup_timeout_s=2.0)
    handle: DispatchHandle | None = None
    rows = torch.empty(0)
    if phase != "initialize":
        comm.initialize()
        assert works(comm)
    if phase == "combine":
        out, handle = comm.dispatch(**good(comm))
        rows = out.tokens
    if ctx.rank == culprit:
        if how == "dies":
            os._exit(3)
        return None

    def call() -> object:
        if phase == "initialize":
            return comm.initialize()
        if phase == "combine":
            assert handle is not None
            return comm.combine(rows, handle)
        return comm.dispatch(**good(comm))

    started = time.monotonic()
    try:
        call()
    except ExpertlinkError as error:
        waited = time.monotonic() - started
        missing = getattr(error, "missing", None)
        # Retrying `initialize` is a new attempt; other calls must refuse at once.
        again = outcome(call) if phase != "initialize" else ("ClosedError", "")
        comm.close()
        return type(error).__name__, str(error), missing, waited, again
    return "", "no error", None, 0.0, ("", "")


def other_communicator(ctx: RankContext, culprit: int) -> Any:
    """One rank uses another communicator of the group than the rest."""
    with small(ctx) as a, small(ctx) as b:
        mine = b if ctx.rank == culprit else a
        return outcome(lambda: mine.dispatch(**good(mine)))


def late_handshake(ctx: RankContext, culprit: int) -> Any:
    """One rank misses the first handshake; the second one succeeds."""
    comm = small(ctx, startup_timeout_s=1.0)
    first = ("", "")
    if ctx.rank == culprit:
        time.sleep(2.0)
    else:
        first = outcome(comm.initialize)
    comm.close()
    with small(ctx) as again:
        return first, works(again)


def failed_wait(ctx: RankContext, culprit: int) -> Any:
    """A wait that failed keeps failing: unfilled tensors never pass for results."""
    comm = small(ctx, timeout_s=2.0)
    assert works(comm)
    out, handle = comm.dispatch(**good(comm))
    if ctx.rank == culprit:
        return None
    # The combine's agreement needs the missing rank, a request's transfer would as well.
    first = outcome(lambda: comm.combine_async(out.tokens, handle).wait())
    second = outcome(lambda: comm.combine_async(out.tokens, handle).wait())
    third = outcome(lambda: comm.dispatch(**good(comm)))
    health = outcome(comm.check_health)
    assert first[1] in health[1], "the failure that ended it is repeated"
    return first[0], second[0], third[0], health[0]


def one_call_ahead(ctx: RankContext, culprit: int) -> Any:
    """One rank has counted a call that the others did not make."""
    with small(ctx) as comm:
        assert works(comm)
        if ctx.rank == culprit:
            comm._engine._wire.call += 1  # type: ignore[union-attr]
        return outcome(lambda: comm.dispatch(**good(comm))), works(comm)


def mixed_up(ctx: RankContext, culprit: int, kind: str, fields: dict[str, Any]) -> Any:
    """Two dispatches of different routing are open; one rank's calls go on with the other one."""
    with small(ctx, **fields) as comm:
        first, second = good(comm), good(comm)
        second["topk_ids"] = second["topk_ids"].flip(0) if ctx.rank else second["topk_ids"] * 0 - 1
        opened = [comm.dispatch(**mine) for mine in (first, second)]
        wrong = int(ctx.rank == culprit)

        def call() -> object:
            out, handle = opened[wrong]
            if kind == "combine":
                return comm.combine(out.tokens, handle)
            return comm.dispatch(first["input"], None, previous_handle=handle)

        seen = outcome(call)
        sums = [comm.combine(out.tokens, handle) for out, handle in opened]
        right = torch.equal(sums[0], K * first["input"])
        return seen, right and works(comm)


def mixed_up_backward(ctx: RankContext, culprit: int, fields: dict[str, Any]) -> Any:
    """One rank unwinds two micro-batches in another order than the rest."""
    with small(ctx, **fields) as comm:
        losses, inputs = [], []
        for _ in range(2):
            mine = good(comm)
            inputs.append(mine["input"].requires_grad_())
            out, handle = comm.dispatch(**mine)
            losses.append(comm.combine(out.tokens, handle).sum())
        order = (1, 0) if ctx.rank == culprit else (0, 1)
        return outcome(lambda: losses[order[0]].backward()), works(comm)


def other_default_device(ctx: RankContext, fields: dict[str, Any]) -> bool:
    """All kinds of calls where tensors are made on another device unless that is said."""
    with small(ctx) as comm:
        mine = good(comm)
    torch.set_default_device("meta")
    try:
        with small(ctx, **fields) as comm:
            totals, y = comm.enable_statistics(), mine["input"]
            for _ in range(2):
                out, handle = comm.dispatch(**mine)
                out, again = comm.dispatch(mine["input"], None, previous_handle=handle)
                if comm.config.layout.expanded:
                    comm.expert_ranges(again)
                rows = out.tokens
                if out.topk_weights is not None:
                    rows = rows * out.topk_weights.sum(-1, keepdim=True)
                y = comm.combine(rows, again)
            with torch.no_grad():
                comm.dispatch(**mine, output_buffer=comm.create_buffers())
            return torch.equal(y, K * mine["input"]) and totals.rows_sent.device == ctx.device
    finally:
        torch.set_default_device(None)


def other_experts(ctx: RankContext, culprit: int) -> Any:
    """One rank uses a communicator of the group that has more experts."""
    with small(ctx) as a, small(ctx, num_experts=3 * E) as b:
        mine = b if ctx.rank == culprit else a
        seen = outcome(lambda: mine.dispatch(**good(mine)))
        return seen, works(a) and works(b)


# -- one rank gives up, its process lives on ------------------------------------------------------

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


# -- one rank's arguments differ ------------------------------------------------------------------

RANKS, CULPRIT = 3, 1
OTHERS = [rank for rank in range(RANKS) if rank != CULPRIT]
Errors = list[ExpertlinkError | None]

MASKABLE = [pytest.param(usual(RANKS, layout), id=layout.value) for layout in DispatchLayout]
SHAPES = [
    *MASKABLE,
    pytest.param(exact(usual(RANKS, DispatchLayout.FLAT)), id="flat-exact"),
    pytest.param(exact(usual(RANKS, DispatchLayout.EXPERT_MAJOR)), id="expert_major-exact"),
]
# Faulty ids of `usual` shapes, and what the error says of them.
FAULTY_IDS: list[tuple[list[int], str]] = [
    ([96], "topk_ids[2]=[96,"),
    ([-2], "topk_ids[2]=[-2,"),
    ([2**40 + 1], f"topk_ids[2]=[{2**40 + 1},"),
    ([5, 5], "an expert is chosen twice"),
]


def dispatch_with(case: Case, **changed: Callable[[torch.Tensor], Any]) -> Callable[..., object]:
    """A dispatch in which one rank passes arguments that were changed."""

    def call(comm: MoECommunicator) -> object:
        own = inputs_of(case, comm.rank)
        arguments: dict[str, Any] = {"input": own.x_TH, "topk_ids": own.ids_TK}
        if own.weights_TK is not None:
            arguments["weights"] = own.weights_TK
        if comm.rank == CULPRIT:
            arguments.update({name: change(arguments[name]) for name, change in changed.items()})
        on_gpu: dict[str, Any] = {
            k: None if v is None else v.to(comm.device) for k, v in arguments.items()
        }
        return comm.dispatch(**on_gpu)

    return call


def usual_case(layout: DispatchLayout) -> Case:
    return usual(RANKS, layout).case((9, 4, 7), seed=1)


def judge(errors: Errors, *, own: str, text: str) -> None:
    """The culprit raised its own error, the others name it and repeat it."""
    assert type(errors[CULPRIT]).__name__ == own, errors
    assert text in str(errors[CULPRIT])
    for rank in OTHERS:
        error = errors[rank]
        assert isinstance(error, PeerError), errors
        assert error.ranks == (CULPRIT,)
        assert f"rank {CULPRIT} refused it: {own}" in str(error)
        assert text in str(error)


def with_ids(first: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Token 2 chooses these experts first."""

    def change(ids_TK: torch.Tensor) -> torch.Tensor:
        ids_TK[2, : len(first)] = torch.tensor(first)
        return ids_TK

    return change


def check_overflow(errors: Errors, rank: int, rows: int, room: int) -> None:
    """One error, the same on all ranks."""
    for error in errors:
        assert isinstance(error, CapacityError), errors
        assert (error.rank, error.rows, error.capacity) == (rank, rows, room)
        assert f"rank {rank} " in str(error)
        assert f" {rows} rows" in str(error)
    assert len({str(error) for error in errors}) == 1


def rows_of(case: Case) -> list[int]:
    """Rows that every rank receives, gaps of FLAT included."""
    return [expected_of(case, rank).shape[0] for rank in range(case.ranks)]


def fails_once(
    comm: MoECommunicator, case: Case, call: Callable[[MoECommunicator], object]
) -> ExpertlinkError | None:
    """The error of one call; the next ones are as if it had not been made."""
    error = error_of(lambda: call(comm))
    torch.cuda.synchronize(comm.device)
    contracts(comm, [case])
    return error
