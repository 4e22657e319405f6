"""A dispatch and its combine in training: the forward pair, and the backward pair that follows it
(`expertlink bench --backward`).

Experts return the rows that they received, so that nothing but the two calls is in either pass.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import Drawn, agree_on_results, draw_input
from expertlink.bench.measure import no_garbage_collection, open_communicator, time_steps
from expertlink.bench.options import BenchOptions, build_cases
from expertlink.bench.records import (
    Checked,
    Environment,
    RecordError,
    Summary,
    slowest_rank,
    summarize,
)
from expertlink.bench.steps import Step
from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext
from expertlink.types import DispatchHandle
from expertlink.workloads.check import mismatch

BACKWARD_PAIR = "backward_pair"
"""The phase that records name."""
_FORWARD = "forward_pair"
_SAME = ("variant", "layout", "dtype", "uneven", "ranks", "tokens", "hidden", "topk", "experts")
_SAME += ("num_sms_dispatch", "num_sms_combine", "hosts", "rail")
_DOT_TOLERANCE = 0.02  # of the product of two norms


@dataclass(frozen=True, kw_only=True)
class BackwardRecord(Checked):
    """One case. Times in microseconds, of the slowest rank of each iteration; bytes of the rank
    that needs most."""

    kind: str = "backward"
    engine: str
    phase: str  # `BACKWARD_PAIR`
    variant: str
    layout: str
    dtype: str
    routing: str
    uneven: bool
    ranks: int
    tokens: int  # of the rank that has most
    hidden: int
    topk: int
    experts: int
    num_sms_dispatch: int | None = None
    num_sms_combine: int | None = None
    hosts: int = 1
    rail: str | None = None
    time_us: Summary  # gradients of tokens and weights, once there is one of the results
    host_us: Summary  # until the host was free
    forward_us: Summary  # dispatch and combine with gradients enabled, alternating with the above
    forward_host_us: Summary
    backward_ratio: float  # medians: `time_us` over `forward_us`
    expanded_bytes: int  # of the rows that a dispatch received, alignment gaps included
    # CUDA: what the forward pair leaves allocated, results included; and the most that the backward
    # pair adds to that.
    kept_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_ratio: float | None = None  # `memory_peak_bytes` over `expanded_bytes`
    environment: Environment
    aligned: str  # as in `Record`
    iterations: int
    inputs: int
    seed: int
    command: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phase != BACKWARD_PAIR:
            raise RecordError(f"phase is {self.phase!r}, not {BACKWARD_PAIR!r}")

    def key(self) -> tuple[object, ...]:
        """What was measured, without when and how fast."""
        return (*(getattr(self, name) for name in (*_SAME, "engine", "routing")), self.hardware)

    @property
    def hardware(self) -> str:
        """GPU, or CPU with its core count."""
        return self.environment.hardware


def build_backward_cases(options: BenchOptions, *, device: str, ranks: int) -> list[Case]:
    """All combinations of the listed options, for `--backward`.

    Raises:
        ExpertlinkError: an option, or a combination of options, cannot be measured.
    """
    cases = build_cases(options, device=device, ranks=ranks)
    for case in cases:
        calls, layout = case.calls, case.layout
        if case.mode != "ht" or case.quantization is not None or calls.graph or calls.zero_copy:
            raise ConfigurationError(
                f"mode={case.mode!r}, variant={case.variant!r}, quantization={case.quantization!r} "
                "cannot be measured with --backward; accepted: mode ht, variants uncached, cached "
                "and static, unquantized rows"
            )
        if layout != "flat":
            raise ConfigurationError(
                f"layout={layout!r} cannot be measured with --backward; accepted: flat, whose "
                "combine applies the weights"
            )
    return cases


def measure_backward(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[BackwardRecord]]:
    """Checks, then times forward and backward pairs. See `measure.measure_batch`."""
    clock = Clock(context.device, control)
    for case in cases:
        gc.collect()
        if clock.on_gpu:
            torch.cuda.empty_cache()
        with open_communicator(context, case, plan) as comm, torch.enable_grad():
            record = _measure(comm, case, plan, clock, on_progress)
        yield [record] if context.rank == 0 else []


class _Pair:
    """The two passes of one input. `backward` uses up what `forward` has left.

    Args:
        comm: makes the calls.
        case: how.
        drawn: the tokens; every token's gradient is the token itself, in other memory.
    """

    def __init__(self, comm: MoECommunicator, case: Case, drawn: Drawn) -> None:
        self._comm, self._ids_TK = comm, drawn.topk_ids_TK
        self._x_TH = drawn.x_TH.detach().requires_grad_()
        self._weights_TK = drawn.topk_weights_TK.detach().requires_grad_()
        self._grad_TH = drawn.x_TH.clone()
        self._results: list[Tensor] = []
        self._handle: DispatchHandle | None = None
        received, handle = comm.dispatch(drawn.x_TH, self._ids_TK, drawn.topk_weights_TK)
        self.expanded_bytes = received.tokens.nbytes
        if case.calls.cached:
            self._handle = handle

    def forward(self) -> None:
        """A dispatch and its combine."""
        if self._handle is None:
            received, handle = self._comm.dispatch(self._x_TH, self._ids_TK, self._weights_TK)
        else:
            received, handle = self._comm.dispatch(
                self._x_TH, None, self._weights_TK, previous_handle=self._handle
            )
        self._results[:] = [self._comm.combine(received.tokens, handle)]

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients of tokens and weights."""
        y_TH = self._results.pop()
        return torch.autograd.grad(y_TH, (self._x_TH, self._weights_TK), self._grad_TH)

    def kept_bytes(self) -> int:
        """Device memory that a forward pass leaves allocated. Collective."""
        device = self._comm.device
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        self.forward()
        torch.cuda.synchronize(device)
        kept = torch.cuda.memory_allocated(device) - before
        self.backward()
        return max(kept, 0)

    def check(self) -> str | None:
        """Makes both passes once; what is wrong with the result or a gradient. Collective."""
        x_TH, weights_TK, chosen_TK = self._x_TH.detach(), self._weights_TK, self._ids_TK >= 0
        self.forward()
        y_TH = self._results[0].detach()
        grad_x_TH, grad_weights_TK = self.backward()
        sums_T1 = torch.where(chosen_TK, weights_TK.detach(), 0.0).sum(dim=1, keepdim=True)
        expected_TH = x_TH.float() * sums_T1
        for name, found_TH in (("result", y_TH), ("gradient of the tokens", grad_x_TH)):
            problem = mismatch(found_TH, expected_TH, wire_dtype=x_TH.dtype)
            if problem is not None:
                return f"{name}: {problem}"
        squares_T1 = x_TH.float().square().sum(dim=1, keepdim=True)
        errors_TK = (grad_weights_TK - squares_T1 * chosen_TK).abs()
        if bool((errors_TK > _DOT_TOLERANCE * squares_T1 + 1e-6).any()):
            return f"gradient of the weights: off by up to {float(errors_TK.max()):.3g}"
        return None


