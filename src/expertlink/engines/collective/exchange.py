"""Rows over the wire: how many go between which ranks, and the all-to-all that moves them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expertlink.engines.ranks.wire import Transfer, Wire
from expertlink.layouts import as_bytes


@dataclass(frozen=True)
class Splits:
    """Rows exchanged with each rank, own rank included."""

    send: list[int]
    receive: list[int]

    def reversed(self) -> Splits:
        """The same rows on their way back."""
        return Splits(self.receive, self.send)


def exchange_rows(wire: Wire, send: Tensor, receive: Tensor, splits: Splits) -> Transfer:
    """Starts an all-to-all of whole rows, moved as bytes.

    Args:
        wire: the ranks' connection.
        send: `[n, W]` rows by destination rank, any dtype.
        receive: `[N, W]` of the same dtype; receives rows by source rank.
        splits: rows for and from each rank.
    """
    return wire.exchange(as_bytes(send), as_bytes(receive), splits.send, splits.receive)
