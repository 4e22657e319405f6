"""Differentiable dispatch and combine over any engine.

Backward of dispatch is an unweighted combine of the rows' gradients; backward of combine is a
cached dispatch of the tokens' gradients, scaled in place by the routing weights where combine
applied them. Gradients of the weights travel back as `[T, K]` numbers. Rounding on the wire passes
gradients unchanged.

Both are collective, so which calls autograd tracks must not depend on what a rank received: the
expert outputs of a rank without rows have no graph. A dispatch is tracked where its own tensors
require grad, a combine wherever gradients are enabled. An empty tensor, the anchor, connects all
combines to their dispatch in the graph, so that their backward calls come in one order on every
rank. A handle keeps it, and so the graph, until the backward of the dispatch.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched, Engine
from expertlink.engines.outputs import with_tensors
from expertlink.gradients import TrackedDispatch, anchor_of, needs_grad, without_gradients
from expertlink.reduction import weighted_backward
from expertlink.types import Anchor, DispatchHandle


def tracks_combine(call: CombineCall, handle: DispatchHandle, out: Tensor | None) -> bool:
    """Whether autograd tracks a combine; called where gradients are enabled.

    Args:
        call: the combine.
        handle: of its dispatch.
        out: the caller's tensor for the result. With it, as with other arguments that exclude
            gradients, a combine is tracked only if something here requires grad.
    """
    if anchor_of(handle) is not None or needs_grad(call.rows, _weights_of(call, handle)):
        return True
    return (
        call.out_TH is not out
        and call.slot_weights is None
        and call.weight_grads is None
        and not call.return_recv_hook
        and not handle.leases
        and not torch.is_inference_mode_enabled()
    )


def dispatch(engine: Engine, call: DispatchCall, weights_TK: Tensor | None) -> TrackedDispatch:
    """`engine.dispatch` whose tokens and weights carry gradients back to the call's tensors.

    Args:
        engine: moves the rows.
        call: the dispatch.
        weights_TK: the routing weights: the call's, or those that a cached dispatch keeps.
    """
    work = _DispatchWork(engine, call)
    try:
        results: Any = _Dispatch.apply(call.x_TW, weights_TK, work)
    except Exception:
        _finish_failed(work.started)
        raise
    plain, kept = work.started, work.kept
    assert plain is not None
    tokens, weights, kept.tensor = results
    output = with_tensors(plain.output, tokens=tokens, topk_weights=weights)
    return TrackedDispatch(
        output, plain.state, plain.finish, plain.call, plain.topk_ids_TK, anchor=kept
    )


def combine(engine: Engine, call: CombineCall, handle: DispatchHandle) -> Combined:
    """`engine.combine` whose result carries gradients back to the rows and the routing weights."""
    weights_TK = _weights_of(call, handle)
    anchor = anchor_of(handle)
    if anchor is None:
        anchor = _new_anchor(call.rows).requires_grad_()
    work = _CombineWork(engine, call)
    try:
        out_TH: Any = _Combine.apply(call.rows, weights_TK, anchor, work)
    except Exception:
        _finish_failed(work.started)
        raise
    plain = work.started
    assert plain is not None
    return Combined(out_TH, plain.weight_grads_TK, plain.finish)


def _weights_of(call: CombineCall, handle: DispatchHandle) -> Tensor | None:
    """`[T, K]` weights to which gradients of a combine flow, or None."""
    if not call.weighted:
        return None
    return handle.topk_weights if call.weights_TK is None else call.weights_TK


def _finish_failed(operation: Dispatched | Combined | None) -> None:
    """Finishes a call that started but whose results nobody gets, because an exception ended it.

    The recomputation of a checkpoint ends so: by an exception, at the last tensor that is saved.
    """
    if operation is not None:
        without_gradients(operation.finish)


class _DispatchWork:
    """What a tracked dispatch does, and what it started. (Functions look at every argument.)"""

    __slots__ = ("call", "engine", "kept", "started")

    def __init__(self, engine: Engine, call: DispatchCall) -> None:
        self.engine, self.call, self.kept = engine, call, Anchor(None)
        self.started: Dispatched | None = None


class _CombineWork:
    """The same of a combine."""

    __slots__ = ("call", "engine", "started")

    def __init__(self, engine: Engine, call: CombineCall) -> None:
        self.engine, self.call = engine, call
        self.started: Combined | None = None


def _new_anchor(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TW: Tensor,
        weights_TK: Tensor | None,
        work: _DispatchWork,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        del weights_TK  # an argument so that its gradient has somewhere to go
        call = work.call
        started = work.started = work.engine.dispatch(call)
        ctx.engine, ctx.state, ctx.shape = work.engine, started.state, x_TW.shape
        output = started.output
        ctx.quantized = call.scales is not None or call.quantize_to is not None
        if ctx.quantized:
            ctx.mark_non_differentiable(output.tokens)
        anchor = _new_anchor(x_TW)
        ctx.kept = weakref.ref(work.kept)  # the handle's; it keeps this node
        # A checkpoint is recomputed where a saved tensor is asked for: on all ranks.
        ctx.save_for_backward(anchor)
        return output.tokens, output.topk_weights, anchor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_tokens, grad_weights, _ = grads
        _ = ctx.saved_tensors
        kept = ctx.kept()
        if kept is not None:  # a handle that is kept for cached dispatches keeps no graph
            kept.tensor = None
        if ctx.quantized:  # only the weights carry gradients
            grads_TK = ctx.engine.weight_grads(ctx.state, grad_weights.contiguous())
            return None, grads_TK, None
        out_TH = grad_tokens.new_empty(ctx.shape)
        combined = ctx.engine.combine(
            CombineCall(
                rows=grad_tokens.contiguous(),
                state=ctx.state,
                weighted=False,
                out_TH=out_TH,
                weight_grads=None if grad_weights is None else grad_weights.contiguous(),
            )
        )
        combined.finish()
        return out_TH, combined.weight_grads_TK, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights_TK: Tensor | None,
        anchor: Tensor,
        work: _CombineWork,
    ) -> Tensor:
        call = work.call
        work.started = work.engine.combine(call)
        ctx.engine, ctx.state, ctx.weighted = work.engine, call.state, call.weighted
        # Only the weights' gradient reads the rows again.
        keep = weights_TK is not None and weights_TK.requires_grad
        ctx.save_for_backward(rows if keep else None, call.weights_TK, anchor)
        return call.out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_TH,) = grads
        rows, given_TK, _ = ctx.saved_tensors
        arrived = ctx.engine.dispatch(
            DispatchCall(
                x_TW=grad_TH.contiguous(),
                previous=ctx.state,
                weights_TK=given_TK,  # of the combine; those of the dispatch are there already
                zero_padding=True,
            )
        )
        arrived.finish()
        grad_rows, grad_weights = arrived.output.tokens, None
        state = ctx.state if given_TK is None else arrived.state
        slot_weights = ctx.engine.slot_weights(state) if ctx.weighted else None
        if slot_weights is not None:
            # What arrived belongs to nobody else: it becomes the result.
            per_slot = weighted_backward(
                grad_rows, slot_weights, rows, kernel=ctx.engine.backward_kernel
            )
            if per_slot is not None:
                grad_weights = ctx.engine.weight_grads(ctx.state, per_slot)
        return grad_rows, grad_weights, None, None
