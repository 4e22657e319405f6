"""The roundings of combine and of its backward, in plain torch: every engine reproduces them.

Combine:

    acc = +0.0;  for each term in order:  acc = round(acc + round(weight * row))

in float32 (float64 for float64 rows), never fused, then rounded to the output type. A missing term
is skipped, which equals adding +0.0: the accumulator can never be -0.0.

`combine_precision` decides what the terms of a token are:

    "wire"     one term per rank, in ascending order, without a weight: the sum of the weighted rows
               of the token's experts there, in top-k order, itself such a sum and rounded to the
               wire type
    "exact"    one term per choice, in top-k order: weight and row of that expert

Where `domains` put the ranks on several hosts, "wire" has one more level. There is one term per
host, in ascending order: the sum of the terms of its ranks, ascending, rounded to the wire type. A
single host makes no difference, since rounding twice to one type is rounding once. "exact" is the
same on any hosts.

Backward of a weighted row. The row's gradient is round(grad * weight), rounded once. The weight's
is the sum over the row of round(grad * row), in 256 parts:

    part[h mod 256] = round(part[h mod 256] + round(grad[h] * row[h]))     ascending h, from +0.0
    then neighbours are added, 256 parts to 128, to 64, ... to 1

256 parts are what a warp of a GPU adds up side by side when each lane loads 16 bytes of 2-byte
elements. Parts that a short row has no element for are +0.0, which changes no sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from expertlink.workspace import Workspace

SumKernel = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None", Tensor], None]
BackwardKernel = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], None]

PARTS = 256
"""Sums that the gradient of a weight is made of."""

_CHUNK_BYTES = 384 << 10  # sums made at a time: fewer cost more calls, more miss the cache


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which rows of `dtype` are summed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def ordered_sum(
    rows_SH: Tensor,
    slots_MC: Tensor,
    weights_MC: Tensor | None = None,
    *,
    out: Tensor,
    hosts_S: Tensor | None = None,
    workspace: Workspace | None = None,
    kernel: SumKernel | None = None,
) -> None:
    """`out[m] = sum over c of weights[m, c] * rows[slots[m, c]]`, columns in order.

    With `hosts_S` the terms of a result that come from one host are added up first, in the order of
    their columns, and rounded to the rows' dtype. Then the hosts' sums are added up, in ascending
    order.

    Args:
        rows_SH: `[S, H]` floating point; rows that no slot refers to are never read.
        slots_MC: `[M, C]` int64, -1: no term.
        weights_MC: `[M, C]` float32, or None for plain sums.
        out: `[M, H]` receives the result, rounded once to its dtype, which is that of the rows.
        hosts_S: `[S]` int32 host that each row comes from; excludes weights. None: all from one.
        workspace: where scratch memory is borrowed from.
        kernel: adds up on a GPU in one pass. None: plain torch, in several passes.
    """
    assert hosts_S is None or weights_MC is None
    if out.numel() == 0:
        return
    if rows_SH.shape[0] == 0:
        out.zero_()
        return
    if kernel is not None:
        kernel(rows_SH, slots_MC, weights_MC, hosts_S, out)
    elif out.is_cuda:
        _sum_by_columns(rows_SH, slots_MC, weights_MC, hosts_S, out)
    else:
        workspace = workspace or Workspace(out.device)
        _sum_on_cpu(rows_SH, slots_MC, weights_MC, hosts_S, out, workspace)


def _by_host(slots_MC: Tensor, hosts_S: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of every result by (host, column), absent ones last.

    Returns:
        `[M, C]` slots in that order, and `[M, C]` bool: a term with which a host begins.
    """
    absent = slots_MC < 0
    hosts_MC = hosts_S[slots_MC.clamp(min=0)]
    hosts_MC = torch.where(absent, torch.iinfo(hosts_MC.dtype).max, hosts_MC)
    hosts_MC, order = hosts_MC.sort(dim=1, stable=True)
    slots_MC = slots_MC.gather(1, order)
    begins_MC = slots_MC >= 0
    begins_MC[:, 1:] &= hosts_MC[:, 1:] != hosts_MC[:, :-1]
    return slots_MC, begins_MC


