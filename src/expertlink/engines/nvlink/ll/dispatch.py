"""Low-latency calls of one rank: outputs, arguments, launches of ll_dispatch and ll_combine.

Knows addresses and nothing of process groups, so that several ranks can live in one process.
Nothing here waits for the device, so all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, DispatchCall, RowKind
from expertlink.engines.nvlink.launch import LATENCY_WARPS, KernelName, Run
from expertlink.engines.nvlink.ll.arena import LlArena, LlTables, Tables
from expertlink.engines.nvlink.ll.arguments import COMBINE, DISPATCH, Flag, signature
from expertlink.engines.nvlink.ll.launch import LatencyLauncher
from expertlink.engines.nvlink.ll.plan import REFUSED
from expertlink.engines.nvlink.shared import ScaleKind, expert_locations
from expertlink.engines.nvlink.tables import ORIGINS, Route
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.engines.outputs import largest_output
from expertlink.engines.ranks.header import Operation
from expertlink.quantization import scale_columns
from expertlink.routing import Placement
from expertlink.types import (
    BlockFormat,
    CallStatistics,
    DispatchBuffers,
    DispatchOutput,
)

_SCALE_KINDS = {
    None: ScaleKind.NOT_QUANTIZED,
    BlockFormat.E4M3_FLOAT32: ScaleKind.FLOAT_SCALES,
    BlockFormat.E4M3_POW2: ScaleKind.POWER_SCALES,
    BlockFormat.E4M3_UE8M0: ScaleKind.PACKED_SCALES,
}

# Plain numbers: the operators of enumerations take microseconds.
_WIDE_IDS, _NEW_WEIGHTS = int(Flag.WIDE_IDS), int(Flag.NEW_WEIGHTS)
_GRADS, _ALONE = int(Flag.GRADS), int(Flag.ALONE)
_COMBINE, _WEIGHT_GRADS = int(Operation.COMBINE), int(Operation.WEIGHT_GRADS)


class LowLatency:
    """Builds and queues the low-latency calls of one rank.

    Args:
        config: the communicator's.
        rank: this rank.
        placement: where the experts live, on this rank's GPU.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        run: queues a kernel.
        num_sms: multiprocessors of the GPU.
        communicator: tells communicators apart, the same on all ranks.
        warps: most warps of a block.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        rank: int,
        placement: Placement,
        arena: LlArena,
        watchdog: Watchdog,
        run: Run,
        num_sms: int,
        communicator: int,
        warps: int = LATENCY_WARPS,
    ) -> None:
        self._config, self._arena = config, arena
        self._layout, self._device = config.layout, arena.device
        self._num_ranks = placement.num_ranks
        self._num_local = len(placement.experts_of_rank[rank])
        self._tables = LlTables(config, num_ranks=self._num_ranks, num_local=self._num_local)
        self._kinds: dict[tuple[Any, ...], RowKind] = {}
        self._launch = LatencyLauncher(
            config,
            num_ranks=self._num_ranks,
            num_local=self._num_local,
            arena=arena,
            run=run,
            num_sms=num_sms,
            warps=warps,
        )
        self._arenas = arena.in_use
        self._row_bytes = config.hidden_size * config.dtype.itemsize
        self._signatures = [
            signature(Operation.COMBINE, row_bytes=self._row_bytes, weights=weights)
            for weights in (False, True)
        ]
        self._statistics: CallStatistics | None = None
        self._expert_location = expert_locations(placement)
        common: dict[str, int] = {
            "bases": arena.bases.data_ptr(),
            "state": arena.state.data_ptr(),
            "counters": arena.counters.data_ptr(),
            "control": watchdog.address,
            "rank": rank,
            "communicator": communicator,
            "expert_location": self._expert_location.data_ptr(),
        }
        self._dispatch: Any = DISPATCH.new(**common, num_local=self._num_local)
        self._combine: Any = COMBINE.new(**common)
        # Of buffers: statistics have to reach their arguments.
        self._own: weakref.WeakSet[Tables] = weakref.WeakSet()

    # -- dispatch ---------------------------------------------------------------------------------

    def make_buffers(self, kind: RowKind) -> DispatchBuffers:
        """Everything that a dispatch of such rows needs, at its largest."""
        config = self._config
        output = self._largest(kind)
        tables = Tables(
            block=self._new_block(config.max_tokens_per_rank),
            ids=torch.empty(
                (config.max_tokens_per_rank, config.topk), dtype=torch.int64, device=self._device
            ),
            dispatch=self._dispatch.copy(),
            combine=self._combine.copy(),
            routes={},
        )
        self._name_tables(tables.dispatch, tables.block, tables.ids)
        self._name_output(tables.dispatch, output)
        self._name_route(tables.combine, tables.block)
        self._own.add(tables)
        return DispatchBuffers(output=output, tables=tables, kind=kind)

    def dispatch(
        self, call: DispatchCall, number: int
    ) -> tuple[DispatchOutput, Route, Callable[[], None] | None]:
        """Queues a dispatch: what it returns, its routing, and the half that is left to launch.

        `number` is the host's, 0 in a capture.
        """
        previous: Any = call.previous
        ids, weights = call.topk_ids_TK, call.weights_TK
        weighted = weights is not None
        if previous is not None:
            ids = previous.ids_TK
            if weights is None and previous.weighted:
                weighted = True
                weights = previous.table("own_weights").view(torch.float32)
        assert ids is not None
        num_tokens, width = call.x_TW.shape
        tables: Any = None
        which = 0  # of the words that the transfer's number is kept in
        named = (num_tokens, weighted, width, call.x_TW.dtype, call.quantize_to, previous is None)
        if call.buffers is not None:
            tables = call.buffers.tables
            a, output = tables.dispatch, call.buffers.output
            if not weighted and output.topk_weights is not None:
                output = DispatchOutput(**{**vars(output), "topk_weights": None})
            # A cached dispatch may read the number of the dispatch before.
            which = call.buffers.generation % ORIGINS
            key = (num_tokens, weighted, ids.dtype is torch.int64, which)
            route = tables.routes.get(key)
            if self._arena.halves.left:  # one of them may read these tables
                self._arena.halves.finish_those_of(tables.block)
            if route is None:
                kept = tables.ids
                if ids.dtype is not torch.int64:  # int32 ids take the first half of the memory
                    kept = kept.view(-1).view(ids.dtype)[: kept.numel()].view(kept.shape)
                kept = kept[:num_tokens]
                route = self._new_route(output, num_tokens, kept, tables.block, weighted, which)
                route.combine_arguments = tables.combine
                tables.routes[key] = route
            route.number, route.epoch = number, self._arena.epoch
        else:
            a, block = self._dispatch, self._new_block(num_tokens)
            kept = torch.empty_like(ids)
            output = self._new_output(call, weighted)
            self._name_tables(a, block, kept)
            self._name_output(a, output)
            route = self._new_route(output, num_tokens, kept, block, weighted, which)
            route.number, route.epoch = number, self._arena.epoch
        if call.zero_padding and self._layout.padded:
            output.tokens.zero_()
            if output.scales is not None:
                output.scales.tensor.zero_()
        a.subject = None if previous is None else previous.origin
        a.origin = route.origin
        flags = self._flags()
        if ids.dtype is torch.int64:
            flags |= _WIDE_IDS
        if weights is not None:
            flags |= _NEW_WEIGHTS
            a.weights = weights.data_ptr()
        a.ids = ids.data_ptr()
        if tables is not None and tables.named == named and call.scales is None:
            a.x = call.x_TW.data_ptr()  # the rest is as it was the last time
        else:
            weights_out = output.topk_weights
            a.topk_weights = None if weights_out is None else weights_out.data_ptr()
            self._name_rows(a, call, output, weighted)
            a.num_tokens = num_tokens
            if tables is not None:
                tables.named = named if call.scales is None else None
        quantizes = call.quantize_to is not None
        name = KernelName.DISPATCH_QUANTIZED if quantizes else KernelName.DISPATCH
        needs = (output, route, call.x_TW, call.scales, ids, weights) if call.halves else ()
        left = self._launch(
            name, a, flags, call.num_sms, halves=call.halves, needs=needs, tables=route.block
        )
        return output, route, left

    def _flags(self) -> int:
        """Those of every call. Calls of several arenas must not hold SMs for their followers."""
        return _ALONE if self._arenas[0] > 1 else 0

    def refuse(self) -> None:
        """Lets the peers know that this rank will not make the dispatch that they make."""
        config = self._config
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=self._device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=self._device),
        )
        a = self._dispatch
        kept = torch.empty((0, config.topk), dtype=torch.int64, device=self._device)
        block = self._new_block(0)
        output = self._new_output(call, weighted=False)
        self._name_tables(a, block, kept)
        self._name_output(a, output)
        self._name_rows(a, call, output, weighted=False)
        a.topk_weights, a.num_tokens, a.signature = None, 0, REFUSED
        a.subject, a.origin = None, self._tables.address(block.data_ptr(), "origin")
        self._launch(KernelName.DISPATCH, a, self._flags() | _WIDE_IDS, None, halves=False)

    def _name_rows(
        self, a: Any, call: DispatchCall, output: DispatchOutput, weighted: bool
    ) -> None:
        """What is sent, and what all ranks must say of it alike."""
        x = call.x_TW
        a.x, a.input_bytes = x.data_ptr(), x.shape[1] * x.element_size()
        kind = _SCALE_KINDS[call.quantize_to]
        row_bytes = x.shape[1] if kind else a.input_bytes
        scale_bytes = 0
        a.scales = None
        if output.scales is not None:
            scales = output.scales.tensor
            a.scale_item = scales.element_size()
            scale_bytes = scales.shape[-1] * a.scale_item
            if call.scales is not None:
                a.scales = call.scales.data_ptr()
        a.scale_kind, a.row_bytes, a.scale_bytes = kind, row_bytes, scale_bytes
        operation = Operation.DISPATCH if call.previous is None else Operation.CACHED_DISPATCH
        a.operation = operation
        a.signature = signature(
            operation,
            row_bytes=row_bytes,
            weights=weighted,
            scale_kind=kind,
            scale_bytes=scale_bytes,
        )

    def _name_tables(self, a: Any, block: Tensor, ids: Tensor) -> None:
        """Where the tables of the routing are."""
        tables, base = self._tables, block.data_ptr()
        address = tables.address
        a.ids_copy, a.weights_copy = ids.data_ptr(), address(base, "own_weights")
        a.slots_of_token = address(base, "slots")
        a.rows_from, a.rows_to = address(base, "rows_from"), address(base, "rows_to")
        a.first_row, a.first_slot = address(base, "first_row"), address(base, "first_slot")
        a.tokens_per_expert = address(base, "counts")
        a.choices_of_row, a.weights_of_row = address(base, "choices"), address(base, "weights")
        a.tokens_of_row = address(base, "tokens")

    def _name_output(self, a: Any, output: DispatchOutput) -> None:
        """Where the caller's tensors are."""
        counts, per_rank = output.num_tokens_per_expert, output.num_tokens_per_rank
        assert per_rank is not None
        a.counts_out, a.rows_from_out = counts.data_ptr(), per_rank.data_ptr()
        # Between the two, in every layout; without local experts the counts have no address.
        a.offsets_out = a.rows_from_out - 4 * (self._num_local + 1)
        a.tokens, a.max_slots = output.tokens.data_ptr(), math.prod(output.tokens.shape[:-1])
        a.topk_ids = None if output.topk_ids is None else output.topk_ids.data_ptr()
        a.scales_out, a.scale_stride = None, 0
        if output.scales is not None:
            a.scales_out = output.scales.tensor.data_ptr()
            if self._config.scale_order == "column_major":
                a.scale_stride = output.tokens.shape[-2]

    def _new_route(
        self,
        output: DispatchOutput,
        num_tokens: int,
        ids: Tensor,
        block: Tensor,
        weighted: bool,
        which: int,
    ) -> Route:
        return Route(
            shape=tuple(output.tokens.shape[:-1]),
            num_tokens=num_tokens,
            ids_TK=ids,
            layout=self._tables,
            block=block,
            weights_block=None,
            weighted=weighted,
            counts=None,
            origin=self._tables.address(block.data_ptr(), "origin") + 4 * which,
        )

    def _new_block(self, num_tokens: int) -> Tensor:
        """Memory for the tables of a routing."""
        words = self._tables.words(num_tokens)
        return torch.empty(words, dtype=torch.int32, device=self._device)

    def kind_of(self, call: DispatchCall, weighted: bool) -> RowKind:
        """The rows that a call returns."""
        x, scales, quantized = call.x_TW, call.scales, call.quantize_to
        key = (x.dtype, x.shape[1], quantized, call.scale_format, weighted)
        if scales is not None:
            key = (*key, scales.dtype, scales.shape[1])
        kind = self._kinds.get(key)
        if kind is None:
            dtype, width, format_ = x.dtype, x.shape[1], call.scale_format
            scale_dtype, columns = None, 0
            if scales is not None:
                scale_dtype, columns = scales.dtype, scales.shape[1]
            if quantized is not None:
                dtype, format_ = torch.float8_e4m3fn, quantized
                packed = quantized is BlockFormat.E4M3_UE8M0
                scale_dtype = torch.int32 if packed else torch.float32
                columns = scale_columns(width, quantized)
            kind = self._kinds[key] = RowKind(dtype, width, scale_dtype, columns, format_, weighted)
        return kind

    def _largest(self, kind: RowKind, tokens: Tensor | None = None) -> DispatchOutput:
        return largest_output(
            self._config,
            kind,
            tokens=tokens,
            num_ranks=self._num_ranks,
            num_local=self._num_local,
            device=self._device,
        )

    def _new_output(self, call: DispatchCall, weighted: bool) -> DispatchOutput:
        """Tensors of the caller's own."""
        return self._largest(self.kind_of(call, weighted), call.output_buffer)

    # -- combine ----------------------------------------------------------------------------------

    def combine(
        self, call: CombineCall, after: Callable[[], object] | None = None
    ) -> tuple[Tensor | None, Callable[[], None] | None]:
        """Queues a combine: the weight gradients, and the half that is left to launch.

        `after` queues what follows the receiving half.
        """
        route: Any = call.state
        grads = call.weight_grads
        a = self._arguments_for(route)
        a.operation = _COMBINE
        a.row_bytes = self._row_bytes
        a.rows, a.out = call.rows.data_ptr(), call.out_TH.data_ptr()
        weights = call.slot_weights
        a.slot_weights = None if weights is None else weights.data_ptr()
        a.weights_of_row = route.weights_address() if call.weighted else None
        grads_TK = self._name_grads(a, route, grads)
        a.signature = self._signatures[grads is not None]
        flags = self._flags()
        if grads is not None:
            flags |= _GRADS
        if route.ids_TK.dtype is torch.int64:
            flags |= _WIDE_IDS
        needs = (call, route, grads, grads_TK) if call.halves else ()
        left = self._launch(
            KernelName.COMBINE,
            a,
            flags,
            call.num_sms,
            halves=call.halves,
            needs=needs,
            after=after,
            tables=route.block,
        )
        return grads_TK, left

    def weight_grads(self, route: Route, grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        a = self._arguments_for(route)
        a.operation, a.row_bytes = _WEIGHT_GRADS, 0
        a.signature = signature(Operation.WEIGHT_GRADS, row_bytes=0, weights=True)
        a.slot_weights = a.weights_of_row = None
        grads_TK = self._name_grads(a, route, grads)
        assert grads_TK is not None
        flags = self._flags() | _GRADS
        if route.ids_TK.dtype is torch.int64:
            flags |= _WIDE_IDS
        self._launch(KernelName.COMBINE, a, flags, None, halves=False)
        return grads_TK

    def _arguments_for(self, route: Route) -> Any:
        """Arguments of a combine with the tables of a routing."""
        a = route.combine_arguments
        if a is None:
            a = self._combine
            self._name_route(a, route.block)
        a.num_tokens, a.max_slots = route.num_tokens, math.prod(route.shape)
        a.ids, a.subject = route.ids_TK.data_ptr(), route.origin
        return a

    def _name_route(self, a: Any, block: Tensor) -> None:
        tables, base = self._tables, block.data_ptr()
        address = tables.address
        a.slots_of_token = address(base, "slots")
        a.rows_from, a.rows_to = address(base, "rows_from"), address(base, "rows_to")
        a.choices_of_row, a.tokens_of_row = address(base, "choices"), address(base, "tokens")

    def _name_grads(self, a: Any, route: Route, grads: Tensor | None) -> Tensor | None:
        if grads is None:
            return None
        grads = grads.to(torch.float32).contiguous()
        grads_TK = torch.empty(
            (route.num_tokens, self._config.topk), dtype=torch.float32, device=self._device
        )
        a.slot_grads, a.grads_out = grads.data_ptr(), grads_TK.data_ptr()
        # Freed for this stream only, which comes to it after the kernel.
        return grads_TK

    # -- statistics -------------------------------------------------------------------------------

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        if self._statistics is None:
            counted = self._statistics = CallStatistics.zeros(
                num_local=self._num_local, num_ranks=self._num_ranks, device=self._device
            )
            dispatches = [self._dispatch, *(tables.dispatch for tables in self._own)]
            combines = [self._combine, *(tables.combine for tables in self._own)]
            for a in (*dispatches, *combines):
                a.rows_sent = counted.rows_sent.data_ptr()
                a.rows_received = counted.rows_received.data_ptr()
                a.bytes_sent = counted.bytes_sent.data_ptr()
                a.bytes_received = counted.bytes_received.data_ptr()
                a.longest_wait_ns = counted.longest_wait_ns.data_ptr()
            for a in dispatches:
                a.tokens_stat = counted.tokens_per_expert.data_ptr()
        return self._statistics
