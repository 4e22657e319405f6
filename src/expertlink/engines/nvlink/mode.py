"""The seam between the nvlink engine and its modes.

A mode is a folder: its memory (plan), what host and kernels tell each other (arguments), and the
calls (dispatch, combine). `mode.py` in that folder is its class, which is a `Mode`. The engine
checks a call, brings the ranks to an agreement about it and orders it after the calls before; then
the mode makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.nvlink.arena import Arena, Buffer, Plan
from expertlink.engines.nvlink.launch import Program, Run
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import ExpertlinkError, InputError
from expertlink.routing import Placement
from expertlink.types import CallStatistics, DispatchBuffers, RowKind

ALIGNMENT = 16  # bytes of what kernels read and write at once


@dataclass(frozen=True)
class Memory:
    """What communicators of one rank can share.

    Attributes:
        arena: memory that all ranks write.
        watchdog: host memory that the kernels write.
    """

    arena: Arena
    watchdog: Watchdog


class Mode(Protocol):
    """How one rank makes its calls, over memory that all ranks can reach.

    Args:
        config: the communicator's.
        wire: the ranks' connection.
        placement: where the experts live, on this rank's GPU.
        memory: made for a plan of this mode.
        run: queues a kernel.
        num_sms: multiprocessors of the GPU.
        max_warps: most warps of a block, if fewer than tuned: several ranks on one GPU.

    Attributes:
        routing_form: as `Engine.routing_form`.
        numbers_by_max_tokens: as `Engine.numbers_by_max_tokens`.
        quantizes: as `Engine.quantizes`.
        counts_captures: the host always has to know whether a call is captured. Else only where
            the hosts agree before calls.
        agrees_on_device: the kernels of a new routing agree before anything is placed, so the hosts
            need not.
        takes_weights: combines take `weights_TK`. Else a dispatch brings them before.
    """

    routing_form: str
    numbers_by_max_tokens: bool
    quantizes: bool
    counts_captures: bool
    agrees_on_device: bool
    takes_weights: bool

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        memory: Memory,
        run: Run,
        num_sms: int,
        max_warps: int | None = None,
    ) -> None: ...

    # -- what a communicator needs, before there is a mode ----------------------------------------

    @staticmethod
    def plan(config: MoECommunicatorConfig, num_ranks: int) -> Plan:
        """Sizes of the arena."""
        ...

    @staticmethod
    def program(config: MoECommunicatorConfig, plan: Plan, *, num_ranks: int) -> Program:
        """The kernels, for an arena of this plan."""
        ...

    @staticmethod
    def make_arena(plan: Plan, *, rank: int, buffer: Buffer, device: torch.device) -> Arena:
        """This rank's view of the memory of all ranks."""
        ...

    # -- calls, in the order in which the engine asks ---------------------------------------------

    def check(self, call: DispatchCall) -> None:
        """Raises InputError where the kernels cannot move such rows."""
        ...

    def find_fault(self, previous: object | None, *, capturing: bool) -> ExpertlinkError | None:
        """Why a call with an earlier routing, or without (a dispatch), cannot be made now."""
        ...

    def dispatch(self, call: DispatchCall, number: int) -> Dispatched:
        """Queues a dispatch; `number` is the host's, 0 in a capture that is known as one."""
        ...

    def combine(self, call: CombineCall) -> Combined:
        """Queues a combine."""
        ...

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        ...

    def refuse(self, number: int, error: Exception) -> None:
        """Takes part in a dispatch only to refuse it; may raise what the ranks agree on."""
        ...

    def occupied_sms(self, operation: Operation, num_sms: int | None) -> int:
        """Most SMs that one launch of a dispatch or combine takes; `num_sms`: as in the calls."""
        ...

    # -- the rest, as `Engine` has it -------------------------------------------------------------

    def set_tokens_bound(self, tokens_bound: int | None) -> None:
        """As `Engine.set_tokens_bound`."""
        ...

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape for such rows, and tables of one routing."""
        ...

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        ...

    def query_mask(self) -> Tensor:
        """`[R]` bool on the device: ranks that calls no longer wait for."""
        ...

    def mask_peer(self, rank: int) -> None:
        """Calls neither wait for that rank nor send to it from now on."""
        ...

    def clear_mask(self) -> None:
        """All ranks take part again. Collective."""
        ...


def common_arguments(memory: Memory, *, wire: Wire, expert_location: Tensor) -> dict[str, int]:
    """Arguments that a communicator's kernels share in every mode, by name."""
    arena = memory.arena
    return {
        "bases": arena.bases.data_ptr(),
        "state": arena.state.data_ptr(),
        "control": memory.watchdog.address,
        "rank": wire.rank,
        "communicator": wire.number,
        "expert_location": expert_location.data_ptr(),
    }


def check_address(buffer: Tensor) -> None:
    """Refuses an output buffer that kernels cannot write to."""
    if buffer.data_ptr() % ALIGNMENT:
        raise InputError(
            f"output_buffer starts at an address that is no multiple of {ALIGNMENT} bytes"
        )
