"""What calls of mode `ht` share: the arena with its pools of zero-copy rows."""

from __future__ import annotations

import torch

from expertlink.engines.nvlink.arena import Arena, Buffer
from expertlink.engines.nvlink.ht.plan import HtPlan


class HtArena(Arena):
    """An arena with two pools that zero-copy dispatches take in turn."""

    plan: HtPlan

    def __init__(self, plan: HtPlan, *, rank: int, buffer: Buffer, device: torch.device) -> None:
        super().__init__(plan, rank=rank, buffer=buffer, device=device)
        self._pool = self._captured_pool = 0

    def next_pool(self, *, capturing: bool) -> tuple[int, int]:
        """Pool 0 or 1 for the next zero-copy dispatch of this rank, and its offset.

        Dispatches of captures take turns apart: a capture launches nothing, and what this rank
        captures is no other rank's business.
        """
        if capturing:
            self._captured_pool ^= 1
            pool = self._captured_pool
        else:
            self._pool ^= 1
            pool = self._pool
        return pool, self.plan.pool_at(pool)
