"""What tests of low-latency mode run on ranks that are processes: calls captured in graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertlink import DispatchOutput
from expertlink.launch import RankContext
from support import ll_halves_jobs, ll_jobs
from support.ll_process_jobs import make
from support.oracle import Case
from support.oracle_results import combined_of
from support.rank_jobs import check_contract, check_output, same_bits
from support.soak_items import Item


class Inputs:
    """Tensors that graphs read, and what loads a case into them."""

    def __init__(self, item: Item) -> None:
        self.x_TH, self.ids_TK = item.x_TH.clone(), item.ids_TK.clone()
        self.weights_TK = item.weights_TK.clone()

    def load(self, item: Item) -> None:
        self.x_TH.copy_(item.x_TH)
        self.ids_TK.copy_(item.ids_TK)
        self.weights_TK.copy_(item.weights_TK)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x_TH, self.ids_TK, self.weights_TK


def captured(
    stream: torch.cuda.Stream, call: Callable[[], Any]
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, and what the call returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = call()
    return graph, result


def poison(*outputs: DispatchOutput | Tensor) -> None:
    """Results of a replay, where the next one writes to the same memory."""
    for output in outputs:
        values = [output] if isinstance(output, Tensor) else list(vars(output).values())
        for value in values:
            if isinstance(value, Tensor):
                value.fill_(float("nan") if value.is_floating_point() else -7)


def graphs(ctx: RankContext, cases: list[Case], **fields: Any) -> int:
    """A pair, a lone dispatch and a cached pair; between replays, eager calls of the same T."""
    stream = torch.cuda.Stream(ctx.device)
    with torch.no_grad(), torch.cuda.stream(stream), make(ctx, cases[0], **fields) as comm:
        items = [Item.of(i, case, ctx.rank, ctx.device) for i, case in enumerate(cases)]
        inputs = Inputs(items[0])
        _, handle = comm.dispatch(*inputs.arguments)
        rows = items[0].rows(handle.rows_shape).clone()
        comm.combine(rows, handle)
        torch.cuda.synchronize(ctx.device)

        def pair() -> tuple[DispatchOutput, Tensor]:
            out, handle = comm.dispatch(*inputs.arguments)
            return out, comm.combine(rows, handle)

        both, (paired, result) = captured(stream, pair)
        lone, (single, previous) = captured(stream, lambda: comm.dispatch(*inputs.arguments))

        def again() -> tuple[DispatchOutput, Tensor]:
            out, handle = comm.dispatch(inputs.x_TH, None, previous_handle=previous)
            return out, comm.combine(rows, handle)

        cached, (repeated, cached_result) = captured(stream, again)
        for round_ in range(3 * ll_jobs.ROUNDS):
            item = items[round_ % len(items)]
            case = item.case
            inputs.load(item)
            rows.copy_(item.rows(tuple(rows.shape)))
            poison(paired, result, single, repeated, cached_result)
            both.replay()
            lone.replay()  # never followed by a combine of its own
            if round_ % 3 == 0:
                ll_jobs.calls_with_all(comm, items[(round_ + 1) % len(items)].case)
            cached.replay()
            for out in (paired, single, repeated):
                check_output(case, ctx.rank, out, static=True)
            expected = combined_of(case, ctx.rank)
            same_bits(result, expected, "combine of a graph")
            same_bits(cached_result, expected, "cached combine of a graph")
            if round_ % 4 == 1:
                check_contract(comm, case)
        comm.check_health()
    return len(cases)


def graphs_of_halves(ctx: RankContext, cases: list[Case], **fields: Any) -> int:
    """Every half in a graph of its own, two micro-batches under way at once."""
    stream = torch.cuda.Stream(ctx.device)
    with torch.no_grad(), torch.cuda.stream(stream), make(ctx, cases[0], **fields) as comm:
        items = [Item.of(i, case, ctx.rank, ctx.device) for i, case in enumerate(cases)]
        batches = [Inputs(items[i]) for i in range(2)]
        buffers = [comm.create_buffers() for _ in range(2)]
        _, handle = comm.dispatch(*batches[0].arguments)
        rows = [items[i].rows(handle.rows_shape).clone() for i in range(2)]
        comm.combine(rows[0], handle)
        torch.cuda.synchronize(ctx.device)

        def dispatch(i: int) -> Any:
            return comm.dispatch(
                *batches[i].arguments, output_buffer=buffers[i], return_recv_hook=True
            )

        def combine(i: int) -> Any:
            return comm.combine(rows[i], calls[i][1][1], return_recv_hook=True)

        calls = [captured(stream, lambda i=i: dispatch(i)) for i in range(2)]
        halves = [calls[0][0], calls[1][0]]
        combines: list[Any] = []
        for i in range(2):
            halves.append(captured(stream, calls[i][1][2])[0])
            combines.append(captured(stream, lambda i=i: combine(i)))
            halves.append(combines[i][0])
        halves += [captured(stream, combines[i][1][1])[0] for i in range(2)]
        for round_ in range(2 * ll_jobs.ROUNDS):
            chosen = [items[(round_ + i) % len(items)] for i in range(2)]
            for i, item in enumerate(chosen):
                batches[i].load(item)
                rows[i].copy_(item.rows(tuple(rows[i].shape)))
                poison(calls[i][1][0], combines[i][1][0])
            for graph in halves:
                graph.replay()
            for i, item in enumerate(chosen):
                check_output(item.case, ctx.rank, calls[i][1][0], static=True)
                expected = combined_of(item.case, ctx.rank)
                same_bits(combines[i][1][0], expected, "combine in graphs of halves")
            if round_ % 3 == 2:
                ll_jobs.calls_with_all(comm, chosen[0].case)
                ll_halves_jobs.many_turns(comm, [item.case for item in items])
        comm.check_health()
    return len(cases)
