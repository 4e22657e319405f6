"""How much of a dispatch disappears behind a matrix product that runs at the same time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import Input, prepare_inputs
from expertlink.bench.measure import no_garbage_collection, open_communicator
from expertlink.bench.records import Environment, Summary, slowest_rank, summarize
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext
from expertlink.types import DispatchHandle

TIMES = ("gemm", "dispatch", "both")


@dataclass(frozen=True, kw_only=True)
class OverlapRecord:
    """One case. Times in microseconds, of the slowest rank of each iteration."""

    kind: str = "overlap"
    case: dict[str, Any]
    """Fields of the `Case`."""
    engine: str
    gemm: tuple[int, int, int]
    """m, n, k of the bfloat16 product."""
    gemm_us: Summary
    """The product alone."""
    dispatch_us: Summary
    """The dispatch alone."""
    both_us: Summary
    """`dispatch_async`, the product on the caller's stream, `wait()`."""
    hidden: float
    """`hidden_part` of the medians."""
    environment: Environment
    iterations: int
    seed: int
    command: str

    def to_json(self) -> str:
        """The record in one line."""
        return json.dumps(asdict(self), allow_nan=False)


def read_overlaps(path: Path) -> list[OverlapRecord]:
    """What `to_json` wrote, line by line."""
    records: list[OverlapRecord] = []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        values |= {f"{name}_us": Summary(**values[f"{name}_us"]) for name in TIMES}
        values["environment"] = Environment(**values["environment"])
        records.append(OverlapRecord(**values))
    return records


def hidden_part(gemm_us: float, dispatch_us: float, both_us: float) -> float:
    """What overlapping saves, as a part of what it could save at best.

    1: both take as long as the longer one alone; 0: as long as one after the other; negative: they
    hinder each other.
    """
    shorter = min(gemm_us, dispatch_us)
    return (gemm_us + dispatch_us - both_us) / shorter if shorter > 0 else 0.0


def check_overlap(cases: Sequence[Case]) -> None:
    """Refuses cases whose dispatch cannot run beside a product.

    Raises:
        ConfigurationError: a variant is made of graphs or of prepared calls.
    """
    for case in cases:
        if case.calls.graph or case.calls.prepared:
            raise ConfigurationError(
                f"variant={case.variant!r} cannot be measured with --overlap; accepted: variants "
                "that call dispatch_async themselves"
            )


def measure_overlaps(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[OverlapRecord]]:
    """Times a product, a dispatch, and both at once. Arguments as for `measure.measure_batch`.

    Yields:
        For every case, on rank 0 one record; on the others nothing.
    """
    clock = Clock(context.device, control)
    for case in cases:
        engine, times_IK = _time(context, case, plan, clock, on_progress)
        everyone_RIK = clock.gather(torch.tensor(times_IK, dtype=torch.float64))
        record = _record(case, plan, engine, everyone_RIK, context.device)
        yield [record] if context.rank == 0 else []


def _time(
    context: RankContext, case: Case, plan: Plan, clock: Clock, on_progress: Callable[[int], None]
) -> tuple[str, list[list[float]]]:
    """The engine that served the case, and times of product, dispatch and both per iteration."""
    assert plan.gemm is not None
    m, n, k = plan.gemm
    a_MK = torch.randn(m, k, device=context.device, dtype=torch.bfloat16)
    b_KN = torch.randn(k, n, device=context.device, dtype=torch.bfloat16)
    c_MN = a_MK.new_empty(m, n)
    times_IK: list[list[float]] = []
    with torch.no_grad(), open_communicator(context, case, plan) as comm:
        inputs = prepare_inputs(comm, case, plan, clock)

        def weights_of(item: Input) -> torch.Tensor | None:
            return None if case.calls.cached else item.topk_weights_TK

        def handle_of(item: Input) -> DispatchHandle | None:
            return item.handle if case.calls.cached else None

        def gemm() -> None:
            torch.mm(a_MK, b_KN, out=c_MN)

        def dispatch(item: Input) -> object:
            given = (item.rows, item.topk_ids_TK, weights_of(item), item.scales)
            return comm.dispatch(*given, previous_handle=handle_of(item))

        def both(item: Input) -> None:
            given = (item.rows, item.topk_ids_TK, weights_of(item), item.scales)
            request = comm.dispatch_async(*given, previous_handle=handle_of(item))
            gemm()
            request.wait()

        with no_garbage_collection():
            for number in range(-plan.warmup, plan.iters):
                item = inputs[number % len(inputs)]
                calls = (gemm, lambda item=item: dispatch(item), lambda item=item: both(item))
                samples = [clock.sample(call) for call in calls]
                if number >= 0:
                    times_IK.append([sample.time_us for sample in samples])
                    on_progress(1)
        return comm.engine_name, times_IK


def _record(
    case: Case, plan: Plan, engine: str, times_RIK: torch.Tensor, device: torch.device
) -> OverlapRecord:
    assert plan.gemm is not None
    gemm, dispatch, both = (summarize(slowest_rank(times_RI)) for times_RI in times_RIK.unbind(-1))
    return OverlapRecord(
        case=asdict(case),
        engine=engine,
        gemm=plan.gemm,
        gemm_us=gemm,
        dispatch_us=dispatch,
        both_us=both,
        hidden=round(hidden_part(gemm.median, dispatch.median, both.median), 4),
        environment=describe_environment(device),
        iterations=plan.iters,
        seed=plan.seed,
        command=plan.command,
    )
