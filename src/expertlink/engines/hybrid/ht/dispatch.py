"""High-throughput dispatch across hosts of one rank: chunks, messages, arguments, launches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.hybrid.ht.arguments import DISPATCH
from expertlink.engines.hybrid.ht.chunks import (
    Rows,
    exchange,
    full_message,
    tell_chunk,
    tell_tables,
)
from expertlink.engines.hybrid.ht.launch import ChunkLaunches, HybridDispatchPlanner
from expertlink.engines.hybrid.ht.messages import Messages
from expertlink.engines.hybrid.ht.order import Step, dispatch_steps
from expertlink.engines.hybrid.ht.plan import (
    RING,
    HybridPlan,
    RailRow,
    head_rows,
)
from expertlink.engines.hybrid.ht.tables import HybridRoute, HybridTables, as_hybrid_route
from expertlink.engines.nvlink.ht.arguments import Flag
from expertlink.engines.nvlink.ht.blocks import BlockShape
from expertlink.engines.nvlink.ht.dispatch import Started
from expertlink.engines.nvlink.ht.launch import DispatchPlanner
from expertlink.engines.nvlink.launch import KernelName, Launch, Launches, Run
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import HEADER_WORDS, Verdict
from expertlink.engines.nvlink.tables import Route
from expertlink.engines.nvlink.watchdog import Mail, Watchdog
from expertlink.engines.outputs import OutputTensors, PublicCounts
from expertlink.engines.ranks import capacity, metadata
from expertlink.engines.ranks.agreement import refusal
from expertlink.engines.ranks.header import Operation
from expertlink.layouts import align
from expertlink.types import DispatchLayout

_MOVES, _WITHIN_HOST = int(Flag.SEND | Flag.PLACE), int(Flag.WITHIN_HOST)
_CLEAR = int(Flag.CLEAR)


class HybridDispatcher:
    """Queues the dispatches of one rank.

    Args:
        config: the communicator's.
        common: arguments that all calls share, by name.
        experts: global ids of this rank's experts.
        messages: what the rail carries.
        device: this rank's GPU.
        watchdog: host memory that the kernels write.
        run: queues a kernel.
        blocks: shape of the blocks.
        num_sms: multiprocessors of the GPU.

    Attributes:
        most_blocks: of the planner.
        arguments: of all calls.
        dispatches_queued: as `HybridMode.dispatches_queued`.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        common: dict[str, int],
        experts: tuple[int, ...],
        messages: Messages,
        device: torch.device,
        watchdog: Watchdog,
        run: Run,
        blocks: BlockShape,
        num_sms: int,
    ) -> None:
        plan = messages.plan
        self._config, self._messages, self._plan = config, messages, plan
        self._watchdog, self._run = watchdog, run
        self._num_local, self._layout = len(experts), config.layout
        self._device, self._number = device, common["communicator"]
        self._host = common["seat"] // plan.num_peers
        self._shape = RowShape.of(config)
        self._limit = math.prod(
            capacity.largest_shape(config, num_ranks=plan.num_ranks, num_local=self._num_local)
        )
        self._tables = HybridTables(config, plan, num_local=self._num_local)
        inside = DispatchPlanner(config, blocks, num_sms)
        self.most_blocks = inside.most_blocks
        self._launches: Launches[ChunkLaunches] = Launches(
            HybridDispatchPlanner(inside, plan.num_peers)
        )
        self._mails = not config.static_shapes
        self._positions = 4 * min(config.topk, plan.num_peers)
        self._memory = _Scratch.of(config, plan, experts, num_sms=num_sms, device=self._device)
        self.arguments = DISPATCH.new(**common, **self._memory.arguments())
        self.dispatches_queued = 0

    # -- calls ------------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall, *, number: int) -> Started:
        """Queues a dispatch with a new routing; waits for the counts unless shapes are static.

        `number` is the host's, 0 in a capture.
        """
        ids_TK = call.topk_ids_TK
        assert ids_TK is not None
        a, tables = self.arguments, self._tables
        num_tokens, weighted = call.x_TW.shape[0], call.weights_TK is not None
        block = self._new_words(tables.words(num_tokens))
        kept_ids_TK = torch.empty_like(ids_TK)
        public = self._new_counts()
        a.ids, a.ids_copy = ids_TK.data_ptr(), kept_ids_TK.data_ptr()
        a.weights_of_row = block.data_ptr() + tables.at["weights"] if weighted else None
        a.capacity = self._announced(call)
        origin = block.data_ptr() + tables.at["origin"]
        self._write(call, Operation.DISPATCH, Flag(0), block, tables, public, None, 0, origin)
        mail = self._count(call, number)
        if mail is not None and mail.verdict is not Verdict.FINE:
            return Started(None, None, mail)
        counts = rows = None
        shape = (self._limit,)
        if mail is not None:
            counts, rows = mail.counts, self._rows_of(mail)
            for chunk in self._first_chunks(rows)[1:]:  # at once: the rail waits for the host
                self._exchange(call, chunk, rows)
            shape = (mail.slots if self._layout.expanded else mail.arrivals,)
        if self._layout.padded:
            shape = self._padded_shape()
        elif mail is None and call.output_buffer is not None:
            shape = (call.output_buffer.shape[0],)
        try:
            tensors = self._make_output(call, shape, weighted)
        except Exception:  # no memory, say: the peers must not wait for this rank
            self._discard(call, rows)
            raise
        route = HybridRoute(
            shape=shape,
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
            rows=rows,
        )
        self._move(call, rows, filled=RING)
        return Started(tensors.output(self._layout, public, counts), route, mail)

    def dispatch_cached(self, call: DispatchCall, old: Route, *, number: int) -> Started:
        """Queues a dispatch with the routing of an earlier one."""
        tables, old = self._tables, as_hybrid_route(old)
        public = self._new_counts(old.block)
        weights_block = old.weights_block
        if call.weights_TK is not None:
            table = (tables.rows, tables.topk)
            weights_block = torch.empty(table, dtype=torch.float32, device=self._device)
        route = HybridRoute(
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
            rows=old.rows,
        )
        self.arguments.weights_of_row = route.weights_address()
        self._write(
            call,
            Operation.CACHED_DISPATCH,
            Flag.CACHED if call.counted else Flag.CACHED | Flag.UNCOUNTED,
            old.block,
            old.layout,
            public,
            old.origin,
            old.maker,
            route.origin,
        )
        tensors = self._make_output(call, old.shape, route.weighted)
        self._move(call, route.rows, filled=0)
        return Started(tensors.output(self._layout, public, old.counts), route, None)

    def refuse(self, error: Exception, *, number: int) -> Mail | None:
        """Takes part in a dispatch only to say that this rank refuses it."""
        config, a = self._config, self.arguments
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=self._device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=self._device),
        )
        block, public = self._new_words(self._tables.words(0)), self._new_counts()
        origin = block.data_ptr() + self._tables.at["origin"]
        self._write(call, Operation.DISPATCH, Flag(0), block, self._tables, public, None, 0, origin)
        a.status, a.capacity = refusal(error)
        try:
            return self._count(call, number)
        finally:
            a.status = 0

    def new_tables(self) -> None:
        """None: buffers keep outputs only, and every dispatch makes its tables."""

    # -- counting, and moving chunks --------------------------------------------------------------

    def _count(self, call: DispatchCall, number: int) -> Mail | None:
        """Counts, tells all ranks, plans, and fills the first messages; the host's mail if any.

        Chunk 0 is on the rail before the counts are known, with room for all its rows, and so are
        all of them with static shapes, where chunk 0 brings the counts.
        """
        a, messages, memory = self.arguments, self._messages, self._memory
        launches = self._launches[a.row_bytes, call.num_sms]
        self._tell(launches)
        self._run_counting(KernelName.COUNT, launches.counting)
        before = self._watchdog.mail_number
        first = self._first_chunks(None)
        if not self._mails:
            for chunk in first:
                self._fill(call, chunk, None)
            self._tell_chunk(call, 0)
            a.gathered, a.gathered_stride = messages.receive[0].data_ptr(), a.message_bytes
            messages.wait(0)
            self._run_counting(KernelName.PLAN, launches.planning)
            return None
        messages.gather(memory.count_row, memory.gathered)
        a.gathered, a.gathered_stride = memory.gathered.data_ptr(), memory.gathered.shape[1]
        self._pack(call, 0)
        messages.wait(0)  # for the gather
        self._exchange(call, 0, None)
        self._run_counting(KernelName.PLAN, launches.planning)
        for chunk in first[1:]:
            self._pack(call, chunk)
        return self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)

    def _first_chunks(self, rows: Rows | None) -> range:
        """Those whose messages are in memory at a time when a call begins."""
        return range(min(RING, self._plan.num_chunks if rows is None else len(rows)))

    def _run_counting(self, name: KernelName, launch: Launch) -> None:
        """Queues a kernel whose header says that the host waits for counts."""
        a = self.arguments
        flags = a.flags
        a.flags |= int(Flag.COUNT)
        self._run(name, a, launch)
        a.flags = flags

    def _move(
        self, call: DispatchCall, rows: Rows | None, *, filled: int, clear: bool = True
    ) -> None:
        """Moves the rows of all chunks.

        Args:
            call: the dispatch.
            rows: of its messages; None: with static shapes.
            filled: the messages of so many chunks are on the rail already.
            clear: slots that no row fills are cleared.
        """
        a = self.arguments
        launch = self._launches[a.row_bytes, call.num_sms].moving
        num_chunks = self._plan.num_chunks if rows is None else len(rows)
        first = clear
        for step, chunk in dispatch_steps(num_chunks):
            if step is Step.FILL:
                if chunk >= filled:
                    self._fill(call, chunk, rows)
                continue
            self._tell_chunk(call, chunk)
            if step is Step.DRAIN:
                self._messages.wait(chunk)
            flags = a.flags
            a.flags |= _MOVES | (_WITHIN_HOST if step is Step.OWN else 0) | (_CLEAR if first else 0)
            self._run(KernelName.DISPATCH, a, launch)
            a.flags, first = flags, False
        self.dispatches_queued += 1

    def _discard(self, call: DispatchCall, rows: Rows | None) -> None:
        """Takes part in a new dispatch without an output: what arrives is dropped.

        Its own rows, and those that it relays, reach the other ranks.
        """
        self.arguments.max_slots = 0
        self._move(call, rows, filled=RING, clear=False)

    def _fill(self, call: DispatchCall, chunk: int, rows: Rows | None) -> None:
        self._pack(call, chunk)
        self._exchange(call, chunk, rows)

    def _pack(self, call: DispatchCall, chunk: int) -> None:
        a = self.arguments
        self._tell_chunk(call, chunk)
        self._run(KernelName.PACK, a, self._launches[a.row_bytes, call.num_sms].packing)

    def _exchange(self, call: DispatchCall, chunk: int, rows: Rows | None) -> None:
        self._tell_lengths(chunk, cached=call.previous is not None)
        exchange(self.arguments, self._messages, chunk, rows, host=self._host)

    def _head(self, chunk: int, *, cached: bool) -> int:
        """Rows in front of a message: with static shapes the first ones bring the counts."""
        words = HEADER_WORDS if self._mails or cached or chunk else self._plan.count_words
        return head_rows(words, self.arguments.rail_stride)

    def _rows_of(self, mail: Mail) -> Rows:
        hosts, words = self._plan.num_hosts, mail.rail
        return [
            (words[at : at + hosts], words[at + hosts : at + 2 * hosts])
            for at in range(0, 2 * hosts * mail.chunks, 2 * hosts)
        ]

    # -- arguments and outputs --------------------------------------------------------------------

    def _tell(self, launches: ChunkLaunches) -> None:
        a = self.arguments
        a.num_senders, a.slot_bytes, a.warp_bytes, a.batch, a.groups = launches[:5]

    def _tell_chunk(self, call: DispatchCall, chunk: int) -> None:
        """Tells the kernels which chunk moves, and where its messages are."""
        a = self.arguments
        self._tell(self._launches[a.row_bytes, call.num_sms])
        tell_chunk(a, self._messages, chunk)
        self._tell_lengths(chunk, cached=call.previous is not None)

    def _tell_lengths(self, chunk: int, *, cached: bool) -> None:
        """The first message of a new routing has one size: ranks do not know yet whether their rows
        have one."""
        a = self.arguments
        a.head_rows = self._head(chunk, cached=cached)
        a.message_bytes = 0
        if not self._mails:
            a.message_bytes = full_message(a, self._plan, chunk)
        elif not cached and not chunk:
            a.message_bytes = self._plan.first_message

    def _write(
        self,
        call: DispatchCall,
        operation: Operation,
        flags: Flag,
        block: Tensor,
        layout: object,
        public: PublicCounts,
        subject: int | None,
        maker: int,
        origin: int,
    ) -> None:
        """Tells the kernels what is sent, and where tables and counts are; not the output."""
        a, x, scales, weights = self.arguments, call.x_TW, call.scales, call.weights_TK
        assert isinstance(layout, HybridTables)
        if weights is not None:
            flags |= Flag.NEW_WEIGHTS
            a.weights = weights.data_ptr()
        if call.topk_ids_TK is not None and call.topk_ids_TK.dtype is torch.int64:
            flags |= Flag.WIDE_IDS
        scale_bytes = metadata_bytes = 0
        if call.previous is None or weights is not None or self._config.source_tokens:
            metadata_bytes = self._shape.scales_at
        if scales is not None:
            scale_bytes = metadata.row_bytes(scales)
            metadata_bytes = self._shape.scales_at + align(scale_bytes, 16)
            a.scales = scales.data_ptr()
        a.operation, a.flags, a.origin = int(operation), int(flags), origin
        a.subject, a.maker = subject, maker
        a.num_tokens, a.x = x.shape[0], x.data_ptr()
        a.row_bytes, a.scale_bytes = metadata.row_bytes(x), scale_bytes
        a.metadata_bytes = metadata_bytes
        a.header_metadata_bytes = scale_bytes + (0 if weights is None else 4 * layout.topk)
        positions = 0 if flags & Flag.CACHED else self._positions
        a.rail_stride = RailRow(a.row_bytes, metadata_bytes, positions).stride
        base = block.data_ptr()
        tell_tables(a, layout, base, x.shape[0])
        at = layout.at
        a.own_tokens = layout.own_tokens(base, x.shape[0])
        a.first_sent, a.first_slot = base + at["first_sent"], base + at["first_slot"]
        a.tokens_per_expert, a.expert_offsets = base + at["counts"], base + at["offsets"]
        counts, offsets, _ = layout.public
        address = public.memory.data_ptr()
        a.counts_out, a.offsets_out = address, address + 4 * counts
        a.rows_from_out = address + 4 * (counts + offsets)

    def _make_output(
        self, call: DispatchCall, shape: tuple[int, ...], weighted: bool
    ) -> OutputTensors:
        """Allocates what a dispatch of a leading shape returns, and tells the kernels."""
        a, x, scales = self.arguments, call.x_TW, call.scales
        tokens = call.output_buffer
        if tokens is None:
            tokens = x.new_empty((*shape, x.shape[1]))
        elif not self._layout.padded:
            tokens = tokens[: shape[0]]
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

    def _padded_shape(self) -> tuple[int, ...]:
        if self._layout is DispatchLayout.RANK_MAJOR:
            return (self._plan.num_ranks, self._config.max_tokens_per_rank)
        return (self._num_local, self._tables.rows)

    def _announced(self, call: DispatchCall) -> int:
        """Rows that this rank has room for, or UNBOUNDED."""
        room = capacity.announced(self._config, call.output_buffer)
        if room < 0 and self._config.static_shapes and not self._layout.padded:
            return self._limit
        return room

    def _new_words(self, words: int) -> Tensor:
        return torch.empty(words, dtype=torch.int32, device=self._device)

    def _new_counts(self, block: Tensor | None = None) -> PublicCounts:
        """The caller's own counts, or copies of a block's, with a word behind them."""
        sizes = [*self._tables.public, 1]
        total = sum(sizes)
        memory = self._new_words(total) if block is None else block[:total].clone()
        return PublicCounts.within(memory, sizes)


