"""Measures cases on one rank: all ranks call the same function, rank 0 gets the records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import Ceilings
from expertlink.bench.clocks import Clock, Sample, make_clock
from expertlink.bench.inputs import Input, prepare_inputs
from expertlink.bench.records import PHASES, Record
from expertlink.bench.results import Measured, gather_traffic, make_record
from expertlink.bench.times import Times
from expertlink.bench.variants import VARIANTS
from expertlink.communicator import MoECommunicator
from expertlink.config import MoECommunicatorConfig
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext
from expertlink.types import DispatchHandle, DispatchOutput


def measure_cases(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[Record]]:
    """`measure_case` for one case after the other."""
    for case in cases:
        yield measure_case(context, case, plan, on_progress=on_progress, control=control)


def measure_case(
    context: RankContext,
    case: Case,
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> list[Record]:
    """Checks, then times a case. Collective over the default process group.

    Args:
        context: this rank.
        case: what to measure; `case.ranks` is the size of the group.
        plan: how.
        on_progress: called with 1 after every timed iteration.
        control: group of all ranks, with gloo, in which hosts meet and exchange times; its
            time-out bounds the wait for a rank that failed. None: the default group.

    Returns:
        On rank 0 a record for each of dispatch, combine and pair; on the others nothing.

    Raises:
        WrongResultError: the result was wrong on some rank; raised on every rank.
        ExpertlinkError: the library refused the case or lost a peer.
    """
    # As in serving: with gradients enabled, padding would be zeroed for the experts' backward.
    with torch.no_grad(), open_communicator(context, case, plan) as comm:
        inputs = prepare_inputs(comm, case, plan, context.device, control)
        wires = [item.wire for item in inputs]
        with (
            Ceilings(
                wires, device=context.device, control=control, num_sms=plan.ceiling_num_sms
            ) as ceilings,
            no_garbage_collection(),
        ):
            rounds = _Rounds(comm, case, inputs, make_clock(context.device, control), ceilings)
            for number in range(-plan.warmup, plan.iters):
                rounds.run(number)
                if number >= 0:
                    on_progress(1)
            if rounds.clock.has_idle:
                for number in range(plan.iters):
                    rounds.run_idle(number)
        engine_name = comm.engine_name
    measured = Measured(
        device=context.device,
        engine_name=engine_name,
        aligned=rounds.clock.aligned,
        num_inputs=len(inputs),
        times=rounds.times.gather(control),
        traffic=gather_traffic(inputs, case, control),
        ceiling_note=ceilings.note,
    )
    return [make_record(phase, case, plan, measured) for phase in PHASES if context.rank == 0]


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
        **case.calls.config_fields,
    )
    comm = MoECommunicator(config)
    try:
        check_engine(comm, case)
    except ConfigurationError:
        comm.close()
        raise
    return comm


def check_engine(comm: MoECommunicator, case: Case) -> None:
    """Refuses a variant that the communicator's engine does not have."""
    if not case.calls.needs_nvlink or comm.engine_name == "nvlink":
        return
    others = [name for name, calls in VARIANTS[case.mode].items() if not calls.needs_nvlink]
    raise ConfigurationError(
        f"variant={case.variant!r} cannot be measured with the {comm.engine_name} engine "
        f"({comm.engine_reason}); accepted: {', '.join(others)}"
    )


@dataclass(frozen=True)
class _Rounds:
    """The repeated part: every round times each phase once."""

    comm: MoECommunicator
    case: Case
    inputs: list[Input]
    clock: Clock
    ceilings: Ceilings
    times: Times = field(default_factory=lambda: Times())

    def run(self, number: int) -> None:
        """Times the phases and, alternately before and after them, what they are compared with.

        Rounds with negative numbers are warm-up.
        """
        index = number % len(self.inputs)
        item = self.inputs[index]
        times = self.times if number >= 0 else Times()

        def compared(phase: str, call: Callable[[], Any], raw: Callable[[], None]) -> Sample:
            others = {"raw": raw, **self.ceilings.calls(index, phase)}

            def time_others() -> None:
                for kind, other in others.items():
                    times.put(phase, kind, self.clock.sample(other).time_us)

            if number % 2:
                time_others()
            sample = self.clock.sample(call)
            if number % 2 == 0:
                time_others()
            times.put_sample(phase, sample)
            return sample

        handle = compared("dispatch", lambda: self._dispatch(item), item.raw.dispatch).result
        compared("combine", lambda: self._combine(item, handle), item.raw.combine)
        times.put_sample("pair", self.clock.sample(lambda: self._pair(item)))

    def run_idle(self, number: int) -> None:
        """Times the phases from an idle device."""
        item = self.inputs[number % len(self.inputs)]
        dispatched = self.clock.sample_idle(lambda: self._dispatch(item))
        handle = dispatched.result
        combined = self.clock.sample_idle(lambda: self._combine(item, handle))
        pair = self.clock.sample_idle(lambda: self._pair(item))
        for phase, sample in zip(PHASES, (dispatched, combined, pair), strict=True):
            self.times.put(phase, "idle", sample.time_us)
            self.times.put(phase, "idle host", sample.host_us)

    def _dispatch(self, item: Input) -> DispatchHandle:
        if item.graphs is not None:
            item.graphs.dispatch.replay()
            return item.handle  # the captured combine knows its own
        # The received rows are dropped at once: the next call may have their memory.
        return dispatch_input(self.comm, self.case, item)[1]

    def _combine(self, item: Input, handle: DispatchHandle) -> None:
        if item.graphs is not None:
            item.graphs.combine.replay()
        else:
            self.comm.combine(item.expert_out, handle)

    def _pair(self, item: Input) -> None:
        if item.graphs is not None:
            item.graphs.pair.replay()
        else:
            self._combine(item, self._dispatch(item))


def dispatch_input(
    comm: MoECommunicator, case: Case, item: Input
) -> tuple[DispatchOutput, DispatchHandle]:
    """One dispatch of an input, as the variant has it."""
    if case.calls.cached:
        return comm.dispatch(
            item.rows, item.topk_ids_TK, None, item.scales, previous_handle=item.handle
        )
    return comm.dispatch(item.rows, item.topk_ids_TK, item.topk_weights_TK, item.scales)


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
