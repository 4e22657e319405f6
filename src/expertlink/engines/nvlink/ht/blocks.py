"""Blocks of the high-throughput kernels: threads, shared memory, and how many of them send."""

from __future__ import annotations

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ht.plan import count_columns, shared_table_words
from expertlink.engines.nvlink.rows import RowShape
from expertlink.layouts import align


class BlockShape:
    """Threads and shared memory of blocks for rows of a size.

    Args:
        config: the communicator's.
        num_ranks: R.
        num_local: E_loc.
        max_warps: most warps of a block that move rows.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        num_ranks: int,
        num_local: int,
        max_warps: int = tuning.HT_MAX_WARPS,
    ) -> None:
        self._metadata = RowShape.of(config).metadata
        self._room = tuning.SHARED_BYTES - tuning.STATIC_BYTES
        self._columns = count_columns(config, num_ranks)
        table = shared_table_words(config, num_ranks)
        self._plan_bytes = 4 * (2 * num_ranks + num_local + 1 + table)
        self._max_warps = max_warps

    def slot_bytes(self, row_bytes: int) -> int:
        """Shared memory of a warp that moves rows."""
        return align(row_bytes + self._metadata, 128)

    def warps(self, row_bytes: int) -> int:
        """Warps that move rows, each with one of its own in shared memory."""
        return max(1, min(self._max_warps, self._room // self.slot_bytes(row_bytes)))

    def threads(self, row_bytes: int) -> int:
        """Threads of a block."""
        return 32 * (self.warps(row_bytes) + 1)

    def groups(self, warps: int) -> int:
        """Masks of 32 tokens that counting can hold at a time."""
        return min(warps, self._room // (4 * self._columns) - 2)

    def shared_bytes(self, row_bytes: int, *, counts: bool) -> int:
        """Dynamic shared memory of a block."""
        warps = self.warps(row_bytes)
        ring = warps * self.slot_bytes(row_bytes)
        if not counts:
            return ring
        return max(ring, 4 * (self.groups(warps) + 2) * self._columns, self._plan_bytes)

    def unavailable_reason(self, row_bytes: int) -> str | None:
        """Why a communicator is too large for these kernels, or None."""
        if self.slot_bytes(row_bytes) > self._room:
            return f"rows of {row_bytes} bytes exceed the shared memory of a block"
        if self.groups(1) < 1 or self._plan_bytes > self._room:
            return f"{self._columns} ranks and experts exceed the shared memory of a block"
        return None


def split_blocks(total: int, *, senders: float) -> tuple[int, int]:
    """Blocks that send, and all blocks, of `total`; a single block does both."""
    if total == 1:
        return 1, 1
    return min(total - 1, max(1, round(total * senders))), total
