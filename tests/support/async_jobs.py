"""Operations in flight: several at once, waited for in any order, always the same bits."""

from __future__ import annotations

from typing import Any

import torch

from expertlink import MoECommunicator
from expertlink.launch import RankContext
from support.oracle import Case, inputs_of
from support.oracle_results import combined_of, expert_rows
from support.rank_jobs import (
    check_output,
    config_of,
    counts_stay_on_device,
    rows_for,
    same_bits,
)


def overlapping(ctx: RankContext, case: Case, **fields: Any) -> bool:
    """Two dispatches and two combines in flight on one communicator."""
    own = inputs_of(case, ctx.rank)
    x_TH, ids_TK = own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device)
    weights = None if own.weights_TK is None else own.weights_TK.to(ctx.device)
    with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
        overlap = comm.create_overlap_config("dispatch")
        first = comm.dispatch_async(x_TH, ids_TK, weights, overlap=overlap)
        second = comm.dispatch_async(x_TH, ids_TK, weights)
        results = [second.wait(), first.wait()]
        for out, _ in results:
            check_output(case, ctx.rank, out, static=counts_stay_on_device(comm))
        assert first.wait() is results[1], "waiting again gives the same"
        combines = [
            comm.combine_async(rows_for(case, ctx.rank, handle, round_=i), handle)
            for i, (_, handle) in enumerate(results)
        ]
        for i in (1, 0):
            result = combines[i].wait()
            assert isinstance(result, torch.Tensor)
            same_bits(result, combined_of(case, ctx.rank, round_=i), f"combine {i}")
    return True


def finished_later(ctx: RankContext, case: Case, **fields: Any) -> bool:
    """`async_finish=True`: results may be read after `handle.wait()`; combine waits by itself."""
    own = inputs_of(case, ctx.rank)
    x_TH, ids_TK = own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device)
    weights = None if own.weights_TK is None else own.weights_TK.to(ctx.device)
    with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
        out, handle = comm.dispatch(x_TH, ids_TK, weights, async_finish=True)
        handle.wait()
        handle.wait()
        check_output(case, ctx.rank, out, static=counts_stay_on_device(comm))
        result = comm.combine(rows_for(case, ctx.rank, handle), handle, async_finish=True)
        handle.wait()
        same_bits(result, combined_of(case, ctx.rank), "combine")

        _, unwaited = comm.dispatch(x_TH, ids_TK, weights, async_finish=True)
        result = comm.combine(rows_for(case, ctx.rank, unwaited), unwaited)
        same_bits(result, combined_of(case, ctx.rank), "combine of an unwaited dispatch")
    return True


def gradients_through_requests(ctx: RankContext, case: Case) -> bool:
    """Asynchronous calls are differentiable and give the gradients of the plain ones."""
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    grads = []
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        for asynchronous in (False, True):
            x_TH = own.x_TH.to(ctx.device).requires_grad_()
            weights_TK = own.weights_TK.to(ctx.device).requires_grad_()
            ids_TK = own.ids_TK.to(ctx.device)
            if asynchronous:
                out, handle = comm.dispatch_async(x_TH, ids_TK, weights_TK).wait()
            else:
                out, handle = comm.dispatch(x_TH, ids_TK, weights_TK)
            rows = torch.sin(out.tokens)
            if out.topk_weights is not None:
                rows = (rows * out.topk_weights.sum(-1, keepdim=True)).to(out.tokens.dtype)
            if asynchronous:
                result = comm.combine_async(rows, handle).wait()
                assert isinstance(result, torch.Tensor)
            else:
                result = comm.combine(rows, handle)
            result.square().sum().backward()
            grads.append((result, x_TH.grad, weights_TK.grad))
    return all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def two_communicators(ctx: RankContext, cases: list[Case]) -> bool:
    """Calls of two communicators on one group, interleaved and in flight together."""
    with (
        MoECommunicator(config_of(cases[0], ctx.device)) as one,
        MoECommunicator(config_of(cases[1], ctx.device)) as two,
    ):
        for _ in range(3):
            pending = []
            for comm, case in zip((one, two), cases, strict=True):
                own = inputs_of(case, ctx.rank)
                weights = None if own.weights_TK is None else own.weights_TK.to(ctx.device)
                pending.append(
                    comm.dispatch_async(own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device), weights)
                )
            for comm, case, request in zip((two, one), cases[::-1], pending[::-1], strict=True):
                out, handle = request.wait()
                check_output(case, ctx.rank, out)
                result = comm.combine(expert_rows(case, ctx.rank).to(ctx.device), handle)
                same_bits(result, combined_of(case, ctx.rank), "combine")
    return True


def soak(ctx: RankContext, cases: list[Case], calls: int) -> bool:
    """Many calls of changing shape on one communicator; borrowed memory must never leak through."""
    with MoECommunicator(config_of(cases[0], ctx.device)) as comm:
        for index in range(calls):
            case = cases[index % len(cases)]
            own = inputs_of(case, ctx.rank)
            weights = None if own.weights_TK is None else own.weights_TK.to(ctx.device)
            out, handle = comm.dispatch(own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device), weights)
            check_output(case, ctx.rank, out)
            if index % 5 == 4:
                continue  # a dispatch that is never combined
            result = comm.combine(expert_rows(case, ctx.rank).to(ctx.device), handle)
            same_bits(result, combined_of(case, ctx.rank), f"combine {index}")
    return True
