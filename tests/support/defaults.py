"""Calls under another default device and default dtype, as serving frameworks set them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expertlink import BlockFormat, InputError, MoECommunicator
from expertlink.launch import RankContext
from support.jobs import check_output, config_of, same_bits
from support.oracle import (
    Case,
    combined_of,
    expert_rows,
    inputs_of,
    ranges_of,
    returned_grads,
    slot_grads,
)


@contextlib.contextmanager
def other_defaults() -> Iterator[None]:
    """Tensors are made without memory and of bfloat16, unless somebody says otherwise."""
    dtype = torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def contract(ctx: RankContext, case: Case) -> bool:
    """Everything that a communicator does, in inference mode; compared outside."""
    rank = ctx.rank
    own, rows, grads = inputs_of(case, rank), expert_rows(case, rank), slot_grads(case, rank)
    config = config_of(case, ctx.device)
    seen: dict[str, Any] = {}
    with other_defaults(), torch.inference_mode(), MoECommunicator(config) as comm:
        totals = comm.enable_statistics()
        seen["dispatch"], handle = comm.dispatch(own.x_TH, own.ids_TK, own.weights_TK)
        seen["combine"] = comm.combine(rows, handle)
        seen["cached"], cached = comm.dispatch(own.x_TH, own.ids_TK, previous_handle=handle)
        sums, grads_TK = comm.combine(rows, cached, weight_grads=grads)
        buffers = comm.create_buffers()
        request = comm.dispatch_async(own.x_TH, own.ids_TK, own.weights_TK, output_buffer=buffers)
        seen["into buffers"], kept = request.wait()
        into, hook = comm.combine(rows, kept, return_recv_hook=True)
        hook()
        with contextlib.suppress(InputError):
            comm.dispatch(own.x_TH[:, 1:], own.ids_TK, own.weights_TK)
            raise AssertionError("rows of another width are refused")
        if case.layout.expanded:
            seen["ranges"] = [values.tolist() for values in comm.expert_ranges(handle)]
        comm.wire_rows(handle)
        comm.query_mask()
        comm.check_health()
        received = int(totals.rows_received.sum())
    for name in ("dispatch", "cached", "into buffers"):
        check_output(case, rank, seen[name])
    for name, result in (("combine", seen["combine"]), ("again", sums), ("hook", into)):
        same_bits(result, combined_of(case, rank), name)
    same_bits(grads_TK, returned_grads(case, rank), "weight gradients")
    if case.layout.expanded:
        assert seen["ranges"][1] == ranges_of(case, rank)[1]
    assert received > 0
    return True


def training(ctx: RankContext, case: Case, block_format: BlockFormat | None) -> bool:
    """Rows, sums and gradients are those of the usual defaults."""
    own = inputs_of(case, ctx.rank)
    config = config_of(case, ctx.device, quantization=block_format)

    def step() -> list[Tensor]:
        x_TH, weights_TK = own.x_TH.clone(), own.weights_TK
        assert weights_TK is not None
        weights_TK = weights_TK.clone().requires_grad_()
        x_TH.requires_grad_(block_format is None)
        with MoECommunicator(config) as comm:
            out, handle = comm.dispatch(x_TH, own.ids_TK, weights_TK)
            rows = out.tokens.to(case.dtype)
            if out.topk_weights is not None:
                rows = rows * out.topk_weights.sum(-1, keepdim=True)
            result = comm.combine(rows.to(case.dtype), handle)
            result.square().sum().backward()
        grads = [tensor.grad for tensor in (x_TH, weights_TK) if tensor.grad is not None]
        return [result, *grads]

    usual = step()
    with other_defaults():
        other = step()
    assert len(usual) == (3 if block_format is None else 2)
    for number, (one, two) in enumerate(zip(usual, other, strict=True)):
        same_bits(two, one, f"tensor {number}")
    return True
