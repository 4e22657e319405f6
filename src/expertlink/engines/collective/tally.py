"""Running totals of calls in plain torch, from what the host knows of them."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.engines.collective.exchange import Splits
from expertlink.types import CallStatistics


class Tally:
    """Adds calls to `CallStatistics`, once enabled.

    Args:
        rank: this rank, whose own rows cost no bytes.
        num_ranks: R.
        num_local: E_loc.
        device: where the totals live.
    """

    def __init__(self, *, rank: int, num_ranks: int, num_local: int, device: torch.device) -> None:
        self._rank, self._num_ranks, self._num_local = rank, num_ranks, num_local
        self._device = device
        self._totals: CallStatistics | None = None

    def enable(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        if self._totals is None:
            with torch.inference_mode(False):  # calls of any mode write to them
                self._totals = CallStatistics.zeros(
                    num_local=self._num_local, num_ranks=self._num_ranks, device=self._device
                )
        return self._totals

    def add(self, splits: Splits, row_bytes: int, tokens_per_expert: Tensor | None = None) -> None:
        """Adds a call, if enabled.

        Args:
            splits: rows sent to and received from each rank.
            row_bytes: bytes of a row and of its scales.
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
        if tokens_per_expert is not None:
            totals.tokens_per_expert.add_(tokens_per_expert)
