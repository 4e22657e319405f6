"""The baseline: `all_to_all_single` of the bytes that a dispatch and its combine move, and no more.

No counting, no reordering, no reduction: what is left of a call when all of that costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_METADATA_BYTES = 8


@dataclass(frozen=True)
class WireRows:
    """Rows that one rank exchanges with every rank in a dispatch; combine reverses them.

    Attributes:
        rank: the rank.
        rows_to: `[R]` rows it sends, its own share included.
        rows_from: `[R]` rows it receives, its own share included.
        dispatch_row_bytes: payload and scales of a dispatched row.
        combine_row_bytes: payload of a combined row.
    """

    rank: int
    rows_to: list[int]
    rows_from: list[int]
    dispatch_row_bytes: int
    combine_row_bytes: int

    def sent(self, phase: str) -> int:
        """Bytes that leave the rank in a phase; its own share does not."""
        out = self._remote(self.rows_to) * self.dispatch_row_bytes
        back = self._remote(self.rows_from) * self.combine_row_bytes
        return {"dispatch": out, "combine": back, "pair": out + back}[phase]

    def received(self, phase: str) -> int:
        """Bytes that arrive at the rank from others in a phase."""
        out = self._remote(self.rows_from) * self.dispatch_row_bytes
        back = self._remote(self.rows_to) * self.combine_row_bytes
        return {"dispatch": out, "combine": back, "pair": out + back}[phase]

    def metadata(self, phase: str, *, topk: int) -> int:
        """Bytes of the expert ids (int32) and weights (float32) beside the rows that leave."""
        return 0 if phase == "combine" else self._remote(self.rows_to) * topk * _METADATA_BYTES

    def _remote(self, rows: list[int]) -> int:
        return sum(rows) - rows[self.rank]


class RawExchange:
    """`all_to_all_single` in both directions, on buffers that are allocated once.

    Args:
        wire: rows and their sizes.
        device: where the buffers live; decides the backend.
    """

    def __init__(self, wire: WireRows, *, device: torch.device) -> None:
        self._wire = wire
        self._out = _buffers(wire.rows_to, wire.rows_from, wire.dispatch_row_bytes, device)
        self._back = _buffers(wire.rows_from, wire.rows_to, wire.combine_row_bytes, device)

    def dispatch(self) -> None:
        """Moves as many bytes as the dispatch."""
        dist.all_to_all_single(self._out[1], self._out[0], self._wire.rows_from, self._wire.rows_to)

    def combine(self) -> None:
        """Moves as many bytes as the combine."""
        dist.all_to_all_single(
            self._back[1], self._back[0], self._wire.rows_to, self._wire.rows_from
        )


def _buffers(
    rows_out: list[int], rows_in: list[int], row_bytes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    source = torch.zeros(sum(rows_out), row_bytes, dtype=torch.uint8, device=device)
    return source, torch.zeros(sum(rows_in), row_bytes, dtype=torch.uint8, device=device)
