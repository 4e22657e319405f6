"""Calls into outputs that were made once: as a decode loop makes them, eager or in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.bench.cases import Case, Plan
from expertlink.bench.check import mismatch, scaling_experts
from expertlink.bench.graphs import capture_repeated
from expertlink.bench.inputs import Input
from expertlink.bench.variants import RECV, SEND
from expertlink.communicator import MoECommunicator
from expertlink.types import DispatchBuffers, DispatchHandle, DispatchOutput


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that the clock times. The steps of an input run in their order, again and again.

    Attributes:
        variant: what records call it.
        phase: "dispatch", "combine" or "pair".
        run: does it.
        calls: dispatches, combines or pairs that `run` makes.
        received: what a dispatch of this step has received when it is over; None: nothing yet.
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
    """Makes the prepared calls of one input.

    Attributes:
        comm: whom they are made to.
        case: what is measured.
        item: the input.
        buffers: outputs of every dispatch whose handle is used before the next one.
    """

    comm: MoECommunicator
    case: Case
    item: Input
    buffers: DispatchBuffers

    def steps(self, *, calls_per_graph: int | None) -> list[Step]:
        """What the case's variant is made of. Collective: calls are captured, some are made.

        Args:
            calls_per_graph: as `graph_size` has it.
        """
        if self.case.calls.halves:
            return list(self._halves(captured=calls_per_graph is not None))
        return list(self._eager() if calls_per_graph is None else self._captured(calls_per_graph))

    def check(self, steps: Sequence[Step]) -> str | None:
        """Runs the steps once; what is wrong with the first wrong result. Collective."""
        problem: str | None = None
        for step in steps:
            if step.begins:
                _poison(self.buffers.output.tokens)
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
            problem = mismatch(result_TH, item.expected_TH, wire_dtype=case.wire_dtype)
            if problem is not None:
                return f"{step.variant} {step.phase}: {problem}"
        return None

    def _dispatch(self, buffers: DispatchBuffers | None) -> tuple[DispatchOutput, DispatchHandle]:
        item = self.item
        return self.comm.dispatch(
            item.rows, item.topk_ids_TK, item.topk_weights_TK, item.scales, output_buffer=buffers
        )

    def _combine(self, handle: DispatchHandle, out_TH: Tensor) -> None:
        self.comm.combine(self.item.expert_out, handle, out=out_TH)

    def _results(self, count: int) -> list[Tensor]:
        return [torch.empty_like(self.item.x_TH) for _ in range(count)]

    def _eager(self) -> Iterator[Step]:
        last: list[tuple[DispatchOutput, DispatchHandle]] = []
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
        last: list[tuple[DispatchOutput, DispatchHandle]] = []
        results, results_of_pairs = self._results(calls), self._results(calls)
        # A handle serves one combine, so as many dispatches are made ahead. Without buffers: into
        # the same ones, each would make the handle before it stale.
        handles = [self._dispatch(None)[1] for _ in range(calls)]
        unused, waiting, waiting_pairs = iter(handles), iter(results), iter(results_of_pairs)

        def dispatch() -> None:
            last[:] = [self._dispatch(self.buffers)]

        def pair() -> None:
            dispatch()
            self._combine(last[0][1], next(waiting_pairs))

        dispatches = capture_repeated(dispatch, calls)
        received = _constantly(last[0][0])
        combines = capture_repeated(lambda: self._combine(next(unused), next(waiting)), calls)
        pairs = capture_repeated(pair, calls)
        received_in_pair = _constantly(last[0][0])

        name = self.case.variant
        yield Step(
            variant=name, phase="dispatch", run=dispatches.replay, calls=calls, received=received
        )
        yield Step(
            variant=name,
            phase="combine",
            run=combines.replay,
            calls=calls,
            results=results,
            kept=handles,
        )
        yield Step(
            variant=name,
            phase="pair",
            run=pairs.replay,
            calls=calls,
            received=received_in_pair,
            results=results_of_pairs,
        )

    def _halves(self, *, captured: bool) -> Iterator[Step]:
        last: list[tuple[DispatchOutput, DispatchHandle, Callable[[], None]]] = []
        item = self.item
        [y_TH] = results = self._results(1)
        hooks: list[Callable[[], None]] = []

        def send_rows() -> None:
            last[:] = [
                self.comm.dispatch(
                    item.rows,
                    item.topk_ids_TK,
                    item.topk_weights_TK,
                    item.scales,
                    output_buffer=self.buffers,
                    return_recv_hook=True,
                )
            ]

        def send_sums() -> None:
            hooks[:] = [
                self.comm.combine(item.expert_out, last[0][1], out=y_TH, return_recv_hook=True)[1]
            ]

        calls: list[Callable[[], Any]] = [
            send_rows,
            lambda: last[0][2](),
            send_sums,
            lambda: hooks[0](),
        ]
        if captured:
            calls = [capture_repeated(call).replay for call in calls]
        yield Step(variant=SEND, phase="dispatch", run=calls[0])
        yield Step(
            variant=RECV,
            phase="dispatch",
            run=calls[1],
            received=lambda: last[0][0],
            begins=False,
        )
        yield Step(variant=SEND, phase="combine", run=calls[2])
        yield Step(variant=RECV, phase="combine", run=calls[3], results=results, begins=False)


def graph_size(case: Case, plan: Plan, engine_name: str) -> int | None:
    """Calls of a case that one graph holds; None where calls are launched one by one."""
    if not (case.calls.graph or (case.calls.halves and engine_name == "nvlink")):
        return None
    return plan.calls_per_graph if case.calls.chained else 1


def _constantly(output: DispatchOutput) -> Callable[[], DispatchOutput]:
    """What a captured dispatch receives is in the same tensors after every replay."""
    return lambda: output


def _poison(tokens: Tensor) -> None:
    """Makes every element NaN in all formats, so that rows of an earlier call are noticed."""
    tokens.view(torch.uint8).fill_(255)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Also where both are NaN."""
    same_shape = left.shape == right.shape and left.dtype == right.dtype
    return same_shape and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
