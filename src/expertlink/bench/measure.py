"""Measures cases on one rank: all ranks call the same function, rank 0 gets the records.

Cases with prepared outputs that can share a communicator do (`cases.batches`), and those that
differ in nothing but their variant share inputs and ceilings as well. What is timed is the same as
if each had its own. A case of another kind, `--overlap` for one, has a function like
`measure_batch` in a module of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.distributed as dist

from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import Ceilings, Moves
from expertlink.bench.clock import Clock, Times, capture
from expertlink.bench.inputs import Input, agree_on_results, prepare_inputs
from expertlink.bench.measured import Measured, gather_traffic, make_records
from expertlink.bench.rails import RailCeiling
from expertlink.bench.records import Record
from expertlink.bench.steps import Caller, Step
from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext
from expertlink.types import DispatchBuffers

_HOT_WARMUP = 3
_LEAST_ITERS = 5  # whatever the budget
_IDLE_SHARE = 1.5  # of an iteration with the calls from an idle device


def measure_batch(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[Record]]:
    """Checks, then times cases that share a communicator. Collective over the default group.

    `on_progress` is called with the number of timed iterations after each; `control` is for the
    `Clock`. Yields for every case in turn its records on rank 0, nothing on the others.

    Raises:
        WrongResultError: the result was wrong on some rank; raised on every rank.
        ExpertlinkError: the library refused the case or lost a peer.
    """
    budget = Budget(plan, len(cases))
    with open_communicator(context, cases[0], plan) as comm:
        clock = Clock(context.device, control)
        with (
            Ceilings(cases[0], plan, clock) as ceilings,
            closing(RailCeiling(cases[0], plan, clock)) as rail,
            no_garbage_collection(),
        ):
            batch = _Batch(plan, on_progress, clock, comm, ceilings, rail, budget)
            buffers = comm.create_buffers() if cases[0].calls.prepared else None
            for _, group in groupby(cases, key=lambda case: case.situation):
                yield from batch.measure(list(group), buffers)


def open_communicator(context: RankContext, case: Case, plan: Plan) -> MoECommunicator:
    """The communicator of a case.

    Raises:
        ConfigurationError: the engine that serves the case does not have its variant.
    """
    comm = MoECommunicator(case.config(context.device, timeout_s=plan.timeout_s))
    try:
        _check_engine(comm, case)
    except ConfigurationError:
        comm.close()
        raise
    return comm


def _check_engine(comm: MoECommunicator, case: Case) -> None:
    """Refuses a variant that the communicator's engine does not have."""
    if not case.calls.needs_nvlink or comm.engine_name != "collective":
        return
    others = [name for name, calls in case.variants.items() if not calls.needs_nvlink]
    raise ConfigurationError(
        f"variant={case.variant!r} cannot be measured with the {comm.engine_name} engine "
        f"({comm.engine_reason}); accepted: {', '.join(others)}"
    )


class Budget:
    """Time for the cases of a batch, which begins now.

    Args:
        plan: its `budget_s` is that of all of them together.
        cases: how many there are.
    """

    def __init__(self, plan: Plan, cases: int) -> None:
        self._seconds, self._left = plan.budget_s, cases
        self._began = time.monotonic()

    def fitted(
        self,
        plan: Plan,
        groups: Sequence[Sequence[Sequence[Step]]],
        clock: Clock,
        *,
        from_idle: bool,
    ) -> Plan:
        """The plan of the next case, with as many iterations as fit; the same on all ranks.
        Collective.

        Args:
            plan: has the most iterations that are wanted.
            groups: of `time_steps`.
            clock: times them.
            from_idle: calls are also timed from an idle device.
        """
        if self._seconds is None:
            return plan
        once = replace(plan, warmup=0, iters=1)
        time_steps(groups, once, clock, lambda _: None)  # the first time takes longer
        begin = time.monotonic()
        time_steps(groups, once, clock, lambda _: None)
        now = time.monotonic()
        round_s = (now - begin) * (_IDLE_SHARE if from_idle else 1.0)
        left_s = (self._seconds - (now - self._began)) / max(self._left, 1)
        self._left -= 1
        fitting = torch.tensor([left_s / max(round_s, 1e-9)], dtype=torch.float64)
        iters = int(clock.gather(fitting).min())
        return replace(plan, warmup=0, iters=max(min(iters, plan.iters), _LEAST_ITERS))


