"""What calls of mode `ll` share: the arena with its counters, and the halves that are left."""

from __future__ import annotations

import torch

from expertlink.engines.nvlink.arena import Arena, Buffer
from expertlink.engines.nvlink.capture import capture_of, is_capturing
from expertlink.engines.nvlink.ll.halves import Halves
from expertlink.engines.nvlink.ll.plan import SETS, LlPlan
from expertlink.engines.nvlink.shared import counters


class LlArena(Arena):
    """An arena with the counters of `ll` calls, and the calls of which half is under way.

    Attributes:
        counters: uint8, the struct `shared.counters`.
        masks: `[R]` int32, the part of `counters` that says who is masked.
        halves: calls whose receiving half has not been launched.
        restarts: how often the ranks have begun anew: a list of one number, which routings share.
    """

    def __init__(self, plan: LlPlan, *, rank: int, buffer: Buffer, device: torch.device) -> None:
        super().__init__(plan, rank=rank, buffer=buffer, device=device)
        layout = counters(self.num_ranks, SETS)
        self.counters = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        self.masks = layout.member(self.counters, "masked")
        self.halves = Halves()
        self.restarts = [0]

    def follow(self, *, capturing: bool = False) -> None:
        """Orders torch's current stream after the last call, where that was made on another.

        `capturing` is not read: not every caller knows.
        """
        raw = self._current()
        if raw != self._last_raw:
            self._change_stream(raw)

    def _change_stream(self, raw: int) -> None:
        stream = torch.cuda.current_stream(self.device)
        if not is_capturing():
            self.enter(stream, capturing=False)
            return
        if self._last_raw is not None and self._last is not None:
            capture = capture_of(self._last_raw)
            if capture == capture_of(raw):  # calls of this capture may have come on that stream
                self._captured = capture, self._last
        self.enter(stream, capturing=True)
        self._last_raw = None  # every call looks again, until an eager one comes

    def capture(self) -> int:
        """Number of the capture that torch's current stream is in, or 0."""
        return capture_of(self._current()) if is_capturing() else 0

    def restart(self) -> None:
        """As before the first call. No rank may be in a call, nor begin one before all are here."""
        torch.cuda.synchronize(self.device)
        self.plan.prepare(self.local)
        self.counters.zero_()
        self.state.zero_()
        self.halves = Halves()
        self.restarts[0] += 1
        torch.cuda.synchronize(self.device)
