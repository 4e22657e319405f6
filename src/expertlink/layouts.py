"""The four receive layouts as index arithmetic: from arrival order to slots.

Pure torch. A rank's arrivals are rows ordered by (source rank, source token); a slot is a position
in `tokens` with its leading dimensions flattened. Within an expert, and within a source rank, the
order of slots is the order of arrival, so results are bitwise reproducible.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.types import DispatchLayout

_COPY_BYTES = 32 << 20  # bytes of gathered rows held at a time when slots are not dense


@dataclass(frozen=True)
class LayoutPlan:
    """Where every arrival goes. N arrivals, S filled slots (a row may fill several).

    Attributes:
        layout: which layout this is.
        shape: leading dimensions of `tokens`.
        row_of_fill: `[S]` int64 arrival of each filled slot, slots ascending; None: the identity.
        slot_of_fill: `[S]` int64 slots ascending; None: dense, 0..S-1.
        slots_of_row: `[N, K]` (expanded) or `[N, 1]` int64: slots of each arrival, in top-k order,
            -1 where a choice is not local.
    """

    layout: DispatchLayout
    shape: tuple[int, ...]
    row_of_fill: Tensor | None
    slot_of_fill: Tensor | None
    slots_of_row: Tensor


def align(count: int, alignment: int) -> int:
    """`count` rounded up to a multiple of `alignment`."""
    return -(-count // alignment) * alignment


def expert_offsets(tokens_per_expert: Tensor, alignment: int = 1) -> Tensor:
    """FLAT: `[E_loc + 1]` int32 first row of every expert's group, and the end of the last."""
    aligned = (tokens_per_expert + (alignment - 1)) // alignment * alignment
    return torch.nn.functional.pad(aligned.cumsum(0), (1, 0)).to(torch.int32)


def leading_shape(
    layout: DispatchLayout,
    *,
    tokens_per_expert: Sequence[int],
    rows_per_source: Sequence[int],
    max_tokens_per_rank: int,
    alignment: int = 1,
) -> tuple[int, ...]:
    """Shape of `tokens` without its last dimension."""
    num_ranks = len(rows_per_source)
    if layout is DispatchLayout.RANK_MAJOR:
        return (num_ranks, max_tokens_per_rank)
    if layout is DispatchLayout.EXPERT_MAJOR:
        return (len(tokens_per_expert), num_ranks * max_tokens_per_rank)
    if layout is DispatchLayout.FLAT:
        return (sum(align(count, alignment) for count in tokens_per_expert),)
    return (sum(rows_per_source),)


def plan_layout(
    layout: DispatchLayout,
    local_ids_NK: Tensor,
    *,
    tokens_per_expert: Tensor,
    tokens_per_expert_list: Sequence[int],
    rows_per_source: Sequence[int],
    max_tokens_per_rank: int,
    alignment: int = 1,
) -> LayoutPlan:
    """Slots of the arrivals.

    Args:
        layout: the layout.
        local_ids_NK: `[N, K]` int32 local expert index of each choice of each arrival, or -1.
        tokens_per_expert: `[E_loc]` int32 on the device, choices of each local expert.
        tokens_per_expert_list: the same on the host.
        rows_per_source: arrivals from each rank.
        max_tokens_per_rank: T_max, sizes the padded layouts.
        alignment: FLAT: multiple to which each expert's group is padded.
    """
    num_ranks = len(rows_per_source)
    shape = leading_shape(
        layout,
        tokens_per_expert=tokens_per_expert_list,
        rows_per_source=rows_per_source,
        max_tokens_per_rank=max_tokens_per_rank,
        alignment=alignment,
    )
    if layout.expanded:
        if layout is DispatchLayout.FLAT:
            starts = expert_offsets(tokens_per_expert, alignment)[:-1].to(torch.int64)
        else:
            starts = torch.arange(shape[0], device=local_ids_NK.device) * shape[1]
        filled = sum(tokens_per_expert_list)
        return _plan_expanded(layout, shape, local_ids_NK, tokens_per_expert, starts, filled)
    device = local_ids_NK.device
    total = local_ids_NK.shape[0]
    slots = torch.arange(total, device=device)
    if layout is DispatchLayout.RANK_MAJOR:
        starts = list(itertools.accumulate(rows_per_source, initial=0))
        shift = [rank * max_tokens_per_rank - starts[rank] for rank in range(num_ranks)]
        table = torch.tensor([shift, list(rows_per_source)], dtype=torch.int64)
        shift_R, rows_R = table.to(device, non_blocking=True)
        slots = slots + torch.repeat_interleave(shift_R, rows_R, output_size=total)
    return LayoutPlan(
        layout=layout,
        shape=shape,
        row_of_fill=None,
        slot_of_fill=slots if layout.padded else None,
        slots_of_row=slots[:, None],
    )


