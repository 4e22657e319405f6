"""How much of a dispatch disappears behind a matrix product that runs at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from expertlink.bench.carve_out import product_sms, products_on
from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import Input, prepare_inputs
from expertlink.bench.measure import no_garbage_collection, open_communicator, time_steps
from expertlink.bench.records import Checked, Environment, Summary, slowest_rank, summarize
from expertlink.bench.steps import Step
from expertlink.launch import RankContext

TIMES = ("gemm", "dispatch", "both")
LIMITED_TIMES = ("limited_gemm", "limited_both")


@dataclass(frozen=True, kw_only=True)
class OverlapRecord(Checked):
    """One case. Times in microseconds, of the slowest rank of each iteration."""

    signed = ("hidden", "limited_hidden")

    kind: str = "overlap"
    case: dict[str, Any]  # fields of the `Case`
    engine: str
    gemm: list[int]  # m, n, k of the bfloat16 product
    gemm_us: Summary  # the product alone
    dispatch_us: Summary  # the dispatch alone
    both_us: Summary  # `dispatch_async`, the product on the caller's stream, `wait()`
    hidden: float  # `hidden_part` of the medians
    # The same with a product that leaves the dispatch its SMs: how many it was limited to. None: it
    # cannot be limited, see `carve_out.product_sms`.
    compute_sms: int | None = None
    limited_gemm_us: Summary | None = None
    limited_both_us: Summary | None = None
    limited_hidden: float | None = None
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
        compute_sms = product_sms(comm, ("dispatch",))

        def gemm() -> None:
            torch.mm(a_MK, b_KN, out=c_MN)

        def limited_gemm() -> None:
            with products_on(compute_sms, context.device):
                gemm()

        def steps_of(item: Input) -> list[list[Step]]:
            weights_TK = None if cached else item.topk_weights_TK
            given = (item.rows, item.topk_ids_TK, weights_TK, item.scales)
            handle = item.handle if cached else None

            def dispatch() -> object:
                return comm.dispatch(*given, previous_handle=handle)

            def both(product: Callable[[], None] = gemm) -> None:
                request = comm.dispatch_async(*given, previous_handle=handle)
                product()
                request.wait()

            runs = dict(zip(TIMES, (gemm, dispatch, both), strict=True))
            if compute_sms is not None:
                limited = (limited_gemm, partial(both, limited_gemm))
                runs |= dict(zip(LIMITED_TIMES, limited, strict=True))
            return [[Step(variant="", phase=name, run=run)] for name, run in runs.items()]

        steps = [steps_of(item) for item in prepare_inputs(comm, case, plan, clock)]
        with no_garbage_collection():
            times = time_steps(steps, plan, clock, on_progress).gather(clock)
        engine = comm.engine_name
    summaries = {
        name: summarize(slowest_rank(times["", name, "time"]))
        for name in (*TIMES, *LIMITED_TIMES)
        if ("", name, "time") in times
    }
    medians = {name: summary.median for name, summary in summaries.items()}
    fields: dict[str, Any] = {f"{name}_us": summary for name, summary in summaries.items()}
    limited_hidden = None
    if compute_sms is not None:
        limited = (medians["limited_gemm"], medians["dispatch"], medians["limited_both"])
        limited_hidden = round(hidden_part(*limited), 4)
    return OverlapRecord(
        case=asdict(case),
        engine=engine,
        gemm=[m, n, k],
        **fields,
        hidden=round(hidden_part(*(medians[name] for name in TIMES)), 4),
        compute_sms=compute_sms,
        limited_hidden=limited_hidden,
        environment=describe_environment(context.device),
        iterations=plan.iters,
        seed=plan.seed,
        command=plan.command,
    )
