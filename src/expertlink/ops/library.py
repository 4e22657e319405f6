"""The operators: their names, schemas and backward. calls.py does the work.

| operator | returns |
|---|---|
| `dispatch`, `cached_dispatch` | what `parts` lists, then the tensors of the handle |
| `combine` | the sums `[T, H]` |
| `dispatch_backward` | gradients of the rows, and of the weights, where they are asked for |
| `combine_backward` | gradients of the expert outputs and of the anchor, and of the weights |

Each exists twice. Those whose name ends in `_static` never wait on the host and take part in CUDA
graphs. The others are marked as unsafe there, so that torch.compile leaves them outside.

Backward is as in autograd.py, whose anchor is here a tensor between the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertlink.errors import InputError
from expertlink.graph_names import communicator
from expertlink.ops import calls, shapes
from expertlink.ops.shapes import Parts, joined, own_handle_is_whole, parts


class _Family:
    """The operators of one kind: of calls that wait on the host, or of those that do not."""

    def __init__(self, *, static: bool) -> None:
        self._suffix = "_static" if static else ""
        # What waits on the host, or looks something up there, cannot be replayed.
        self._tags = () if static else (torch.Tag.cudagraph_unsafe,)
        row = "Tensor input, Tensor{0} topk_ids, Tensor? weights, "
        scales = "Tensor? scales, str scale_format, bool zero_padding"
        self.dispatch = self._define(
            "dispatch", f"(str comm, {row.format('')}{scales}) -> Tensor[]"
        )
        self.cached_dispatch = self._define(
            "cached_dispatch",
            f"(str comm, str maker, {row.format('?')}bool new_weights, {scales}, "
            "Tensor[] handle, SymInt num_tokens, SymInt num_rows, bool weighted) -> Tensor[]",
        )
        self.combine = self._define(
            "combine",
            "(str comm, str maker, Tensor rows, Tensor[] handle, Tensor? anchor, Tensor? weights, "
            "bool given, SymInt num_tokens, bool weighted) -> Tensor",
        )
        self.dispatch_backward = self._define(
            "dispatch_backward",
            "(str comm, Tensor? grad_tokens, Tensor? grad_weights, Tensor? grad_anchor, "
            "Tensor[] handle, SymInt num_tokens, bool weighted) -> Tensor[]",
        )
        self.combine_backward = self._define(
            "combine_backward",
            "(str comm, str maker, Tensor grad, Tensor? rows, Tensor? weights, Tensor[] handle, "
            "SymInt[] leading, SymInt num_tokens, bool weighted, bool scaled) -> Tensor[]",
        )
        self.dispatch.register_autograd(self._dispatched, setup_context=_after_dispatch)
        self.cached_dispatch.register_autograd(
            self._cached_dispatched, setup_context=_after_cached_dispatch
        )
        self.combine.register_autograd(self._combined, setup_context=_after_combine)

    def _define(self, name: str, schema: str) -> Any:
        """The operator of a name, which calls.py and shapes.py have a function for."""
        qualified = f"expertlink::{name}{self._suffix}"
        kernel, fake = getattr(calls, name), getattr(shapes, name)
        op: Any = torch.library.custom_op(
            qualified, kernel, mutates_args=(), schema=schema, tags=self._tags
        )
        op.register_fake(fake)
        op.register_vmap(_refuse_vmap)
        return op

    # -- backward ---------------------------------------------------------------------------------

    def _dispatched(self, ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        grad_input, grad_weights = self._dispatch_grads(ctx, grads)
        return None, grad_input, None, grad_weights, None, None, None

    def _cached_dispatched(self, ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        grad_input, grad_weights = self._dispatch_grads(ctx, grads)
        nothing = [None] * ctx.num_given
        left = (None, None, None, None, nothing, None, None, None)
        return None, None, grad_input, None, grad_weights, *left

    def _dispatch_grads(
        self, ctx: Any, grads: Sequence[Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        at: Parts = ctx.at
        grad_weights = grads[at.topk_weights] if ctx.weights_need_grad else None
        found = self.dispatch_backward(
            ctx.comm,
            None if ctx.quantized else grads[at.tokens],
            grad_weights,
            grads[at.anchor],
            list(ctx.saved_tensors),
            ctx.num_tokens,
            ctx.weighted,
        )
        found = list(found)
        grad_input = None if ctx.quantized else found.pop(0)
        return grad_input, found[0] if found else None

    def _combined(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = list(ctx.saved_tensors)
        handle, others = tensors[: ctx.num_given], tensors[ctx.num_given :]
        weights = others.pop() if ctx.given else None
        rows = others.pop() if others else None
        found = self.combine_backward(
            ctx.comm,
            ctx.maker,
            grad,
            rows,
            weights,
            handle,
            ctx.leading,
            ctx.num_tokens,
            ctx.weighted,
            ctx.scaled,
        )
        grad_weights = found[2] if len(found) > 2 else None
        grad_anchor = found[1] if ctx.anchored else None
        nothing = [None] * ctx.num_given
        return None, None, found[0], nothing, grad_anchor, grad_weights, None, None, None


def _after_dispatch(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    comm, input, _, weights, scales, _, _ = inputs
    at = _note_dispatch(ctx, comm, input, weights, scales, output)
    ctx.weighted = weights is not None
    ctx.save_for_backward(*output[at.handle :])


def _after_cached_dispatch(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    comm, _, input, _, weights, new_weights, scales, _, _, handle, _, _, weighted = inputs
    at = _note_dispatch(ctx, comm, input, weights, scales, output)
    ctx.num_given = len(handle)
    ctx.weighted = weighted or new_weights
    own = output[at.handle :]
    if own_handle_is_whole(comm):
        ctx.save_for_backward(*own)
    else:
        ctx.save_for_backward(*joined(handle, own, new_weights))


def _note_dispatch(
    ctx: Any,
    comm: str,
    input: Tensor,
    weights: Tensor | None,
    scales: Tensor | None,
    output: list[Tensor],
) -> Parts:
    config = communicator(comm).config
    ctx.quantized = scales is not None or config.block_format is not None
    at = parts(config, scaled=ctx.quantized, weighted=weights is not None)
    ctx.comm, ctx.at, ctx.num_tokens = comm, at, input.shape[0]
    ctx.weights_need_grad = at.topk_weights >= 0 and weights is not None and weights.requires_grad
    if ctx.quantized:
        ctx.mark_non_differentiable(output[at.tokens], output[at.scales])
    return at


def _after_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    comm, maker, rows, handle, anchor, weights, given, num_tokens, weighted = inputs
    ctx.comm, ctx.maker, ctx.given = comm, maker, given
    ctx.anchored = anchor is not None
    ctx.num_given, ctx.num_tokens, ctx.weighted = len(handle), num_tokens, weighted
    ctx.leading = list(rows.shape[:-1])
    expanded = communicator(comm).config.layout.expanded
    ctx.scaled = expanded and weights is not None
    keep = [*handle]
    if expanded and weights is not None and weights.requires_grad:
        keep.append(rows)  # only the gradients of weights read them again
    if given:
        keep.append(weights)
    ctx.save_for_backward(*keep)


def _refuse_vmap(info: Any, in_dims: Any, *args: Any, **options: Any) -> Any:
    raise InputError(
        "dispatch and combine cannot be vectorized by torch.vmap: every call takes part in an "
        "exchange with the other ranks. Call them on whole batches, outside of vmap"
    )


HOST = _Family(static=False)
STATIC = _Family(static=True)

DISPATCH_OPS = tuple(
    op._opoverload for f in (HOST, STATIC) for op in (f.dispatch, f.cached_dispatch)
)
COMBINE_OPS = tuple(family.combine._opoverload for family in (HOST, STATIC))
