"""The nvlink engine behind the seam of engines/base.py: agreement, order and failures of calls."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import NoReturn

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines import extras
from expertlink.engines.agreement import judge, without_counts
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.buffers import in_scale_order, into_buffers, into_tokens, largest_output
from expertlink.engines.header import Operation
from expertlink.engines.nvlink.arena import Arena, RowShape
from expertlink.engines.nvlink.route import Route, as_route
from expertlink.engines.nvlink.throughput import HighThroughput, Started
from expertlink.engines.nvlink.watchdog import DISAGREE, Watchdog
from expertlink.engines.unmasked import Unmasked
from expertlink.engines.wire import Wire
from expertlink.errors import (
    CapacityError,
    ConfigurationError,
    EngineUnavailableError,
    InputError,
)
from expertlink.routing import Placement
from expertlink.types import CallStatistics, DispatchBuffers, DispatchLayout, RowKind
from expertlink.validation import explain_ids

_ALIGNMENT = 16  # bytes of what bulk copies read and write
logger = logging.getLogger("expertlink")


class NvlinkEngine(Unmasked):
    """Moves rows with kernels that address the memory of other GPUs.

    Args:
        config: the communicator's.
        wire: the ranks' connection, for what is said in words.
        placement: where the experts live.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        calls: queues this rank's calls.
        check: ranks agree before every combine and cached dispatch.
    """

    name = "nvlink"
    quantizes = False

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        arena: Arena,
        watchdog: Watchdog,
        calls: HighThroughput,
        check: bool,
    ) -> None:
        if config.combine_precision == "exact":
            raise EngineUnavailableError("combine_precision='exact' needs low-latency kernels")
        self._config, self._wire, self._placement = config, wire, placement
        self.arena, self.watchdog, self._calls = arena, watchdog, calls
        self._check = check
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
        self._wire.close()

    def memory_estimate(self) -> dict[str, int]:
        """Bytes of the arena by region; no call needs more beyond its inputs and outputs."""
        return self.arena.plan.regions()

    def wire_rows(self, state: object) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included."""
        return as_route(state).wire_rows()

    def expert_ranges(self, state: object) -> tuple[Tensor, Tensor]:
        """Expanded layouts: first slot and rows of each source in each group, `[E_loc, R]`."""
        return expert_ranges(as_route(state), self._config.layout)

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

    def check_health(self) -> None:
        """Raises what the kernels have reported since the last call."""
        self.watchdog.check(self._wire.call)

    def refuse(self, operation: str, error: Exception) -> NoReturn:
        """Raises `error` here and `PeerError` on the ranks that agree on this call."""
        kind = Operation[operation.upper()]
        if kind is Operation.DISPATCH:
            self._enter(kind)
            self._begin()
            mail = self._calls.refuse(kind, number=self._wire.call)
            if mail is not None:
                judge(self._wire, kind, mail.heads, refused=error)
        elif self._check:
            self._enter(kind)
            self._agree(kind, refused=error)
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
            self.refuse(kind.name, error)
        self._enter(kind)
        if call.x_TW.data_ptr() % 16:
            call = dataclasses.replace(call, x_TW=call.x_TW.clone())
        if self._check and call.previous is not None:
            self._agree(kind, row_bytes=extras.row_bytes(call.x_TW), extra_bytes=extras.width(call))
        self._begin()
        started = self._calls.dispatch(call, number=self._wire.call)
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
        self._enter(Operation.COMBINE)
        if self._check:
            self._agree(Operation.COMBINE)
        self._begin()
        if call.slot_weights is not None:
            route = with_slot_weights(as_route(call.state), call.slot_weights)
            call = dataclasses.replace(call, state=route)
        out_TH = call.out_TH
        if out_TH.data_ptr() % _ALIGNMENT:
            call = dataclasses.replace(call, out_TH=torch.empty_like(out_TH))
        grads_TK = self._calls.combiner.combine(call)
        if call.out_TH is not out_TH:
            out_TH.copy_(call.out_TH)
        return Combined(out_TH=out_TH, weight_grads_TK=grads_TK, finish=nothing_left)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32."""
        self._enter(Operation.WEIGHT_GRADS)
        if self._check:
            self._agree(Operation.WEIGHT_GRADS)
        self._begin()
        return self._calls.combiner.weight_grads(as_route(state), weight_grads)

    def slot_weights(self, state: object) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, 0 where none is filled."""
        return as_route(state).slot_weights()

    # -- shared -----------------------------------------------------------------------------------

    def _enter(self, operation: Operation) -> None:
        self._wire.enter(operation.title, self._wire.call + 1)
        self.watchdog.check(self._wire.call)

    def _begin(self) -> None:
        self.arena.enter(torch.cuda.current_stream(self.arena.device))

    def _agree(
        self,
        operation: Operation,
        *,
        refused: Exception | None = None,
        row_bytes: int = 0,
        extra_bytes: int = 0,
    ) -> None:
        """Exchanges headers between the hosts."""
        without_counts(
            self._wire,
            operation,
            num_experts=self._placement.num_experts,
            refused=refused,
            row_bytes=row_bytes,
            extra_bytes=extra_bytes,
        ).conclude()

    def _refused(self, call: DispatchCall, started: Started) -> NoReturn:
        """A dispatch that no rank carries out."""
        mail, number = started.mail, self._wire.call
        assert mail is not None
        if mail.verdict == DISAGREE:
            ids_TK = call.topk_ids_TK
            assert ids_TK is not None
            judge(
                self._wire,
                Operation.DISPATCH,
                mail.heads,
                explain=lambda: explain_ids(ids_TK, self._placement.num_experts),
            )
            raise InputError(
                f"dispatch #{number} did not happen: some ranks pass weights, others do not"
            )
        raise CapacityError(
            f"rank {mail.rank} would receive {mail.rows} rows in dispatch #{number} but has room "
            f"for {mail.capacity} (max_recv_tokens_per_rank or its output_buffer); nothing was "
            "placed",
            rank=mail.rank,
            rows=mail.rows,
            capacity=mail.capacity,
        )


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


def with_slot_weights(route: Route, slot_weights: Tensor) -> Route:
    """The same routing with other weights: one for every slot of an expanded layout."""
    weights = slot_weights.reshape(-1)
    # Entries beyond the last row, and those that name no slot, are never multiplied.
    slots = route.table("choices").clamp(min=0, max=max(weights.numel() - 1, 0))
    picked = weights[slots] if weights.numel() else weights.new_zeros(slots.shape)
    return dataclasses.replace(route, weights_block=picked, weighted=True)


def check_address(buffer: Tensor | None) -> None:
    if buffer is not None and buffer.data_ptr() % _ALIGNMENT:
        raise InputError(
            f"output_buffer starts at an address that is no multiple of {_ALIGNMENT} bytes"
        )


def nothing_left() -> None:
    """All work of a call is queued before it returns."""
