"""What every rank sends back for a token, apart: sums that combine does not have.

Combine adds up rows in one sequence of roundings. Where another sum is wanted, every rank writes
its row into columns of its own and zeros into the others'. Adding zeros changes nothing, so the
token's rank gets all rows as they were, and adds them up as it likes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertlink.domains import Domains

Combine = Callable[[Tensor], Tensor]
"""`[..., W]` bfloat16 rows of a dispatch to their sums `[T, W]`; one for a given W."""


def rows_apart(rows: Tensor, combine: Combine, *, rank: int, num_ranks: int, width: int) -> Tensor:
    """Every rank's row of every token: `[T, R, H]` bfloat16, zeros where it has none.

    Args:
        rows: `[N, H]` bfloat16, this rank's.
        combine: of rows of `width` elements.
        rank: this rank.
        num_ranks: R.
        width: of the rows that travel, a multiple of R. More rounds are made where it is less than
            R * H.
    """
    part = width // num_ranks
    parts: list[Tensor] = []
    for begin in range(0, rows.shape[1], part):
        columns = rows[:, begin : begin + part]
        wide = rows.new_zeros((rows.shape[0], num_ranks, part))
        wide[:, rank, : columns.shape[1]] = columns
        sums = combine(wide.view(rows.shape[0], width))
        parts.append(sums.view(-1, num_ranks, part)[:, :, : columns.shape[1]])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def floats_as_rows(values_NK: Tensor) -> Tensor:
    """float32 `[N, K]` as bfloat16 `[N, 4 * K]`: one byte in every element, which is exact."""
    return values_NK.contiguous().view(torch.uint8).to(torch.bfloat16)


def rows_as_floats(rows: Tensor) -> Tensor:
    """The inverse of `floats_as_rows`, over the last dimension."""
    return rows.to(torch.uint8).contiguous().view(torch.float32)


def sum_in_order(terms_TRW: Tensor, first_TW: Tensor | None = None) -> Tensor:
    """float32 `[T, W]`: `first` or +0.0, then the terms of the ranks in ascending order."""
    terms = terms_TRW.unbind(1)
    total = torch.zeros_like(terms[0], dtype=torch.float32) if first_TW is None else first_TW
    for term in terms:
        total = total + term
    return total


def sums_of_hosts(terms_TRH: Tensor, domains: Domains) -> Tensor:
    """`[T, hosts, H]`: terms of the ranks of each host, added up in ascending order and rounded.

    On one host the terms themselves: nothing is rounded on the way.
    """
    if domains.num_hosts == 1:
        return terms_TRH
    hosts = [list(domains.ranks_of(host)) for host in range(domains.num_hosts)]
    sums = [sum_in_order(terms_TRH[:, ranks]).to(terms_TRH.dtype) for ranks in hosts]
    return torch.stack(sums, dim=1)


def sum_of_biases(bias: Tensor | tuple[Tensor, ...]) -> Tensor:
    """float32 `[T, H]` of one bias or of two."""
    biases = bias if isinstance(bias, tuple) else (bias,)
    total = biases[0].float()
    for other in biases[1:]:
        total = total + other.float()
    return total
