"""Calls that go wrong: a rank refuses, is late or mixed up; what every rank sees then.

Jobs for ranks in processes, with a small communicator; they return what their rank saw. Ranks that
give up are in giving_up.py, wrong arguments on hosted ranks in wrong_arguments.py.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from expertlink import (
    DispatchHandle,
    ExpertlinkError,
    InputError,
    MoECommunicator,
    MoECommunicatorConfig,
    TooManyTokensError,
)
from expertlink.engines.ranks.handshake import handshake
from expertlink.engines.ranks.wire import Wire
from expertlink.launch import RankContext

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
