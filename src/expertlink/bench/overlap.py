"""How much of a dispatch disappears behind a matrix product that runs at the same time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from expertlink.bench.cases import Case, Plan
from expertlink.bench.clocks import gather_on_hosts, make_clock
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import Input, prepare_inputs
from expertlink.bench.measure import dispatch_input, no_garbage_collection, open_communicator
from expertlink.bench.records import Environment
from expertlink.bench.summary import Summary, rounded, slowest_rank, summarize
from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext

DEFAULT_GEMM = {"cpu": (256, 512, 512), "cuda": (8192, 4096, 7168)}
"""m, n, k of the product, by kind of device."""
_TIMES = ("gemm", "dispatch", "both")


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
    """Times a product, a dispatch, and both at once. Arguments as for `measure.measure_cases`.

    Yields:
        For every case, on rank 0 one record; on the others nothing.
    """
    for case in cases:
        yield _measure_overlap(context, case, plan, on_progress, control)


def _measure_overlap(
    context: RankContext,
    case: Case,
    plan: Plan,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None,
) -> list[OverlapRecord]:
    assert plan.gemm is not None
    m, n, k = plan.gemm
    device = context.device
    a_MK = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    b_KN = torch.randn(k, n, device=device, dtype=torch.bfloat16)
    c_MN = a_MK.new_empty(m, n)
    times: list[list[float]] = []
    with torch.no_grad(), open_communicator(context, case, plan) as comm:
        inputs = prepare_inputs(comm, case, plan, device, control)
        clock = make_clock(device, control)

        def gemm() -> None:
            torch.mm(a_MK, b_KN, out=c_MN)

        def both(item: Input) -> None:
            request = _dispatch_async(comm, case, item)
            gemm()
            request.wait()

        with no_garbage_collection():
            for number in range(-plan.warmup, plan.iters):
                item = inputs[number % len(inputs)]
                samples = (
                    clock.sample(gemm),
                    clock.sample(lambda item=item: dispatch_input(comm, case, item)),
                    clock.sample(lambda item=item: both(item)),
                )
                if number >= 0:
                    times.append([sample.time_us for sample in samples])
                    on_progress(1)
        engine_name = comm.engine_name
    everyone_RIK = gather_on_hosts(torch.tensor(times, dtype=torch.float64), control)
    if context.rank != 0:
        return []
    summaries = {
        name: rounded(summarize(slowest_rank(everyone_RIK[:, :, column])))
        for column, name in enumerate(_TIMES)
    }
    medians = [summaries[name].median for name in _TIMES]
    return [
        OverlapRecord(
            case=asdict(case),
            engine=engine_name,
            gemm=plan.gemm,
            gemm_us=summaries["gemm"],
            dispatch_us=summaries["dispatch"],
            both_us=summaries["both"],
            hidden=round(hidden_part(*medians), 4),
            environment=describe_environment(
                device=device, backend="nccl" if device.type == "cuda" else "gloo"
            ),
            iterations=plan.iters,
            seed=plan.seed,
            command=plan.command,
        )
    ]


def print_overlap(records: Sequence[OverlapRecord], console: Console) -> None:
    """Prints one row per record."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case", overflow="fold")
    for name in ("SMs", "m x n x k", *_TIMES, "hidden"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        case = Case(**record.case)
        table.add_row(
            f"{record.engine} {case.label()}",
            "auto" if case.num_sms_dispatch is None else str(case.num_sms_dispatch),
            " x ".join(map(str, record.gemm)),
            *(f"{getattr(record, f'{name}_us').median:.0f}" for name in _TIMES),
            f"{record.hidden:.0%}",
        )
    console.print(table)
    console.print(
        "µs, median of the slowest rank: the product alone, the dispatch alone, both at once; "
        "hidden: part of the shorter one that costs no time",
        style="dim",
    )


def _dispatch_async(comm: MoECommunicator, case: Case, item: Input) -> Any:
    if case.calls.cached:
        return comm.dispatch_async(
            item.rows, item.topk_ids_TK, None, item.scales, previous_handle=item.handle
        )
    return comm.dispatch_async(item.rows, item.topk_ids_TK, item.topk_weights_TK, item.scales)
