"""Measures the low-latency variants: prepared calls, eager and in graphs, whole and in halves.

Cases that can share a communicator do, and those that differ in nothing but their variant share
inputs and ceilings as well. What is timed is the same as if each had its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import PHASES as COMPARED_PHASES
from expertlink.bench.ceilings import Ceilings
from expertlink.bench.clocks import Clock, host_barrier, make_clock
from expertlink.bench.floor import Yardstick
from expertlink.bench.graphs import capture_repeated
from expertlink.bench.inputs import Input, agree_on_results, prepare_inputs
from expertlink.bench.measure import check_engine, no_garbage_collection, open_communicator
from expertlink.bench.prepared import Caller, Step, graph_size
from expertlink.bench.records import PHASES, Record
from expertlink.bench.results import Measured, gather_traffic, make_record
from expertlink.bench.times import Times
from expertlink.bench.variants import RECV, recorded_as
from expertlink.communicator import MoECommunicator
from expertlink.launch import RankContext
from expertlink.types import DispatchBuffers

_HOT_WARMUP = 3
_NOTHING_LEAVES = "rows are there before a receiving half begins"


def measure_latency(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[Record]]:
    """Checks, then times cases with prepared outputs that share a communicator. Collective.

    Arguments and errors as for `measure.measure_case`.

    Yields:
        For every case in turn, on rank 0 a record for each phase, or for each half of dispatch
        and combine; on the others nothing.
    """
    clock = make_clock(context.device, control)
    with (
        open_communicator(context, cases[0], plan) as comm,
        Yardstick(cases[0], plan, device=context.device, clock=clock, control=control) as yardstick,
    ):
        bench = _Bench(context, plan, control, on_progress, clock, comm, yardstick)
        buffers = comm.create_buffers()
        for situation, group in groupby(cases, key=lambda case: case.situation):
            yield from bench.measure(situation, list(group), buffers)


@dataclass(frozen=True)
class _Bench:
    """What the cases of one communicator have in common."""

    context: RankContext
    plan: Plan
    control: dist.ProcessGroup | None
    on_progress: Callable[[int], None]
    clock: Clock
    comm: MoECommunicator
    yardstick: Yardstick

    def measure(
        self, situation: Case, cases: Sequence[Case], buffers: DispatchBuffers
    ) -> Iterator[list[Record]]:
        """Measures cases that differ in their variant only."""
        device, control = self.context.device, self.control
        with torch.no_grad():
            inputs = prepare_inputs(self.comm, situation, self.plan, device, control)
        with (
            Ceilings(
                [item.wire for item in inputs],
                device=device,
                control=control,
                num_sms=self.plan.ceiling_num_sms,
                memory=self.yardstick.memory,
            ) as ceilings,
            no_garbage_collection(),
        ):
            for case in cases:
                check_engine(self.comm, case)
                with torch.no_grad():
                    times = self._time(case, inputs, ceilings, buffers)
                yield self._records(case, inputs, ceilings.note, times)

    def _time(
        self, case: Case, inputs: list[Input], ceilings: Ceilings, buffers: DispatchBuffers
    ) -> dict[str, Times]:
        """Times by the name of the variant in records."""
        plan = self.plan
        calls = graph_size(case, plan, self.comm.engine_name)
        steps = self._checked_steps(case, inputs, buffers, calls)
        # Launches are in what is compared with as they are in what is measured.
        compared = [
            {
                (phase, kind): call if calls is None else capture_repeated(call, calls).replay
                for phase in COMPARED_PHASES
                for kind, call in ceilings.calls(index, phase).items()
            }
            for index in range(len(inputs))
        ]
        times = {name: Times() for name in recorded_as(case.variant)}
        for number in range(-plan.warmup, plan.iters):
            index = number % len(inputs)
            kept = times if number >= 0 else {name: Times() for name in times}
            others = _Others(self.clock, inputs[index], compared[index], calls or 1, kept)
            for step in steps[index]:
                if number % 2 and step.begins:
                    others.sample(step.phase)
                sample = self.clock.sample(step.run)
                kept[step.variant].put_sample(step.phase, sample, calls=step.calls)
                if number % 2 == 0 and step.begins:
                    others.sample(step.phase)
            if number >= 0:
                self.on_progress(1)
        if self.clock.has_idle and not (case.calls.chained or case.calls.halves):
            for number in range(plan.iters):
                for step in steps[number % len(inputs)]:
                    sample = self.clock.sample_idle(step.run)
                    times[step.variant].put(step.phase, "idle", sample.time_us)
                    times[step.variant].put(step.phase, "idle host", sample.host_us)
            for step in steps[0]:
                if step.phase == "pair":
                    host_barrier(self.control)
                    _time_idle_loop(step, times[step.variant], count=plan.iters)
        if not (case.calls.graph or case.calls.halves):
            host_barrier(self.control)
            _time_hot_calls(steps[0], times[case.variant], count=plan.iters)
        self.comm.check_health()  # replays raise nothing themselves
        return times

    def _checked_steps(
        self, case: Case, inputs: list[Input], buffers: DispatchBuffers, calls: int | None
    ) -> list[list[Step]]:
        """The steps of every input, after each has given the right result."""
        callers = [Caller(self.comm, case, item, buffers) for item in inputs]
        steps = [caller.steps(calls_per_graph=calls) for caller in callers]
        # Only now: a graph is replayed after others have been captured.
        problems = [caller.check(own) for caller, own in zip(callers, steps, strict=True)]
        agree_on_results(next(filter(None, problems), None), self.control)
        return steps

    def _records(
        self, case: Case, inputs: list[Input], note: str | None, times: dict[str, Times]
    ) -> list[Record]:
        traffic = gather_traffic(inputs, case, self.control)
        records: list[Record] = []
        for name, own in times.items():
            gathered = own.gather(self.control)
            measured = Measured(
                device=self.context.device,
                engine_name=self.comm.engine_name,
                aligned=self.clock.aligned,
                num_inputs=len(inputs),
                times=gathered,
                traffic=traffic,
                ceiling_note=_NOTHING_LEAVES if name == RECV and note is None else note,
                variant=name,
                calls_per_graph=graph_size(case, self.plan, self.comm.engine_name),
                floor=None if case.calls.halves else self.yardstick.floor,
                on_wire=name != RECV,
            )
            if self.context.rank == 0:
                phases = [phase for phase in PHASES if (phase, "time") in gathered]
                records += [make_record(phase, case, self.plan, measured) for phase in phases]
        return records


@dataclass(frozen=True)
class _Others:
    """What the phases of one input are compared with."""

    clock: Clock
    item: Input
    compared: dict[tuple[str, str], Callable[[], Any]]
    calls: int
    times: dict[str, Times]

    def sample(self, phase: str) -> None:
        """Times the raw exchange and the ceilings of a phase; a pair is the sum of its parts."""
        if phase == "pair":
            return
        raw = self.item.raw
        self._put(phase, "raw", raw.dispatch if phase == "dispatch" else raw.combine, 1)
        for (of, kind), call in self.compared.items():
            if of == phase:
                self._put(phase, kind, call, self.calls)

    def _put(self, phase: str, kind: str, call: Callable[[], Any], calls: int) -> None:
        time_us = self.clock.sample(call).time_us / calls
        for times in self.times.values():
            times.put(phase, kind, time_us)


def _time_idle_loop(step: Step, times: Times, *, count: int) -> None:
    """Calls one after the other, each from an idle device; the one before has aligned the ranks."""
    for number in range(-_HOT_WARMUP, count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step.run()
        torch.cuda.synchronize()
        if number >= 0:
            times.put(step.phase, "idle loop", (time.perf_counter() - begin) * 1e6)


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
