"""Running totals of what crosses the rails, for the modes of this engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from expertlink.domains import Domains
from expertlink.engines.ranks import metadata
from expertlink.routing import Placement, hosts_of_experts, rows_per_host
from expertlink.types import CallStatistics, DispatchOutput


class RailTally:
    """Adds calls to `CallStatistics.rail_bytes`, once enabled, with torch operations.

    Calls pass what makes the ids of their routing: few count, and a tensor takes time.

    Args:
        placement: where the experts live.
        domains: hosts of the ranks.
        rank: this one.
    """

    def __init__(self, placement: Placement, domains: Domains, *, rank: int) -> None:
        self._num_hosts = domains.num_hosts
        self._host_of_E = hosts_of_experts(placement, domains.host_of, rank=rank)
        self._totals: CallStatistics | None = None

    def enable(self, counted: CallStatistics) -> CallStatistics:
        """The totals of a mode, with those of the rails; the same ones every time."""
        if self._totals is None:
            rail_bytes = counted.rows_sent.new_zeros(self._num_hosts)
            self._totals = dataclasses.replace(counted, rail_bytes=rail_bytes)
        return self._totals

    def add_dispatch(self, ids: Callable[[], Tensor], output: DispatchOutput) -> None:
        """Adds the rows of a dispatch, as they travelled."""
        if self._totals is None:
            return
        row_bytes = _row_bytes(output.tokens)
        if output.scales is not None:
            row_bytes += _row_bytes(output.scales.tensor)
        self._add(self._totals, ids(), row_bytes)

    def add_combine(self, ids: Callable[[], Tensor], out_TH: Tensor) -> None:
        """Adds the sums that came back in a combine."""
        if self._totals is not None:
            self._add(self._totals, ids(), metadata.row_bytes(out_TH))

    def _add(self, totals: CallStatistics, ids_TK: Tensor, row_bytes: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            ids_TK, num_experts = ids_TK.long(), self._host_of_E.numel() - 1
            is_expert = (ids_TK >= 0) & (ids_TK < num_experts)
            host_TK = self._host_of_E[torch.where(is_expert, ids_TK, num_experts)]
            rows_N = rows_per_host(host_TK, self._num_hosts)
            totals.rail_bytes.add_(rows_N, alpha=row_bytes)


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[-1] * rows.element_size()
