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
from expertlink.engines.nvlink.tables import Route, TableLayout
from expertlink.engines.nvlink.watchdog import Mail, Watchdog
from expertlink.engines.outputs import OutputTensors, PublicCounts
from expertlink.engines.ranks import capacity, metadata
from expertlink.engines.ranks.agreement import refusal
from expertlink.engines.ranks.header import Operation
from expertlink.layouts import align
from expertlink.types import DispatchLayout, DispatchOutput

# Plain numbers: the operators of enumerations take microseconds.
_UNCACHED = int(Flag.COUNT | Flag.SEND)
_CACHED = int(Flag.CACHED | Flag.SEND | Flag.PLACE)
_COUNT, _PLACE, _DISCARD = int(Flag.COUNT), int(Flag.PLACE), int(Flag.DISCARD)
_WIDE_IDS, _NEW_WEIGHTS = int(Flag.WIDE_IDS), int(Flag.NEW_WEIGHTS)
_DISPATCH, _CACHED_DISPATCH = int(Operation.DISPATCH), int(Operation.CACHED_DISPATCH)
_KERNEL = KernelName.DISPATCH
_DISCARDS = Launch(grid=1, block=32, shared_bytes=0, follows=True, local=True)


@dataclass(frozen=True)
class Started:
    """A dispatch that has been queued.

    Attributes:
        output: what the rank receives; None where the ranks do not agree or one has no room.
        route: its tables; None likewise.
        mail: what the host learned of an uncached dispatch, unless shapes are static.
    """

    output: DispatchOutput | None
    route: Route | None
    mail: Mail | None


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
        self._shape = RowShape.of(config)
        self._limit = math.prod(
            capacity.largest_shape(config, num_ranks=self._num_ranks, num_local=self._num_local)
        )
        self._tables = TableLayout(config, num_ranks=self._num_ranks, num_local=self._num_local)
        planner = DispatchPlanner(config, blocks, num_sms)
        self.most_blocks, self._launches = planner.most_blocks, Launches(planner)
        # Rows that recent calls needed.
        self._needed: collections.deque[int] = collections.deque(maxlen=tuning.HT_CALLS_REMEMBERED)
        self._number, self._max_tokens = common["communicator"], config.max_tokens_per_rank
        self._mails, self._zero_copy = not config.static_shapes, config.zero_copy
        self._experts = torch.tensor(experts or (0,), dtype=torch.int32, device=self._device)
        columns = self._num_ranks + config.num_experts
        self._histogram = torch.empty(num_sms * columns, dtype=torch.int32, device=self._device)
        self._ordinals = torch.empty(
            config.max_tokens_per_rank * config.topk, dtype=torch.int32, device=self._device
        )
        self._faulty = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._arguments = DISPATCH.new(
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
        ids_TK = call.topk_ids_TK
        assert ids_TK is not None
        a, tables = self._arguments, self._tables
        num_tokens = call.x_TW.shape[0]
        weighted = call.weights_TK is not None
        block = self._new_block(num_tokens)
        base = block.data_ptr()
        kept_ids_TK = torch.empty_like(ids_TK)
        public = self._new_counts()
        origin = base + tables.at["origin"]
        a.weights_of_row = base + tables.at["weights"] if weighted else None
        a.ids, a.ids_copy = ids_TK.data_ptr(), kept_ids_TK.data_ptr()
        pool_at = self._write(
            call,
            _DISPATCH,
            _UNCACHED,
            capturing=number == 0,
            block=base,
            tables=tables,
            public=public,
            subject=None,
            maker=0,
            origin=origin,
            room=self._announced(call),
        )
        tensors = None
        shape = self._expected_shape(call)
        if shape is not None:
            a.flags |= _PLACE
            tensors = self._make_output(call, shape, weighted, pool_at)
        before = self._watchdog.mail_number
        self._launch(call, sends=True)
        mail = counts = None
        if self._mails:
            mail = self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)
            if mail.verdict is not Verdict.FINE:
                self._discard()
                return Started(None, None, mail)
            counts = mail.counts
            if not self._layout.padded:
                rows = mail.slots if self._layout.expanded else mail.arrivals
                self._needed.append(rows)
                if tensors is None or tensors.shape[0] < rows:
                    try:
                        tensors = self._make_output(call, (rows,), weighted, pool_at)
                    except RuntimeError:  # no memory: the peers must not wait for this rank
                        self._discard()
                        raise
                    a.flags = _PLACE | a.flags & (_WIDE_IDS | _NEW_WEIGHTS)
                    self._launch(call, sends=False)
                tensors.cut(rows)
        assert tensors is not None
        route = Route(
            shape=tensors.shape,
            num_tokens=num_tokens,
            ids_TK=kept_ids_TK,
            layout=tables,
            block=block,
            weights_block=None,
            weighted=weighted,
            counts=counts,
            origin=origin,
            number=number,
            maker=self._number,
        )
        return Started(tensors.output(self._layout, public, counts), route, mail)

    def dispatch_cached(self, call: DispatchCall, old: Route, *, number: int) -> Started:
        """Queues a dispatch with the routing of an earlier one."""
        tables = self._tables
        public = self._new_counts(old.block)
        weights_block = old.weights_block
        if call.weights_TK is not None:
            weights_block = torch.empty(
                (tables.rows, tables.topk), dtype=torch.float32, device=self._device
            )
        route = Route(
            shape=old.shape,
            num_tokens=old.num_tokens,
            ids_TK=old.ids_TK,
            layout=old.layout,
            block=old.block,
            weights_block=weights_block,
            weighted=old.weighted or call.weights_TK is not None,
            counts=old.counts,
            origin=public.memory.data_ptr() + 4 * sum(tables.public),
            keeps=public.memory,
            number=number,
            maker=self._number,
            other_slots=old.other_slots,
        )
        slots = old.slots_for(self._max_tokens)  # kept until the launch
        self._arguments.weights_of_row = route.weights_address()
        pool_at = self._write(
            call,
            _CACHED_DISPATCH,
            _CACHED,
            capturing=number == 0,
            block=old.block.data_ptr(),
            tables=old.layout,
            public=public,
            subject=old.origin,
            maker=old.maker,
            origin=route.origin,
        )
        if slots is not None:
            self._arguments.slots_of_token = slots.data_ptr()
        tensors = self._make_output(call, old.shape, route.weighted, pool_at)
        self._launch(call, sends=True)
        if not self._layout.padded:
            tensors.cut(old.shape[0])
        return Started(tensors.output(self._layout, public, old.counts), route, None)

    def refuse(self, error: Exception, *, number: int) -> Mail | None:
        """Takes part in a dispatch only to say that this rank refuses it."""
        config, a = self._config, self._arguments
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=self._device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=self._device),
        )
        status, room = refusal(error)
        block = self._new_block(0)
        public = self._new_counts()
        self._write(
            call,
            _DISPATCH,
            _UNCACHED,
            capturing=number == 0,
            block=block.data_ptr(),
            tables=self._tables,
            public=public,
            subject=None,
            maker=0,
            origin=block.data_ptr() + self._tables.at["origin"],
            room=room,
        )
        a.status = status
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

    # -- parts of them ----------------------------------------------------------------------------

    def _new_block(self, num_tokens: int) -> Tensor:
        """Memory for the tables of a routing."""
        words = self._tables.words(num_tokens)
        return torch.empty(words, dtype=torch.int32, device=self._device)

    def _new_counts(self, block: Tensor | None = None) -> PublicCounts:
        """The caller's own counts, or copies of a block's, with a word behind them."""
        sizes = [*self._tables.public, 1]
        total = sum(sizes)
        if block is None:
            memory = torch.empty(total, dtype=torch.int32, device=self._device)
        else:
            memory = block[:total].clone()
        return PublicCounts.within(memory, sizes)

    def _announced(self, call: DispatchCall) -> int:
        """Rows that this rank has room for, or UNBOUNDED."""
        room = capacity.announced(self._config, call.output_buffer)
        if room < 0 and self._config.static_shapes and not self._layout.padded:
            return self._limit
        return room

    def _write(
        self,
        call: DispatchCall,
        operation: int,
        flags: int,
        *,
        capturing: bool,
        block: int,
        tables: TableLayout,
        public: PublicCounts,
        subject: int | None,
        maker: int,
        origin: int,
        room: int | None = None,
    ) -> int:
        """Tells the kernel what is sent, and where tables and counts are; not the output.

        The struct is used again: a new one takes 8 µs. Returns where the pool of a zero-copy
        dispatch is.
        """
        a, x = self._arguments, call.x_TW
        scales, weights = call.scales, call.weights_TK
        if weights is not None:
            flags |= _NEW_WEIGHTS
            a.weights = weights.data_ptr()
        if call.topk_ids_TK is not None and call.topk_ids_TK.dtype is torch.int64:
            flags |= _WIDE_IDS
        scale_bytes = metadata_bytes = 0
        if operation == _DISPATCH or weights is not None or self._config.source_tokens:
            metadata_bytes = self._shape.scales_at
        if scales is not None:
            scale_bytes = metadata.row_bytes(scales)
            metadata_bytes = self._shape.scales_at + align(scale_bytes, 16)
            a.scales = scales.data_ptr()
        a.operation, a.flags, a.origin = operation, flags, origin
        a.subject, a.maker = subject, maker
        a.num_tokens, a.x = x.shape[0], x.data_ptr()
        a.row_bytes, a.scale_bytes = metadata.row_bytes(x), scale_bytes
        a.metadata_bytes = metadata_bytes
        a.header_metadata_bytes = scale_bytes + (0 if weights is None else 4 * tables.topk)
        if room is not None:
            a.capacity = room
        at = tables.at
        a.slots_of_token = block + at["slots"]
        a.own_tokens = tables.own_tokens(block, x.shape[0])
        a.rows_from = block + at["rows_from"]
        a.first_row = block + at["first_row"]
        a.first_sent = block + at["first_sent"]
        a.first_slot = block + at["first_slot"]
        a.tokens_per_expert = block + at["counts"]
        a.expert_offsets = block + at["offsets"]
        a.choices_of_row = block + at["choices"]
        counts, offsets, _ = tables.public
        address = public.memory.data_ptr()
        a.counts_out, a.offsets_out = address, address + 4 * counts
        a.rows_from_out = address + 4 * (counts + offsets)
        if not self._zero_copy:
            return 0
        a.pool, pool_at = self._arena.next_pool(capturing=capturing)
        return pool_at

    def _expected_shape(self, call: DispatchCall) -> tuple[int, ...] | None:
        """Leading dimensions of a `tokens` that rows can go to before they are counted, or None.

        Where the host will learn their number it is made as large as recent calls suggest. Should
        more rows arrive, the kernel leaves placing them to a second launch.
        """
        config, ranks = self._config, self._num_ranks
        if self._layout is DispatchLayout.RANK_MAJOR:
            return (ranks, config.max_tokens_per_rank)
        if self._layout is DispatchLayout.EXPERT_MAJOR:
            return (self._num_local, self._tables.rows)
        if call.output_buffer is not None:
            return (call.output_buffer.shape[0],)
        if config.static_shapes or config.zero_copy:
            return (self._limit,)
        most = max(self._needed, default=0)
        return (min(most + most // tuning.HT_OUTPUT_SLACK, self._limit),) if most else None

    def _make_output(
        self, call: DispatchCall, shape: tuple[int, ...], weighted: bool, pool_at: int
    ) -> OutputTensors:
        """Allocates what a dispatch of a leading shape returns, and tells the kernel."""
        a, x, scales = self._arguments, call.x_TW, call.scales
        full = (*shape, x.shape[1])
        if self._zero_copy:
            nbytes = math.prod(full) * x.element_size()
            pool = self._arena.local[pool_at : pool_at + nbytes]
            tokens = pool.view(x.dtype).view(full)
        elif call.output_buffer is not None:
            tokens = call.output_buffer
        else:
            tokens = x.new_empty(full)
        tensors = OutputTensors.around(
            self._config,
            tokens,
            shape=shape,
            scale_dtype=None if scales is None else scales.dtype,
            scale_columns=0 if scales is None else scales.shape[1],
            scale_format=call.scale_format,
            weighted=weighted,
            row_major=True,
        )
        a.tokens, a.max_slots = tokens.data_ptr(), math.prod(shape)
        if tensors.scales is not None:
            a.scales_out = tensors.scales.data_ptr()
        if tensors.ids is not None:
            a.topk_ids = tensors.ids.data_ptr()
            a.topk_weights = None if tensors.weights is None else tensors.weights.data_ptr()
        if tensors.source_tokens is not None:
            a.source_tokens = tensors.source_tokens.data_ptr()
        if call.zero_padding and self._layout.padded:
            tensors.zero_rows()
        return tensors

    def _launch(self, call: DispatchCall, *, sends: bool) -> None:
        """Queues one kernel; without `sends` it places what the one before it has sent."""
        a = self._arguments
        key = (a.row_bytes, call.num_sms, sends, a.flags & _COUNT)
        plan = self._launches[key]
        a.num_senders, a.slot_bytes, a.warp_bytes, a.batch, a.groups, launch = plan
        self._run(_KERNEL, a, launch)

    def _discard(self) -> None:
        """Lets the peers go on after a dispatch that does not happen."""
        a = self._arguments
        a.flags, a.num_senders = _DISCARD, 0
        self._run(_KERNEL, a, _DISCARDS)
