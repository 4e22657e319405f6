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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from expertlink.bench.cases import RECV, VARIANTS, Case, Plan, recorded_as
from expertlink.bench.ceilings import Ceilings
from expertlink.bench.clock import Clock, Times, capture
from expertlink.bench.inputs import Input, agree_on_results, prepare_inputs
from expertlink.bench.measured import Measured, gather_traffic, make_record
from expertlink.bench.records import PHASES, Record
from expertlink.bench.steps import Caller, Step, graph_size
from expertlink.communicator import MoECommunicator
from expertlink.config import MoECommunicatorConfig
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext
from expertlink.types import DispatchBuffers

Copies = dict[str, dict[str, Callable[[], None]]]
"""By phase and kind, what moves the rows of an input."""
_HOT_WARMUP = 3
_NOTHING_LEAVES = "rows are there before a receiving half begins"


def measure_batch(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[Record]]:
    """Checks, then times cases that share a communicator. Collective over the default group.

    Args:
        context: this rank.
        cases: what to measure; their `ranks` is the size of the group.
        plan: how.
        on_progress: called with 1 after every timed iteration.
        control: group of all ranks, with gloo, in which hosts meet and exchange times; its
            time-out bounds the wait for a rank that failed. None: the default group.

    Yields:
        For every case in turn, on rank 0 a record for each of dispatch, combine and pair, or for
        each half of dispatch and combine; on the others nothing.

    Raises:
        WrongResultError: the result was wrong on some rank; raised on every rank.
        ExpertlinkError: the library refused the case or lost a peer.
    """
    with open_communicator(context, cases[0], plan) as comm:
        clock = Clock(context.device, control)
        with Ceilings(cases[0], plan, clock) as ceilings, no_garbage_collection():
            batch = _Batch(plan, on_progress, clock, comm, ceilings)
            buffers = comm.create_buffers() if cases[0].calls.prepared else None
            for _, group in groupby(cases, key=lambda case: case.situation):
                yield from batch.measure(list(group), buffers)


def open_communicator(context: RankContext, case: Case, plan: Plan) -> MoECommunicator:
    """The communicator of a case.

    Raises:
        ConfigurationError: the engine that serves the case does not have its variant.
    """
    config = MoECommunicatorConfig(
        device=context.device,
        num_experts=case.experts,
        hidden_size=case.hidden,
        topk=case.topk,
        max_tokens_per_rank=case.max_tokens_per_rank or case.tokens,
        dtype=case.torch_dtype,
        mode="ll" if case.mode == "ll" else "ht",
        engine=case.engine,  # pyright: ignore[reportArgumentType]
        output_layout=case.layout,  # pyright: ignore[reportArgumentType]
        quantization=case.quantization,  # pyright: ignore[reportArgumentType]
        num_sms_dispatch=case.num_sms_dispatch,
        num_sms_combine=case.num_sms_combine,
        timeout_s=plan.timeout_s,
        startup_timeout_s=plan.timeout_s,
        zero_copy=case.calls.zero_copy,
        static_shapes=case.calls.static,
    )
    comm = MoECommunicator(config)
    try:
        _check_engine(comm, case)
    except ConfigurationError:
        comm.close()
        raise
    return comm


def _check_engine(comm: MoECommunicator, case: Case) -> None:
    """Refuses a variant that the communicator's engine does not have."""
    if not case.calls.needs_nvlink or comm.engine_name == "nvlink":
        return
    others = [name for name, calls in VARIANTS[case.mode].items() if not calls.needs_nvlink]
    raise ConfigurationError(
        f"variant={case.variant!r} cannot be measured with the {comm.engine_name} engine "
        f"({comm.engine_reason}); accepted: {', '.join(others)}"
    )


@dataclass(frozen=True)
class _Other:
    """What a phase is compared with: its call, and how many times that moves the bytes."""

    kind: str
    run: Callable[[], Any]
    calls: int = 1