def _measure(
    comm: MoECommunicator,
    case: Case,
    plan: Plan,
    clock: Clock,
    on_progress: Callable[[int], None],
) -> BackwardRecord:
    drawn = [
        draw_input(case, plan.seed, index, rank=comm.rank, device=clock.device)
        for index in range(plan.inputs)
    ]
    pairs = [_Pair(comm, case, one) for one in drawn]
    problems = [pair.check() for pair in pairs]
    agree_on_results(next(filter(None, problems), None), clock)
    kept = max(pair.kept_bytes() for pair in pairs) if clock.on_gpu else 0

    def steps_of(pair: _Pair) -> list[list[Step]]:
        runs = {_FORWARD: pair.forward, BACKWARD_PAIR: pair.backward}
        return [[Step(variant=case.variant, phase=name, run=run)] for name, run in runs.items()]

    with no_garbage_collection():
        times = time_steps([steps_of(pair) for pair in pairs], plan, clock, on_progress)
    comm.check_health()
    gathered = times.gather(clock)
    expanded = max(pair.expanded_bytes for pair in pairs)
    peak = int(gathered[case.variant, BACKWARD_PAIR, "memory"].max())
    largest = clock.gather(torch.tensor([expanded, kept])).amax(dim=0).tolist()

    def of(phase: str, kind: str) -> Summary:
        return summarize(slowest_rank(gathered[case.variant, phase, kind]))

    time_us, forward_us = of(BACKWARD_PAIR, "time"), of(_FORWARD, "time")
    memory: dict[str, Any] = {}
    if clock.on_gpu:
        memory = {"kept_bytes": largest[1], "memory_peak_bytes": peak}
        memory["memory_ratio"] = round(peak / max(largest[0], 1), 4)
    return BackwardRecord(
        engine=comm.engine_name,
        phase=BACKWARD_PAIR,
        routing=case.routing_label,
        **{name: getattr(case, name) for name in _SAME},
        time_us=time_us,
        host_us=of(BACKWARD_PAIR, "host"),
        forward_us=forward_us,
        forward_host_us=of(_FORWARD, "host"),
        backward_ratio=round(time_us.median / forward_us.median, 4),
        expanded_bytes=largest[0],
        **memory,
        environment=describe_environment(clock.device),
        aligned="device" if clock.on_gpu else "host",
        iterations=plan.iters,
        inputs=len(pairs),
        seed=plan.seed,
        command=plan.command,
    )
