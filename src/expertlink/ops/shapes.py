"""What the operators return: parts and their positions, and the shapes that a trace is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.connection import Connection
from expertlink.engines.nvlink.ll.tables import LlTableLayout
from expertlink.engines.nvlink.tables import TableLayout
from expertlink.engines.ranks.capacity import largest_shape
from expertlink.graph_names import GraphForm, communicator
from expertlink.ops.calls import quant_scales
from expertlink.types import QuantScales, RowKind
from expertlink.validation import kind_of, plain_kind


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


def own_handle_is_whole(comm: str) -> bool:
    """Whether a cached dispatch returns all tensors of its handle."""
    _, form = _of(comm)
    return form.own_tables or not form.static


def joined(previous: Sequence[Tensor], own: Sequence[Tensor], new_weights: bool) -> list[Tensor]:
    """Tensors of the handle of a cached dispatch that shares tables with the one before."""
    older = [] if new_weights else previous[2:3]
    return [previous[0], *own, *older]


# -- shapes, a function for each operator --------------------------------------------------------


def dispatch(
    comm: str,
    input: Tensor,
    topk_ids: Tensor,
    weights: Tensor | None,
    scales: Tensor | None,
    scale_format: str,
    zero_padding: bool,
) -> list[Tensor]:
    found, form = _of(comm)
    shape = largest_shape(found.config, num_ranks=found.num_ranks, num_local=form.num_local)
    if not form.fixed_rows:
        shape = (torch.library.get_ctx().new_dynamic_size(max=shape[0]),)
    if form.static:
        wide = topk_ids.dtype is torch.int64
        words = _table_layout(found, form).ids_end(input.shape[0], wide=wide)
        tensors = [topk_ids.new_empty((words,), dtype=torch.int32)]
    else:
        tensors = [_token()]
    quant = quant_scales(scales, scale_format)
    return _without_handle(found, form, input, quant, shape, weights is not None) + tensors


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
    found, form = _of(comm)
    shape: tuple[Any, ...] = (num_rows,)
    if found.config.layout.padded:
        shape = largest_shape(found.config, num_ranks=found.num_ranks, num_local=form.num_local)
    if not form.static:
        tensors = [_token()]
    elif form.own_tables:
        tensors = [torch.empty_like(handle[0])]
    else:
        tables = _table_layout(found, form)
        tensors = [handle[0].new_empty((sum(tables.public) + 1,))]
        if new_weights:
            tensors.append(input.new_empty((tables.rows, tables.topk), dtype=torch.float32))
    quant = quant_scales(scales, scale_format)
    return _without_handle(found, form, input, quant, shape, weighted or new_weights) + tensors


def _without_handle(
    comm: Connection,
    form: GraphForm,
    input: Tensor,
    scales: QuantScales | None,
    shape: tuple[Any, ...],
    weighted: bool,
) -> list[Tensor]:
    """What a dispatch returns before the handle."""
    config = comm.config
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
        made.append(_scales(config, input, kind, shape))
    if not form.expanded:
        made.append(input.new_empty((*shape, config.topk), dtype=torch.int64))
        if weighted:
            made.append(input.new_empty((*shape, config.topk), dtype=config.weight_dtype))
    if config.source_tokens:
        made.append(input.new_empty(shape, dtype=torch.int32))
    return made


def _scales(
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
    return rows.new_empty((num_tokens, rows.shape[-1]))


def dispatch_backward(
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
        grads.append(_weight_grads(comm, grad_weights, num_tokens))
    return grads


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
    grads = [
        grad.new_empty((*leading, grad.shape[-1])),
        grad.new_empty((0,), dtype=torch.float32),
    ]
    if scaled and rows is not None:
        grads.append(_weight_grads(comm, grad, num_tokens))
    return grads


def _weight_grads(comm: str, like: Tensor, num_tokens: int) -> Tensor:
    config = communicator(comm).config
    return like.new_empty((num_tokens, config.topk), dtype=config.weight_dtype)


def _token() -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


def _of(name: str) -> tuple[Connection, GraphForm]:
    """The communicator of a name, and what a graph knows of it."""
    found = communicator(name)
    form = found._graph_form
    assert form is not None
    return found, form
