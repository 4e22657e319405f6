"""What one launch of high-throughput dispatch is: its blocks and their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ht.blocks import BlockShape, split_blocks
from expertlink.engines.nvlink.launch import Launch
from expertlink.engines.nvlink.rows import RowShape


class DispatchLaunch(NamedTuple):
    """A launch, and what the kernel is told of it.

    Sending blocks, the warps' memory, masks of 32 tokens that are counted at once.
    """

    num_senders: int
    slot_bytes: int
    warp_bytes: int
    batch: int
    groups: int
    launch: Launch


@dataclass(frozen=True)
class DispatchPlanner:
    """Plans launches.

    Attributes:
        config: the communicator's.
        blocks: shape of the blocks.
        num_sms: multiprocessors of the GPU.
    """

    config: MoECommunicatorConfig
    blocks: BlockShape
    num_sms: int

    def most_blocks(self, num_sms: int | None) -> int:
        """Blocks of a launch that sends, at most, for a caller's number of SMs."""
        return min(self.num_sms, num_sms or self.config.num_sms_dispatch or self.blocks.default_sms)

    def __call__(
        self, row_bytes: int, num_sms: int | None, sends: bool, counts: int
    ) -> DispatchLaunch:
        """The launch for rows of a size and a caller's number of SMs.

        With `sends` it counts or not, and sends and places; else it places what the launch before
        it has sent.
        """
        config, blocks = self.config, self.blocks
        total = self.most_blocks(num_sms)
        share = tuning.HT_DISPATCH_SENDERS
        if config.layout.expanded:
            share = tuning.HT_DISPATCH_SENDERS_EXPANDED
        elif 2 * row_bytes <= RowShape.of(config).row:
            share = tuning.HT_DISPATCH_SENDERS_SHORT_ROWS
        senders, total = split_blocks(total, senders=share)
        if config.zero_copy:  # little is left to do for those who do not send
            senders = max(1, total - max(1, total // tuning.HT_ZERO_COPY_PLACERS))
        movers = blocks.dispatch(row_bytes)
        launch = Launch(
            grid=total if sends else max(1, total - senders),
            block=movers.threads,
            shared_bytes=blocks.shared_bytes(movers, counts=bool(counts)),
            follows=not sends,
            local=not sends,
        )
        return DispatchLaunch(
            num_senders=senders if sends else 0,
            slot_bytes=movers.slot_bytes,
            warp_bytes=movers.warp_bytes,
            batch=movers.batch,
            groups=blocks.groups(movers.warps),
            launch=launch,
        )
