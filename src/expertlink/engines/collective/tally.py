"""Running totals of calls in plain torch, from what the host knows of them."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.domains import Domains
from expertlink.engines.collective.exchange import Splits
from expertlink.engines.collective.route import Route
from expertlink.routing import rows_per_host
from expertlink.types import CallStatistics


class Tally:
    """Adds calls to `CallStatistics`, once enabled.

    Args:
        rank: this rank, whose own rows cost no bytes.
        domains: hosts of the ranks.
        num_local: E_loc.
        device: where the totals live.
    """

    def __init__(
        self, *, rank: int, domains: Domains, num_local: int, device: torch.device
    ) -> None:
        self._rank, self._num_local, self._device = rank, num_local, device
        self._num_ranks, self._num_hosts = domains.num_ranks, domains.num_hosts
        # By the rank of a row; N for the own host, and for rows that there are not.
        hosts = [
            self._num_hosts if host == domains.host_of[rank] else host for host in domains.host_of
        ]
        self._host_of_R = torch.tensor([*hosts, self._num_hosts], device=device)
        self._totals: CallStatistics | None = None

    def enable(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        if self._totals is None:
            with torch.inference_mode(False):  # calls of any mode write to them
                self._totals = CallStatistics.zeros(
                    num_local=self._num_local,
                    num_ranks=self._num_ranks,
                    num_hosts=self._num_hosts,
                    device=self._device,
                )
        return self._totals

    def add(
        self,
        splits: Splits,
        row_bytes: int,
        *,
        route: Route,
        single: bool = False,
        tokens_per_expert: Tensor | None = None,
    ) -> None:
        """Adds a call, if enabled.

        Args:
            splits: rows sent to and received from each rank.
            row_bytes: bytes of a row and of its scales.
            route: of the call.
            single: a row comes back for each choice.
            tokens_per_expert: `[E_loc]` of a dispatch.
        """
        totals = self._totals
        if totals is None:
            return
        rows = torch.tensor([splits.send, splits.receive], dtype=torch.int64, device="cpu")
        nbytes = rows * row_bytes
        nbytes[:, self._rank] = 0
        table = torch.cat([rows, nbytes]).to(totals.rows_sent.device, non_blocking=True)
        totals.rows_sent.add_(table[0])
        totals.rows_received.add_(table[1])
        totals.bytes_sent.add_(table[2])
        totals.bytes_received.add_(table[3])
        if self._num_hosts > 1:
            totals.rail_bytes.add_(self._rows_per_host(route, single), alpha=row_bytes)
        if tokens_per_expert is not None:
            totals.tokens_per_expert.add_(tokens_per_expert)

    def _rows_per_host(self, route: Route, single: bool) -> Tensor:
        """`[N]` rows that cross between hosts, were each host sent a token once."""
        row_TX = route.row_of_choice.view(-1, 1) if single else route.rows_of_token
        ends_R = route.rows_per_rank.cumsum(0)
        rank_TX = torch.searchsorted(ends_R, row_TX.to(ends_R.dtype).contiguous(), right=True)
        rank_TX = torch.where(row_TX < 0, self._num_ranks, rank_TX)
        return rows_per_host(self._host_of_R[rank_TX], self._num_hosts)
