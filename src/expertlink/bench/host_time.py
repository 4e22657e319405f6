"""What a call costs the host: calls in a tight loop, split into launches, torch and Python.

The loop is run three times. The first one times whole calls. In the second a stopwatch runs around
every launch and around every wait for counts, in the third around every operation of torch. Python
is what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import Input, prepare_inputs
from expertlink.bench.measure import no_garbage_collection, open_communicator
from expertlink.bench.records import Checked, Environment, Summary, summarize
from expertlink.bench.stopwatch import IN_A_ROW, Stopwatch
from expertlink.communicator import MoECommunicator
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.jit.kernel import Kernel
from expertlink.launch import RankContext

PHASES = ("dispatch", "combine")
OUTPUTS = ("own", "prepared", "tracked")


@dataclass(frozen=True, kw_only=True)
class HostTimeRecord(Checked):
    """One phase of one case. Microseconds of host time of the rank that takes longest.

    `host_us`, `launch_us`, `torch_us` and `python_us` are without the host's wait for counts.
    """

    kind: str = "host_time"
    case: dict[str, Any]  # fields of the `Case`
    engine: str
    phase: str  # one of `PHASES`
    # "own": every call makes its outputs; "prepared": `create_buffers` and `out=`; "tracked": its
    # own, with gradients enabled.
    outputs: str
    host_hot_us: Summary  # until the call returned, one pair of calls right after the other
    wait_us: float  # of it, the wait for the counts of all ranks: median
    host_us: float  # the rest: median
    launch_us: float  # in the functions that launch kernels of this library: median
    torch_us: float  # in operations of torch, those that read attributes of tensors included
    python_us: float  # `host_us` less launches and torch
    environment: Environment
    iterations: int
    seed: int
    command: str


class _TorchTime(TorchFunctionMode):
    """Runs a stopwatch in every operation of torch."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begin = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._watch.take(begin)


def measure_host_times(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[HostTimeRecord]]:
    """Times what the host does in dispatches and combines. See `measure.measure_batch`."""
    clock = Clock(context.device, control)
    for case in cases:
        with open_communicator(context, case, plan) as comm, no_garbage_collection():
            with torch.no_grad():
                item = prepare_inputs(comm, case, plan, clock)[0]
            records: list[HostTimeRecord] = []
            for outputs in _outputs_of(case):
                records += _measure(comm, case, plan, clock, item, outputs)
            on_progress(plan.iters)
        yield records if context.rank == 0 else []


def _outputs_of(case: Case) -> list[str]:
    """Those of `OUTPUTS` that a case can have."""
    found = ["own"]
    if not case.calls.zero_copy:
        found.append("prepared")
        if case.mode == "ht" and case.quantization is None:
            found.append("tracked")
    return found


def _measure(
    comm: MoECommunicator, case: Case, plan: Plan, clock: Clock, item: Input, outputs: str
) -> list[HostTimeRecord]:
    dispatch, combine = _calls(comm, case, item, outputs)
    launches, waits, operations = Stopwatch(), Stopwatch(), Stopwatch()
    with torch.set_grad_enabled(outputs == "tracked"):
        plain = _loop(dispatch, combine, plan, clock)
        with ExitStack() as stack:
            stack.enter_context(launches.around(Kernel, "launch_as"))
            stack.enter_context(waits.around(Watchdog, "wait_for_mail"))
            parts = _loop(dispatch, combine, plan, clock, launches, waits)
        with _TorchTime(operations):
            torchs = _loop(dispatch, combine, plan, clock, operations)
    comm.check_health()
    records = []
    for phase in PHASES:
        totals = [total for total, *_ in plain[phase]]
        launch = median(spent[1] for spent in parts[phase])
        wait = median(spent[2] for spent in parts[phase])
        in_torch = median(spent[1] for spent in torchs[phase])
        rest = max(median(totals) - wait, 0.0)
        python = max(rest - launch - in_torch, 0.0)
        mine = torch.tensor([rest, wait, launch, in_torch, python, *totals], dtype=torch.float64)
        every = clock.gather(mine)
        slowest = every[int(every[:, 0].argmax())].tolist()
        figures = [round(value, 2) for value in slowest[:5]]
        records.append(
            HostTimeRecord(
                case=asdict(case),
                engine=comm.engine_name,
                phase=phase,
                outputs=outputs,
                host_hot_us=summarize(slowest[5:]),
                host_us=figures[0],
                wait_us=figures[1],
                launch_us=figures[2],
                torch_us=figures[3],
                python_us=figures[4],
                environment=describe_environment(clock.device),
                iterations=plan.iters,
                seed=plan.seed,
                command=plan.command,
            )
        )
    return records


def _calls(
    comm: MoECommunicator, case: Case, item: Input, outputs: str
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """A dispatch, and the combine of what it returned."""
    rows, buffers, out = item.rows, None, None
    if outputs == "prepared":
        example = rows if item.scales is not None else None
        buffers, out = comm.create_buffers(example, item.scales), torch.empty_like(item.x_TH)
    elif outputs == "tracked":
        rows = rows.detach().requires_grad_()
    ids_TK: Tensor | None = item.topk_ids_TK
    weights_TK: Tensor | None = item.topk_weights_TK
    handle = None
    if case.calls.cached:
        handle, ids_TK, weights_TK = item.handle, None, None

    def dispatch() -> Any:
        return comm.dispatch(
            rows,
            ids_TK,
            weights_TK,
            item.scales,
            output_buffer=buffers,
            previous_handle=handle,
        )

    def combine(dispatched: Any) -> Any:
        return comm.combine(item.expert_out, dispatched[1], out=out)

    return dispatch, combine


def _loop(
    dispatch: Callable[[], Any],
    combine: Callable[[Any], Any],
    plan: Plan,
    clock: Clock,
    *watches: Stopwatch,
) -> dict[str, list[list[float]]]:
    """By phase and iteration: the call's time, and those of the watches, in microseconds."""
    found: dict[str, list[list[float]]] = {phase: [] for phase in PHASES}
    dispatched = None
    for number in range(-plan.warmup, plan.iters):
        if number % IN_A_ROW == 0 or number == -plan.warmup:
            if clock.on_gpu:
                torch.cuda.synchronize()
            clock.barrier()
        for phase in PHASES:
            for watch in watches:
                watch.read()
            begin = time.perf_counter()
            if phase == "dispatch":
                dispatched = dispatch()
            else:
                combine(dispatched)
            took = time.perf_counter() - begin
            if number >= 0:
                spent = [took, *(watch.read() for watch in watches)]
                found[phase].append([1e6 * seconds for seconds in spent])
    return found
