"""What ranks in processes do on pretended hosts: two engines side by side, and ranks that die.

Jobs take the engines' names, so that gloo on CPUs can run them with one engine on both sides.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink import DispatchHandle, DispatchOutput, ExpertlinkError, MoECommunicator
from expertlink.bench.rails import rail_environment
from expertlink.launch import DeviceType, RankContext, RankPool
from support import jobs
from support.cases import LL, Shape
from support.faults import error_of
from support.jobs import config_of, counted, dispatch_case, rows_for, same_bits
from support.oracle import Case, expert_rows, inputs_of, received_of, slot_grads
from support.processes import captured

Results = dict[str, Tensor]


def hosts_of(hosts: int, ranks: int) -> tuple[int, ...]:
    """Host of every rank, as `rail_environment` pretends them."""
    return tuple(rank * hosts // ranks for rank in range(ranks))


def pool_on(hosts: int, ranks: int, device: DeviceType) -> RankPool:
    """Ranks of one machine that NCCL takes for several."""
    environments = [
        rail_environment(rank, ranks=ranks, hosts=hosts, rail="sockets", ctas=None)
        for rank in range(ranks)
    ]
    return RankPool(num_ranks=ranks, device=device, environments=environments)


def cases_on(shape: Shape, domains: tuple[int, ...]) -> list[Case]:
    """Uneven T, a rank without tokens, a host that sends nothing, one that receives nothing."""
    most, ranks = shape.max_tokens, shape.ranks
    uneven = tuple((most, 0, 17, 1)[rank % 4] for rank in range(ranks))
    one_sided = tuple(0 if host else min(most, 9) for host in domains)
    return [
        shape.case(uneven, seed=1, domains=domains),
        shape.case(uneven, masked=0.4, skew=2.0, seed=2, domains=domains),
        shape.case(uneven, only_rank=0, seed=3, domains=domains),
        shape.case(one_sided, seed=4, domains=domains),
        shape.case((most,) * ranks, masked=0.95, seed=5, domains=domains),
        shape.case((0,) * ranks, seed=6, domains=domains),
    ]


# -- two engines side by side ---------------------------------------------------------------------


def fields_of(mode: str, engine: str, **fields: Any) -> dict[str, Any]:
    """Configuration of a mode that one of the engines serves."""
    chosen = {**(LL if mode == "ll" else {"mode": mode}), **fields, "engine": engine}
    if engine == "collective":
        chosen["static_shapes"] = False  # it has none
    return chosen


def output_of(comm: MoECommunicator, case: Case, out: DispatchOutput) -> Results:
    """The parts of a dispatch's output that the contract fixes."""
    rank = comm.rank
    received = received_of(case, rank)
    found: Results = {
        "tokens": counted(case, rank, out.tokens)[received.filled],
        "num_tokens_per_expert": out.num_tokens_per_expert,
    }
    for name in ("num_tokens_per_rank", "expert_offsets"):
        value = getattr(out, name)
        if value is not None:
            found[name] = value
    for name in ("topk_ids", "topk_weights"):
        value = getattr(out, name)
        if value is not None:
            found[name] = counted(case, rank, value)[received.filled]
    # Some of these are views that a later call writes to.
    return {name: value.detach().clone() for name, value in found.items()}


def pair_of(comm: MoECommunicator, case: Case, what: str, previous: Any = None) -> Any:
    """Results of a dispatch and its combine with gradients of weights; and the handle."""
    rank = comm.rank
    if previous is None:
        out, handle = dispatch_case(comm, case)
    else:
        x_TH = inputs_of(case, rank).x_TH.to(comm.device)
        out, handle = comm.dispatch(x_TH, None, previous_handle=previous)
    results = output_of(comm, case, out)
    grads = jobs.filled_up(slot_grads(case, rank), handle.rows_shape[:-1], comm.device)
    y_TH, grads_TK = comm.combine(rows_for(case, rank, handle), handle, weight_grads=grads)
    results |= {"combine": y_TH, "weight gradients": grads_TK}
    return {f"{what}: {name}": value for name, value in results.items()}, handle


def halves_of(comm: MoECommunicator, case: Case) -> Results:
    """Two dispatches in halves under way at once, then their combines."""
    found: Results = {}
    sent = [dispatch_case(comm, case, return_recv_hook=True) for _ in range(2)]
    combines = []
    for number, (out, handle, hook) in enumerate(sent):
        hook()
        results = output_of(comm, case, out)
        found |= {f"halves {number}: {name}": value for name, value in results.items()}
        rows = rows_for(case, comm.rank, handle, round_=number)
        combines.append(comm.combine(rows, handle, return_recv_hook=True))
    for number, (y_TH, hook) in enumerate(combines):
        hook()
        found[f"halves {number}: combine"] = y_TH
    return found