def _sum_on_cpu(
    rows_SH: Tensor,
    slots_MC: Tensor,
    weights_MC: Tensor | None,
    hosts_S: Tensor | None,
    out: Tensor,
    workspace: Workspace,
) -> None:
    """A few results at a time, so that their terms stay in the cache between steps."""
    wide = accumulator_dtype(rows_SH.dtype)
    total, hidden = out.shape
    begins_MC = None
    if hosts_S is not None:
        slots_MC, begins_MC = _by_host(slots_MC, hosts_S)
    present = slots_MC >= 0
    slot_P = slots_MC[present]  # present terms, result by result
    weight_P1 = None if weights_MC is None else weights_MC[present].to(wide).unsqueeze(1)
    starts = _starts(present)
    step = min(total, max(1, _CHUNK_BYTES // (hidden * wide.itemsize)))
    cuts = [*starts[:-1:step].tolist(), len(slot_P)]
    most = max(end - begin for begin, end in itertools.pairwise(cuts))
    narrow = workspace.take((most, hidden), rows_SH.dtype)
    terms = workspace.take((most, hidden), wide)
    hosts = None if begins_MC is None else _Hosts(begins_MC, present)
    for chunk, (first, last) in enumerate(itertools.pairwise(cuts)):
        begin, end = chunk * step, min(total, (chunk + 1) * step)
        if first == last:
            out[begin:end].zero_()
            continue
        picked, term_PH = narrow[: last - first], terms[: last - first]
        torch.index_select(rows_SH, 0, slot_P[first:last], out=picked)
        term_PH.copy_(picked)
        if weight_P1 is not None:
            term_PH.mul_(weight_P1[first:last])
        bags = starts[begin : end + 1] - first
        if hosts is not None:
            of_terms, bags = hosts.bags(begin, end, first)
            term_PH = _sum_bags(term_PH, of_terms).to(rows_SH.dtype).to(wide)
        out[begin:end].copy_(_sum_bags(term_PH, bags))
    workspace.give_back(narrow, terms)


class _Hosts:
    """Sums per host between terms and results.

    Args:
        begins_MC: terms with which a host begins.
        present_MC: terms that there are.
    """

    def __init__(self, begins_MC: Tensor, present_MC: Tensor) -> None:
        first_P = begins_MC[present_MC].nonzero()[:, 0]
        self._first_terms = torch.nn.functional.pad(first_P, (0, 1), value=int(present_MC.sum()))
        self._of_results = _starts(begins_MC)

    def bags(self, begin: int, end: int, first: int) -> tuple[Tensor, Tensor]:
        """Bags of terms, counted from term `first`, and bags of hosts, of a range of results."""
        of_results = self._of_results[begin : end + 1]
        of_terms = self._first_terms[int(of_results[0]) : int(of_results[-1]) + 1]
        return of_terms - first, of_results - of_results[0]


def _starts(present_MC: Tensor) -> Tensor:
    """`[M + 1]` where the present ones of every result begin, and where the last ones end."""
    return torch.nn.functional.pad(present_MC.sum(dim=1).cumsum(0), (1, 0))


def _sum_bags(terms_PH: Tensor, bags: Tensor) -> Tensor:
    """Sums of successive terms: a bag adds its rows in order, from +0.0.

    Args:
        terms_PH: `[P, H]` float32 or float64.
        bags: first term of every bag, then the end of the last one.
    """
    positions = torch.arange(len(terms_PH), dtype=torch.int64, device=terms_PH.device)
    return torch.embedding_bag(
        terms_PH, positions, bags, False, 0, False, None, include_last_offset=True
    )[0]


def _sum_by_columns(
    rows_SH: Tensor,
    slots_MC: Tensor,
    weights_MC: Tensor | None,
    hosts_S: Tensor | None,
    out: Tensor,
) -> None:
    """On any device, without a host wait: one column after another, absent terms masked."""
    wide = accumulator_dtype(rows_SH.dtype)
    begins_MC = None
    if hosts_S is not None:
        slots_MC, begins_MC = _by_host(slots_MC, hosts_S)
    step = max(1, _CHUNK_BYTES * 64 // (max(1, out.shape[0]) * wide.itemsize))
    for begin in range(0, out.shape[1], step):
        part_SH = rows_SH[:, begin : begin + step]
        acc = torch.zeros((out.shape[0], part_SH.shape[1]), dtype=wide, device=out.device)
        of_hosts = torch.zeros_like(acc)  # sums of the hosts before
        for column in range(slots_MC.shape[1]):
            slots = slots_MC[:, column]
            term = part_SH.index_select(0, slots.clamp(min=0)).to(wide)
            if weights_MC is not None:
                term = term * weights_MC[:, column, None].to(wide)
            if begins_MC is not None:
                begins = begins_MC[:, column, None]
                of_hosts = torch.where(begins, of_hosts + acc.to(rows_SH.dtype).to(wide), of_hosts)
                acc = torch.where(begins, 0.0, acc)
            acc = torch.where((slots >= 0)[:, None], acc + term, acc)
        if begins_MC is not None:
            acc = of_hosts + acc.to(rows_SH.dtype).to(wide)
        out[:, begin : begin + step] = acc.to(out.dtype)


def weighted_backward(
    grads: Tensor,
    weights: Tensor,
    rows: Tensor | None = None,
    *,
    kernel: BackwardKernel | None = None,
) -> Tensor | None:
    """Backward of rows that combine multiplied by weights; scales the gradients in place.

        result[s] = sum over h of grads[s, h] * rows[s, h];   grads[s, h] *= weights[s]

    Every slot is treated alike, also those that no row fills. There the gradients are zero and stay
    zero, and the result is whatever `rows` give, NaN included: it belongs to no choice.

    Args:
        grads: `[..., H]` contiguous gradients of the weighted rows; become those of the rows.
        weights: `[...]` contiguous, float32 (float64 for float64 rows).
        rows: `[..., H]` of the same dtype; None: only scale.
        kernel: does it on a GPU in one pass. None: plain torch, some rows at a time.

    Returns:
        `[...]` gradient of every slot's weight, float32 (float64 for float64 rows); None without
        `rows`.
    """
    sums = None if rows is None else torch.empty_like(weights)
    if grads.numel() == 0:
        return sums
    grads_SH, weights_S = grads.flatten(0, -2), weights.flatten()
    rows_SH = None if rows is None else rows.flatten(0, -2).contiguous()
    sums_S = None if sums is None else sums.flatten()
    if kernel is not None:
        kernel(grads_SH, weights_S, rows_SH, sums_S)
    else:
        _backward_in_chunks(grads_SH, weights_S, rows_SH, sums_S)
    return sums


def _backward_in_chunks(
    grads_SH: Tensor, weights_S: Tensor, rows_SH: Tensor | None, sums_S: Tensor | None
) -> None:
    """A few rows at a time: few are wide at once, and on CPU they stay in the cache."""
    wide = accumulator_dtype(grads_SH.dtype)
    total, hidden = grads_SH.shape
    chunk = _CHUNK_BYTES * (256 if grads_SH.is_cuda else 1)  # a GPU wants fewer, larger operations
    step = min(total, max(1, chunk // (hidden * wide.itemsize)))
    wide_grads = torch.empty((step, hidden), dtype=wide, device=grads_SH.device)
    products = None if rows_SH is None else torch.empty_like(wide_grads)
    for begin in range(0, total, step):
        grads = grads_SH[begin : begin + step]
        grad_MH = wide_grads[: len(grads)].copy_(grads)
        if rows_SH is not None and products is not None and sums_S is not None:
            product_MH = products[: len(grads)].copy_(rows_SH[begin : begin + step])
            sums_S[begin : begin + step] = _sum_in_parts(product_MH.mul_(grad_MH))
        grads.copy_(grad_MH.mul_(weights_S[begin : begin + step, None]))


def _sum_in_parts(terms_MH: Tensor) -> Tensor:
    """`[M]` sums over the rows, in the order that is defined above."""
    hidden = terms_MH.shape[1]
    # Parts of a short row without an element are left out.
    parts = min(PARTS, 1 << (hidden - 1).bit_length())
    sums = terms_MH.new_zeros((len(terms_MH), parts))
    for first in range(0, hidden, parts):
        terms = terms_MH[:, first : first + parts]
        sums[:, : terms.shape[1]] += terms
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums[:, 0]
