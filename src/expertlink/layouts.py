"""The four receive layouts as index arithmetic: from arrival order to slots.

In: counts, and local expert ids of the arrivals. Out: slots, and functions that move rows to them.

Pure torch. A rank's arrivals are rows ordered by (source rank, source token). A slot is a position
in `tokens` with its leading dimensions flattened. Within an expert, and within a source rank, slots
are in order of arrival, so results are bitwise reproducible.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.types import DispatchLayout

_COPY_BYTES = 32 << 20  # gathered rows held at a time, where slots are not dense


@dataclass(frozen=True)
class LayoutPlan:
    """The slots of every arrival. N arrivals, S filled slots (a row may fill several).

    Attributes:
        layout: the layout.
        shape: leading dimensions of `tokens`.
        row_of_fill: `[S]` int64 arrival of each filled slot, slots ascending; None: the identity.
        slot_of_fill: `[S]` int64 slots ascending; None: dense, 0..S-1.
        slots_of_row: `[N, K]` (expanded) or `[N, 1]` int64: slots of each arrival in top-k order;
            -1 for a choice that is not local.
    """

    layout: DispatchLayout
    shape: tuple[int, ...]
    row_of_fill: Tensor | None
    slot_of_fill: Tensor | None
    slots_of_row: Tensor


def align(count: int, alignment: int) -> int:
    """`count` rounded up to a multiple of `alignment`."""
    return -(-count // alignment) * alignment


def expert_offsets(tokens_per_expert: Sequence[int], alignment: int = 1) -> list[int]:
    """FLAT: `[E_loc + 1]` first row of every expert's group, then the end of the last group."""
    groups = (align(count, alignment) for count in tokens_per_expert)
    return list(itertools.accumulate(groups, initial=0))


def source_ranges(
    layout: DispatchLayout, tokens_per_source: Sequence[Sequence[int]], alignment: int = 1
) -> tuple[list[list[int]], list[list[int]]]:
    """Expanded layouts: first slot, and number of rows, of every source in every expert's group.

    Args:
        layout: FLAT counts slots from the start of `tokens`, EXPERT_MAJOR from that of the group.
        tokens_per_source: `[R][E_loc]` rows of each local expert from each source rank.
        alignment: FLAT: multiple to which each expert's group is padded.

    Returns:
        `(starts, counts)`, `[E_loc][R]` each.
    """
    counts = [list(group) for group in zip(*tokens_per_source, strict=True)]
    firsts = [0] * len(counts)
    if layout is DispatchLayout.FLAT:
        firsts = expert_offsets([sum(group) for group in counts], alignment)
    starts = [
        list(itertools.accumulate(group, initial=first))[:-1]
        for group, first in zip(counts, firsts, strict=False)
    ]
    return starts, counts


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
    local_ids_NK: Tensor | None,
    *,
    device: torch.device,
    tokens_per_expert: Sequence[int],
    rows_per_source: Sequence[int],
    max_tokens_per_rank: int,
    alignment: int = 1,
) -> LayoutPlan:
    """Slots of the arrivals.

    Args:
        layout: the layout.
        local_ids_NK: `[N, K]` int32 local expert index of each choice of each arrival, or -1;
            only expanded layouts need it.
        device: where the plan's tensors live.
        tokens_per_expert: choices of each local expert.
        rows_per_source: arrivals from each rank.
        max_tokens_per_rank: T_max, sizes the padded layouts.
        alignment: FLAT: multiple to which each expert's group is padded.
    """
    shape = leading_shape(
        layout,
        tokens_per_expert=tokens_per_expert,
        rows_per_source=rows_per_source,
        max_tokens_per_rank=max_tokens_per_rank,
        alignment=alignment,
    )
    groups = tokens_per_expert if layout.expanded else rows_per_source
    if layout is DispatchLayout.FLAT:
        starts = expert_offsets(tokens_per_expert, alignment)
    elif layout.padded:
        starts = [group * shape[1] for group in range(len(groups))]
    else:
        starts = list(itertools.accumulate(groups, initial=0))
    if not layout.expanded:
        slots = _shift(sum(groups), groups, starts, None, device)
        return LayoutPlan(layout, shape, None, slots if layout.padded else None, slots[:, None])
    assert local_ids_NK is not None
    by_group, group_of_fill = _sort_by_expert(local_ids_NK, groups)
    slots = _shift(len(by_group), groups, starts, group_of_fill, device)
    slots_of_row = local_ids_NK.new_full((local_ids_NK.numel(),), -1, dtype=torch.int64)
    slots_of_row[by_group] = slots
    return LayoutPlan(
        layout=layout,
        shape=shape,
        row_of_fill=by_group // local_ids_NK.shape[1],
        slot_of_fill=None if shape == (len(slots),) else slots,
        slots_of_row=slots_of_row.view(local_ids_NK.shape),
    )


