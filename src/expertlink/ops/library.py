"""The operators: what they do, the shapes that they return, their backward.

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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.connection import Connection
from expertlink.engines.base import CombineCall, DispatchCall
from expertlink.engines.nvlink.ll.tables import LlTableLayout
from expertlink.engines.nvlink.tables import TableLayout
from expertlink.engines.ranks.capacity import largest_shape
from expertlink.errors import ExpertlinkError, InputError
from expertlink.graph_names import (
    GraphForm,
    apart,
    communicator,
    handle_of,
    tables_of,
    token_of,
)
from expertlink.reduction import weighted_backward
from expertlink.types import BlockFormat, DispatchHandle, QuantScales, RowKind
from expertlink.validation import kind_of, plain_kind

_ABSENT = torch.empty(0)  # stands for weights where it matters only that there are some


class Parts(NamedTuple):
    """Positions in what a dispatch returns; -1: not there. The handle's tensors come after them.

    `counts` are rows per local expert, offsets of the groups `[E_loc + 1]`, rows per rank.
    """

    tokens: int
    anchor: int
    counts: int
    scales: int
    topk_ids: int
    topk_weights: int
    source_tokens: int
    handle: int


def parts(config: MoECommunicatorConfig, *, scaled: bool, weighted: bool) -> Parts:
    """What a dispatch returns.

    Args:
        config: of its communicator.
        scaled: rows have scales.
        weighted: rows have weights.
    """
    deduplicated = not config.layout.expanded
    there = (
        True,
        True,
        True,
        scaled,
        deduplicated,
        deduplicated and weighted,
        config.source_tokens,
        True,
    )
    return Parts(*(sum(there[:i]) if is_there else -1 for i, is_there in enumerate(there)))


# -- what they do ---------------------------------------------------------------------------------


def _dispatch(
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
        _quant_scales(scales, scale_format),
        zero_padding=zero_padding,
        previous=None,
    )


def _cached_dispatch(
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
        _quant_scales(scales, scale_format),
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
        returned = [output.tokens, _new_anchor(input), torch.cat(counts), scale_tensor]
        small = (output.topk_ids, output.topk_weights, output.source_tokens)
        returned += [None if tensor is None else apart(tensor) for tensor in small]
        form = comm._graph_form
        assert form is not None
        if not form.static:
            tensors = [token_of(handle)]
        else:
            tensors = tables_of(comm, handle)
            if previous is not None and not form.own_tables:
                tensors = tensors[2 : 4 if weights is not None else 3]  # the others are not new
    return [tensor for tensor in returned if tensor is not None] + tensors


def _combine(
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


def _dispatch_backward(
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


def _combine_backward(
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
        grads = [arrived.output.tokens, _new_anchor(grad)]
        if scaled:
            slot_weights = engine.slot_weights(state if weights is None else arrived.state)
            assert slot_weights is not None
            per_slot = weighted_backward(
                grads[0], slot_weights, rows, kernel=engine.backward_kernel
            )
            if per_slot is not None:
                grads.append(engine.weight_grads(state, per_slot))
    return grads


def _new_anchor(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def _quant_scales(scales: Tensor | None, scale_format: str) -> QuantScales | None:
    if scales is None:
        return None
    return QuantScales(scales, BlockFormat(scale_format) if scale_format else None)


# -- shapes ---------------------------------------------------------------------------------------


def _fake_dispatch(
    comm: str,
    input: Tensor,
    topk_ids: Tensor,
    weights: Tensor | None,
    scales: Tensor | None,
    scale_format: str,
    zero_padding: bool,
) -> list[Tensor]:
    found = communicator(comm)
    config, form = found.config, found._graph_form
    assert form is not None
    shape = largest_shape(config, num_ranks=found.num_ranks, num_local=form.num_local)
    if not form.static:
        if not config.layout.padded:
            shape = (torch.library.get_ctx().new_dynamic_size(max=shape[0]),)
        tensors = [torch.empty(1, dtype=torch.int64, device="cpu")]
    else:
        words = _table_layout(found, form).words(input.shape[0])
        tensors = [topk_ids.new_empty((words,), dtype=torch.int32), torch.empty_like(topk_ids)]
    quant = _quant_scales(scales, scale_format)
    return _fake_parts(found, input, quant, shape, weights is not None) + tensors


def _fake_cached_dispatch(
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
    found = communicator(comm)
    config, form = found.config, found._graph_form
    assert form is not None
    shape = largest_shape(config, num_ranks=found.num_ranks, num_local=form.num_local)
    if not config.layout.padded:
        shape = (num_rows,)
    if not form.static:
        tensors = [torch.empty(1, dtype=torch.int64, device="cpu")]
    elif form.own_tables:
        tensors = [torch.empty_like(handle[0]), torch.empty_like(handle[1])]
    else:
        tables = _table_layout(found, form)
        tensors = [handle[0].new_empty((sum(tables.public) + 1,))]
        if new_weights:
            tensors.append(input.new_empty((tables.rows, tables.topk), dtype=torch.float32))
    quant = _quant_scales(scales, scale_format)
    return _fake_parts(found, input, quant, shape, weighted or new_weights) + tensors


def _fake_parts(
    comm: Connection,
    input: Tensor,
    scales: QuantScales | None,
    shape: tuple[Any, ...],
    weighted: bool,
) -> list[Tensor]:
    """What a dispatch returns before the handle."""
    config, form = comm.config, comm._graph_form
    assert form is not None
    kind: RowKind = plain_kind(config) if scales is None else kind_of(input, scales)
    counts = form.num_local + comm.num_ranks
    if config.output_layout == "flat":
        counts += form.num_local + 1
    made = [
        input.new_empty((*shape, kind.width), dtype=kind.dtype),
        input.new_empty((0,), dtype=torch.float32),
        input.new_empty((counts,), dtype=torch.int32),
    ]
    if kind.scale_dtype is not None:
        made.append(_fake_scales(config, input, kind, shape))
    if not form.expanded:
        made.append(input.new_empty((*shape, config.topk), dtype=torch.int64))
        if weighted:
            made.append(input.new_empty((*shape, config.topk), dtype=config.weight_dtype))
    if config.source_tokens:
        made.append(input.new_empty(shape, dtype=torch.int32))
    return made


def _fake_scales(
    config: MoECommunicatorConfig, input: Tensor, kind: RowKind, shape: tuple[Any, ...]
) -> Tensor:
    columns = kind.scale_columns
    if config.scale_order == "row_major":
        return input.new_empty((*shape, columns), dtype=kind.scale_dtype)
    *outer, last = shape
    return input.new_empty((*outer, columns, last), dtype=kind.scale_dtype).transpose(-1, -2)


def _table_layout(comm: Connection, form: GraphForm) -> TableLayout:
    layout = LlTableLayout if form.own_tables else TableLayout
    return layout(comm.config, num_ranks=comm.num_ranks, num_local=form.num_local)


def _fake_combine(
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
    return rows.new_empty((num_tokens, rows.shape[-1]))


def _fake_dispatch_backward(
    comm: str,
    grad_tokens: Tensor | None,
    grad_weights: Tensor | None,
    grad_anchor: Tensor | None,
    handle: Sequence[Tensor],
    num_tokens: int,
    weighted: bool,
) -> list[Tensor]:
    grads = []
    if grad_tokens is not None:
        grads.append(grad_tokens.new_empty((num_tokens, grad_tokens.shape[-1])))
    if grad_weights is not None:
        grads.append(_fake_weight_grads(comm, grad_weights, num_tokens))
    return grads


def _fake_combine_backward(
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
    grads = [
        grad.new_empty((*leading, grad.shape[-1])),
        grad.new_empty((0,), dtype=torch.float32),
    ]
    if scaled and rows is not None:
        grads.append(_fake_weight_grads(comm, grad, num_tokens))
    return grads


def _fake_weight_grads(comm: str, like: Tensor, num_tokens: int) -> Tensor:
    config = communicator(comm).config
    return like.new_empty((num_tokens, config.topk), dtype=config.weight_dtype)


# -- gradients ------------------------------------------------------------------------------------


class _Family:
    """The operators of one kind: of calls that wait on the host, or of those that do not."""

    def __init__(self, *, static: bool) -> None:
        self._suffix = "_static" if static else ""
        # What waits on the host, or looks something up there, cannot be replayed.
        self._tags = () if static else (torch.Tag.cudagraph_unsafe,)
        row = "Tensor input, Tensor{0} topk_ids, Tensor? weights, "
        scales = "Tensor? scales, str scale_format, bool zero_padding"
        self.dispatch = self._define(
            "dispatch",
            _dispatch,
            _fake_dispatch,
            f"(str comm, {row.format('')}{scales}) -> Tensor[]",
        )
        self.cached_dispatch = self._define(
            "cached_dispatch",
            _cached_dispatch,
            _fake_cached_dispatch,
            f"(str comm, str maker, {row.format('?')}bool new_weights, {scales}, "
            "Tensor[] handle, SymInt num_tokens, SymInt num_rows, bool weighted) -> Tensor[]",
        )
        self.combine = self._define(
            "combine",
            _combine,
            _fake_combine,
            "(str comm, str maker, Tensor rows, Tensor[] handle, Tensor? anchor, Tensor? weights, "
            "bool given, SymInt num_tokens, bool weighted) -> Tensor",
        )
        self.dispatch_backward = self._define(
            "dispatch_backward",
            _dispatch_backward,
            _fake_dispatch_backward,
            "(str comm, Tensor? grad_tokens, Tensor? grad_weights, Tensor? grad_anchor, "
            "Tensor[] handle, SymInt num_tokens, bool weighted) -> Tensor[]",
        )
        self.combine_backward = self._define(
            "combine_backward",
            _combine_backward,
            _fake_combine_backward,
            "(str comm, str maker, Tensor grad, Tensor? rows, Tensor? weights, Tensor[] handle, "
            "SymInt[] leading, SymInt num_tokens, bool weighted, bool scaled) -> Tensor[]",
        )
        self.dispatch.register_autograd(self._dispatched, setup_context=_after_dispatch)
        self.cached_dispatch.register_autograd(
            self._cached_dispatched, setup_context=_after_cached_dispatch
        )
        self.combine.register_autograd(self._combined, setup_context=_after_combine)

    def _define(
        self, name: str, kernel: Callable[..., Any], fake: Callable[..., Any], schema: str
    ) -> Any:
        qualified = f"expertlink::{name}{self._suffix}"
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


def own_handle_is_whole(comm: str) -> bool:
    """Whether a cached dispatch returns all tensors of its handle."""
    form = communicator(comm)._graph_form
    assert form is not None
    return form.own_tables or not form.static


def joined(previous: Sequence[Tensor], own: Sequence[Tensor], new_weights: bool) -> list[Tensor]:
    """Tensors of the handle of a cached dispatch that shares tables with the one before."""
    older = [] if new_weights else previous[3:4]
    return [*previous[:2], *own, *older]


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