@dataclass(frozen=True)
class _Batch:
    """What the cases of one communicator have in common."""

    plan: Plan
    on_progress: Callable[[int], None]
    clock: Clock
    comm: MoECommunicator
    ceilings: Ceilings
    rail: RailCeiling
    budget: Budget

    def measure(
        self, cases: Sequence[Case], buffers: DispatchBuffers | None
    ) -> Iterator[list[Record]]:
        """Measures cases that differ in their variant only."""
        if cases[0].hosts > 1:
            self.comm.set_tokens_bound(cases[0].tokens)
        # As in serving: with gradients enabled, padding would be zeroed for the experts' backward.
        with torch.no_grad():
            inputs = prepare_inputs(self.comm, cases[0], self.plan, self.clock)
        copies = self.ceilings.moves(self.comm.rank, [item.wire.rows_to for item in inputs])
        rails = self.rail.moves(cases[0], [item.topk_ids_TK for item in inputs])
        rail_bytes = self.rail.bytes_sent(cases[0], [item.topk_ids_TK for item in inputs])
        moves = [{**of_item, **rail} for of_item, rail in zip(copies, rails, strict=True)]
        gc.collect()
        for case in cases:
            _check_engine(self.comm, case)
            with torch.no_grad():
                plan, times = self._time(case, inputs, moves, buffers)
            measured = Measured(
                device=self.clock.device,
                engine=self.comm.engine_name,
                num_inputs=len(inputs),
                times=times.gather(self.clock),
                traffic=gather_traffic([item.wire for item in inputs], case, self.clock),
                ceiling_note=self.ceilings.note,
                floor=self.ceilings.floor,
                rail_bytes=rail_bytes,
            )
            yield make_records(case, plan, measured) if self.comm.rank == 0 else []

    def _time(
        self,
        case: Case,
        inputs: Sequence[Input],
        moves: Sequence[Moves],
        buffers: DispatchBuffers | None,
    ) -> tuple[Plan, Times]:
        """The plan that was followed, and the times."""
        plan, clock, calls = self.plan, self.clock, case.calls
        per_graph = case.calls_per_graph(plan, self.comm.engine_name)
        callers = [Caller(self.comm, case, item, buffers) for item in inputs]
        steps = [caller.steps(calls_per_graph=per_graph) for caller in callers]
        # Only now: a graph is replayed after others have been captured.
        problems = [caller.check(own) for caller, own in zip(callers, steps, strict=True)]
        agree_on_results(next(filter(None, problems), None), clock)

        groups = [_groups(*parts, per_graph) for parts in zip(steps, inputs, moves, strict=True)]
        from_idle = clock.on_gpu and not (calls.chained or calls.halves)
        plan = self.budget.fitted(plan, groups, clock, from_idle=from_idle)
        times = time_steps(groups, plan, clock, self.on_progress)
        if from_idle:
            for number in range(plan.iters):
                for step in steps[number % len(inputs)]:
                    sample = clock.sample_idle(step.run)
                    times.put(step.variant, step.phase, "idle", sample.time_us)
                    times.put(step.variant, step.phase, "idle host", sample.host_us)
            if calls.prepared:
                clock.barrier()
                _time_idle_loop(steps[0], times, count=plan.iters)
        if calls.prepared and not (calls.graph or calls.halves):
            clock.barrier()
            _time_hot_calls(steps[0], times, count=plan.iters)
        self.comm.check_health()  # replays raise nothing themselves
        return plan, times


def _groups(
    steps: Sequence[Step], item: Input, copies: Moves, per_graph: int | None
) -> list[list[Step]]:
    """Each step of an input, and what it is compared with; a pair is the sum of its parts.

    Where prepared calls are captured, so are the ceilings: launches are in both or in neither.
    """
    others: list[Step] = []
    for (phase, kind), move in {**item.raw, **copies}.items():
        calls = None if kind == "raw" else per_graph
        run = move if calls is None else capture(move, calls).replay
        others.append(Step(variant="", phase=phase, kind=kind, run=run, calls=calls or 1))
    return [
        [step, *(other for other in others if step.begins and other.phase == step.phase)]
        for step in steps
    ]


def time_steps(
    inputs: Sequence[Sequence[Sequence[Step]]],
    plan: Plan,
    clock: Clock,
    on_progress: Callable[[int], None],
) -> Times:
    """Times the steps of inputs that take turns. Collective.

    A group of an input's steps is a step, and what it is compared with: before and after it in
    turns, so that neither side is always first.
    """
    times = Times()
    for number in range(-plan.warmup, plan.iters):
        for step, *others in inputs[number % len(inputs)]:
            for timed in [*others, step] if number % 2 else [step, *others]:
                sample = clock.sample(timed.run)
                if number < 0:
                    continue
                key = (timed.variant, timed.phase)
                times.put(*key, timed.kind, sample.time_us / timed.calls)
                if timed.kind == "time":
                    times.put(*key, "host", sample.host_us / timed.calls)
                    times.put(*key, "memory", sample.memory_bytes)
        if number >= 0:
            on_progress(number + 1)
    return times


def _time_idle_loop(steps: Sequence[Step], times: Times, *, count: int) -> None:
    """Pairs one after the other, each from an idle device; the one before has aligned the ranks."""
    [pair] = [step for step in steps if step.phase == "pair"]
    for number in range(-_HOT_WARMUP, count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        pair.run()
        torch.cuda.synchronize()
        if number >= 0:
            times.put(pair.variant, "pair", "idle loop", (time.perf_counter() - begin) * 1e6)


def _time_hot_calls(steps: Sequence[Step], times: Times, *, count: int) -> None:
    """Host times of dispatches and combines one after the other, nothing in between."""
    dispatch, combine, pair = steps
    for number in range(-_HOT_WARMUP, count):
        begin = time.perf_counter()
        dispatch.run()
        between = time.perf_counter()
        combine.run()
        end = time.perf_counter()
        if number >= 0:
            for step, took in (
                (dispatch, between - begin),
                (combine, end - between),
                (pair, end - begin),
            ):
                times.put(step.variant, step.phase, "hot host", took * 1e6)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps Python's collector out of the timed calls."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
