"""What both modes of the nvlink engine share behind the seam of engines/base.py."""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.arena import Arena
from expertlink.engines.nvlink.capture import is_capturing
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.tables import Route, as_route
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.engines.ranks.agreement import begin_agreement
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import InputError
from expertlink.routing import Placement
from expertlink.types import DispatchLayout

ALIGNMENT = 16  # bytes of what kernels read and write at once


class NvlinkBase:
    """An engine whose kernels address the memory of other GPUs.

    Args:
        config: the communicator's.
        wire: the ranks' connection, for what is said in words.
        placement: where the experts live.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        check: ranks agree before calls that do not agree by themselves.
    """

    name = "nvlink"

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        arena: Arena,
        watchdog: Watchdog,
        check: bool,
    ) -> None:
        self._config, self._wire, self._placement = config, wire, placement
        self.arena, self.watchdog, self._check = arena, watchdog, check
        arena.join(wire.number)
        watchdog.attach(wire.post_abort, wire.abort_reason)
        watchdog.interrupted = weakref.WeakMethod(self.abort)
        self._rows = RowShape.of(config)

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds."""
        self._wire.timeout_s = timeout_s
        self.watchdog.set_timeout(timeout_s)

    def close(self) -> None:
        """Waits for the calls under way, then lets go of memory and group.

        The arena goes with the last communicator that shares it.
        """
        with contextlib.suppress(RuntimeError):  # a broken context has nothing under way
            torch.cuda.synchronize(self.arena.device)
        if self.arena.leave(self._wire.number):
            self.watchdog.release()
        self._wire.close()

    def abort(self, reason: str) -> None:
        """Ends this communicator, and those that share its memory, on all ranks. Never raises."""
        if self.watchdog.dead:
            return
        self.watchdog.fail(f"abort: {reason}")
        # Peers that learn of it wait a moment for the reason.
        with contextlib.suppress(RuntimeError):
            self.arena.post_abort()
        self.watchdog.post_abort(reason)

    def memory_estimate(self) -> dict[str, int]:
        """Bytes of the arena by region; no call needs more beyond its inputs and outputs."""
        return self.arena.plan.regions()

    def wire_rows(self, state: object) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included."""
        return as_route(state).wire_rows()

    def expert_ranges(self, state: object) -> tuple[Tensor, Tensor]:
        """Expanded layouts: first slot and rows of each source in each group, `[E_loc, R]`."""
        return expert_ranges(as_route(state), self._config.layout)

    def check_health(self) -> None:
        """Raises what the kernels have reported since the last call, and overflows."""
        self.watchdog.check(self._wire.call)
        self.watchdog.check_overflow()

    def slot_weights(self, state: object) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, 0 where none is filled."""
        return as_route(state).slot_weights()

    # -- shared -----------------------------------------------------------------------------------

    def _enter(self, phase: str) -> int:
        """Begins a call; returns its number, 0 in a capture, which launches nothing."""
        wire = self._wire
        capturing = is_capturing()
        number = wire.call if capturing else wire.call + 1
        wire.enter(phase, number)
        self.watchdog.check(number)
        return 0 if capturing else number

    def _agree(
        self,
        operation: Operation,
        *,
        refused: Exception | None = None,
        row_bytes: int = 0,
        metadata_bytes: int = 0,
        subject: int = 0,
    ) -> None:
        """Exchanges headers between the hosts."""
        begin_agreement(
            self._wire,
            operation,
            num_experts=self._placement.num_experts,
            refused=refused,
            row_bytes=row_bytes,
            metadata_bytes=metadata_bytes,
            subject=subject,
        ).conclude()


def expert_ranges(route: Route, layout: DispatchLayout) -> tuple[Tensor, Tensor]:
    """See `Engine.expert_ranges`."""
    first_ER = route.table("first_slot").t()
    ends_E = first_ER[:, 0] + route.table("counts")
    counts_ER = torch.cat([first_ER[:, 1:], ends_E[:, None]], dim=1) - first_ER
    groups_E = torch.zeros_like(ends_E)
    if layout is DispatchLayout.EXPERT_MAJOR:
        groups_E = torch.arange(len(ends_E), dtype=torch.int32, device=ends_E.device)
        groups_E *= route.layout.rows
    return first_ER - groups_E[:, None], counts_ER


def check_address(buffer: Tensor | None) -> None:
    if buffer is not None and buffer.data_ptr() % ALIGNMENT:
        raise InputError(
            f"output_buffer starts at an address that is no multiple of {ALIGNMENT} bytes"
        )


def nothing_left() -> None:
    """All work of a call is queued before it returns."""
