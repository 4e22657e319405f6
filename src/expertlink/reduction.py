"""The one sequence of roundings of combine, in plain torch.

    acc = +0.0;  for each term in order:  acc = round(acc + round(weight * row))

in float32 (float64 for float64 rows), never fused, then rounded to the output type. A missing term
is skipped, which equals adding +0.0: the accumulator can never be -0.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.workspace import Workspace

SumKernel = Callable[[Tensor, Tensor, "Tensor | None", Tensor], None]

_CHUNK_BYTES = 1 << 20  # accumulator bytes worked on at a time; less costs calls, more costs cache


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which rows of `dtype` are summed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def ordered_sum(
    rows_SH: Tensor,
    slots_MC: Tensor,
    weights_MC: Tensor | None = None,
    *,
    out: Tensor,
    workspace: Workspace | None = None,
    kernel: SumKernel | None = None,
) -> None:
    """`out[m] = sum over c of weights[m, c] * rows[slots[m, c]]`, columns in order.

    Args:
        rows_SH: `[S, H]` floating point; rows that no slot names are never read.
        slots_MC: `[M, C]` int64, -1: no term.
        weights_MC: `[M, C]` float32, or None for plain sums.
        out: `[M, H]` receives the result, rounded once to its dtype.
        workspace: where scratch memory is borrowed from.
        kernel: does it on a GPU in one pass; without one, plain torch does, in several.
    """
    if out.numel() == 0:
        return
    if rows_SH.shape[0] == 0:
        out.zero_()
        return
    if kernel is not None:
        kernel(rows_SH, slots_MC, weights_MC, out)
    elif out.is_cuda:
        _sum_by_columns(rows_SH, slots_MC, weights_MC, out)
    else:
        _sum_on_cpu(rows_SH, slots_MC, weights_MC, out, workspace or Workspace(out.device))


@dataclass(frozen=True)
class _Column:
    """The terms at one position of the order: which results they belong to, whence they come."""

    row_M: Tensor
    slot_M: Tensor
    weight_M: Tensor | None


def _columns(slots_MC: Tensor, weights_MC: Tensor | None) -> list[_Column]:
    """Terms by position, absent ones squeezed out: column c holds every row's c-th present term."""
    present = slots_MC >= 0
    position_MC = torch.where(present, present.cumsum(dim=1) - 1, -1)
    columns = []
    for position in range(slots_MC.shape[1]):
        # Row-major search keeps rows ascending, which the chunks below rely on.
        row_M, choice_M = (position_MC == position).nonzero(as_tuple=True)
        if not len(row_M):
            break
        weight_M = None if weights_MC is None else weights_MC[row_M, choice_M]
        columns.append(_Column(row_M, slots_MC[row_M, choice_M], weight_M))
    return columns


def _sum_on_cpu(
    rows_SH: Tensor,
    slots_MC: Tensor,
    weights_MC: Tensor | None,
    out: Tensor,
    workspace: Workspace,
) -> None:
    wide = accumulator_dtype(rows_SH.dtype)
    total, hidden = out.shape
    step = min(total, max(1, _CHUNK_BYTES // (hidden * wide.itemsize)))
    columns = _columns(slots_MC, None if weights_MC is None else weights_MC.to(wide))
    edges = torch.arange(0, total + step, step)
    cuts = [torch.searchsorted(column.row_M, edges).tolist() for column in columns]
    narrow = workspace.take((step, hidden), rows_SH.dtype)
    term_buffer = workspace.take((step, hidden), wide)
    acc_buffer = workspace.take((step, hidden), wide)
    for chunk, begin in enumerate(range(0, total, step)):
        acc = acc_buffer[: min(step, total - begin)]
        for index, column in enumerate(columns):
            first, last = cuts[index][chunk], cuts[index][chunk + 1]
            count = last - first
            full = index == 0 and count == len(acc)  # every result has a first term
            if index == 0 and not full:
                acc.zero_()
            if count == 0:
                continue
            picked = narrow[:count]
            torch.index_select(rows_SH, 0, column.slot_M[first:last], out=picked)
            weight = None if column.weight_M is None else column.weight_M[first:last, None]
            if full:
                # Sums start at +0.0, which makes a lone -0.0 positive.
                if weight is None:
                    acc.copy_(picked.add_(0.0))
                else:
                    acc.copy_(picked).mul_(weight).add_(0.0)
            else:
                term = term_buffer[:count].copy_(picked)
                if weight is not None:
                    term.mul_(weight)
                acc.index_add_(0, column.row_M[first:last] - begin, term)
        if columns:
            out[begin : begin + len(acc)].copy_(acc)
        else:
            out[begin : begin + len(acc)].zero_()
    workspace.give_back(narrow, term_buffer, acc_buffer)


def _sum_by_columns(
    rows_SH: Tensor, slots_MC: Tensor, weights_MC: Tensor | None, out: Tensor
) -> None:
    """On any device without a host wait: every column as a whole, absent terms masked."""
    wide = accumulator_dtype(rows_SH.dtype)
    step = max(1, _CHUNK_BYTES * 8 // (max(1, out.shape[0]) * wide.itemsize))
    for begin in range(0, out.shape[1], step):
        part_SH = rows_SH[:, begin : begin + step]
        acc = torch.zeros((out.shape[0], part_SH.shape[1]), dtype=wide, device=out.device)
        for column in range(slots_MC.shape[1]):
            slots = slots_MC[:, column]
            term = part_SH.index_select(0, slots.clamp(min=0)).to(wide)
            if weights_MC is not None:
                term = term * weights_MC[:, column, None].to(wide)
            acc = torch.where((slots >= 0)[:, None], acc + term, acc)
        out[:, begin : begin + step] = acc.to(out.dtype)
