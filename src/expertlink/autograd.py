"""Differentiable dispatch and combine over any engine.

Backward of dispatch is an unweighted combine of the rows' gradients; backward of combine is a
cached dispatch of the tokens' gradients, scaled by the routing weights where combine applied them.
Gradients of the weights travel back as `[T, K]` numbers. Rounding on the wire passes gradients
unchanged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched, Engine
from expertlink.reduction import accumulator_dtype


def needs_grad(*tensors: Tensor | None) -> bool:
    """True where autograd has to follow a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def dispatch(engine: Engine, call: DispatchCall) -> Dispatched:
    """`engine.dispatch` whose tokens and weights carry gradients back to the call's tensors."""
    started: list[Dispatched] = []
    tokens, weights = _Dispatch.apply(call.x_TW, call.weights_TK, engine, call, started)
    output = dataclasses.replace(started[0].output, tokens=tokens, topk_weights=weights)
    return dataclasses.replace(started[0], output=output)


def combine(engine: Engine, call: CombineCall, weights_TK: Tensor | None) -> Combined:
    """`engine.combine` whose result carries gradients back to the rows and to `weights_TK`.

    `weights_TK` are the routing weights that the dispatch was given, if combine applies them.
    """
    started: list[Combined] = []
    out_TH = _Combine.apply(call.rows, weights_TK, engine, call, started)
    return dataclasses.replace(started[0], out_TH=out_TH)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TW: Tensor,
        weights_TK: Tensor | None,
        engine: Engine,
        call: DispatchCall,
        started: list[Dispatched],
    ) -> tuple[Tensor, Tensor | None]:
        del weights_TK  # an argument so that its gradient has somewhere to go
        started.append(engine.dispatch(call))
        ctx.engine, ctx.state, ctx.shape = engine, started[0].state, x_TW.shape
        output = started[0].output
        ctx.quantized = call.scales is not None or call.quantize_to is not None
        if ctx.quantized:
            ctx.mark_non_differentiable(output.tokens)
        return output.tokens, output.topk_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_tokens, grad_weights = grads
        if ctx.quantized:  # only the weights carry gradients
            grads_TK = ctx.engine.weight_grads(ctx.state, grad_weights.contiguous())
            return None, grads_TK, None, None, None
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
        return out_TH, combined.weight_grads_TK, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights_TK: Tensor | None,
        engine: Engine,
        call: CombineCall,
        started: list[Combined],
    ) -> Tensor:
        started.append(engine.combine(call))
        ctx.engine, ctx.state, ctx.weighted = engine, call.state, call.weighted
        # Only the weights' gradient reads the rows again.
        keep = weights_TK is not None and weights_TK.requires_grad
        ctx.save_for_backward(rows if keep else None)
        return call.out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_TH,) = grads
        (rows,) = ctx.saved_tensors
        arrived = ctx.engine.dispatch(
            DispatchCall(x_TW=grad_TH.contiguous(), previous=ctx.state, zero_padding=True)
        )
        arrived.finish()
        grad_rows = arrived.output.tokens
        grad_weights = None
        if rows is not None:
            wide = accumulator_dtype(rows.dtype)
            per_slot = (grad_rows.to(wide) * rows.to(wide)).sum(dim=-1)
            grad_weights = ctx.engine.weight_grads(ctx.state, per_slot)
        slot_weights = ctx.engine.slot_weights(ctx.state) if ctx.weighted else None
        if slot_weights is not None:
            grad_rows = (grad_rows * slot_weights.unsqueeze(-1)).to(grad_rows.dtype)
        return grad_rows, grad_weights, None, None, None
