"""Calls in halves: what sends has been launched, what receives has not.

A half belongs to the side of a capture on which it was launched. Eager calls launch the eager
halves that are left, calls of a capture those of the same capture; the rest is left to its hooks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from expertlink.errors import InputError


class Half:
    """The receiving half of one call; calling it launches it. Safe to call again.

    Args:
        halves: of the arena; it is one of them until it is launched.
        capture: number of the capture that the sending half is in, or 0.
        tables: memory of the routing, which may be that of the caller's buffers.
        launch: queues the kernel, and what follows it.
        follow: orders the current stream after the last call.
        capture_now: number of the capture that the current stream is in, or 0.
        needs: owns the memory that the kernel uses; let go of as soon as it is queued.
    """

    __slots__ = (
        "_capture_now",
        "_follow",
        "_halves",
        "_inference",
        "_launch",
        "_needs",
        "before",
        "capture",
        "tables",
    )

    def __init__(
        self,
        halves: Halves,
        *,
        capture: int,
        tables: object,
        launch: Callable[[], None],
        follow: Callable[[], None],
        capture_now: Callable[[], int],
        needs: tuple[object, ...],
    ) -> None:
        self._halves, self.capture, self.tables = halves, capture, tables
        self._launch: Callable[[], None] | None = launch
        self._follow, self._capture_now, self._needs = follow, capture_now, needs
        self._inference = torch.is_inference_mode_enabled()
        self.before: Half | None = None  # of the call before on the same side, while it is left

    def __call__(self) -> None:
        """Launches it, after those of earlier calls on its side.

        Raises:
            InputError: its call was made outside the present capture, or in one and this is none.
        """
        if self._launch is None:  # another call has queued it, on its own stream perhaps
            self._follow()
            return
        now = self._capture_now()
        if now and not self.capture:
            raise InputError(
                "the sending half of this call was launched outside the capture: call its hook "
                "before the capture begins"
            )
        if self.capture and not now:
            raise InputError(
                "the sending half of this call was captured in a CUDA graph: call its hook in that "
                "capture, or in one whose graph is replayed after that graph"
            )
        self._halves.launch(self)

    @property
    def is_left(self) -> bool:
        """It has not been launched."""
        return self._launch is not None

    def launch(self) -> None:
        """Launches those that are left before it, then this one."""
        before, self.before = self.before, None
        if before is not None:
            before.launch()
        if self._launch is None:
            return
        launch, self._launch = self._launch, None
        self._follow()
        if self._inference and not torch.is_inference_mode_enabled():  # a call outside of it
            with torch.inference_mode():  # tensors made in it can be written to nowhere else
                launch()
        else:
            launch()
        self._needs, self.tables = (), None


class Halves:
    """The halves of an arena's calls that are left.

    Attributes:
        left: oldest first; every call looks whether there are any.
    """

    def __init__(self) -> None:
        self.left: list[Half] = []

    def add(self, half: Half) -> None:
        """Another one, of the latest call."""
        own = [other for other in self.left if other.capture == half.capture]
        half.before = own[-1] if own else None
        self.left.append(half)

    def finish(self, capture: int, most: int = 0) -> None:
        """Launches the oldest halves of a capture, or with 0 eager ones, until `most` are left.

        Halves of other captures are forgotten: only their hooks can still launch them.

        Raises:
            InputError: a call in a capture would launch an eager half.
        """
        if not self.left:
            return
        own = [half for half in self.left if half.capture == capture]
        if capture and any(not half.capture for half in self.left):
            raise InputError(
                "half of a call outside the capture is left: call its hook before the capture "
                "begins"
            )
        self.left = own
        while len(self.left) > most:
            self.launch(self.left[0])

    def launch(self, last: Half) -> None:
        """Launches a half, after those before it."""
        last.launch()
        self.left = [half for half in self.left if half.is_left]

    def finish_those_of(self, tables: object) -> None:
        """Launches what needs these tables, and what comes before it."""
        for half in [half for half in self.left if half.tables is tables]:
            half()
