"""Low-latency dispatch of one rank: outputs, arguments, launches.

Knows addresses and nothing of process groups, so that several ranks can live in one process.
Nothing here waits for the device, so all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.launch import KernelName, Launch, Run
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.arguments import DISPATCH, Flag, signature
from expertlink.engines.nvlink.ll.launch import HalvesLauncher, LlLaunch
from expertlink.engines.nvlink.ll.plan import REFUSED, default_sms, shared_words
from expertlink.engines.nvlink.ll.tables import BufferTables, LlRoute, LlTableLayout, said_by
from expertlink.engines.nvlink.shared import ScaleKind
from expertlink.engines.nvlink.tables import ORIGINS
from expertlink.engines.outputs import largest_output, without_weights
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.header import Operation
from expertlink.jit.kernel import Arguments
from expertlink.quantization import scale_columns
from expertlink.types import BlockFormat, DispatchOutput, RowKind

_SCALE_KINDS = {
    None: ScaleKind.NOT_QUANTIZED,
    BlockFormat.E4M3_FLOAT32: ScaleKind.FLOAT_SCALES,
    BlockFormat.E4M3_POW2: ScaleKind.POWER_SCALES,
    BlockFormat.E4M3_UE8M0: ScaleKind.PACKED_SCALES,
}

# Plain numbers: the operators of enumerations take microseconds.
_WIDE_IDS, _NEW_WEIGHTS = int(Flag.WIDE_IDS), int(Flag.NEW_WEIGHTS)
_ALONE = int(Flag.ALONE)
_DISPATCH, _CACHED_DISPATCH = Operation.DISPATCH, Operation.CACHED_DISPATCH
_PLAIN, _QUANTIZED = KernelName.DISPATCH, KernelName.DISPATCH_QUANTIZED


@dataclass(frozen=True)
class DispatchPlanner:
    """Plans launches.

    Attributes:
        config: the communicator's.
        num_ranks: R.
        num_local: E_loc.
        num_sms: multiprocessors of the GPU.
        warps: warps of a block.
        num_hosts: N.
    """

    config: MoECommunicatorConfig
    num_ranks: int
    num_local: int
    num_sms: int
    warps: int
    num_hosts: int = 1

    def most_blocks(self, num_sms: int | None) -> int:
        """Blocks of a launch for a caller's number of SMs."""
        default, _ = default_sms(self.config, self.num_ranks // self.num_hosts)
        return min(self.num_sms, num_sms or self.config.num_sms_dispatch or default)

    def __call__(
        self, name: KernelName, num_sms: int | None, sends: bool, receives: bool
    ) -> LlLaunch:
        """The launch of some halves, for a caller's number of SMs."""
        config, warps = self.config, self.warps
        words = shared_words(
            config,
            num_ranks=self.num_ranks,
            num_local=self.num_local,
            sends=sends,
            receives=receives,
            num_hosts=self.num_hosts,
        )
        blocks = self.most_blocks(num_sms)
        senders = warps - tuning.LL_PUBLISHING_WARPS
        if sends and receives:
            copies = max(1.0, self._copies_to_peers())
            wanted = tuning.LL_SENDING_WARPS / copies
            if name is _QUANTIZED:
                work, once = tuning.LL_QUANTIZING_WARPS
                wanted = work / (once + copies)
            senders = min(senders, round(wanted / blocks))
        launch = Launch(grid=blocks, block=32 * warps, shared_bytes=4 * words, follows=True)
        return LlLaunch(launch, max(1, senders))

    def _copies_to_peers(self) -> float:
        """Peers that a token goes to, on average, if its experts are drawn evenly from all."""
        peers = self.num_ranks // self.num_hosts - 1
        return peers * (1.0 - (1.0 - 1.0 / self.num_ranks) ** self.config.topk)


class LlDispatcher:
    """Queues the dispatches of one rank.

    The arguments are structs that are used again: a new one takes longer than the rest of a call.

    Args:
        config: the communicator's.
        common: arguments that all calls share, by name.
        num_ranks: R.
        num_local: E_loc.
        arena: memory shared with the other ranks.
        run: queues a kernel.
        num_sms: multiprocessors of the GPU.
        max_warps: most warps of a block.
        num_hosts: N.

    Attributes:
        arguments: those of dispatches that make tensors of their own.
        tables: where the tables of a routing lie.
        most_blocks: of the planner.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        common: dict[str, int],
        num_ranks: int,
        num_local: int,
        arena: LlArena,
        run: Run,
        num_sms: int,
        max_warps: int,
        num_hosts: int = 1,
    ) -> None:
        self._config, self._arena, self._in_use = config, arena, arena.in_use
        self._number, self._restarts = common["communicator"], arena.restarts
        self._layout, self._device = config.layout, arena.device
        self._num_ranks, self._num_local = num_ranks, num_local
        self.tables = self._table_layout(num_hosts)
        self._kinds: dict[tuple[object, ...], RowKind] = {}
        warps = max(1, min(max_warps, tuning.LL_DISPATCH_WARPS))
        plan = DispatchPlanner(config, num_ranks, num_local, num_sms, warps, num_hosts)
        self.most_blocks = plan.most_blocks
        self._launch = HalvesLauncher(arena=arena, run=run, plan=plan)
        self.arguments = DISPATCH.new(**common, num_local=num_local)

    def dispatch(
        self, call: DispatchCall, number: int
    ) -> tuple[DispatchOutput, LlRoute, Callable[[], None] | None]:
        """Queues a dispatch: what it returns, its routing, and the half that is left to launch.

        `number` is the host's, 0 in a capture that is known as one.
        """
        previous = call.previous
        ids, weights = call.topk_ids_TK, call.weights_TK
        weighted = weights is not None
        if previous is not None:
            assert isinstance(previous, LlRoute)
            ids = previous.ids()
            if weights is None and previous.weighted:
                weighted = True
                weights = previous.table("own_weights").view(torch.float32)
        assert ids is not None
        num_tokens, width = call.x_TW.shape
        tables = None
        which = 0  # of the words that the transfer's number is kept in
        named = (num_tokens, weighted, width, call.x_TW.dtype, call.quantize_to, previous is None)
        if call.buffers is not None:
            tables = call.buffers.tables
            assert isinstance(tables, BufferTables)
            a, output = tables.dispatch, call.buffers.output
            if not weighted and output.topk_weights is not None:
                output = without_weights(output)
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
                route.combine = tables.combine
                tables.routes[key] = route
        else:
            a, block = self.arguments, self._new_block(num_tokens)
            kept = torch.empty_like(ids)
            output = self._new_output(call, weighted)
            self._name_memory(a, block, kept, output)
            route = self._new_route(output, num_tokens, kept, block, weighted, which)
        route.number, route.epoch = number, self._restarts[0]
        if call.zero_padding and self._layout.padded:
            output.tokens.zero_()
            if output.scales is not None:
                output.scales.tensor.zero_()
        # Calls of several arenas must not hold SMs for their followers.
        flags = _ALONE if self._in_use[0] > 1 else 0
        if ids.dtype is torch.int64:
            flags |= _WIDE_IDS
        if weights is not None:
            flags |= _NEW_WEIGHTS
            a.weights = weights.data_ptr()
        a.subject = None if previous is None else previous.origin
        if previous is not None or a.communicator != self._number:
            a.communicator = said_by(self._number, of=previous)
        a.origin, a.ids = route.origin, ids.data_ptr()
        if tables is not None and tables.named == named and call.scales is None:
            a.x = call.x_TW.data_ptr()  # the rest is as it was the last time
        else:
            self._name_rows(a, call, output, weighted)
            if tables is not None:
                tables.named = named if call.scales is None else None
        after = None
        if output.source_tokens is not None:
            after = functools.partial(route.write_source_tokens, output.source_tokens)
        needs: tuple[object, ...] = ()
        if call.return_recv_hook:
            needs = (output, route, call.x_TW, call.scales, ids, weights)
        left = self._launch(
            _PLAIN if call.quantize_to is None else _QUANTIZED,
            a,
            flags,
            call.num_sms,
            halves=call.return_recv_hook,
            needs=needs,
            after=after,
            tables=route.block,
        )
        return output, route, left

    def refuse(self) -> None:
        """Lets the peers know that this rank will not make the dispatch that they make."""
        config, a = self._config, self.arguments
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=self._device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=self._device),
        )
        kept = torch.empty((0, config.topk), dtype=torch.int64, device=self._device)
        block = self._new_block(0)
        output = self._new_output(call, weighted=False)
        self._name_memory(a, block, kept, output)
        self._name_rows(a, call, output, weighted=False)
        a.signature, a.communicator = REFUSED, self._number
        a.subject, a.origin = None, block.data_ptr() + self.tables.at["origin"]
        flags = _WIDE_IDS | (_ALONE if self._in_use[0] > 1 else 0)
        self._launch(_PLAIN, a, flags, None, halves=False)

    def new_tables(self, output: DispatchOutput, *, combine: Arguments) -> BufferTables:
        """Memory of one routing at its largest; its dispatches go to the tensors of `output`.

        `combine` are arguments that are to name it as well; see `combine.name_tables`.
        """
        config = self._config
        tables = BufferTables(
            block=self._new_block(config.max_tokens_per_rank),
            ids=torch.empty(
                (config.max_tokens_per_rank, config.topk), dtype=torch.int64, device=self._device
            ),
            dispatch=self.arguments.copy(),
            combine=combine,
            routes={},
        )
        self._name_memory(tables.dispatch, tables.block, tables.ids, output)
        return tables

    def largest_output(self, kind: RowKind, tokens: Tensor | None = None) -> DispatchOutput:
        """Tensors of the largest shape for such rows, or for `tokens`."""
        return largest_output(
            self._config,
            kind,
            tokens=tokens,
            num_ranks=self._num_ranks,
            num_local=self._num_local,
            device=self._device,
        )

    # -- arguments --------------------------------------------------------------------------------

    def _name_rows(
        self, a: Arguments, call: DispatchCall, output: DispatchOutput, weighted: bool
    ) -> None:
        """What is sent, and what all ranks must say of it alike."""
        x = call.x_TW
        kind = _SCALE_KINDS[call.quantize_to]
        input_bytes = metadata.row_bytes(x)
        row_bytes = x.shape[1] if kind else input_bytes
        scale_bytes = 0
        a.scales = None
        if output.scales is not None:
            scales = output.scales.tensor
            a.scale_item = scales.element_size()
            scale_bytes = scales.shape[-1] * a.scale_item
            if call.scales is not None:
                a.scales = call.scales.data_ptr()
        operation = _DISPATCH if call.previous is None else _CACHED_DISPATCH
        a.x, a.input_bytes, a.num_tokens = x.data_ptr(), input_bytes, x.shape[0]
        a.scale_kind, a.row_bytes, a.scale_bytes = kind, row_bytes, scale_bytes
        a.topk_weights = None if output.topk_weights is None else output.topk_weights.data_ptr()
        a.operation = operation
        a.signature = signature(
            operation,
            row_bytes=row_bytes,
            weights=weighted,
            scale_kind=kind,
            scale_bytes=scale_bytes,
        )

    def _name_memory(
        self, a: Arguments, block: Tensor, ids: Tensor, output: DispatchOutput
    ) -> None:
        """Where the tables of the routing and the caller's tensors are."""
        base, at = block.data_ptr(), self.tables.at
        a.ids_copy, a.weights_copy = ids.data_ptr(), base + at["own_weights"]
        a.slots_of_token = base + at["slots"]
        a.rows_from, a.rows_to = base + at["rows_from"], base + at["rows_to"]
        a.first_row, a.first_slot = base + at["first_row"], base + at["first_slot"]
        a.tokens_per_expert = base + at["counts"]
        a.choices_of_row, a.weights_of_row = base + at["choices"], base + at["weights"]
        a.tokens_of_row = base + at["tokens"]
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

    # -- memory -----------------------------------------------------------------------------------

    def _table_layout(self, num_hosts: int) -> LlTableLayout:
        """Of the tables of a routing."""
        return LlTableLayout(self._config, num_ranks=self._num_ranks, num_local=self._num_local)

    def _new_route(
        self,
        output: DispatchOutput,
        num_tokens: int,
        ids: Tensor,
        block: Tensor,
        weighted: bool,
        which: int,
    ) -> LlRoute:
        return LlRoute(
            shape=tuple(output.tokens.shape[:-1]),
            num_tokens=num_tokens,
            ids_TK=ids,
            layout=self.tables,
            block=block,
            weights_block=None,
            weighted=weighted,
            counts=None,
            origin=block.data_ptr() + self.tables.at["origin"] + 4 * which,
            maker=self._number,
            ids_address=ids.data_ptr(),
            wide_ids=ids.dtype is torch.int64,
            restarts=self._restarts,
        )

    def _new_block(self, num_tokens: int) -> Tensor:
        """Memory for the tables of a routing."""
        words = self.tables.words(num_tokens)
        return torch.empty(words, dtype=torch.int32, device=self._device)

    def _new_output(self, call: DispatchCall, weighted: bool) -> DispatchOutput:
        """Tensors of the caller's own."""
        return self.largest_output(self._kind_of(call, weighted), call.output_buffer)

    def _kind_of(self, call: DispatchCall, weighted: bool) -> RowKind:
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
