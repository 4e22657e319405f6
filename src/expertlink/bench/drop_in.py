"""The drop-in for `deep_ep`: what its calls take, and what they cost the host beside the library's
own calls (`expertlink bench --drop-in`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock, TimesOfRanks, capture
from expertlink.bench.drop_in_calls import DropIn, TimedCall
from expertlink.bench.drop_in_cases import DROP_IN_VARIANTS, FORMATS, INTERFACES, DropInCase
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import agree_on_results, draw_input
from expertlink.bench.measure import no_garbage_collection, time_steps
from expertlink.bench.records import (
    Checked,
    Environment,
    RecordError,
    Summary,
    slowest_rank,
    summarize,
)
from expertlink.bench.steps import Step
from expertlink.bench.stopwatch import IN_A_ROW, Stopwatch
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.launch import RankContext

_MOST_INPUTS = 2  # low-latency rows are padded: an input may take gigabytes
_SAME = ("interface", "variant", "quantization", "uneven", "ranks", "tokens", "hidden", "topk")
_SAME += ("experts", "max_tokens_per_rank", "hosts", "rail", "rail_ctas")


@dataclass(frozen=True, kw_only=True)
class DropInRecord(Checked):
    """One call of one case. Times in microseconds, of the slowest rank of each iteration."""

    signed = ("added_us",)

    kind: str = "drop_in"
    engine: str  # that moved the rows
    interface: str  # one of `INTERFACES`
    call: str  # see `drop_in_calls`
    variant: str  # one of `DROP_IN_VARIANTS`
    quantization: str | None
    routing: str
    uneven: bool
    ranks: int
    hosts: int = 1  # that the drop-in found, of equally many ranks
    rail: str | None = None  # what joins them
    rail_ctas: int | None = None  # most thread blocks of NCCL's kernels there
    tokens: int  # of the rank that has most
    hidden: int
    topk: int
    experts: int
    max_tokens_per_rank: int | None = None  # M of low-latency calls
    num_sms: int | None = None  # that the call may occupy; None: the engine's choice
    time_us: Summary  # from inputs ready to outputs usable; of a graph, over its calls
    idle_us: Summary | None = None  # CUDA, eager: from an idle device, launches included
    loop_us: float | None = None  # eager: a call in a tight loop, its work included: mean
    # Eager. Host time of a call in a tight loop, of the rank that takes longest: medians; without
    # the wait for counts on `nvlink` and `hybrid`, with all that ranks exchange on `collective`.
    # The library's own call takes turns with it, with its own number of SMs.
    host_us: float | None = None
    library_host_us: float | None = None
    added_us: float | None = None  # the difference of the two
    calls_per_graph: int | None = None
    environment: Environment
    aligned: str  # as in `Record`
    iterations: int
    inputs: int
    seed: int
    command: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, accepted in (
            ("interface", INTERFACES),
            ("variant", tuple(DROP_IN_VARIANTS)),
            ("quantization", FORMATS),
        ):
            if getattr(self, name) not in accepted:
                raise RecordError(f"{name} is {getattr(self, name)!r}, not one of {accepted}")

    def key(self) -> tuple[object, ...]:
        """What was measured, without when and how fast."""
        names = (*_SAME, "engine", "call", "routing", "num_sms")
        return (*(getattr(self, name) for name in names), self.environment.hardware)


def measure_drop_in(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[DropInRecord]]:
    """Checks, then times calls of the drop-in. See `measure.measure_batch`."""
    clock = Clock(context.device, control)
    for case in cases:
        assert isinstance(case, DropInCase)
        with (
            torch.no_grad(),
            closing(DropIn(case, context.device)) as drop_in,
            no_garbage_collection(),
        ):
            records = _measure(context, case, plan, clock, drop_in, on_progress)
            if clock.on_gpu:
                torch.cuda.synchronize()
            clock.barrier()
        yield records if context.rank == 0 else []


def _measure(
    context: RankContext,
    case: DropInCase,
    plan: Plan,
    clock: Clock,
    drop_in: DropIn,
    on_progress: Callable[[int], None],
) -> list[DropInRecord]:
    count = min(plan.inputs, _MOST_INPUTS)
    drawn = [
        draw_input(case, plan.seed, index, rank=context.rank, device=context.device)
        for index in range(count)
    ]
    made = [drop_in.calls(one) for one in drawn]
    agree_on_results(next(filter(None, (one.problem for one in made)), None), clock)
    eager = not case.calls.graph

    def step(call: TimedCall) -> Step:
        if eager:
            return Step(variant=case.variant, phase=call.name, run=call.run)
        graph = capture(call.run, plan.calls_per_graph)
        calls = plan.calls_per_graph
        return Step(variant=case.variant, phase=call.name, run=graph.replay, calls=calls)

    steps = [[[step(call)] for call in one.calls] for one in made]
    collected = time_steps(steps, plan, clock, on_progress)
    if eager and clock.on_gpu:
        for number in range(plan.iters):
            for call in made[number % count].calls:
                sample = clock.sample_idle(call.run)
                collected.put(case.variant, call.name, "idle", sample.time_us)
    times = collected.gather(clock)
    tight = [_in_a_loop(call, plan, clock) if eager else {} for call in made[0].calls]
    normal = ("combine", "dispatch", "pair")

    def record(call: TimedCall, loop: dict[str, Any]) -> DropInRecord:
        limited = case.interface != "low_latency" and call.name.startswith(normal)
        return DropInRecord(
            engine=made[0].engine,
            call=call.name,
            routing=case.routing_label,
            **{name: getattr(case, name) for name in _SAME},
            num_sms=drop_in.num_sms if limited else None,
            time_us=summarize(slowest_rank(times[case.variant, call.name, "time"])),
            idle_us=_optional(times, case.variant, call.name),
            **loop,
            calls_per_graph=None if eager else plan.calls_per_graph,
            environment=describe_environment(clock.device),
            aligned="device" if clock.on_gpu else "host",
            iterations=plan.iters,
            inputs=count,
            seed=plan.seed,
            command=plan.command,
        )

    return [record(call, loop) for call, loop in zip(made[0].calls, tight, strict=True)]


def _optional(times: TimesOfRanks, variant: str, name: str) -> Summary | None:
    found = times.get((variant, name, "idle"))
    return None if found is None else summarize(slowest_rank(found))


def _in_a_loop(call: TimedCall, plan: Plan, clock: Clock) -> dict[str, Any]:
    """The fields of a record that come from calls one after the other. Collective."""
    waits = Stopwatch()
    with waits.around(Watchdog, "wait_for_mail"):
        hosts = {"host_us": _host_us(call.run, plan, clock, waits)}
        loop = _loop_us(call.run, plan, clock)
        if call.own is not None:
            # Twice each, in turns: neither is always the warmer one.
            own = [_host_us(call.own, plan, clock, waits)]
            again = _host_us(call.run, plan, clock, waits)
            own.append(_host_us(call.own, plan, clock, waits))
            hosts["host_us"] = (hosts["host_us"] + again) / 2
            hosts["library_host_us"] = sum(own) / 2
    slowest = clock.gather(torch.tensor([loop, *hosts.values()], dtype=torch.float64))
    found = slowest[int(slowest[:, 1].argmax())].tolist()
    found[0] = float(slowest[:, 0].max())
    fields = dict(zip(("loop_us", *hosts), (round(value, 2) for value in found), strict=True))
    if "library_host_us" in fields:
        fields["added_us"] = round(fields["host_us"] - fields["library_host_us"], 2)
    return fields


def _host_us(call: Callable[[], object], plan: Plan, clock: Clock, waits: Stopwatch) -> float:
    """Median microseconds until a call has returned, without its wait for counts."""
    found: list[float] = []
    for number in range(-plan.warmup, plan.iters):
        if number % IN_A_ROW == 0 or number == -plan.warmup:
            _meet(clock)
        waits.read()
        begin = time.perf_counter()
        call()
        took = time.perf_counter() - begin
        if number >= 0:
            found.append(1e6 * max(took - waits.read(), 0.0))
    _meet(clock)
    return median(found)


def _loop_us(call: Callable[[], object], plan: Plan, clock: Clock) -> float:
    """Mean microseconds of calls one after the other, until the work of all is done."""
    _meet(clock)
    begin = time.perf_counter()
    count = min(IN_A_ROW, plan.iters)
    for _ in range(count):
        call()
    if clock.on_gpu:
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begin) / count


def _meet(clock: Clock) -> None:
    """All work of this rank is done, and all ranks have come here."""
    if clock.on_gpu:
        torch.cuda.synchronize()
    clock.barrier()
