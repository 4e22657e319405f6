"""The nvlink engine in high-throughput mode: agreement, order and failures of calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.nvlink.capture import is_capturing
from expertlink.engines.nvlink.engine import ALIGNMENT, NvlinkBase, check_address, nothing_left
from expertlink.engines.nvlink.ht.arena import HtArena
from expertlink.engines.nvlink.ht.dispatch import HighThroughput, Started
from expertlink.engines.nvlink.shared import Verdict
from expertlink.engines.nvlink.tables import Route, as_route
from expertlink.engines.nvlink.watchdog import Mail, Watchdog
from expertlink.engines.outputs import in_scale_order, into_buffers, into_tokens, largest_output
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.agreement import judge
from expertlink.engines.ranks.header import NUM_FIELDS, Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.engines.unmasked import Unmasked
from expertlink.errors import (
    CapacityError,
    ConfigurationError,
    EngineUnavailableError,
    InputError,
)
from expertlink.routing import Placement
from expertlink.types import CallStatistics, DispatchBuffers, RowKind
from expertlink.validation import explain_ids


class NvlinkEngine(NvlinkBase, Unmasked):
    """Moves many rows: dispatches whose counts the host may learn, and combines.

    Args:
        config: the communicator's.
        wire: the ranks' connection, for what is said in words.
        placement: where the experts live.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        calls: queues this rank's calls.
        check: ranks agree before every combine and cached dispatch.
    """

    quantizes = False

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        arena: HtArena,
        watchdog: Watchdog,
        calls: HighThroughput,
        check: bool,
    ) -> None:
        if config.combine_precision == "exact":
            raise EngineUnavailableError("combine_precision='exact' needs low-latency kernels")
        super().__init__(
            config, wire=wire, placement=placement, arena=arena, watchdog=watchdog, check=check
        )
        self._calls = calls

    def enable_statistics(self) -> CallStatistics:
        """Refuses: these kernels count nothing."""
        raise ConfigurationError("statistics are kept by mode='ll' on the nvlink engine")

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape; tables and copies of the rest are made by every call."""
        placement = self._placement
        output = largest_output(
            self._config,
            rows,
            num_ranks=placement.num_ranks,
            num_local=len(placement.experts_of_rank[self._wire.rank]),
            device=self._wire.device,
        )
        return DispatchBuffers(output=output, tables=None, kind=rows)

    def refuse(self, operation: Operation, error: Exception) -> NoReturn:
        """Raises `error` here and `PeerError` on the ranks that agree on this call."""
        if is_capturing():
            raise error  # a capture is no call: the peers know nothing of it
        if operation is Operation.DISPATCH:
            number = self._enter(operation.title)
            self._begin(number)
            mail = self._calls.refuse(operation, number=number)
            if mail is not None:
                self._judge(mail, refused=error)
        elif self._check:
            self._enter(operation.title)
            self._agree(operation, refused=error)
        raise error

    # -- calls ------------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Queues a dispatch; waits for all ranks' counts where the host has to know them."""
        kind = Operation.DISPATCH if call.previous is None else Operation.CACHED_DISPATCH
        call = into_tokens(call)
        try:
            self._rows.check(call.x_TW, call.scales)
            check_address(call.output_buffer)
        except InputError as error:
            self.refuse(kind, error)
        number = self._enter(kind.title)
        if number == 0 and call.previous is None and not self._config.static_shapes:
            raise InputError(
                "a dispatch without previous_handle waits for the row counts of all ranks, so it "
                "cannot be captured in a CUDA graph: configure static_shapes=True, or capture "
                "cached dispatches"
            )
        if call.x_TW.data_ptr() % 16:
            call = dataclasses.replace(call, x_TW=call.x_TW.clone())
        if self._check and number and call.previous is not None:
            self._agree(
                kind,
                row_bytes=metadata.row_bytes(call.x_TW),
                metadata_bytes=metadata.width(call),
                subject=as_route(call.previous).number,
            )
        self._begin(number)
        started = self._calls.dispatch(call, number=number)
        if started.output is None or started.route is None:
            self._refused(call, started)
        output = started.output
        if call.buffers is None:
            output = in_scale_order(self._config, output)
        else:
            output, fill = into_buffers(call.buffers, output)
            fill()
        return Dispatched(
            output=output,
            state=started.route,
            finish=nothing_left,
            call=self._wire.call,
            topk_ids_TK=started.route.ids_TK,
        )

    def combine(self, call: CombineCall) -> Combined:
        """Queues a combine."""
        number = self._enter("combine")
        if self._check and number:
            self._agree(Operation.COMBINE, subject=as_route(call.state).number)
        self._begin(number)
        if call.slot_weights is not None:
            route = with_slot_weights(as_route(call.state), call.slot_weights)
            call = dataclasses.replace(call, state=route)
        out_TH = call.out_TH
        if out_TH.data_ptr() % ALIGNMENT:
            call = dataclasses.replace(call, out_TH=torch.empty_like(out_TH))
        grads_TK = self._calls.combiner.combine(call)
        if call.out_TH is not out_TH:
            out_TH.copy_(call.out_TH)
        return Combined(out_TH=out_TH, weight_grads_TK=grads_TK, finish=nothing_left)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32."""
        number = self._enter(Operation.WEIGHT_GRADS.title)
        if self._check and number:
            self._agree(Operation.WEIGHT_GRADS, subject=as_route(state).number)
        self._begin(number)
        return self._calls.combiner.weight_grads(as_route(state), weight_grads)

    # -- shared -----------------------------------------------------------------------------------

    def _begin(self, number: int) -> None:
        stream = torch.cuda.current_stream(self.arena.device)
        self.arena.enter(stream, capturing=number == 0)

    def _judge(
        self,
        mail: Mail,
        *,
        refused: Exception | None = None,
        explain: Callable[[], Exception] | None = None,
    ) -> NoReturn:
        """Raises why a dispatch does not happen, the same on all ranks."""
        error = self.watchdog.disagreement(mail.headers)
        if self.watchdog.is_fatal(mail.headers):
            self.watchdog.fail(str(error))
            raise error if refused is None else refused
        # The ranks that refused say why.
        judge(
            self._wire,
            Operation.DISPATCH,
            [words[:NUM_FIELDS] for words in mail.headers],
            refused=refused,
            explain=explain,
            resynchronise=False,
        )
        raise error

    def _refused(self, call: DispatchCall, started: Started) -> NoReturn:
        """A dispatch that no rank carries out."""
        mail, number = started.mail, self._wire.call
        assert mail is not None
        if mail.verdict is Verdict.DISAGREE:
            ids_TK = call.topk_ids_TK
            assert ids_TK is not None
            self._judge(mail, explain=lambda: explain_ids(ids_TK, self._placement.num_experts))
        raise CapacityError(
            f"rank {mail.rank} would receive {mail.rows} rows in dispatch #{number} but has room "
            f"for {mail.capacity} (max_recv_tokens_per_rank or its output_buffer); nothing was "
            "placed",
            rank=mail.rank,
            rows=mail.rows,
            capacity=mail.capacity,
        )


def with_slot_weights(route: Route, slot_weights: Tensor) -> Route:
    """The same routing with other weights: one for every slot of an expanded layout."""
    weights = slot_weights.reshape(-1)
    # Entries beyond the last row, and those that name no slot, are never multiplied.
    slots = route.table("choices").clamp(min=0, max=max(weights.numel() - 1, 0))
    picked = weights[slots] if weights.numel() else weights.new_zeros(slots.shape)
    return dataclasses.replace(route, weights_block=picked, weighted=True)
