"""The hybrid engine: the engine of a host, and a rail to the other hosts that may fail by itself.

How rows move is up to its mode (mode.py). Checks, agreement and order of calls are those of the
nvlink engine; this adds what the rail needs.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.hybrid.mode import HybridMode
from expertlink.engines.hybrid.monitor import Monitor
from expertlink.engines.hybrid.watched_rail import WatchedRail
from expertlink.engines.nvlink.capture import is_capturing
from expertlink.engines.nvlink.engine import NvlinkEngine
from expertlink.engines.nvlink.mode import Memory
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import (
    AbortError,
    CapacityError,
    InputError,
    PeerError,
    PeerTimeoutError,
)
from expertlink.reduction import BackwardKernel
from expertlink.routing import Placement

_WAITS = (AbortError, PeerTimeoutError)
_VERDICTS = (CapacityError, InputError, PeerError)
_FAILURES = (*_WAITS, *_VERDICTS, torch.OutOfMemoryError)


class Connection:
    """A rank's rail and its monitor. Communicators that share memory share it.

    Args:
        rail: with its steps counted.
        monitor: of that rail.
    """

    def __init__(self, rail: WatchedRail, monitor: Monitor) -> None:
        self.rail, self.monitor = rail, monitor
        self._members: set[int] = set()

    def join(self, communicator: int) -> None:
        """A communicator will use the rail; `leave` when it does no more."""
        self._members.add(communicator)

    def leave(self, communicator: int) -> None:
        """Closes the rail with the last communicator. Nothing may be under way."""
        if communicator in self._members:
            self._members.remove(communicator)
            if not self._members:
                self.rail.close()


class HybridEngine(NvlinkEngine):
    """See `engines.base.Engine`.

    Args:
        config: the communicator's.
        wire: the connection of the ranks of all hosts.
        placement: where the experts live.
        memory: of the ranks of this host.
        mode: makes the calls.
        connection: to the other hosts.
        backward_kernel: as `Engine.backward_kernel`.
        check_inputs: the hosts agree before calls whose kernels do not agree by themselves.
    """

    name = "hybrid"

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        memory: Memory,
        mode: HybridMode,
        connection: Connection,
        backward_kernel: BackwardKernel | None,
        check_inputs: bool,
    ) -> None:
        super().__init__(
            config,
            wire=wire,
            placement=placement,
            memory=memory,
            mode=mode,
            backward_kernel=backward_kernel,
            check_inputs=check_inputs,
        )
        self.connection, self._monitor = connection, connection.monitor
        self._rail_mode, self._message_regions = mode, mode.message_regions()
        connection.join(wire.number)

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Queues a dispatch; waits for all ranks' counts where the host has to know them."""
        queued = self._rail_mode.dispatches_queued
        try:
            return super().dispatch(call)
        except _FAILURES as error:
            # A dispatch that is queued runs without this rank: nobody waits for it.
            self._raise_failure(error, is_awaited=self._rail_mode.dispatches_queued == queued)

    def combine(self, call: CombineCall) -> Combined:
        """Queues a combine."""
        try:
            return super().combine(call)
        except _FAILURES as error:
            self._raise_failure(error)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32."""
        try:
            return super().weight_grads(state, weight_grads)
        except _FAILURES as error:
            self._raise_failure(error)

    def refuse(self, operation: Operation, error: Exception) -> NoReturn:
        """Raises `error` here; the ranks that make the call learn that it does not happen."""
        try:
            super().refuse(operation, error)
        except _WAITS as failure:
            self._raise_cause(failure)

    def _raise_failure(self, error: Exception, *, is_awaited: bool = True) -> NoReturn:
        """Raises what a failed call comes from.

        `is_awaited`: the peers would wait for this rank, so one without memory ends the call.
        """
        if isinstance(error, _WAITS):
            self._raise_cause(error)
        if isinstance(error, _VERDICTS):
            self._raise_verdict(error)
        if is_awaited and not is_capturing():  # a capture is no call: nobody waits
            self.abort(f"{type(error).__name__}: {error}")
        raise error

    def _raise_verdict(self, error: Exception) -> NoReturn:
        """Raises what kernels say of a call, unless its rail has failed: then the counts and
        messages that they read are those of an earlier call, or a part of this one's."""
        if self._monitor.failure is None:
            raise error
        self._raise_cause(error)

    def _raise_cause(self, error: Exception) -> NoReturn:
        """Raises what a failed wait comes from: a rail may have ended it, here or at a peer."""
        cause = self._monitor.explain(error)
        self.watchdog.fail(str(cause))
        if cause is error:
            raise cause
        raise cause from error

    def _enter(self, operation: Operation, state: object | None, capturing: bool) -> int:
        if self._monitor.failure is not None:
            self._monitor.check()
        return super()._enter(operation, state, capturing)

    def check_health(self) -> None:
        """Raises what the monitor and the kernels have found since the last call, and overflows."""
        self._monitor.check()
        try:
            super().check_health()
        except _FAILURES as error:
            self._raise_failure(error)

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds; those of the rail that are under way too."""
        super().set_timeout(timeout_s)
        self._monitor.timeout_s = timeout_s

    def abort(self, reason: str) -> None:
        """Ends this communicator, and those that share its memory, on all ranks. Never raises."""
        is_new = not self.watchdog.dead
        super().abort(reason)
        if is_new:
            self._monitor.stop()  # it would report what ends now
            self.connection.rail.abort()

    def close(self) -> None:
        """Waits for the calls under way, which the monitor bounds, then lets go of everything."""
        number = self._wire.number
        super().close()
        self.connection.leave(number)

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region: of the host's arena, and of what the rail sends and receives."""
        return {**super().memory_estimate(), **self._message_regions}
