"""The one sequence of roundings of combine, in plain torch.

    acc = +0.0;  for each term in order:  acc = round(acc + round(weight * row))

in float32 (float64 for float64 rows), never fused, then rounded to the output type. A missing term
is skipped, which equals adding +0.0: the accumulator can never be -0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 4 << 20  # accumulator bytes worked on at a time; less costs calls, more costs cache


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which rows of `dtype` are summed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def ordered_sum(
    rows_SH: Tensor, slots_MC: Tensor, weights_MC: Tensor | None = None, *, out: Tensor
) -> None:
    """`out[m] = sum over c of weights[m, c] * rows[slots[m, c]]`, columns in order.

    Args:
        rows_SH: `[S, H]` floating point; rows that no slot names are never read.
        slots_MC: `[M, C]` int64, -1: no term.
        weights_MC: `[M, C]` float32, or None for plain sums.
        out: `[M, H]` receives the result, rounded once to its dtype.
    """
    if out.numel() == 0:
        return
    if rows_SH.shape[0] == 0:
        out.zero_()
        return
    if out.is_cuda:
        _sum_on_cuda(rows_SH, slots_MC, weights_MC, out)
    else:
        _sum_on_cpu(rows_SH, slots_MC, weights_MC, out)


def _sum_on_cpu(rows_SH: Tensor, slots_MC: Tensor, weights_MC: Tensor | None, out: Tensor) -> None:
    acc_dtype = accumulator_dtype(rows_SH.dtype)
    absent = slots_MC < 0
    # Present terms first, in their order: column c then concerns only rows with more than c terms.
    order = absent.sort(dim=1, stable=True).indices
    slots = slots_MC.gather(1, order)
    weights = None if weights_MC is None else weights_MC.to(acc_dtype).gather(1, order)
    terms = (~absent).sum(dim=1)
    step = max(1, _CHUNK_BYTES // (out.shape[1] * acc_dtype.itemsize))
    for begin in range(0, len(terms), step):
        chunk = slice(begin, begin + step)
        count = terms[chunk]
        acc = None
        for column in range(int(count.max())):
            present = (count > column).nonzero().squeeze(1)
            term = rows_SH.index_select(0, slots[chunk, column][present]).to(acc_dtype, copy=True)
            if weights is not None:
                term.mul_(weights[chunk, column][present].unsqueeze(1))
            if acc is not None:
                acc.index_add_(0, present, term)
            elif len(present) == len(count):
                acc = term.add_(0.0)  # the sum starts at +0.0, which turns a lone -0.0 positive
            else:
                acc = torch.zeros((len(count), out.shape[1]), dtype=acc_dtype)
                acc.index_add_(0, present, term)
        if acc is None:
            out[chunk].zero_()
        else:
            out[chunk].copy_(acc)


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