def _plan_expanded(
    layout: DispatchLayout,
    shape: tuple[int, ...],
    local_ids_NK: Tensor,
    tokens_per_expert: Tensor,
    starts: Tensor,
    filled: int,
) -> LayoutPlan:
    total, topk = local_ids_NK.shape
    device = local_ids_NK.device
    num_local = tokens_per_expert.numel()

    # A stable sort by expert keeps (source rank, source token) order inside each expert.
    flat_ids = local_ids_NK.reshape(-1)
    keys = torch.where(flat_ids < 0, num_local, flat_ids)
    by_expert = keys.sort(stable=True).indices[:filled]

    fill = torch.arange(filled, device=device)
    if shape == (filled,):
        slot_of_fill = None
        slots = fill
    else:
        counts = tokens_per_expert.to(torch.int64)
        dense_starts = counts.cumsum(0) - counts
        slots = fill + (starts - dense_starts)[keys[by_expert].to(torch.int64)]
        slot_of_fill = slots
    slots_of_row = torch.full((total * topk,), -1, dtype=torch.int64, device=device)
    slots_of_row[by_expert] = slots
    return LayoutPlan(
        layout=layout,
        shape=shape,
        row_of_fill=by_expert // topk,
        slot_of_fill=slot_of_fill,
        slots_of_row=slots_of_row.view(total, topk),
    )


def as_bytes(x_NW: Tensor) -> Tensor:
    """The same memory as `[N, bytes]` uint8."""
    return _with_plain_strides(x_NW).view(torch.uint8)


def as_words(x_NW: Tensor) -> Tensor:
    """The same memory as the widest integers that fit: moves rows of any dtype alike."""
    x_NW = _with_plain_strides(x_NW)
    row_bytes = x_NW.shape[1] * x_NW.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16):
        size = dtype.itemsize
        if row_bytes % size == 0 and x_NW.storage_offset() * x_NW.element_size() % size == 0:
            return x_NW.view(dtype)
    return x_NW.view(torch.uint8)


def _with_plain_strides(x_NW: Tensor) -> Tensor:
    # Dimensions of size 0 or 1 may carry any stride, which views of another type refuse.
    assert x_NW.is_contiguous()
    return x_NW.as_strided(x_NW.shape, (max(x_NW.shape[1], 1), 1))


def _alike(a_NW: Tensor, b_MW: Tensor) -> tuple[Tensor, Tensor]:
    """Both as words of one type; bytes where one of them sits at an odd address."""
    a, b = as_words(a_NW), as_words(b_MW)
    return (a, b) if a.dtype == b.dtype else (as_bytes(a_NW), as_bytes(b_MW))


def place(plan: LayoutPlan, rows_NW: Tensor, out: Tensor, *, zero_gaps: bool = False) -> None:
    """Writes arrivals to their slots.

    Args:
        plan: where they go.
        rows_NW: `[N, W]` arrivals, any dtype.
        out: `plan.shape + (W,)` contiguous; slots of FLAT's alignment gaps are zeroed.
        zero_gaps: zero the unfilled slots of padded layouts as well.
    """
    source, target = _alike(rows_NW, out.view(math.prod(plan.shape), out.shape[-1]))
    if plan.slot_of_fill is None:
        if plan.row_of_fill is None:
            target.copy_(source)
        else:
            torch.index_select(source, 0, plan.row_of_fill, out=target)
        return
    if zero_gaps or not plan.layout.padded:
        target.zero_()
    step = max(1, _COPY_BYTES // max(1, source.shape[1] * source.element_size()))
    for begin in range(0, plan.slot_of_fill.numel(), step):
        slots = plan.slot_of_fill[begin : begin + step]
        if plan.row_of_fill is None:
            target.index_copy_(0, slots, source[begin : begin + step])
        else:
            rows = plan.row_of_fill[begin : begin + step]
            target.index_copy_(0, slots, source.index_select(0, rows))


def collect(plan: LayoutPlan, values: Tensor, *, out: Tensor) -> None:
    """Deduplicated layouts: the filled slots of `plan.shape + (W,)` in arrival order.

    Args:
        plan: which slots are filled.
        values: contiguous; unfilled slots are not read.
        out: `[N, W]` of the same dtype.
    """
    source, target = _alike(values.view(math.prod(plan.shape), values.shape[-1]), out)
    if plan.slot_of_fill is None:
        target.copy_(source)
    else:
        torch.index_select(source, 0, plan.slot_of_fill, out=target)
