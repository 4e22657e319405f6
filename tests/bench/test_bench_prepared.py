"""Prepared calls of the benchmark: what they are made of, and that wrong results are noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from conftest import RankPools
from expertlink.bench import steps as bench_steps
from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock
from expertlink.bench.inputs import prepare_inputs
from expertlink.bench.measure import open_communicator
from expertlink.bench.records import PHASES
from expertlink.bench.steps import Caller
from expertlink.communicator import MoECommunicator
from expertlink.launch import RankContext
from support.bench_records import latency_case

LAYOUTS = ("expert_major", "rank_major", "flat", "token_major")


def caller_of(comm: MoECommunicator, case: Case, context: RankContext) -> Caller:
    [item] = prepare_inputs(comm, case.situation, Plan(inputs=1), Clock(context.device))
    return Caller(comm, case, item, comm.create_buffers())


def check_eager_calls(context: RankContext, case: Case) -> list[str | None]:
    """Runs on a rank: what the check says of right calls, and of wrong ones."""
    with torch.no_grad(), open_communicator(context, case, Plan()) as comm:
        caller = caller_of(comm, case, context)
        steps = caller.steps(calls_per_graph=None)
        found = [caller.check(steps)]
        dispatch, combine = MoECommunicator.dispatch, MoECommunicator.combine

        def other_rows(self: MoECommunicator, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return dispatch(self, -x, *args, **kwargs)

        def other_sums(self: MoECommunicator, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
            return combine(self, rows * 2, *args, **kwargs)

        with mock.patch.object(MoECommunicator, "dispatch", other_rows):
            found.append(caller.check(steps))
        with mock.patch.object(MoECommunicator, "combine", other_sums):
            found.append(caller.check(steps))
    return found


@pytest.mark.parametrize("variant", ["eager", "halves"])
@pytest.mark.parametrize("quantization", [None, "e4m3_float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_calls_are_noticed(
    rank_pools: RankPools, layout: str, quantization: str | None, variant: str
) -> None:
    case = latency_case(layout=layout, quantization=quantization, variant=variant)
    for right, rows, sums in rank_pools(2).run(check_eager_calls, case):
        assert right is None
        assert rows is not None
        assert "other rows" in rows
        assert sums is not None
        assert "tokens are wrong" in sums


class RecordedGraph:
    """Stands for a CUDA graph on a CPU: a replay writes what the captured calls wrote."""

    empty = False

    def __init__(self, watched: list[Tensor], call: Callable[[], Any], times: int) -> None:
        before = [tensor.view(torch.uint8).fill_(255).clone() for tensor in watched]
        for _ in range(times):
            call()
        self._written = [
            (tensor, tensor.clone())
            for tensor, bits in zip(watched, before, strict=True)
            if not torch.equal(tensor.view(torch.uint8), bits)
        ]

    def replay(self) -> None:
        for tensor, value in self._written:
            if not self.empty:
                tensor.copy_(value)


def check_captured_calls(context: RankContext, case: Case) -> tuple[list[Any], str | None]:
    """Runs on a rank: phases and calls of the steps, what the check says, and of empty graphs."""
    watched: list[Tensor] = []
    make_results = Caller._results

    def results(self: Caller, count: int) -> list[Tensor]:
        made = make_results(self, count)
        watched.extend(made)
        return made

    def capture(call: Callable[[], Any], times: int = 1) -> RecordedGraph:
        return RecordedGraph(watched, call, times)

    with (
        torch.no_grad(),
        mock.patch.object(Caller, "_results", results),
        mock.patch.object(bench_steps, "capture", capture),
        open_communicator(context, case.situation, Plan()) as comm,
    ):
        caller = caller_of(comm, case, context)
        assert caller.buffers is not None
        out = caller.buffers.output
        watched.append(out.tokens)
        if out.scales is not None:
            watched.append(out.scales.tensor)
        steps = caller.steps(calls_per_graph=3 if case.calls.chained else 1)
        assert caller.check(steps) is None
        assert caller.check(steps) is None
        with mock.patch.object(RecordedGraph, "empty", True):
            problem = caller.check(steps)
        return [(step.variant, step.phase, step.calls) for step in steps], problem


@pytest.mark.parametrize("quantization", [None, "e4m3_float32"])
@pytest.mark.parametrize("variant", ["graph", "graph_single", "halves"])
def test_replays_are_checked(rank_pools: RankPools, variant: str, quantization: str | None) -> None:
    case = latency_case(variant=variant, quantization=quantization)
    for steps, problem in rank_pools(2).run(check_captured_calls, case):
        if variant == "halves":
            assert [(name, phase) for name, phase, _ in steps] == [
                ("send", "dispatch"),
                ("recv", "dispatch"),
                ("send", "combine"),
                ("recv", "combine"),
            ]
        else:
            calls = 3 if variant == "graph" else 1
            assert steps == [(variant, phase, calls) for phase in PHASES]
        assert problem is not None


def check_captured_static_calls(context: RankContext) -> tuple[list[str], list[str | None]]:
    """Runs on a rank: phases of the steps of mode "ht", what the check says, and of empty graphs.

    Static shapes need GPUs, so the calls that stand for captured ones make their own outputs.
    """
    watched: list[Tensor] = []
    make_results = Caller._results

    def results(self: Caller, count: int) -> list[Tensor]:
        watched.extend(made := make_results(self, count))
        return made

    def capture(call: Callable[[], Any], times: int = 1) -> RecordedGraph:
        return RecordedGraph(watched, call, times)

    case = latency_case(mode="ht", variant="graph", layout="flat")
    with (
        torch.no_grad(),
        mock.patch.object(Caller, "_results", results),
        mock.patch.object(bench_steps, "capture", capture),
        open_communicator(context, case.situation, Plan()) as comm,
    ):
        [item] = prepare_inputs(comm, case.situation, Plan(inputs=1), Clock(context.device))
        caller = Caller(comm, case, item, None)
        steps = caller.steps(calls_per_graph=case.calls_per_graph(Plan(), "nvlink"))
        found = [caller.check(steps), caller.check(steps)]
        with mock.patch.object(RecordedGraph, "empty", True):
            found.append(caller.check(steps))
        return [step.phase for step in steps], found


def test_replays_of_static_calls_are_checked(rank_pools: RankPools) -> None:
    for phases, (first, again, empty) in rank_pools(2).run(check_captured_static_calls):
        assert phases == list(PHASES)
        assert first is again is None
        assert empty is not None
        assert "combine" in empty
