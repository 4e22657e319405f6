"""The nvlink engine in low-latency mode, behind the seam of engines/base.py.

No call waits for the device. Unless `check_inputs` is on, nor do hosts agree first: a call that
does not fit those of the other ranks is noticed by the kernels, and reported at the next call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from expertlink import routing
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched, RowKind
from expertlink.engines.nvlink.capture import is_capturing
from expertlink.engines.nvlink.engine import ALIGNMENT, NvlinkBase, check_address, nothing_left
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.dispatch import LowLatency
from expertlink.engines.nvlink.tables import as_route
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import HandleError, InputError
from expertlink.routing import Placement
from expertlink.types import CallStatistics, DispatchBuffers
from expertlink.validation import explain_ids


class LatencyEngine(NvlinkBase):
    """Moves the rows of few tokens with one launch per call.

    Args:
        config: the communicator's.
        wire: the ranks' connection, for what is said in words.
        placement: where the experts live.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        calls: queues this rank's calls.
        check: ranks agree before every call.
    """

    quantizes = True
    arena: LlArena

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        arena: LlArena,
        watchdog: Watchdog,
        calls: LowLatency,
        check: bool,
    ) -> None:
        super().__init__(
            config, wire=wire, placement=placement, arena=arena, watchdog=watchdog, check=check
        )
        self._low = calls

    def refuse(self, operation: Operation, error: Exception) -> NoReturn:
        """Raises `error` here; the ranks that make the call learn that it does not happen."""
        if is_capturing():
            raise error  # a capture is no call: the peers know nothing of it
        if self._check:
            self._enter(operation.title)
            self._agree(operation, refused=error)
        elif operation is Operation.DISPATCH:
            self._enter(operation.title)
            self.arena.follow()
            self._low.refuse()
        raise error

    # -- calls ------------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Queues a dispatch, or with `halves` its sending half."""
        wire = self._wire
        kind = Operation.DISPATCH if call.previous is None else Operation.CACHED_DISPATCH
        try:
            if call.quantize_to is None:
                self._rows.check(call.x_TW, call.scales)
            elif call.x_TW.shape[1] % ALIGNMENT:
                raise InputError(
                    f"quantized rows have {call.x_TW.shape[1]} bytes; the nvlink engine moves "
                    f"multiples of {ALIGNMENT}"
                )
            check_address(call.output_buffer)
        except InputError as error:
            self.refuse(kind, error)
        # What `_enter` does; whether this is a capture matters only where hosts count alike.
        capturing = self._check and is_capturing()
        number = wire.call if capturing else wire.call + 1
        wire.enter("dispatch" if call.previous is None else "cached dispatch", number)
        self.watchdog.check(number)
        if call.previous is not None:
            self._check_epoch(kind, call.previous)
        if call.x_TW.data_ptr() % ALIGNMENT:
            call = dataclasses.replace(call, x_TW=call.x_TW.clone())
        if self._check and not capturing:
            self._agree_on(kind, call)
        self.arena.follow()
        output, route, rest = self._low.dispatch(call, 0 if capturing else number)
        return Dispatched(
            output=output,
            state=route,
            finish=nothing_left if rest is None else self._unless_closed(rest),
            call=number,
            topk_ids_TK=route.ids_TK,
        )

    def combine(self, call: CombineCall) -> Combined:
        """Queues a combine, or with `halves` its sending half."""
        wire = self._wire
        capturing = self._check and is_capturing()
        number = wire.call if capturing else wire.call + 1
        wire.enter("combine", number)
        self.watchdog.check(number)
        route: Any = call.state
        if route.epoch != self.arena.epoch:
            self._check_epoch(Operation.COMBINE, route)
        if self._check and not capturing:
            self._agree(Operation.COMBINE, subject=route.number)
        self.arena.follow()
        out_TH = call.out_TH
        after = None
        if (out_TH.data_ptr() | call.rows.data_ptr()) % ALIGNMENT:
            call = dataclasses.replace(
                call, rows=call.rows.clone(), out_TH=torch.empty_like(out_TH)
            )
            after = functools.partial(out_TH.copy_, call.out_TH)
        grads_TK, rest = self._low.combine(call, after)
        return Combined(
            out_TH, grads_TK, nothing_left if rest is None else self._unless_closed(rest)
        )

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32."""
        number = self._enter(Operation.WEIGHT_GRADS.title)
        self._check_epoch(Operation.WEIGHT_GRADS, state)
        if self._check and number:
            self._agree(Operation.WEIGHT_GRADS, subject=as_route(state).number)
        self.arena.follow()
        return self._low.weight_grads(as_route(state), weight_grads)

    def _check_epoch(self, kind: Operation, state: object) -> None:
        """Refuses a routing of a time when other ranks took part: nobody was asked for its rows."""
        if as_route(state).epoch != self.arena.epoch:
            self.refuse(
                kind,
                HandleError(
                    "the handle is of a dispatch before clear_mask(), which lets all ranks begin "
                    "anew: dispatch again"
                ),
            )

    def _unless_closed(self, half: Callable[[], None]) -> Callable[[], None]:
        """A receiving half that is launched while this communicator lives."""

        def receive() -> None:
            self._wire.enter(self._wire.phase, self._wire.call)
            half()

        return receive

    def _agree_on(self, kind: Operation, call: DispatchCall) -> None:
        """The ranks agree on a dispatch; faulty ids are refused."""
        refused = None
        ids_TK, experts = call.topk_ids_TK, self._placement.num_experts
        if ids_TK is not None:
            faulty = routing.out_of_range(ids_TK, experts) | routing.has_duplicates(ids_TK)
            if bool(faulty.any()):
                refused = explain_ids(ids_TK, experts)
        previous: Any = call.previous
        self._agree(
            kind,
            refused=refused,
            row_bytes=metadata.row_bytes(call.x_TW),
            metadata_bytes=metadata.width(call),
            subject=0 if previous is None else previous.number,
        )

    # -- what operators ask for -------------------------------------------------------------------

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape and tables: dispatches into them allocate nothing."""
        return self._low.make_buffers(rows)

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        return self._low.enable_statistics()

    def query_mask(self) -> Tensor:
        """`[R]` bool on the device: ranks that calls no longer wait for."""
        self.arena.follow()
        return self.arena.masks != 0

    def mask_peer(self, rank: int) -> None:
        """Calls neither wait for that rank nor send to it from now on."""
        if not 0 <= rank < self._wire.num_ranks or rank == self._wire.rank:
            raise InputError(
                f"rank {rank} cannot be masked; accepted: another rank below {self._wire.num_ranks}"
            )
        if self._config.combine_precision == "exact":
            raise InputError(
                f"rank {rank} cannot be masked with combine_precision='exact': memory of its rows "
                "would be that of others, should it come back"
            )
        self.arena.follow()
        self.arena.masks[rank] = 1

    def clear_mask(self) -> None:
        """All ranks take part again, as if no call had been made. Collective."""
        self._wire.enter("clear mask", self._wire.call + 1)
        if is_capturing():
            raise InputError("clear_mask() waits for all ranks: it cannot be captured")
        self.arena.halves.finish(0)
        torch.cuda.synchronize(self.arena.device)
        self._wire.gather_text("")  # nobody writes any more
        self.arena.restart()
        self._wire.gather_text("")  # everybody's memory is ready
        self.watchdog.revive()