def results_of(comm: MoECommunicator, case: Case, *, halves: bool) -> Results:
    """A pair, a cached pair, another combine of the first dispatch, and calls in halves."""
    found, handle = pair_of(comm, case, "new")
    cached, _ = pair_of(comm, case, "cached", previous=handle)
    found |= cached
    found["another combine"] = comm.combine(rows_for(case, comm.rank, handle, round_=1), handle)
    return found | (halves_of(comm, case) if halves else {})


def same_results(results: Sequence[Results], what: str) -> None:
    """Raises where the results of two engines differ in a bit."""
    one, other = results
    assert one.keys() == other.keys(), f"{what}: {sorted(one)} and {sorted(other)}"
    for name, value in one.items():
        same_bits(value, other[name], f"{what}: {name}")


@contextlib.contextmanager
def communicators(
    ctx: RankContext, cases: Sequence[Case], engines: Sequence[str], mode: str, **fields: Any
) -> Iterator[list[MoECommunicator]]:
    """One for each engine; for each of the cases, where there are two, their hosts."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        comms = [
            stack.enter_context(
                MoECommunicator(config_of(case, ctx.device, **fields_of(mode, engine, **fields)))
            )
            for case, engine in zip(cases, engines, strict=True)
        ]
        for comm, engine in zip(comms, engines, strict=True):
            comm.initialize()
            assert comm.engine_name == engine, comm.engine_reason
        yield comms


def side_by_side(
    ctx: RankContext, cases: list[Case], engines: tuple[str, str], mode: str, **fields: Any
) -> int:
    """The first engine meets the contract, and both give the same bits."""
    with communicators(ctx, cases[:1] * 2, engines, mode, **fields) as comms:
        for case in cases:
            jobs.check_contract(comms[0], case)
            results = [results_of(comm, case, halves=mode == "ll") for comm in comms]
            same_results(results, str(case))
        for comm in comms:
            comm.check_health()
    return len(cases)


def other_hosts(ctx: RankContext, cases: tuple[Case, Case], engines: tuple[str, str]) -> str:
    """What `same_results` says of the same calls on other hosts, whose sums are rounded apart."""
    with communicators(ctx, cases, engines, "ht") as comms:
        results = [
            results_of(comm, case, halves=False) for comm, case in zip(comms, cases, strict=True)
        ]
        try:
            same_results(results, "hosts")
        except AssertionError as error:
            return str(error).splitlines()[0]
    return ""


# -- graphs ---------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """A call that is repeated with what its inputs hold then: a CUDA graph, or on CPUs the call."""

    call: Callable[[], tuple[Tensor, ...]]
    results: tuple[Tensor, ...]
    graph: torch.cuda.CUDAGraph | None

    @staticmethod
    def of(stream: Any, call: Callable[[], tuple[Tensor, ...]]) -> Recorded:
        """Captured on a stream of a GPU; None: made."""
        if stream is None:
            return Recorded(call, call(), None)
        graph, results = captured(stream, call)
        return Recorded(call, results, graph)

    def replay(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self.results = self.call()

    def delete(self) -> None:
        """NCCL closes no communicator whose calls a graph holds."""
        if self.graph is not None:
            self.graph.reset()
            self.graph = None


class Inputs:
    """Tensors that recorded calls read."""

    def __init__(self, comm: MoECommunicator, case: Case) -> None:
        own = inputs_of(case, comm.rank)
        assert own.weights_TK is not None
        self._tensors = [
            tensor.to(comm.device, copy=True) for tensor in (own.x_TH, own.ids_TK, own.weights_TK)
        ]
        self.rank, self.device = comm.rank, comm.device
        self.rows: Tensor | None = None

    def load(self, case: Case) -> None:
        """Tensors of a case with equal T."""
        own = inputs_of(case, self.rank)
        assert own.weights_TK is not None
        for tensor, values in zip(
            self._tensors, (own.x_TH, own.ids_TK, own.weights_TK), strict=True
        ):
            tensor.copy_(values)
        if self.rows is not None:
            rows = expert_rows(case, self.rank)
            self.rows.copy_(jobs.filled_up(rows, tuple(self.rows.shape[:-1]), self.device))

    def dispatch(self, comm: MoECommunicator, previous: DispatchHandle | None = None) -> Any:
        x_TH, ids_TK, weights_TK = self._tensors
        if previous is not None:
            return comm.dispatch(x_TH, None, previous_handle=previous)
        return comm.dispatch(x_TH, ids_TK, weights_TK)


def replays(
    ctx: RankContext, cases: list[Case], engines: tuple[str, str], mode: str, **fields: Any
) -> int:
    """Static shapes: a pair and a cached pair are recorded once, and repeated with new routings.

    Between repetitions the second engine, and now and then the first, make the calls one by one.
    """
    stream = torch.cuda.Stream(ctx.device) if ctx.device.type == "cuda" else None
    fields["static_shapes"] = True
    with (
        torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext(),
        communicators(ctx, cases[:1] * 2, engines, mode, **fields) as (comm, other),
    ):
        inputs = Inputs(comm, cases[0])
        _, handle = inputs.dispatch(comm)
        rows = inputs.rows = rows_for(cases[0], ctx.rank, handle).clone()
        comm.combine(rows, handle)
        handles: list[DispatchHandle] = []

        def pair() -> tuple[Tensor, ...]:
            out, handle = inputs.dispatch(comm)
            handles.append(handle)
            return out.tokens, out.num_tokens_per_expert, comm.combine(rows, handle)

        def again() -> tuple[Tensor, ...]:
            out, handle = inputs.dispatch(comm, handles[-1])
            return out.tokens, out.num_tokens_per_expert, comm.combine(rows, handle)

        recorded = [Recorded.of(stream, pair), Recorded.of(stream, again)]
        try:
            for round_ in range(2 * len(cases)):
                case = cases[round_ % len(cases)]
                inputs.load(case)
                expected, _ = pair_of(other, case, "eager")
                filled = received_of(case, ctx.rank).filled
                for call in recorded:
                    for result in call.results:
                        result.fill_(-7)
                for name, call in zip(("graph", "cached graph"), recorded, strict=True):
                    call.replay()
                    tokens, counts, y_TH = call.results
                    tokens = counted(case, ctx.rank, tokens)[filled]
                    what = f"{name} in round {round_} of {case}"
                    same_bits(tokens, expected["eager: tokens"], f"{what}: tokens")
                    same_bits(counts, expected["eager: num_tokens_per_expert"], f"{what}: counts")
                    same_bits(y_TH, expected["eager: combine"], f"{what}: combine")
                if round_ % 3 == 2:
                    jobs.calls_with_all(comm, cases[(round_ + 1) % len(cases)])
            comm.check_health()
        finally:
            for call in recorded:
                call.delete()
    return 2 * len(cases)


# -- a rank that is killed ------------------------------------------------------------------------


@dataclass(frozen=True)
class Lost:
    """What a rank saw of a call in which another one was dead.

    Attributes:
        error: what was raised.
        seconds: from the beginning of the call until then.
        later: classes of what later calls raised.
        works: the device still computes.
        close_s: seconds that `close` took.
    """

    error: ExpertlinkError | None
    seconds: float
    later: tuple[str, ...]
    works: bool
    close_s: float


def killed(
    ctx: RankContext, case: Case, culprit: int, phase: str, engine: str, mode: str, timeout_s: float
) -> Lost:
    """Good calls, then a rank is killed before one of a phase.

    `phase`: "dispatch", "cached dispatch", "combine", or "replay" of a graph with a pair.
    """
    fields = fields_of(mode, engine, timeout_s=timeout_s, static_shapes=phase == "replay")
    if mode == "ll":
        fields["static_shapes"] = True
    with torch.no_grad():
        comm = MoECommunicator(config_of(case, ctx.device, **fields))
        comm.initialize()
        assert comm.engine_name == engine, comm.engine_reason
        handle = jobs.calls_with_all(comm, case)
        inputs = Inputs(comm, case)
        rows = rows_for(case, ctx.rank, handle)
        stream = torch.cuda.Stream(ctx.device) if ctx.device.type == "cuda" else None
        recorded: Recorded | None = None

        def pair() -> tuple[Tensor, ...]:
            out, handle = inputs.dispatch(comm)
            return out.tokens, comm.combine(rows, handle)

        if phase == "replay":
            recorded = Recorded.of(stream, pair)
            recorded.replay()
        _synchronize(ctx)
        dist.all_reduce(torch.zeros(1))  # by gloo
        if ctx.rank == culprit:
            os.kill(os.getpid(), signal.SIGKILL)

        def call() -> None:
            if recorded is not None:
                recorded.replay()
            elif phase == "combine":
                comm.combine(rows, handle)
            else:
                inputs.dispatch(comm, handle if phase == "cached dispatch" else None)
            _synchronize(ctx)
            comm.check_health()

        began = time.monotonic()
        error = error_of(call)
        seconds = time.monotonic() - began
        ones = torch.ones((64, 64), device=ctx.device)
        works = bool(((ones @ ones) == 64).all())
        later = (error_of(lambda: inputs.dispatch(comm)), error_of(lambda: inputs.dispatch(comm)))
        if recorded is not None:
            recorded.delete()
        began = time.monotonic()
        comm.close()
        close_s = time.monotonic() - began
    names = tuple(type(item).__name__ for item in later)
    return Lost(error, seconds, names, works, close_s)


def _synchronize(ctx: RankContext) -> None:
    if ctx.device.type == "cuda":
        torch.cuda.synchronize(ctx.device)
