"""The nvlink engine: it checks calls, agrees on them, orders them, and says how they fail.

How rows move is up to its mode (mode.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from typing import NoReturn

import torch
from torch import Tensor

from expertlink import routing
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.nvlink.capture import is_capturing
from expertlink.engines.nvlink.mode import ALIGNMENT, Memory, Mode
from expertlink.engines.nvlink.tables import Route, as_route
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.agreement import agree
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import InputError
from expertlink.reduction import BackwardKernel
from expertlink.routing import Placement, explain_ids
from expertlink.types import CallStatistics, DispatchBuffers, RowKind

# Looking up members of an enumeration, and their titles, takes time that decode notices.
_DISPATCH, _CACHED_DISPATCH = Operation.DISPATCH, Operation.CACHED_DISPATCH
_COMBINE, _WEIGHT_GRADS = Operation.COMBINE, Operation.WEIGHT_GRADS
_TITLES = {operation: operation.title for operation in Operation}


class NvlinkEngine:
    """An engine whose kernels address the memory of other GPUs; see `engines.base.Engine`.

    Args:
        config: the communicator's.
        wire: the ranks' connection, for what is said in words.
        placement: where the experts live.
        memory: what communicators can share.
        mode: makes the calls over that memory.
        backward_kernel: as `Engine.backward_kernel`.
        check_inputs: the hosts agree before calls whose kernels do not agree by themselves.
    """

    name = "nvlink"

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        memory: Memory,
        mode: Mode,
        backward_kernel: BackwardKernel | None,
        check_inputs: bool,
    ) -> None:
        self._config, self._wire, self._placement = config, wire, placement
        self.memory, self.arena, self.watchdog = memory, memory.arena, memory.watchdog
        self._mode, self._check = mode, check_inputs
        self.quantizes, self.backward_kernel = mode.quantizes, backward_kernel
        self.routing_form = mode.routing_form
        self.numbers_by_max_tokens = mode.numbers_by_max_tokens
        self._short_rows = None  # of a dispatch that only brings weights
        if config.layout.expanded and not mode.takes_weights:
            shape = (config.max_tokens_per_rank, ALIGNMENT)
            self._short_rows = torch.zeros(shape, dtype=torch.uint8, device=wire.device)
        self.arena.join(wire.number)
        self.watchdog.attach(wire.publish_abort, wire.abort_reason, weakref.WeakMethod(self.abort))

    # -- calls ------------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Queues a dispatch; waits for all ranks' counts where the host has to know them."""
        mode, previous = self._mode, call.previous
        operation = _DISPATCH if previous is None else _CACHED_DISPATCH
        try:
            mode.check(call)
        except InputError as error:
            self.refuse(operation, error)
        capturing = (mode.counts_captures or self._check) and is_capturing()
        number = self._enter(operation, previous, capturing)
        if call.x_TW.data_ptr() % ALIGNMENT:
            call = dataclasses.replace(call, x_TW=call.x_TW.clone())
        if self._check and number:
            self._agree_on(operation, call)
        self.arena.follow(capturing=capturing)
        return mode.dispatch(call, number)

    def combine(self, call: CombineCall) -> Combined:
        """Queues a combine."""
        weights_TK = call.weights_TK
        if weights_TK is not None and self._short_rows is not None:
            call = self._with_weights(call, weights_TK, self._short_rows)
        mode, state = self._mode, call.state
        capturing = (mode.counts_captures or self._check) and is_capturing()
        number = self._enter(_COMBINE, state, capturing)
        if self._check and number:
            row_bytes = 0 if weights_TK is None else metadata.row_bytes(weights_TK)
            self._agree(_COMBINE, of=as_route(state), row_bytes=row_bytes)
        self.arena.follow(capturing=capturing)
        return mode.combine(call)

    def _with_weights(self, call: CombineCall, weights_TK: Tensor, rows: Tensor) -> CombineCall:
        """The same combine, once the ranks that add up have these weights: a dispatch brings them.

        Args:
            call: the combine.
            weights_TK: of this rank's tokens.
            rows: `[T_max, W]` that travel with them; nobody reads those.
        """
        route = as_route(call.state)
        arrived = self.dispatch(
            DispatchCall(
                x_TW=rows[: route.num_tokens],
                weights_TK=weights_TK,
                # As much room as the rows of the combine have.
                output_buffer=rows.new_empty((*route.shape, rows.shape[1])),
                previous=route,
                counted=False,
            )
        )
        arrived.finish()
        return dataclasses.replace(call, state=arrived.state, weights_TK=None)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32."""
        capturing = is_capturing()
        number = self._enter(_WEIGHT_GRADS, state, capturing)
        if self._check and number:
            self._agree(_WEIGHT_GRADS, of=as_route(state))
        self.arena.follow(capturing=capturing)
        return self._mode.weight_grads(state, weight_grads)

    def refuse(self, operation: Operation, error: Exception) -> NoReturn:
        """Raises `error` here; the ranks that make the call learn that it does not happen."""
        if is_capturing():
            raise error  # a capture is no call: the peers know nothing of it
        mode, is_new = self._mode, operation is _DISPATCH
        if self._check and not (is_new and mode.agrees_on_device):
            self._enter(operation, None, False)
            self._agree(operation, refused=error)
        elif is_new:
            number = self._enter(operation, None, False)
            self.arena.follow(capturing=False)
            mode.refuse(number, error)
        raise error

    def _enter(self, operation: Operation, state: object | None, capturing: bool) -> int:
        """Begins a call; returns its number, 0 in a capture, which launches nothing.

        `state` is the routing that the call uses, None for a new one.
        """
        wire = self._wire
        number = wire.call if capturing else wire.call + 1
        wire.enter(_TITLES[operation], number)
        self.watchdog.check(number)
        if capturing or state is not None:
            error = self._mode.find_fault(state, capturing=capturing)
            if error is not None:
                wire.call = number - (not capturing)  # to refuse the call is to begin it
                self.refuse(operation, error)
        return 0 if capturing else number

    def _agree_on(self, operation: Operation, call: DispatchCall) -> None:
        """The hosts agree on a dispatch; faulty ids are refused."""
        refused = None
        if operation is _DISPATCH:
            if self._mode.agrees_on_device:
                return
            ids_TK, experts = call.topk_ids_TK, self._placement.num_experts
            assert ids_TK is not None
            faulty = routing.out_of_range(ids_TK, experts) | routing.has_duplicates(ids_TK)
            if bool(faulty.any()):
                refused = explain_ids(ids_TK, experts)
        self._agree(
            operation,
            refused=refused,
            row_bytes=metadata.row_bytes(call.x_TW),
            metadata_bytes=metadata.width(call),
            of=None if call.previous is None else as_route(call.previous),
        )

    def _agree(
        self,
        operation: Operation,
        *,
        refused: Exception | None = None,
        row_bytes: int = 0,
        metadata_bytes: int = 0,
        of: Route | None = None,
    ) -> None:
        agree(
            self._wire,
            operation,
            num_experts=self._placement.num_experts,
            max_tokens=self._config.max_tokens_per_rank,
            device=self._wire.words_device,
            refused=refused,
            row_bytes=row_bytes,
            metadata_bytes=metadata_bytes,
            subject=0 if of is None else of.number,
            maker=0 if of is None else of.maker,
        )

    # -- failures and the end ---------------------------------------------------------------------

    def set_tokens_bound(self, tokens_bound: int | None) -> None:
        """As `Engine.set_tokens_bound`: up to the mode."""
        if self._check:
            said = self._wire.gather_text(str(tokens_bound))
            if len(set(said)) > 1:
                raise InputError(f"tokens_bound differs: by rank {', '.join(said)}")
        self._mode.set_tokens_bound(tokens_bound)

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds."""
        self._wire.timeout_s = timeout_s
        self.watchdog.set_timeout(timeout_s)

    def check_health(self) -> None:
        """Raises what the kernels have reported since the last call, and overflows."""
        self.watchdog.check(self._wire.call)
        self.watchdog.check_overflow()

    def abort(self, reason: str) -> None:
        """Ends this communicator, and those that share its memory, on all ranks. Never raises."""
        if self.watchdog.dead:
            return
        self.watchdog.fail(f"abort: {reason}")
        # Peers that learn of it wait a moment for the reason.
        with contextlib.suppress(RuntimeError):
            self.arena.post_abort()
        self.watchdog.publish_abort(reason)

    def close(self) -> None:
        """Waits for the calls under way, then lets go of memory and group.

        The arena goes with the last communicator that shares it.
        """
        with contextlib.suppress(RuntimeError):  # a broken context has nothing under way
            torch.cuda.synchronize(self.arena.device)
        self.watchdog.detach(self._wire.publish_abort)
        if self.arena.leave(self._wire.number):
            self.watchdog.release()
        self._wire.close()

    # -- what a routing says ----------------------------------------------------------------------

    def wire_rows(self, state: object) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included."""
        return as_route(state).wire_rows()

    def slot_weights(self, state: object) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, 0 where none is filled."""
        return as_route(state).slot_weights()

    # -- memory, statistics, masks ----------------------------------------------------------------

    def memory_estimate(self) -> dict[str, int]:
        """Bytes of the arena by region; no call needs more beyond its inputs and outputs."""
        return self.arena.plan.regions()

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape for such rows, and tables of one routing."""
        return self._mode.make_buffers(rows)

    def compute_sms(self, operation: Operation, num_sms: int | None) -> int:
        """SMs of the GPU that one dispatch or combine leaves free."""
        device = self.arena.device
        total = torch.cuda.get_device_properties(device).multi_processor_count
        return total - self._mode.occupied_sms(operation, num_sms)

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        return self._mode.enable_statistics()

    def query_mask(self) -> Tensor:
        """`[R]` bool on the device: ranks that calls no longer wait for."""
        return self._mode.query_mask()

    def mask_peer(self, rank: int) -> None:
        """Calls neither wait for that rank nor send to it from now on."""
        self._mode.mask_peer(rank)

    def clear_mask(self) -> None:
        """All ranks take part again. Collective."""
        self._mode.clear_mask()
