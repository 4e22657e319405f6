"""`MoECommunicator.dispatch` and `combine` in a graph: calls of the operators.

torch.compile traces this code, so it is plain: attributes, comparisons, operators.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertlink.graph_names import handle_of
from expertlink.ops.shapes import joined, parts
from expertlink.types import (
    Anchor,
    DispatchBuffers,
    DispatchHandle,
    DispatchLayout,
    DispatchOutput,
    QuantScales,
)
from expertlink.validation import transform_level

if TYPE_CHECKING:
    from expertlink.connection import Connection


@dataclass(eq=False, repr=False)
class TracedHandle(DispatchHandle):
    """The handle of a dispatch in a graph. Outside of graphs it serves as every other.

    `topk_ids` are the caller's own, and there is no `state`: `plain` finds both.

    Attributes:
        maker: name of the communicator that dispatched.
        tensors: what the operators know it by.
        weighted: the routing has weights.
    """

    maker: str = ""
    tensors: list[Tensor] = field(default_factory=list)
    weighted: bool = False

    def wait(self) -> None:
        """Nothing is under way."""

    def plain(self) -> DispatchHandle:
        """The handle as engines know it, connected to the graph of autograd."""
        handle = handle_of(self.maker, self.tensors, self.num_tokens, self.weighted)
        return dataclasses.replace(handle, topk_weights=self.topk_weights, _anchor=self._anchor)


def takes_dispatch(
    comm: Connection,
    input: Tensor,
    topk_ids: Tensor | None,
    *,
    output_buffer: Tensor | DispatchBuffers | None,
    previous_handle: DispatchHandle | None,
    async_finish: bool,
    return_recv_hook: bool,
) -> bool:
    """Whether a dispatch can be an operator. All else leaves the graph."""
    form = comm._graph_form
    if form is None or output_buffer is not None or async_finish or return_recv_hook:
        return False
    if transform_level() is not None:
        return False  # to be refused
    if not form.fixed_rows and torch.compiler.is_dynamo_compiling():
        from expertlink.uncompiled import allows_counted_rows

        if not allows_counted_rows():
            return False
    if not isinstance(input, Tensor):
        return False
    if form.in_blocks and torch.is_grad_enabled() and input.requires_grad:
        return False  # to be refused
    if previous_handle is None:
        return topk_ids is not None
    return isinstance(previous_handle, TracedHandle)


def dispatch(
    comm: Connection,
    input: Tensor,
    topk_ids: Tensor | None,
    weights: Tensor | None,
    scales: QuantScales | Tensor | None,
    previous: DispatchHandle | None,
) -> tuple[DispatchOutput, DispatchHandle]:
    """`comm.dispatch` of arguments that `takes_dispatch`."""
    form, config = comm._graph_form, comm.config
    assert form is not None
    ops = torch.ops.expertlink
    layout, block_format = config.layout, config.block_format
    scale_format = block_format
    if isinstance(scales, QuantScales):
        scale_format, scales = scales.format, scales.tensor
    format_name = "" if scale_format is None else scale_format.value
    zero_padding = torch.is_grad_enabled()
    num_tokens = input.shape[0]
    if previous is None:
        assert topk_ids is not None
        kept, new_weights = weights, True
        weighted = weights is not None
    else:
        assert isinstance(previous, TracedHandle)
        kept = previous.topk_weights if weights is None else weights
        new_weights = weights is not None
        weighted = previous.weighted or new_weights
    carried = kept
    if carried is not None and form.expanded:
        carried = carried.detach()  # their gradients come from combine
    if previous is None:
        op: Any = ops.dispatch_static if form.static else ops.dispatch
        made = op(form.name, input, topk_ids, carried, scales, format_name, zero_padding)
    else:
        same = topk_ids is None or topk_ids is previous.topk_ids
        op = ops.cached_dispatch_static if form.static else ops.cached_dispatch
        made = op(
            form.name,
            previous.maker,
            input,
            None if same else topk_ids,
            carried,
            new_weights,
            scales,
            format_name,
            zero_padding,
            previous.tensors,
            previous.num_tokens,
            previous.rows_shape[0],
            previous.weighted,
        )
    scaled = scales is not None or form.in_blocks
    at = parts(config, scaled=scaled, weighted=weighted)
    tokens, counts = made[at.tokens], made[at.counts]
    tensors = made[at.handle :]
    if previous is not None and form.static and not form.own_tables:
        tensors = joined(previous.tensors, tensors, new_weights)
    local = form.num_local
    is_flat = layout is DispatchLayout.FLAT
    ranks_at = 2 * local + 1 if is_flat else local
    output = DispatchOutput(
        tokens=tokens,
        num_tokens_per_expert=counts[:local],
        layout=layout,
        scales=QuantScales(made[at.scales], scale_format) if scaled else None,
        expert_offsets=counts[local : 2 * local + 1] if is_flat else None,
        topk_ids=made[at.topk_ids] if at.topk_ids >= 0 else None,
        topk_weights=made[at.topk_weights] if at.topk_weights >= 0 else None,
        num_tokens_per_rank=counts[ranks_at:],
        source_tokens=made[at.source_tokens] if at.source_tokens >= 0 else None,
    )
    ids: Any = topk_ids if previous is None else previous.topk_ids
    anchor = made[at.anchor]
    handle = TracedHandle(
        owner=form.identity,
        scope=form.scope,
        call=0,
        num_tokens=num_tokens,
        layout=layout,
        rows_shape=(*tokens.shape[:-1], form.hidden),
        _topk_ids=ids,
        topk_weights=kept,
        state=None,
        _anchor=Anchor(anchor) if anchor.requires_grad else None,
        maker=form.name,
        tensors=tensors,
        weighted=weighted,
    )
    return output, handle


def takes_combine(
    comm: Connection,
    handle: DispatchHandle,
    *,
    out: Tensor | None,
    weights: Tensor | None,
    weight_grads: Tensor | None,
    async_finish: bool,
    return_recv_hook: bool,
) -> bool:
    """Whether a combine can be an operator."""
    return (
        comm._graph_form is not None
        and isinstance(handle, TracedHandle)
        and out is None
        and weights is None
        and weight_grads is None
        and not async_finish
        and not return_recv_hook
    )


def combine(
    comm: Connection,
    expert_output: Tensor,
    handle: DispatchHandle,
    topk_weights: Tensor | None,
) -> Tensor:
    """`comm.combine` of arguments that `takes_combine`."""
    form = comm._graph_form
    assert form is not None
    assert isinstance(handle, TracedHandle)
    given = topk_weights is not None
    weights = topk_weights
    if weights is None and form.expanded:
        weights = handle.topk_weights
    anchor = None
    if torch.is_grad_enabled():
        anchor = form.leaf if handle._anchor is None else handle._anchor.tensor
    ops = torch.ops.expertlink
    op: Any = ops.combine_static if form.static else ops.combine
    return op(
        form.name,
        handle.maker,
        expert_output,
        handle.tensors,
        anchor,
        weights,
        given,
        handle.num_tokens,
        handle.weighted,
    )
