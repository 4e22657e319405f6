"""The one sequence of roundings of combine, in plain torch.

    acc = +0.0;  for each term in order:  acc = round(acc + round(weight * row))

in float32 (float64 for float64 rows), never fused, then rounded to the output type. A missing term
is skipped, which equals adding +0.0: the accumulator can never be -0.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.workspace import Workspace

_CHUNK_BYTES = 2 << 20  # accumulator bytes worked on at a time; less costs calls, more costs cache


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
) -> None:
    """`out[m] = sum over c of weights[m, c] * rows[slots[m, c]]`, columns in order.

    Args:
        rows_SH: `[S, H]` floating point; rows that no slot names are never read.
        slots_MC: `[M, C]` int64, -1: no term.
        weights_MC: `[M, C]` float32, or None for plain sums.
        out: `[M, H]` receives the result, rounded once to its dtype.
        workspace: where scratch memory is borrowed from.
    """
    if out.numel() == 0:
        return
    if rows_SH.shape[0] == 0:
        out.zero_()
        return
    if out.is_cuda:
        _sum_on_cuda(rows_SH, slots_MC, weights_MC, out)
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
            term = acc if full else term_buffer[:count]
            picked = narrow[:count]
            torch.index_select(rows_SH, 0, column.slot_M[first:last], out=picked)
            term.copy_(picked)
            if column.weight_M is not None:
                term.mul_(column.weight_M[first:last].unsqueeze(1))
            if full:
                acc.add_(0.0)  # sums start at +0.0: a lone -0.0 becomes positive
            else:
                acc.index_add_(0, column.row_M[first:last] - begin, term)
        if columns:
            out[begin : begin + len(acc)].copy_(acc)
        else:
            out[begin : begin + len(acc)].zero_()
    workspace.give_back(narrow, term_buffer, acc_buffer)


def _sum_on_cuda(rows_SH: Tensor, slots_MC: Tensor, weights_MC: Tensor | None, out: Tensor) -> None:
    """Bags of rows: the CUDA kernel adds a bag's rows one after another in float32."""
    present = slots_MC >= 0
    starts = torch.nn.functional.pad(present.sum(dim=1).cumsum(0), (1, 0))
    flat = present.reshape(-1)
    # Present slots to the front, in order, without asking the device how many there are.
    position = torch.where(flat, flat.cumsum(0) - 1, flat.numel())
    front = torch.zeros(flat.numel() + 1, dtype=torch.int64, device=out.device)
    front.scatter_(0, position, slots_MC.reshape(-1))
    front = front[:-1].clamp_(min=0)
    if weights_MC is None:
        out.copy_(_bags(rows_SH, front, starts))
        return
    acc_dtype = accumulator_dtype(rows_SH.dtype)
    weight_of_slot = torch.zeros(rows_SH.shape[0] + 1, dtype=acc_dtype, device=out.device)
    target = torch.where(flat, slots_MC.reshape(-1), rows_SH.shape[0])
    weight_of_slot.scatter_(0, target, weights_MC.reshape(-1).to(acc_dtype))
    # Columns are cut so that the float32 products need no more memory than the rows themselves.
    step = max(1, rows_SH.shape[1] // 4)
    for begin in range(0, rows_SH.shape[1], step):
        columns = slice(begin, begin + step)
        products = rows_SH[:, columns] * weight_of_slot[:-1, None]
        out[:, columns].copy_(_bags(products, front, starts))


def _bags(rows: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    return torch.embedding_bag(
        rows, slots, starts, False, 0, False, None, include_last_offset=True
    )[0]