@dataclass(frozen=True)
class _Scratch:
    """Memory of one communicator that the kernels use in every call."""

    experts: Tensor
    num_local: int
    histogram: Tensor
    ordinals: Tensor
    faulty: Tensor
    starts: Tensor
    count_row: Tensor
    gathered: Tensor

    @staticmethod
    def of(
        config: MoECommunicatorConfig,
        plan: HybridPlan,
        experts: tuple[int, ...],
        *,
        num_sms: int,
        device: torch.device,
    ) -> _Scratch:
        def words(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        columns = plan.num_ranks + config.num_experts + plan.num_hosts
        row = 4 * plan.count_words
        return _Scratch(
            experts=torch.tensor(experts or (0,), dtype=torch.int32, device=device),
            num_local=len(experts),
            histogram=words(num_sms * columns),
            ordinals=words(config.max_tokens_per_rank * config.topk),
            faulty=words(1),
            starts=torch.tensor(plan.starts, dtype=torch.int32, device=device),
            count_row=torch.zeros(row, dtype=torch.uint8, device=device),
            gathered=torch.zeros((plan.num_hosts, row), dtype=torch.uint8, device=device),
        )

    def arguments(self) -> dict[str, int]:
        """Where it is, by the names of the arguments."""
        return {
            "experts": self.experts.data_ptr(),
            "num_local": self.num_local,
            "histogram": self.histogram.data_ptr(),
            "ordinals": self.ordinals.data_ptr(),
            "faulty": self.faulty.data_ptr(),
            "chunk_starts": self.starts.data_ptr(),
            "count_row": self.count_row.data_ptr(),
        }
