"""How much of a dispatch disappears behind a matrix product that runs at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import Input, prepare_inputs
from expertlink.bench.measure import no_garbage_collection, open_communicator, time_steps
from expertlink.bench.records import Checked, Environment, Summary, slowest_rank, summarize
from expertlink.bench.steps import Step
from expertlink.launch import RankContext

TIMES = ("gemm", "dispatch", "both")


@dataclass(frozen=True, kw_only=True)
class OverlapRecord(Checked):
    """One case. Times in microseconds, of the slowest rank of each iteration."""

    signed = ("hidden",)

    kind: str = "overlap"
    case: dict[str, Any]  # fields of the `Case`
    engine: str
    gemm: list[int]  # m, n, k of the bfloat16 product
    gemm_us: Summary  # the product alone
    dispatch_us: Summary  # the dispatch alone
    both_us: Summary  # `dispatch_async`, the product on the caller's stream, `wait()`
    hidden: float  # `hidden_part` of the medians
    environment: Environment
    iterations: int
    seed: int
    command: str


def hidden_part(gemm_us: float, dispatch_us: float, both_us: float) -> float:
    """What overlapping saves, as a part of what it could save at best: 1 where both take as long
    as the longer one alone, 0 where as long as one after the other, less where they hinder it."""
    shorter = min(gemm_us, dispatch_us)
    return (gemm_us + dispatch_us - both_us) / shorter if shorter > 0 else 0.0


def measure_overlaps(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[OverlapRecord]]:
    """Times a product, a dispatch, and both at once. See `measure.measure_batch`."""
    clock = Clock(context.device, control)
    for case in cases:
        record = _measure(context, case, plan, clock, on_progress)
        yield [record] if context.rank == 0 else []


def _measure(
    context: RankContext, case: Case, plan: Plan, clock: Clock, on_progress: Callable[[int], None]
) -> OverlapRecord:
    assert plan.gemm is not None
    m, n, k = plan.gemm
    a_MK = torch.randn(m, k, device=context.device, dtype=torch.bfloat16)
    b_KN = torch.randn(k, n, device=context.device, dtype=torch.bfloat16)
    c_MN = a_MK.new_empty(m, n)
    cached = case.calls.cached
    with torch.no_grad(), open_communicator(context, case, plan) as comm:

        def gemm() -> None:
            torch.mm(a_MK, b_KN, out=c_MN)

        def steps_of(item: Input) -> list[list[Step]]:
            weights_TK = None if cached else item.topk_weights_TK
            given = (item.rows, item.topk_ids_TK, weights_TK, item.scales)
            handle = item.handle if cached else None

            def dispatch() -> object:
                return comm.dispatch(*given, previous_handle=handle)

            def both() -> None:
                request = comm.dispatch_async(*given, previous_handle=handle)
                gemm()
                request.wait()

            runs = zip(TIMES, (gemm, dispatch, both), strict=True)
            return [[Step(variant="", phase=name, run=run)] for name, run in runs]

        steps = [steps_of(item) for item in prepare_inputs(comm, case, plan, clock)]
        with no_garbage_collection():
            times = time_steps(steps, plan, clock, on_progress).gather(clock)
        engine = comm.engine_name
    gemm_us, dispatch_us, both_us = (
        summarize(slowest_rank(times["", name, "time"])) for name in TIMES
    )
    medians = (gemm_us.median, dispatch_us.median, both_us.median)
    return OverlapRecord(
        case=asdict(case),
        engine=engine,
        gemm=[m, n, k],
        gemm_us=gemm_us,
        dispatch_us=dispatch_us,
        both_us=both_us,
        hidden=round(hidden_part(*medians), 4),
        environment=describe_environment(context.device),
        iterations=plan.iters,
        seed=plan.seed,
        command=plan.command,
    )
