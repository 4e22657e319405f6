"""What the clock times: the calls of a variant, launched one by one or captured in graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.bench.cases import RECV, SEND, Case
from expertlink.bench.clock import capture
from expertlink.bench.inputs import Input
from expertlink.communicator import MoECommunicator
from expertlink.types import DispatchBuffers, DispatchHandle, DispatchOutput
from expertlink.workloads.check import mismatch, scaling_experts


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that the clock times. The steps of an input run in their order, again and again."""

    variant: str  # what records call it; "" for what all variants are compared with
    phase: str  # "dispatch", "combine" or "pair"
    run: Callable[[], Any]
    kind: str = "time"  # what its time is called, see `clock.Times`
    calls: int = 1  # dispatches, combines or pairs that `run` makes
    # What a dispatch of this step has received when it is over; None: not checked.
    received: Callable[[], DispatchOutput] | None = None
    results: Sequence[Tensor] = ()  # `[T, H]`, what combines of this step write
    kept: object = None  # what `run` uses and nobody else holds

    @property
    def begins(self) -> bool:
        """Whether a call begins with this step; else it is the second half of one."""
        return self.variant != RECV


@dataclass(frozen=True)
class Caller:
    """Makes the calls of one input."""

    comm: MoECommunicator
    case: Case
    item: Input
    buffers: DispatchBuffers | None  # outputs of every prepared dispatch

    def steps(self, *, calls_per_graph: int | None) -> list[Step]:
        """What the case's variant is made of. Collective: calls are captured, some are made.

        `calls_per_graph` is what `Case.calls_per_graph` says.
        """
        if self.case.calls.halves:
            return list(self._halves(captured=calls_per_graph is not None))
        return list(self._whole(calls_per_graph or 1))

    def check(self, steps: Sequence[Step]) -> str | None:
        """Runs the steps once; what is wrong with the first wrong result. Collective."""
        problem: str | None = None
        for step in steps:
            if step.begins and self.buffers is not None:
                # NaN in all formats, so that rows of an earlier call are noticed.
                self.buffers.output.tokens.view(torch.uint8).fill_(255)
            for result_TH in step.results:
                result_TH.fill_(float("nan"))
            step.run()
            problem = problem or self._problem(step)
        return problem

    def _problem(self, step: Step) -> str | None:
        case, item = self.case, self.item
        if step.received is not None:
            expert_out = scaling_experts(
                step.received(),
                self.comm.local_experts,
                dtype=case.torch_dtype,
                block_format=case.block_format,
            )
            if not _same_bits(expert_out, item.expert_out):
                return f"{step.variant} {step.phase} received other rows than a plain dispatch"
        for result_TH in step.results:
            problem = mismatch(result_TH, item.expected_TH, wire_dtype=case.torch_dtype)
            if problem is not None:
                return f"{step.variant} {step.phase}: {problem}"
        return None

    def _dispatch(self, buffers: DispatchBuffers | None) -> tuple[DispatchOutput, DispatchHandle]:
        item, ids_TK = self.item, self.item.topk_ids_TK
        if self.case.calls.cached:
            return self.comm.dispatch(
                item.rows, ids_TK, None, item.scales, previous_handle=item.handle
            )
        weights_TK = item.topk_weights_TK
        return self.comm.dispatch(item.rows, ids_TK, weights_TK, item.scales, output_buffer=buffers)

    def _results(self, count: int) -> list[Tensor]:
        return [torch.empty_like(self.item.x_TH) for _ in range(count)]

    def _whole(self, count: int) -> Iterator[Step]:
        """Dispatch, combine and pair; where they are captured, so many of them in each graph."""
        calls = self.case.calls
        last: list[tuple[Any, DispatchHandle]] = []
        # Captured and prepared calls write into outputs that are made once. Others make theirs,
        # and what they return is dropped at once: the next call may have its memory.
        made_once = calls.graph or calls.prepared
        results = self._results(count) if made_once else []
        places = itertools.cycle(results or [None])
        ahead: list[DispatchHandle] = []
        if calls.graph and calls.prepared:
            # Without buffers: the dispatches that are measured make the handles of those stale.
            ahead.append(self._dispatch(None)[1])

        def dispatch() -> None:
            out, handle = self._dispatch(self.buffers)
            last[:] = [(out if made_once else None, handle)]

        def combine() -> None:
            _, handle = last[0] if made_once else last.pop()
            self.comm.combine(self.item.expert_out, handle, out=next(places))

        def combine_ahead() -> None:
            self.comm.combine(self.item.expert_out, ahead[0], out=next(places))

        def pair() -> None:
            dispatch()
            combine()

        runs = {"dispatch": dispatch, "combine": combine_ahead if ahead else combine, "pair": pair}
        for phase, run in runs.items():
            replay = capture(run, count).replay if calls.graph else None
            # What a captured dispatch receives is in the same tensors after every replay.
            dispatched = [*last] if calls.graph else last
            checked = calls.prepared and phase != "combine"
            yield Step(
                variant=self.case.variant,
                phase=phase,
                run=replay or run,
                calls=count,
                received=(lambda own=dispatched: own[0][0]) if checked else None,
                results=results if phase != "dispatch" else (),
                kept=(ahead, dispatched),
            )

    def _halves(self, *, captured: bool) -> Iterator[Step]:
        last: list[tuple[DispatchOutput, DispatchHandle, Callable[[], None]]] = []
        hooks: list[Callable[[], None]] = []
        item = self.item
        [y_TH] = results = self._results(1)

        def send_rows() -> None:
            dispatched = self.comm.dispatch(
                item.rows,
                item.topk_ids_TK,
                item.topk_weights_TK,
                item.scales,
                output_buffer=self.buffers,
                return_recv_hook=True,
            )
            last[:] = [dispatched]

        def send_sums() -> None:
            handle = last[0][1]
            hooks[:] = [
                self.comm.combine(item.expert_out, handle, out=y_TH, return_recv_hook=True)[1]
            ]

        def half(name: str, phase: str, call: Callable[[], Any], **checked: Any) -> Step:
            run = capture(call).replay if captured else call
            return Step(variant=name, phase=phase, run=run, **checked)

        yield half(SEND, "dispatch", send_rows)
        yield half(RECV, "dispatch", lambda: last[0][2](), received=lambda: last[0][0])
        yield half(SEND, "combine", send_sums)
        yield half(RECV, "combine", lambda: hooks[0](), results=results)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Also where both are NaN."""
    same_shape = left.shape == right.shape and left.dtype == right.dtype
    return same_shape and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
