"""Launches of a high-throughput dispatch across hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from expertlink.engines.nvlink.ht.launch import DispatchPlanner
from expertlink.engines.nvlink.launch import Launch


class ChunkLaunches(NamedTuple):
    """Launches of a dispatch, and what the kernels are told of them."""

    num_senders: int
    slot_bytes: int
    warp_bytes: int
    batch: int
    groups: int
    counting: Launch
    planning: Launch
    packing: Launch
    moving: Launch


@dataclass(frozen=True)
class HybridDispatchPlanner:
    """Plans launches.

    Attributes:
        inside: plans launches inside a host.
        num_peers: G.
    """

    inside: DispatchPlanner
    num_peers: int

    def __call__(self, row_bytes: int, num_sms: int | None) -> ChunkLaunches:
        """The launches for rows of a size and a caller's number of SMs."""
        moving = self.inside(row_bytes, num_sms, True, 0)
        counting = self.inside(row_bytes, num_sms, True, 1).launch
        threads = moving.launch.block
        return ChunkLaunches(
            *moving[:5],
            counting=Launch(
                grid=counting.grid, block=threads, shared_bytes=counting.shared_bytes, local=True
            ),
            planning=Launch(
                grid=min(self.num_peers, counting.grid),
                block=threads,
                shared_bytes=counting.shared_bytes,
            ),
            # No warp announces rows: whoever reads messages is a later launch.
            packing=Launch(
                grid=counting.grid,
                block=threads - 32,
                shared_bytes=moving.launch.shared_bytes,
                local=True,
            ),
            moving=moving.launch,
        )
