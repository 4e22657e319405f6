"""What tests of mode ll run on ranks that are processes: graphs, communicators, streams."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink import ConfigurationError, DispatchHandle, DispatchOutput, MoECommunicator
from expertlink.launch import RankContext
from support import decode, jobs
from support.cases import LL
from support.jobs import (
    check_contract,
    check_output,
    config_of,
    counts_stay_on_device,
    dispatch_case,
    rows_for,
    same_bits,
)
from support.oracle import Case, combined_of, weights_of_combine
from support.soak.items import Item


def ll_communicator(ctx: RankContext, case: Case, **fields: Any) -> MoECommunicator:
    """A communicator in mode "ll"."""
    return MoECommunicator(config_of(case, ctx.device, **{**LL, **fields}))


def on_a_rank(ctx: RankContext, job: jobs.Job, cases: list[Case], *args: Any, **fields: Any) -> int:
    """Runs a job of jobs.py, payloads.py or decode.py for each case."""
    with ll_communicator(ctx, cases[0], **fields) as comm:
        jobs.without_gradients(comm, job, cases, *args)
    return len(cases)


def with_all(ctx: RankContext, job: Callable[..., None], cases: list[Case], **fields: Any) -> int:
    """Runs a job that takes all cases at once."""
    with ll_communicator(ctx, cases[0], **fields) as comm:
        job(comm, cases)
    return len(cases)


# -- graphs ---------------------------------------------------------------------------------------


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
    with (
        torch.no_grad(),
        torch.cuda.stream(stream),
        ll_communicator(ctx, cases[0], **fields) as comm,
    ):
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
        for round_ in range(3 * jobs.ROUNDS):
            item = items[round_ % len(items)]
            case = item.case
            inputs.load(item)
            rows.copy_(item.rows(tuple(rows.shape)))
            poison(paired, result, single, repeated, cached_result)
            both.replay()
            lone.replay()  # never followed by a combine of its own
            if round_ % 3 == 0:
                jobs.calls_with_all(comm, items[(round_ + 1) % len(items)].case)
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


def graphs_with_weights(ctx: RankContext, cases: list[Case], **fields: Any) -> int:
    """A dispatch without weights and a combine that is given them; then another combine of it."""
    stream, rank = torch.cuda.Stream(ctx.device), ctx.rank
    with (
        torch.no_grad(),
        torch.cuda.stream(stream),
        ll_communicator(ctx, cases[0], **fields) as comm,
    ):
        items = [Item.of(i, case, rank, ctx.device) for i, case in enumerate(cases)]
        inputs = Inputs(items[0])
        given = weights_of_combine(cases[0], rank, 0).to(ctx.device)
        _, handle = comm.dispatch(inputs.x_TH, inputs.ids_TK)
        rows = items[0].rows(handle.rows_shape).clone()
        comm.combine(rows, handle, topk_weights=given)
        torch.cuda.synchronize(ctx.device)

        def pair() -> tuple[DispatchHandle, Tensor]:
            _, handle = comm.dispatch(inputs.x_TH, inputs.ids_TK)
            return handle, comm.combine(rows, handle, topk_weights=given)

        both, (handle, first) = captured(stream, pair)
        again, second = captured(stream, lambda: comm.combine(rows, handle, topk_weights=given))
        for round_ in range(3 * jobs.ROUNDS):
            item = items[round_ % len(items)]
            inputs.load(item)
            rows.copy_(item.rows(tuple(rows.shape)))
            poison(first, second)
            for number, (graph, result) in enumerate(((both, first), (again, second))):
                given.copy_(weights_of_combine(item.case, rank, number))
                graph.replay()
                expected = combined_of(item.case, rank, topk_weights=number)
                same_bits(result, expected, f"combine of graph {number} with weights")
                if round_ % 3 == 0:
                    jobs.calls_with_all(comm, items[(round_ + 1) % len(items)].case)
        comm.check_health()
    return len(cases)


def graphs_of_halves(ctx: RankContext, cases: list[Case], **fields: Any) -> int:
    """Every half in a graph of its own, two micro-batches under way at once."""
    stream = torch.cuda.Stream(ctx.device)
    with (
        torch.no_grad(),
        torch.cuda.stream(stream),
        ll_communicator(ctx, cases[0], **fields) as comm,
    ):
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
        for round_ in range(2 * jobs.ROUNDS):
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
                jobs.calls_with_all(comm, chosen[0].case)
                decode.many_turns(comm, [item.case for item in items])
        comm.check_health()
    return len(cases)


# -- several communicators and streams ------------------------------------------------------------


def mixed_modes(ctx: RankContext, cases: list[Case]) -> int:
    """Both modes in one group, each with its own memory, calls in turns."""
    fields: list[dict[str, Any]] = [
        LL,
        {"engine": "nvlink"},
        {"engine": "nvlink", "static_shapes": True},
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        comms = [
            stack.enter_context(MoECommunicator(config_of(cases[0], ctx.device, **own)))
            for own in fields
        ]
        for case in cases:
            handles = []
            for comm in comms:
                out, handle = dispatch_case(comm, case)
                check_output(case, ctx.rank, out, static=counts_stay_on_device(comm))
                handles.append(handle)
            for comm, handle in zip(comms[::-1], handles[::-1], strict=True):
                jobs.combine_case(comm, case, handle, "combine in turns")
        for comm in comms:
            check_contract(comm, cases[0])
    return len(cases)


def shared_memory(ctx: RankContext, cases: list[Case]) -> int:
    """Layers of a model: communicators that share memory, whole calls and halves on two streams."""
    streams = [torch.cuda.current_stream(ctx.device), torch.cuda.Stream(ctx.device)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        first = stack.enter_context(ll_communicator(ctx, cases[0]))
        second = MoECommunicator(
            config_of(cases[0], ctx.device, **{**LL, "num_sms_dispatch": 5}),
            share_with=first,
        )
        comms = [first, stack.enter_context(second)]
        for round_ in range(2 * jobs.ROUNDS):
            sent = []
            for i in range(2):
                case = cases[(round_ + i) % len(cases)]
                with torch.cuda.stream(streams[(round_ + i) % 2]):
                    call = dispatch_case(comms[i], case, return_recv_hook=True)
                sent.append((comms[i], case, streams[(round_ + i) % 2], call))
            for comm, case, stream, (out, handle, hook) in sent:
                with torch.cuda.stream(stream):
                    hook()
                    check_output(case, ctx.rank, out, static=True)
                    jobs.combine_case(comm, case, handle, "combine on its stream")
    return len(cases)


def over_gloo(ctx: RankContext, cases: list[Case], fields: dict[str, Any]) -> tuple[int, str]:
    """The contract over a group that cannot move tensors of GPUs, and what `collective` says."""
    group = dist.new_group(backend="gloo")
    with torch.no_grad():
        done = jobs.contract(ctx, cases, group=group, **fields)
    config = config_of(cases[0], ctx.device, group=group, engine="collective")
    try:
        MoECommunicator(config)
    except ConfigurationError as error:
        return done, str(error)
    return done, ""


def ht_shared_memory(ctx: RankContext, pairs: list[tuple[Case, Case]]) -> int:
    """Layers of a model with different numbers of experts in one arena, in turns."""
    first_case, second_case = pairs[0]
    with (
        torch.no_grad(),
        MoECommunicator(config_of(first_case, ctx.device, engine="nvlink")) as first,
        MoECommunicator(
            config_of(second_case, ctx.device, engine="nvlink"), share_with=first
        ) as second,
    ):
        for pair in pairs:
            for comm, case in zip((first, second), pair, strict=True):
                check_contract(comm, case)
    return len(pairs)


def other_streams(ctx: RankContext, case: Case) -> bool:
    """A hook on another stream than its call; calls on streams that take turns."""
    streams = [torch.cuda.Stream(ctx.device) for _ in range(2)]
    with torch.no_grad(), ll_communicator(ctx, case) as comm:
        kept: list[object] = []
        for round_ in range(4 * jobs.ROUNDS):
            here, there = streams[round_ % 2], streams[(round_ + 1) % 2]
            with torch.cuda.stream(here):
                out, handle, hook = dispatch_case(comm, case, return_recv_hook=True)
            there.wait_stream(here)
            with torch.cuda.stream(there):
                hook()
                check_output(case, ctx.rank, out, static=True)
                rows = rows_for(case, ctx.rank, handle)
                result, hook = comm.combine(rows, handle, return_recv_hook=True)
            here.wait_stream(there)
            with torch.cuda.stream(here):
                hook()
                same_bits(result, combined_of(case, ctx.rank), "combine on two streams")
            # Memory of one stream that the other uses is the caller's to keep.
            kept += [out, handle, rows, result]
        torch.cuda.synchronize(ctx.device)
    return True


def longest_waits(ctx: RankContext, case: Case, late: int) -> list[int]:
    """`longest_wait_ns` where one rank's GPU is busy before its calls."""
    with torch.no_grad(), ll_communicator(ctx, case) as comm:
        totals = comm.enable_statistics()
        jobs.calls_with_all(comm, case)
        torch.cuda.synchronize(ctx.device)
        totals.longest_wait_ns.zero_()
        dist.barrier()
        for _ in range(2):
            if ctx.rank == late:
                torch.cuda._sleep(200_000_000)
            jobs.calls_with_all(comm, case)
        return totals.longest_wait_ns.tolist()
