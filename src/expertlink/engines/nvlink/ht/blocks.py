"""Blocks of the high-throughput kernels: threads, shared memory, and how many of them send."""

from __future__ import annotations

from typing import NamedTuple

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ht.plan import (
    LEAST_SUM_BYTES,
    combine_warps,
    count_columns,
    most_batch,
    shared_table_words,
)
from expertlink.engines.nvlink.rows import RowShape
from expertlink.layouts import align


class Movers(NamedTuple):
    """Warps of a block that move rows, and their shared memory.

    Attributes:
        warps: how many.
        slot_bytes: of a row.
        warp_bytes: of a warp.
        batch: rows that a warp moves at a time; short ones share its memory.
    """

    warps: int
    slot_bytes: int
    warp_bytes: int
    batch: int

    @property
    def threads(self) -> int:
        """Threads of a block: one more warp announces what these have written."""
        return 32 * (self.warps + 1)


class BlockShape:
    """Threads and shared memory of blocks for rows of a size.

    Args:
        config: the communicator's.
        num_ranks: R.
        num_hosts: N, which those are on.
        num_local: E_loc.
        max_warps: most warps of a block that move rows; None: as many as tuned.

    Attributes:
        most_copies: ranks that a token goes to at most.
        default_sms: blocks of a call that asks for no number of SMs.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        num_ranks: int,
        num_local: int,
        max_warps: int | None = None,
        num_hosts: int = 1,
    ) -> None:
        self.most_copies = min(config.topk, num_ranks)
        self.default_sms = default_sms(config, num_ranks)
        self._metadata = RowShape.of(config).metadata
        self._room = tuning.SHARED_BYTES - tuning.STATIC_BYTES
        self._columns = count_columns(config, num_ranks, num_hosts)
        table = shared_table_words(config, num_ranks, num_hosts)
        self._plan_bytes = 4 * (2 * num_ranks + num_local + 1 + table)
        self._most_warps = max_warps or 32
        self._max_warps = min(self._most_warps, tuning.HT_MAX_WARPS)
        self._combine_warps = combine_warps(config)
        self._most_batch, self._expanded = most_batch(config), config.layout.expanded

    def slot_bytes(self, row_bytes: int) -> int:
        """Shared memory of a row with its metadata."""
        return align(row_bytes + self._metadata, 128)

    def dispatch(self, row_bytes: int) -> Movers:
        """Most rows of all warps together; of shapes with as many, the one with more warps."""
        least = min(self._max_warps, tuning.HT_LEAST_WARPS)
        shapes = [self._movers(row_bytes, batch) for batch in range(1, self._most_batch + 1)]
        fitting = [shape for shape in shapes[1:] if shape.warps >= least]
        return max([shapes[0], *fitting], key=lambda shape: shape.warps * shape.batch)

    def combine(self, row_bytes: int) -> Movers:
        """As many warps as possible. Rows that go back as they are share the memory of a warp."""
        slot = align(max(row_bytes, 16), 128)
        least = LEAST_SUM_BYTES if self._expanded else max(LEAST_SUM_BYTES, slot)
        tuned = max(1, min(self._combine_warps, self._room // least))
        warp_bytes = self._room // tuned // 128 * 128  # not more where there are fewer warps
        return Movers(
            warps=min(self._most_warps, tuned),
            slot_bytes=slot,
            warp_bytes=warp_bytes,
            batch=max(1, min(self._most_batch, warp_bytes // slot)),
        )

    def _movers(self, row_bytes: int, batch: int) -> Movers:
        slot = self.slot_bytes(row_bytes)
        warps = min(self._max_warps, self._room // (batch * slot))
        # A single row that does not fit is refused when the engine is built.
        return Movers(max(1, warps) if batch == 1 else warps, slot, batch * slot, batch)

    def groups(self, warps: int) -> int:
        """Masks of 32 tokens that counting can hold at a time."""
        return min(warps, self._room // (4 * self._columns) - 2)

    def shared_bytes(self, movers: Movers, *, counts: bool) -> int:
        """Dynamic shared memory of a block."""
        ring = movers.warps * movers.warp_bytes
        if not counts:
            return ring
        return max(ring, 4 * (self.groups(movers.warps) + 2) * self._columns, self._plan_bytes)

    def unavailable_reason(self, row_bytes: int) -> str | None:
        """Why a communicator is too large for these kernels, or None."""
        if self.slot_bytes(row_bytes) > self._room:
            return f"rows of {row_bytes} bytes exceed the shared memory of a block"
        if self.groups(1) < 1 or self._plan_bytes > self._room:
            return f"{self._columns} ranks and experts exceed the shared memory of a block"
        return None


def default_sms(config: MoECommunicatorConfig, num_ranks: int) -> int:
    """SMs that move rows as fast as the wire takes them, if choices fall on all ranks alike.

    Expanded layouts place a row for every choice, however few of the ranks are behind the wire.
    """
    arriving = num_ranks * (1 - (1 - 1 / num_ranks) ** config.topk)
    sent = arriving * (1 - 1 / num_ranks)
    if not sent:
        return tuning.HT_MOST_SMS
    placed = config.topk if config.layout.expanded else arriving
    # Of one SM, for a byte of every row.
    time = sent / tuning.HT_PUT_GBPS + arriving / tuning.HT_READ_GBPS
    time += placed / tuning.HT_WRITE_GBPS
    needed = time * tuning.HT_WIRE_GBPS / sent
    steps = round(needed / tuning.HT_SMS_STEP) * tuning.HT_SMS_STEP
    return min(tuning.HT_MOST_SMS, max(tuning.HT_LEAST_SMS, steps))


def split_blocks(total: int, *, senders: float) -> tuple[int, int]:
    """Blocks that send, and all blocks, of `total`; a single block does both."""
    if total == 1:
        return 1, 1
    return min(total - 1, max(1, round(total * senders))), total