def _sort_by_expert(local_ids_NK: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Local choices by expert, as positions in the flattened ids, and the expert of each.

    The sort is stable: within an expert, the order of (source rank, source token) stays.
    """
    flat = local_ids_NK.reshape(-1)
    ordered = torch.where(flat < 0, len(groups), flat).sort(stable=True)
    filled = sum(groups)
    return ordered.indices[:filled], ordered.values[:filled]


def _shift(
    count: int,
    groups: Sequence[int],
    starts: Sequence[int],
    group_of_item: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Slots of items sorted by group: `groups` are their lengths, `starts` their first slots."""
    position = torch.arange(count, dtype=torch.int64, device=device)
    dense = list(itertools.accumulate(groups, initial=0))
    shifts = [start - first for start, first in zip(starts[: len(groups)], dense, strict=False)]
    if not any(shifts):
        return position
    table = torch.tensor([shifts, list(groups)], dtype=torch.int64, device="cpu")
    table = table.to(device, non_blocking=True)
    if group_of_item is not None:
        return position + table[0][group_of_item.to(torch.int64)]
    return position + torch.repeat_interleave(table[0], table[1], output_size=count)


def as_bytes(x_NW: Tensor) -> Tensor:
    """The same memory as `[N, bytes]` uint8."""
    return _with_plain_strides(x_NW).view(torch.uint8)


def as_words(x_NW: Tensor) -> Tensor:
    """The same memory as the widest integers that fit, so that any dtype moves alike."""
    x_NW = _with_plain_strides(x_NW)
    row_bytes = x_NW.shape[1] * x_NW.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16):
        size = dtype.itemsize
        if row_bytes % size == 0 and x_NW.storage_offset() * x_NW.element_size() % size == 0:
            return x_NW.view(dtype)
    return x_NW.view(torch.uint8)


def _with_plain_strides(x_NW: Tensor) -> Tensor:
    # Dimensions of size 0 or 1 may have any stride, and then torch refuses views of another type.
    assert x_NW.is_contiguous()
    return x_NW.as_strided(x_NW.shape, (max(x_NW.shape[1], 1), 1))


def _same_words(a_NW: Tensor, b_MW: Tensor) -> tuple[Tensor, Tensor]:
    """Both as words of one type; as bytes if one of them is not aligned like the other."""
    a, b = as_words(a_NW), as_words(b_MW)
    return (a, b) if a.dtype == b.dtype else (as_bytes(a_NW), as_bytes(b_MW))


def place(plan: LayoutPlan, rows_NW: Tensor, out: Tensor, *, zero_gaps: bool = False) -> None:
    """Writes arrivals to their slots.

    Args:
        plan: where they go.
        rows_NW: `[N, W]` arrivals, any dtype.
        out: `plan.shape + (W,)` contiguous; FLAT's alignment gaps are zeroed.
        zero_gaps: zero the unfilled slots of padded layouts as well.
    """
    source, target = _same_words(rows_NW, out.view(math.prod(plan.shape), out.shape[-1]))
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


def place_source_tokens(plan: LayoutPlan, tokens_N: Tensor, out: Tensor) -> None:
    """Writes to every slot which token of its rank its row is; -1 where no row is.

    Args:
        plan: where the arrivals go.
        tokens_N: `[N]` int32 index of each arrival's token at its source rank.
        out: `plan.shape` int32, contiguous.
    """
    # Gaps are filled with zeros, so that numbers from 1 on leave them apart.
    place(plan, (tokens_N + 1)[:, None], out.unsqueeze(-1), zero_gaps=True)
    out -= 1


def collect(plan: LayoutPlan, values: Tensor, *, out: Tensor) -> None:
    """Deduplicated layouts: the filled slots of `plan.shape + (W,)` in arrival order.

    Args:
        plan: which slots are filled.
        values: contiguous; unfilled slots are not read.
        out: `[N, W]` of the same dtype.
    """
    source, target = _same_words(values.view(math.prod(plan.shape), values.shape[-1]), out)
    if plan.slot_of_fill is None:
        target.copy_(source)
    else:
        torch.index_select(source, 0, plan.slot_of_fill, out=target)
