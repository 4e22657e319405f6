"""What the clock times: the calls of a variant, launched one by one or captured in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.bench.cases import RECV, SEND, Case, Plan
from expertlink.bench.clock import capture
from expertlink.bench.inputs import Input
from expertlink.communicator import MoECommunicator
from expertlink.types import DispatchBuffers, DispatchHandle, DispatchOutput
from expertlink.workloads.check import mismatch, scaling_experts

Dispatched = tuple[DispatchOutput, DispatchHandle]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that the clock times. The steps of an input run in their order, again and again.

    Attributes:
        variant: what records call it.
        phase: "dispatch", "combine" or "pair".
        run: does it.
        calls: dispatches, combines or pairs that `run` makes.
        received: what a dispatch of this step has received when it is over; None: not checked.
        results: `[T, H]` tensors that combines of this step have written when it is over.
        begins: whether a call begins with this step; else it is the second half of one.
        kept: what `run` uses and nobody else holds.
    """

    variant: str
    phase: str
    run: Callable[[], Any]
    calls: int = 1
    received: Callable[[], DispatchOutput] | None = None
    results: Sequence[Tensor] = ()
    begins: bool = True
    kept: object = None


@dataclass(frozen=True)
class Caller:
    """Makes the calls of one input.

    Attributes:
        comm: whom they are made to.
        case: what is measured.
        item: the input.
        buffers: outputs of every prepared dispatch; None where each call makes its own.
    """

    comm: MoECommunicator
    case: Case
    item: Input
    buffers: DispatchBuffers | None

    def steps(self, *, calls_per_graph: int | None) -> list[Step]:
        """What the case's variant is made of. Collective: calls are captured, some are made.

        `calls_per_graph` is what `graph_size` says.
        """
        calls = self.case.calls
        if calls.halves:
            return list(self._halves(captured=calls_per_graph is not None))
        if not calls.prepared:
            return list(self._captured_once() if calls.graph else self._plain())
        return list(self._eager() if calls_per_graph is None else self._captured(calls_per_graph))

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

    def _dispatch(self, buffers: DispatchBuffers | None = None) -> Dispatched:
        item, ids_TK = self.item, self.item.topk_ids_TK
        if self.case.calls.cached:
            return self.comm.dispatch(
                item.rows, ids_TK, None, item.scales, previous_handle=item.handle
            )
        weights_TK = item.topk_weights_TK
        return self.comm.dispatch(item.rows, ids_TK, weights_TK, item.scales, output_buffer=buffers)

    def _combine(self, handle: DispatchHandle, out_TH: Tensor | None = None) -> None:
        self.comm.combine(self.item.expert_out, handle, out=out_TH)

    def _results(self, count: int) -> list[Tensor]:
        return [torch.empty_like(self.item.x_TH) for _ in range(count)]

    def _plain(self) -> Iterator[Step]:
        """Calls that make their outputs; what they return is dropped at once."""
        handles: list[DispatchHandle] = []

        def dispatch() -> None:
            # The next call may have the memory of the received rows.
            handles[:] = [self._dispatch()[1]]

        def combine() -> None:
            self._combine(handles.pop())

        def pair() -> None:
            dispatch()
            combine()

        for phase, run in (("dispatch", dispatch), ("combine", combine), ("pair", pair)):
            yield Step(variant=self.case.variant, phase=phase, run=run)

    def _captured_once(self) -> Iterator[Step]:
        """Calls of static shapes, each in a graph; the captured combine knows its dispatch."""
        kept: list[Dispatched] = []
        results, results_of_pair = self._results(1), self._results(1)

        def dispatch() -> None:
            kept.append(self._dispatch())

        def pair() -> None:
            dispatch()
            self._combine(kept[-1][1], results_of_pair[0])

        name = self.case.variant
        run = capture(dispatch).replay
        yield Step(variant=name, phase="dispatch", run=run, kept=kept)
        run = capture(lambda: self._combine(kept[0][1], results[0])).replay
        yield Step(variant=name, phase="combine", run=run, results=results)
        run = capture(pair).replay
        yield Step(variant=name, phase="pair", run=run, results=results_of_pair)

    def _eager(self) -> Iterator[Step]:
        last: list[Dispatched] = []
        [y_TH] = results = self._results(1)

        def dispatch() -> None:
            last[:] = [self._dispatch(self.buffers)]

        def combine() -> None:
            self._combine(last[0][1], y_TH)

        def pair() -> None:
            dispatch()
            combine()

        def received() -> DispatchOutput:
            return last[0][0]

        name = self.case.variant
        yield Step(variant=name, phase="dispatch", run=dispatch, received=received)
        yield Step(variant=name, phase="combine", run=combine, results=results)
        yield Step(variant=name, phase="pair", run=pair, received=received, results=results)

    def _captured(self, calls: int) -> Iterator[Step]:
        last: list[Dispatched] = []
        results, results_of_pairs = self._results(calls), self._results(calls)
        # A handle serves one combine, so as many dispatches are made ahead. Without buffers: into
        # the same ones, each would make the handle before it stale.
        handles = [self._dispatch()[1] for _ in range(calls)]
        unused, waiting, waiting_pairs = iter(handles), iter(results), iter(results_of_pairs)

        def dispatch() -> None:
            last[:] = [self._dispatch(self.buffers)]

        def pair() -> None:
            dispatch()
            self._combine(last[0][1], next(waiting_pairs))

        def captured(
            phase: str, call: Callable[[], Any], results: Sequence[Tensor], kept: object = None
        ) -> Step:
            run = capture(call, calls).replay
            # What a captured dispatch receives is in the same tensors after every replay.
            out = None if phase == "combine" else last[0][0]
            return Step(
                variant=self.case.variant,
                phase=phase,
                run=run,
                calls=calls,
                received=None if out is None else lambda: out,
                results=results,
                kept=kept,
            )

        yield captured("dispatch", dispatch, ())
        yield captured(
            "combine", lambda: self._combine(next(unused), next(waiting)), results, handles
        )
        yield captured("pair", pair, results_of_pairs)

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
            _, hook = self.comm.combine(
                item.expert_out, last[0][1], out=y_TH, return_recv_hook=True
            )
            hooks[:] = [hook]

        def half(name: str, phase: str, call: Callable[[], Any], **checked: Any) -> Step:
            run = capture(call).replay if captured else call
            return Step(variant=name, phase=phase, run=run, begins=name == SEND, **checked)

        yield half(SEND, "dispatch", send_rows)
        yield half(RECV, "dispatch", lambda: last[0][2](), received=lambda: last[0][0])
        yield half(SEND, "combine", send_sums)
        yield half(RECV, "combine", lambda: hooks[0](), results=results)


def graph_size(case: Case, plan: Plan, engine: str) -> int | None:
    """Prepared calls that one graph holds; None where calls are launched one by one."""
    calls = case.calls
    if not calls.prepared or not (calls.graph or (calls.halves and engine == "nvlink")):
        return None
    return plan.calls_per_graph if calls.chained else 1


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Also where both are NaN."""
    same_shape = left.shape == right.shape and left.dtype == right.dtype
    return same_shape and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