@dataclass(frozen=True)
class _Batch:
    """What the cases of one communicator have in common."""

    plan: Plan
    on_progress: Callable[[int], None]
    clock: Clock
    comm: MoECommunicator
    ceilings: Ceilings

    def measure(
        self, cases: Sequence[Case], buffers: DispatchBuffers | None
    ) -> Iterator[list[Record]]:
        """Measures cases that differ in their variant only."""
        # As in serving: with gradients enabled, padding would be zeroed for the experts' backward.
        with torch.no_grad():
            inputs = prepare_inputs(self.comm, cases[0], self.plan, self.clock)
        copies = self.ceilings.calls([item.wire for item in inputs])
        gc.collect()
        for case in cases:
            _check_engine(self.comm, case)
            with torch.no_grad():
                times = self._time(case, inputs, copies, buffers)
            yield self._records(case, inputs, times)

    def _time(
        self, case: Case, inputs: list[Input], copies: list[Copies], buffers: DispatchBuffers | None
    ) -> dict[str, Times]:
        """Times by the name of the variant in records."""
        plan, clock = self.plan, self.clock
        calls = graph_size(case, plan, self.comm.engine_name)
        steps = self._checked_steps(case, inputs, buffers, calls)
        others = [_others(item, own, calls) for item, own in zip(inputs, copies, strict=True)]
        times = {name: Times() for name in recorded_as(case.variant)}
        for number in range(-plan.warmup, plan.iters):
            index = number % len(inputs)
            kept = times if number >= 0 else {name: Times() for name in times}
            for step in steps[index]:
                # Before and after the call in turns, so that neither side is always first.
                if number % 2 and step.begins:
                    self._time_others(others[index][step.phase], step.phase, kept)
                sample = clock.sample(step.run)
                kept[step.variant].put_sample(step.phase, sample, calls=step.calls)
                if number % 2 == 0 and step.begins:
                    self._time_others(others[index][step.phase], step.phase, kept)
            if number >= 0:
                self.on_progress(1)
        if clock.on_gpu and not (case.calls.chained or case.calls.halves):
            for number in range(plan.iters):
                for step in steps[number % len(inputs)]:
                    sample = clock.sample_idle(step.run)
                    times[step.variant].put(step.phase, "idle", sample.time_us)
                    times[step.variant].put(step.phase, "idle host", sample.host_us)
            if case.calls.prepared:
                clock.barrier()
                _time_idle_loop(steps[0], times[case.variant], count=plan.iters)
        if case.calls.prepared and not (case.calls.graph or case.calls.halves):
            clock.barrier()
            _time_hot_calls(steps[0], times[case.variant], count=plan.iters)
        self.comm.check_health()  # replays raise nothing themselves
        return times

    def _checked_steps(
        self, case: Case, inputs: list[Input], buffers: DispatchBuffers | None, calls: int | None
    ) -> list[list[Step]]:
        """The steps of every input, after each has given the right result."""
        callers = [Caller(self.comm, case, item, buffers) for item in inputs]
        steps = [caller.steps(calls_per_graph=calls) for caller in callers]
        # Only now: a graph is replayed after others have been captured.
        problems = [caller.check(own) for caller, own in zip(callers, steps, strict=True)]
        agree_on_results(next(filter(None, problems), None), self.clock)
        return steps

    def _time_others(self, others: list[_Other], phase: str, times: dict[str, Times]) -> None:
        for other in others:
            time_us = self.clock.sample(other.run).time_us / other.calls
            for own in times.values():
                own.put(phase, other.kind, time_us)

    def _records(self, case: Case, inputs: list[Input], times: dict[str, Times]) -> list[Record]:
        note = self.ceilings.note
        traffic = gather_traffic([item.wire for item in inputs], case, self.clock)
        records: list[Record] = []
        for name, own in times.items():
            measured = Measured(
                device=self.clock.device,
                engine=self.comm.engine_name,
                aligned=self.clock.aligned,
                num_inputs=len(inputs),
                times=own.gather(self.clock),
                traffic=traffic,
                ceiling_note=_NOTHING_LEAVES if name == RECV and note is None else note,
                variant=name,
                calls_per_graph=graph_size(case, self.plan, self.comm.engine_name),
                floor=None if case.calls.halves else self.ceilings.floor,
                on_wire=name != RECV,
            )
            phases = [phase for phase in PHASES if (phase, "time") in measured.times]
            if self.comm.rank == 0:
                records += [make_record(phase, case, self.plan, measured) for phase in phases]
        return records


def _others(item: Input, copies: Copies, calls: int | None) -> dict[str, list[_Other]]:
    """What the phases of an input are compared with; a pair is the sum of its parts.

    Where prepared calls are captured, so are the ceilings: launches are in both or in neither.
    """
    others: dict[str, list[_Other]] = {"pair": []}
    for phase, raw in item.raw.items():
        others[phase] = [_Other("raw", raw)]
        for kind, call in copies.get(phase, {}).items():
            run = call if calls is None else capture(call, calls).replay
            others[phase].append(_Other(kind, run, calls or 1))
    return others


def _time_idle_loop(steps: Sequence[Step], times: Times, *, count: int) -> None:
    """Pairs one after the other, each from an idle device; the one before has aligned the ranks."""
    [pair] = [step for step in steps if step.phase == "pair"]
    for number in range(-_HOT_WARMUP, count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        pair.run()
        torch.cuda.synchronize()
        if number >= 0:
            times.put("pair", "idle loop", (time.perf_counter() - begin) * 1e6)


def _time_hot_calls(steps: Sequence[Step], times: Times, *, count: int) -> None:
    """Host times of dispatches and combines one after the other, nothing in between."""
    run = {step.phase: step.run for step in steps}
    for number in range(-_HOT_WARMUP, count):
        begin = time.perf_counter()
        run["dispatch"]()
        between = time.perf_counter()
        run["combine"]()
        end = time.perf_counter()
        if number >= 0:
            times.put("dispatch", "hot host", (between - begin) * 1e6)
            times.put("combine", "hot host", (end - between) * 1e6)
            times.put("pair", "hot host", (end - begin) * 1e6)


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
