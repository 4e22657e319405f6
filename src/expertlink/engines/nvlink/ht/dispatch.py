"""High-throughput dispatch of one rank: outputs, arguments, launches.

Knows addresses and nothing of process groups, so that several ranks can live in one process. The
host's time counts here: making a tensor takes as long as launching a kernel.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ht.arena import HtArena
from expertlink.engines.nvlink.ht.arguments import DISPATCH, Flag
from expertlink.engines.nvlink.ht.blocks import BlockShape, split_blocks
from expertlink.engines.nvlink.launch import KernelName, Launch, Launches, Run
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import Verdict
from expertlink.engines.nvlink.tables import ORIGINS, Route, TableLayout
from expertlink.engines.nvlink.watchdog import Mail, Watchdog
from expertlink.engines.outputs import (
    BufferSource,
    LazyOutput,
    MemorySource,
    OutputSizes,
    first_rows,
    in_scale_order,
)
from expertlink.engines.ranks import capacity, metadata
from expertlink.engines.ranks.agreement import refusal
from expertlink.engines.ranks.header import Operation
from expertlink.layouts import align
from expertlink.types import DispatchBuffers, DispatchLayout, DispatchOutput, QuantScales

# Plain numbers: the operators of enumerations take microseconds.
_UNCACHED = int(Flag.COUNT | Flag.SEND)
_CACHED = int(Flag.CACHED | Flag.SEND | Flag.PLACE)
_COUNT, _PLACE, _DISCARD = int(Flag.COUNT), int(Flag.PLACE), int(Flag.DISCARD)
_UNCOUNTED = int(Flag.UNCOUNTED)
_WIDE_IDS, _NEW_WEIGHTS = int(Flag.WIDE_IDS), int(Flag.NEW_WEIGHTS)
_DISPATCH, _CACHED_DISPATCH = int(Operation.DISPATCH), int(Operation.CACHED_DISPATCH)
_KERNEL = KernelName.DISPATCH
_DISCARDS = Launch(grid=1, block=32, shared_bytes=0, follows=True, local=True)


class Started(NamedTuple):
    """A dispatch that has been queued.

    Attributes:
        output: what the rank receives; None where the ranks do not agree or one has no room.
        route: its tables; None likewise.
        mail: what the host learned of an uncached dispatch, unless shapes are static.
    """

    output: DispatchOutput | None
    route: Route | None
    mail: Mail | None


@dataclass(eq=False)
class BufferTables:
    """What `DispatchBuffers` hold beside the outputs.

    Attributes:
        block: tables of one routing at its largest, and the ids behind them.
        weights: those of the tables.
    """

    block: Tensor
    weights: Tensor


@dataclass(eq=False)
class _Rows:
    """What a dispatch returns, before the host knows how many rows there are.

    Attributes:
        shape: leading dimensions.
        tokens: rows.
        scales: row-major scales of quantized rows, or None.
        source: makes the rest.
        own_tokens: `tokens` have memory that was made for this dispatch.
        own_scales: so have `scales`.
    """

    shape: tuple[int, ...]
    tokens: Tensor
    scales: Tensor | None
    source: MemorySource | BufferSource
    own_tokens: bool
    own_scales: bool

    def cut(self, rows: int) -> None:
        """Leaves the first rows of what was made larger."""
        self.shape = (rows,)
        self.source.cut(rows)
        self.tokens = first_rows(self.tokens, rows, own=self.own_tokens)
        if self.scales is not None:
            self.scales = first_rows(self.scales, rows, own=self.own_scales)


class DispatchLaunch(NamedTuple):
    """A launch, and what the kernel is told of it.

    Sending blocks, the warps' memory, masks of 32 tokens that are counted at once.
    """

    num_senders: int
    slot_bytes: int
    warp_bytes: int
    batch: int
    groups: int
    launch: Launch


@dataclass(frozen=True)
class DispatchPlanner:
    """Plans launches.

    Attributes:
        config: the communicator's.
        blocks: shape of the blocks.
        num_sms: multiprocessors of the GPU.
    """

    config: MoECommunicatorConfig
    blocks: BlockShape
    num_sms: int

    def most_blocks(self, num_sms: int | None) -> int:
        """Blocks of a launch that sends, at most, for a caller's number of SMs."""
        return min(self.num_sms, num_sms or self.config.num_sms_dispatch or self.blocks.default_sms)

    def __call__(
        self, row_bytes: int, num_sms: int | None, sends: bool, counts: int
    ) -> DispatchLaunch:
        """The launch for rows of a size and a caller's number of SMs.

        With `sends` it counts or not, and sends and places; else it places what the launch before
        it has sent.
        """
        config, blocks = self.config, self.blocks
        total = self.most_blocks(num_sms)
        share = tuning.HT_DISPATCH_SENDERS
        if config.layout.expanded:
            share = tuning.HT_DISPATCH_SENDERS_EXPANDED
        elif 2 * row_bytes <= RowShape.of(config).row:
            share = tuning.HT_DISPATCH_SENDERS_SHORT_ROWS
        senders, total = split_blocks(total, senders=share)
        if config.zero_copy:  # little is left to do for those who do not send
            senders = max(1, total - max(1, total // tuning.HT_ZERO_COPY_PLACERS))
        movers = blocks.dispatch(row_bytes)
        launch = Launch(
            grid=total if sends else max(1, total - senders),
            block=movers.threads,
            shared_bytes=blocks.shared_bytes(movers, counts=bool(counts)),
            follows=not sends,
            local=not sends,
        )
        return DispatchLaunch(
            num_senders=senders if sends else 0,
            slot_bytes=movers.slot_bytes,
            warp_bytes=movers.warp_bytes,
            batch=movers.batch,
            groups=blocks.groups(movers.warps),
            launch=launch,
        )


class HtDispatcher:
    """Queues the dispatches of one rank.

    Args:
        config: the communicator's.
        common: arguments that all calls share, by name.
        experts: global ids of this rank's experts.
        num_ranks: R.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        run: queues a kernel.
        blocks: shape of the blocks.
        num_sms: multiprocessors of the GPU.

    Attributes:
        most_blocks: of the planner.
        arguments: of all calls.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        common: dict[str, int],
        experts: tuple[int, ...],
        num_ranks: int,
        arena: HtArena,
        watchdog: Watchdog,
        run: Run,
        blocks: BlockShape,
        num_sms: int,
    ) -> None:
        self._config, self._arena = config, arena
        self._watchdog, self._run = watchdog, run
        self._num_ranks, self._num_local = num_ranks, len(experts)
        self._layout, self._device = config.layout, arena.device
        self._expanded, self._padded = self._layout.expanded, self._layout.padded
        self._topk, self._source_tokens = config.topk, config.source_tokens
        self._scales_at = RowShape.of(config).scales_at
        largest = capacity.largest_shape(config, num_ranks=num_ranks, num_local=self._num_local)
        self._limit, self._mails = math.prod(largest), not config.static_shapes
        # Leading dimensions of outputs that do not depend on the counts.
        self._fixed: tuple[int, ...] | None = None
        if self._padded:
            self._fixed = largest
        elif config.static_shapes or config.zero_copy:
            self._fixed = (self._limit,)
        room = capacity.announced(config, None)
        if room < 0 and config.static_shapes and not self._padded:
            room = self._limit
        self._room = room  # where the caller has made no output
        self._tables = TableLayout(config, num_ranks=self._num_ranks, num_local=self._num_local)
        self._named: tuple[int, TableLayout] | None = None  # tables that the arguments name
        self._counted = sum(self._tables.public)
        is_flat = self._layout is DispatchLayout.FLAT
        self._sizes = OutputSizes(self._num_local, num_ranks, config.topk, is_flat)
        planner = DispatchPlanner(config, blocks, num_sms)
        self.most_blocks, self._launches = planner.most_blocks, Launches(planner)
        # Where every row of an output is some token's, the kernel writes all source tokens.
        self._gapless = self._mails and not self._padded and config.expert_alignment == 1
        # Rows that recent calls needed, and the leading dimensions that the next one is given.
        self._needed: collections.deque[int] = collections.deque(maxlen=tuning.HT_CALLS_REMEMBERED)
        self._expected: tuple[int, ...] | None = None
        self._number, self._max_tokens = common["communicator"], config.max_tokens_per_rank
        self._zero_copy = config.zero_copy
        self._experts = torch.tensor(experts or (0,), dtype=torch.int32, device=self._device)
        columns = self._num_ranks + config.num_experts
        self._histogram = torch.empty(num_sms * columns, dtype=torch.int32, device=self._device)
        self._ordinals = torch.empty(
            config.max_tokens_per_rank * config.topk, dtype=torch.int32, device=self._device
        )
        self._faulty = torch.zeros(1, dtype=torch.int32, device=self._device)
        self.arguments = DISPATCH.new(
            **common,
            experts=self._experts.data_ptr(),
            num_local=self._num_local,
            histogram=self._histogram.data_ptr(),
            ordinals=self._ordinals.data_ptr(),
            faulty=self._faulty.data_ptr(),
        )

    # -- calls ------------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall, *, number: int) -> Started:
        """Queues a dispatch with a new routing; waits for the counts unless shapes are static.

        `number` is the host's, 0 in a capture.
        """
        ids_TK, buffers = call.topk_ids_TK, call.buffers
        assert ids_TK is not None
        a, tables, num_tokens = self.arguments, self._tables, call.x_TW.shape[0]
        weighted = call.weights_TK is not None
        wide, flags = False, _UNCACHED
        if ids_TK.dtype is torch.int64:
            wide, flags = True, _UNCACHED | _WIDE_IDS
        shape = self._expected_shape(call)
        counts_at = rows_at = 0
        if buffers is None:
            # One piece of memory: tables, ids, the caller's counts, source tokens of the rows.
            ids_at = tables.ids_at(num_tokens)
            counts_at = ids_at // 4 + (num_tokens * self._topk << wide)
            rows_at = align(counts_at + self._counted, 4)
            block = self._new_words(rows_at + self._source_words(shape))
            base = block.data_ptr()
            origin = base + tables.at["origin"]
            self._name_counts(base + 4 * counts_at)
        else:
            block = _tables_of(buffers).block
            base, ids_at = block.data_ptr(), tables.ids_at(tables.max_tokens)
            origin = base + _origin_of(buffers, tables)
            self._name_counts_of(buffers)
        if self._named != (base, tables):
            self._name_tables(base, tables)
        a.own_tokens = tables.own_tokens(base, num_tokens)
        a.weights_of_row = base + tables.at["weights"] if weighted else None
        a.ids, a.ids_copy = ids_TK.data_ptr(), base + ids_at
        a.capacity = self._announced(call)
        pool_at = self._write(call, _DISPATCH, flags, number == 0, None, 0, origin)
        rows = None
        if shape is not None:
            a.flags |= _PLACE
            rows = self._make_rows(call, shape, weighted, pool_at, block, counts_at, block, rows_at)
        before = self._watchdog.mail_number
        self._launch(call, sends=True)
        mail = counts = None
        if self._mails:
            mail = self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)
            if mail.verdict is not Verdict.FINE:
                self._discard()
                return Started(None, None, mail)
            counts = mail.counts
            if not self._padded:
                needed = mail.slots if self._expanded else mail.arrivals
                self._remember(needed)
                if rows is None or rows.shape[0] < needed:
                    shape = (needed,)
                    try:
                        words = self._source_words(shape)
                        more = self._new_words(words) if words else block
                        rows = self._make_rows(
                            call, shape, weighted, pool_at, block, counts_at, more, 0
                        )
                    except RuntimeError:  # no memory: the peers must not wait for this rank
                        self._discard()
                        raise
                    a.flags = _PLACE | a.flags & (_WIDE_IDS | _NEW_WEIGHTS)
                    self._launch(call, sends=False)
                rows.cut(needed)
        assert rows is not None
        route = Route(  # by position: names take twice as long
            rows.shape,
            num_tokens,
            None,
            tables,
            block,
            None,
            weighted,
            counts,
            origin,
            None,
            number,
            self._number,
            {},
            base + ids_at,
            wide,
        )
        return Started(self._output(call, rows, weighted, counts), route, mail)

    def dispatch_cached(self, call: DispatchCall, old: Route, *, number: int) -> Started:
        """Queues a dispatch with the routing of an earlier one."""
        a, buffers, new_weights = self.arguments, call.buffers, call.weights_TK is not None
        weights_block, weighted = old.weights_block, old.weighted or new_weights
        rows_at = 0
        if buffers is None:
            # One piece: the caller's counts, the transfer's number, source tokens.
            rows_at = align(self._counted + 1, 4)
            memory = self._new_words(rows_at + self._source_words(old.shape))
            base = memory.data_ptr()
            origin = base + 4 * self._counted
            self._name_counts(base)
            if new_weights:
                table = (self._tables.rows, self._topk)
                weights_block = torch.empty(table, dtype=torch.float32, device=self._device)
        else:
            own = _tables_of(buffers)
            memory = own.block
            origin = memory.data_ptr() + _origin_of(buffers, self._tables)
            self._name_counts_of(buffers)
            if new_weights:
                weights_block = own.weights
        route = Route(
            old.shape,
            old.num_tokens,
            old.ids_TK,
            old.layout,
            old.block,
            weights_block,
            weighted,
            old.counts,
            origin,
            memory,
            number,
            self._number,
            old.other_slots,
            old.ids_address,
            old.wide_ids,
        )
        base = old.block.data_ptr()
        if self._named != (base, old.layout):
            self._name_tables(base, old.layout)
        slots = old.slots_for(self._max_tokens)  # kept until the launch
        if slots is not None:
            self._named = None
            a.slots_of_token = slots.data_ptr()
        a.own_tokens = old.layout.own_tokens(base, old.num_tokens)
        a.weights_of_row = route.weights_address()
        flags = _CACHED if call.counted else _CACHED | _UNCOUNTED
        pool_at = self._write(
            call, _CACHED_DISPATCH, flags, number == 0, old.origin, old.maker, origin
        )
        rows = self._make_rows(call, old.shape, weighted, pool_at, memory, 0, memory, rows_at)
        self._launch(call, sends=True)
        if not self._padded:
            rows.cut(old.shape[0])
        return Started(self._output(call, rows, weighted, old.counts), route, None)

    def refuse(self, error: Exception, *, number: int) -> Mail | None:
        """Takes part in a dispatch only to say that this rank refuses it."""
        config, a, tables = self._config, self.arguments, self._tables
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=self._device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=self._device),
        )
        a.status, a.capacity = refusal(error)
        counts_at = tables.words(0)
        block = self._new_words(counts_at + self._counted)
        base = block.data_ptr()
        self._name_tables(base, tables)
        self._name_counts(base + 4 * counts_at)
        a.own_tokens = tables.own_tokens(base, 0)
        origin = base + tables.at["origin"]
        self._write(call, _DISPATCH, _UNCACHED | _WIDE_IDS, number == 0, None, 0, origin)
        before = self._watchdog.mail_number
        try:
            self._launch(call, sends=True)
        finally:
            a.status = 0
        mail = None
        if self._mails:
            mail = self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)
        self._discard()
        return mail

    def new_tables(self) -> BufferTables:
        """Memory of one routing at its largest, for buffers."""
        tables, most = self._tables, self._tables.max_tokens
        block = self._new_words(tables.ids_at(most) // 4 + 2 * most * self._topk)
        return BufferTables(block, tables.view(block, "weights").view(torch.float32))

    # -- parts of them ----------------------------------------------------------------------------

    def _new_words(self, words: int) -> Tensor:
        """Memory of int32 words."""
        return torch.empty(words, dtype=torch.int32, device=self._device)

    def _source_words(self, shape: tuple[int, ...] | None) -> int:
        """Words of the source tokens of an output, where the kernel writes all of them."""
        if shape is None or not self._gapless or not self._source_tokens:
            return 0
        return math.prod(shape)

    def _announced(self, call: DispatchCall) -> int:
        """Rows that this rank has room for, or UNBOUNDED."""
        if call.buffers is not None and not self._padded:
            return self._limit
        if call.output_buffer is None:
            return self._room
        return capacity.announced(self._config, call.output_buffer)

    def _name_tables(self, base: int, tables: TableLayout) -> None:
        """Tells the kernel where the tables of a routing are. Structs are used again: a new one
        takes 8 µs."""
        a, at = self.arguments, tables.at
        a.slots_of_token = base + at["slots"]
        a.rows_from, a.rows_to = base + at["rows_from"], base + at["rows_to"]
        a.first_row = base + at["first_row"]
        a.first_sent = base + at["first_sent"]
        a.first_slot = base + at["first_slot"]
        a.tokens_per_expert = base + at["counts"]
        a.expert_offsets = base + at["offsets"]
        a.choices_of_row = base + at["choices"]
        self._named = (base, tables)

    def _name_counts(self, address: int) -> None:
        """Tells the kernel where the caller's counts are: one after the other."""
        a = self.arguments
        a.counts_out = address
        a.offsets_out = address + 4 * self._num_local
        a.rows_from_out = address + 4 * (2 * self._num_local + 1)

    def _name_counts_of(self, buffers: DispatchBuffers) -> None:
        per_rank = buffers.output.num_tokens_per_rank
        assert per_rank is not None
        # The last of them: without local experts the others have no address.
        self._name_counts(per_rank.data_ptr() - 4 * (2 * self._num_local + 1))

    def _write(
        self,
        call: DispatchCall,
        operation: int,
        flags: int,
        capturing: bool,
        subject: int | None,
        maker: int,
        origin: int,
    ) -> int:
        """Tells the kernel what is sent; returns where the pool of a zero-copy dispatch is."""
        a, x = self.arguments, call.x_TW
        scales, weights = call.scales, call.weights_TK
        scale_bytes = metadata_bytes = header_bytes = 0
        if operation == _DISPATCH or weights is not None or self._source_tokens:
            metadata_bytes = self._scales_at
        if weights is not None:
            flags |= _NEW_WEIGHTS
            a.weights = weights.data_ptr()
            header_bytes = 4 * self._topk
        if scales is not None:
            scale_bytes = metadata.row_bytes(scales)
            metadata_bytes = self._scales_at + align(scale_bytes, 16)
            header_bytes += scale_bytes
            a.scales = scales.data_ptr()
        num_tokens, width = x.shape
        a.operation, a.flags, a.origin = operation, flags, origin
        a.subject, a.maker = subject, maker
        a.num_tokens, a.x = num_tokens, x.data_ptr()
        a.row_bytes, a.scale_bytes = width * x.element_size(), scale_bytes
        a.metadata_bytes, a.header_metadata_bytes = metadata_bytes, header_bytes
        if not self._zero_copy:
            return 0
        a.pool, pool_at = self._arena.next_pool(capturing=capturing)
        return pool_at

    def _expected_shape(self, call: DispatchCall) -> tuple[int, ...] | None:
        """Leading dimensions of a `tokens` that rows can go to before they are counted, or None.

        Where the host will learn their number it is made as large as recent calls suggest. Should
        more rows arrive, the kernel leaves placing them to a second launch.
        """
        if self._padded:
            return self._fixed
        if call.buffers is not None:
            return (self._limit,)
        if call.output_buffer is not None:
            return (call.output_buffer.shape[0],)
        if self._fixed is not None:
            return self._fixed
        return self._expected

    def _remember(self, needed: int) -> None:
        """Learns how many rows a call needed."""
        self._needed.append(needed)
        most = max(self._needed)
        most += most // tuning.HT_OUTPUT_SLACK
        self._expected = (min(most, self._limit),) if most else None

    def _make_rows(
        self,
        call: DispatchCall,
        shape: tuple[int, ...],
        weighted: bool,
        pool_at: int,
        memory: Tensor,
        counts_at: int,
        rows_memory: Tensor,
        rows_at: int,
    ) -> _Rows:
        """Allocates what a dispatch of a leading shape returns, and tells the kernel.

        Counts start at a word of `memory`, source tokens at one of `rows_memory`, unless all of
        that is in buffers.
        """
        a, x, buffers, count = self.arguments, call.x_TW, call.buffers, math.prod(shape)
        scales, own_tokens, own_scales = None, False, False
        if buffers is not None:
            largest = buffers.output
            tokens = largest.tokens
            if largest.source_tokens is not None:
                if not self._gapless:
                    largest.source_tokens.fill_(-1)
                a.source_tokens = largest.source_tokens.data_ptr()
            if largest.scales is not None and self._config.scale_order == "row_major":
                scales = largest.scales.tensor
            if largest.topk_ids is not None:
                a.topk_ids = largest.topk_ids.data_ptr()
                weights = largest.topk_weights if weighted else None
                a.topk_weights = None if weights is None else weights.data_ptr()
            source = BufferSource(largest, weighted, shape)
        else:
            if call.output_buffer is not None:
                tokens = call.output_buffer
            elif self._zero_copy:
                full = (*shape, x.shape[1])
                nbytes = math.prod(full) * x.element_size()
                pool = self._arena.local[pool_at : pool_at + nbytes]
                tokens = pool.view(x.dtype).view(full)
            else:
                tokens, own_tokens = x.new_empty((*shape, x.shape[1])), True
            ids = weights = sources = None
            if not self._expanded:
                # Of their own: callers free what they have used, and tables must outlive that.
                choices = (*shape, self._topk)
                ids = x.new_empty(choices, dtype=torch.int64)
                a.topk_ids, a.topk_weights = ids.data_ptr(), None
                if weighted:
                    weights = x.new_empty(choices, dtype=torch.float32)
                    a.topk_weights = weights.data_ptr()
            sources_at = -1
            if self._source_tokens:
                if self._gapless:
                    sources_at = rows_at
                    a.source_tokens = rows_memory.data_ptr() + 4 * rows_at
                else:
                    sources = torch.full(shape, -1, dtype=torch.int32, device=self._device)
                    a.source_tokens = sources.data_ptr()
            source = MemorySource(
                self._sizes,
                memory,
                counts_at,
                ids,
                weights,
                sources,
                rows_memory,
                sources_at,
                shape,
            )
        if call.scales is not None:
            if scales is None:
                columns = call.scales.shape[1]
                scales, own_scales = call.scales.new_empty((*shape, columns)), True
            a.scales_out = scales.data_ptr()
        a.tokens, a.max_slots = tokens.data_ptr(), count
        if call.zero_padding and self._padded:
            tokens.zero_()
            if scales is not None:
                scales.zero_()
        return _Rows(shape, tokens, scales, source, own_tokens, own_scales)

    def _output(
        self, call: DispatchCall, rows: _Rows, weighted: bool, counts: list[int] | None
    ) -> DispatchOutput:
        """What the caller gets; `counts` of experts, where the host knows them."""
        scales, buffers = None, call.buffers
        if rows.scales is not None and call.scales is not None:
            tensor = rows.scales
            if self._config.scale_order == "column_major":
                if buffers is None:
                    tensor = in_scale_order(self._config, tensor)
                else:
                    assert buffers.output.scales is not None
                    tensor = buffers.output.scales.tensor[: rows.shape[0]].copy_(tensor)
            scales = QuantScales(tensor, call.scale_format)
        per_expert = None if counts is None else list(counts)
        return LazyOutput.of(rows.source, self._layout, rows.tokens, scales, per_expert)

    def _launch(self, call: DispatchCall, *, sends: bool) -> None:
        """Queues one kernel; without `sends` it places what the one before it has sent."""
        a = self.arguments
        plan = self._launches[a.row_bytes, call.num_sms, sends, a.flags & _COUNT]
        a.num_senders, a.slot_bytes, a.warp_bytes, a.batch, a.groups, launch = plan
        self._run(_KERNEL, a, launch)

    def _discard(self) -> None:
        """Lets the peers go on after a dispatch that does not happen."""
        a = self.arguments
        a.flags, a.num_senders = _DISCARD, 0
        self._run(_KERNEL, a, _DISCARDS)


def _tables_of(buffers: DispatchBuffers) -> BufferTables:
    assert isinstance(buffers.tables, BufferTables)
    return buffers.tables


def _origin_of(buffers: DispatchBuffers, tables: TableLayout) -> int:
    """Bytes to the number of a transfer: a cached dispatch may read that of the one before."""
    return tables.at["origin"] + 4 * (buffers.generation % ORIGINS)
