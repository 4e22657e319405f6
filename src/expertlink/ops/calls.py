"""What the operators do: calls of an engine, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertlink.connection import Connection
from expertlink.engines.base import CombineCall, DispatchCall
from expertlink.errors import ExpertlinkError
from expertlink.graph_names import apart, communicator, handle_of, tables_of, token_of
from expertlink.reduction import weighted_backward
from expertlink.types import BlockFormat, DispatchHandle, QuantScales

_ABSENT = torch.empty(0)  # stands for weights where it matters only that there are some


def dispatch(
    comm: str,
    input: Tensor,
    topk_ids: Tensor,
    weights: Tensor | None,
    scales: Tensor | None,
    scale_format: str,
    zero_padding: bool,
) -> list[Tensor]:
    return _make_dispatch(
        communicator(comm),
        input,
        topk_ids,
        weights,
        quant_scales(scales, scale_format),
        zero_padding=zero_padding,
        previous=None,
    )


def cached_dispatch(
    comm: str,
    maker: str,
    input: Tensor,
    topk_ids: Tensor | None,
    weights: Tensor | None,
    new_weights: bool,
    scales: Tensor | None,
    scale_format: str,
    zero_padding: bool,
    handle: Sequence[Tensor],
    num_tokens: int,
    num_rows: int,
    weighted: bool,
) -> list[Tensor]:
    return _make_dispatch(
        communicator(comm),
        input,
        topk_ids,
        weights if new_weights else None,
        quant_scales(scales, scale_format),
        zero_padding=zero_padding,
        previous=handle_of(maker, handle, num_tokens, weighted),
    )


def _make_dispatch(
    comm: Connection,
    input: Tensor,
    topk_ids: Tensor | None,
    weights: Tensor | None,
    scales: QuantScales | None,
    *,
    zero_padding: bool,
    previous: DispatchHandle | None,
) -> list[Tensor]:
    """What the method of the communicator does, without gradients."""
    engine, calls = comm._ready(), comm._calls
    with torch.no_grad():
        try:
            call = calls.dispatch(input, topk_ids, weights, scales, previous_handle=previous)
        except ExpertlinkError as error:
            comm.refuse("dispatch", error, cached=previous is not None)
        call.zero_padding = zero_padding
        started = engine.dispatch(call)
        # A graph may use the memory of its inputs again: the handle keeps none of them.
        handle = calls.handle(call, started, previous_handle=previous, topk_ids=None)
        if handle.topk_weights is not None:
            handle.topk_weights = _ABSENT
        started.finish()
        output = started.output
        assert output.num_tokens_per_rank is not None
        counts = [output.num_tokens_per_expert, output.num_tokens_per_rank]
        if output.expert_offsets is not None:
            counts.insert(1, output.expert_offsets)
        scale_tensor = None if output.scales is None else output.scales.tensor
        returned = [output.tokens, _anchor(input), torch.cat(counts), scale_tensor]
        small = (output.topk_ids, output.topk_weights, output.source_tokens)
        returned += [None if tensor is None else apart(tensor) for tensor in small]
        form = comm._graph_form
        assert form is not None
        if not form.static:
            tensors = [token_of(handle)]
        else:
            tensors = tables_of(comm, handle)
            if previous is not None and not form.own_tables:
                tensors = tensors[1 : 3 if weights is not None else 2]  # the tables are not new
    return [tensor for tensor in returned if tensor is not None] + tensors


def combine(
    comm: str,
    maker: str,
    rows: Tensor,
    handle: Sequence[Tensor],
    anchor: Tensor | None,
    weights: Tensor | None,
    given: bool,
    num_tokens: int,
    weighted: bool,
) -> Tensor:
    found, made = communicator(comm), handle_of(maker, handle, num_tokens, weighted)
    engine, calls = found._ready(), found._calls
    with torch.no_grad():
        try:
            call = calls.combine(rows, made, topk_weights=weights if given else None)
        except ExpertlinkError as error:
            found.refuse("combine", error)
        started = engine.combine(call)
        started.finish()
    return started.out_TH


def dispatch_backward(
    comm: str,
    grad_tokens: Tensor | None,
    grad_weights: Tensor | None,
    grad_anchor: Tensor | None,
    handle: Sequence[Tensor],
    num_tokens: int,
    weighted: bool,
) -> list[Tensor]:
    state = handle_of(comm, handle, num_tokens, weighted).state
    engine = communicator(comm)._ready()
    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
    with torch.no_grad():
        if grad_tokens is None:  # of quantized rows
            assert grad_weights is not None
            return [engine.weight_grads(state, grad_weights)]
        combined = engine.combine(
            CombineCall(
                rows=grad_tokens.contiguous(),
                state=state,
                weighted=False,
                out_TH=grad_tokens.new_empty((num_tokens, grad_tokens.shape[-1])),
                weight_grads=grad_weights,
            )
        )
        combined.finish()
    if combined.weight_grads_TK is None:
        return [combined.out_TH]
    return [combined.out_TH, combined.weight_grads_TK]


def combine_backward(
    comm: str,
    maker: str,
    grad: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    handle: Sequence[Tensor],
    leading: Sequence[int],
    num_tokens: int,
    weighted: bool,
    scaled: bool,
) -> list[Tensor]:
    state = handle_of(maker, handle, num_tokens, weighted).state
    engine = communicator(comm)._ready()
    with torch.no_grad():
        arrived = engine.dispatch(
            DispatchCall(
                x_TW=grad.contiguous(), previous=state, weights_TK=weights, zero_padding=True
            )
        )
        arrived.finish()
        grads = [arrived.output.tokens, _anchor(grad)]
        if scaled:
            slot_weights = engine.slot_weights(state if weights is None else arrived.state)
            assert slot_weights is not None
            per_slot = weighted_backward(
                grads[0], slot_weights, rows, kernel=engine.backward_kernel
            )
            if per_slot is not None:
                grads.append(engine.weight_grads(state, per_slot))
    return grads


def _anchor(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def quant_scales(scales: Tensor | None, scale_format: str) -> QuantScales | None:
    """Scales and their format, of which an operator is given tensor and name."""
    if scales is None:
        return None
    return QuantScales(scales, BlockFormat(scale_format) if scale_format else None)
