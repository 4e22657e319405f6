"""High-throughput dispatch of one rank: tables, arguments, launches.

Knows addresses and nothing of process groups, so that several ranks can live in one process. The
host's time counts here: what calls have in common is worked out once, and written to the struct of
arguments only where the call before said something else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.nvlink.ht.arena import HtArena
from expertlink.engines.nvlink.ht.arguments import DISPATCH, Flag
from expertlink.engines.nvlink.ht.blocks import BlockShape
from expertlink.engines.nvlink.ht.launch import DispatchPlanner
from expertlink.engines.nvlink.ht.outputs import BufferTables, OutputMaker, tables_of
from expertlink.engines.nvlink.launch import KernelName, Launch, Launches, Run
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import Verdict
from expertlink.engines.nvlink.tables import ORIGINS, Route, TableLayout
from expertlink.engines.nvlink.watchdog import Mail, Watchdog
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.agreement import refusal
from expertlink.engines.ranks.header import Operation
from expertlink.layouts import align
from expertlink.types import DispatchBuffers, DispatchOutput

# Plain numbers: the operators of enumerations take microseconds.
_UNCACHED = int(Flag.COUNT | Flag.SEND)
_CACHED = int(Flag.CACHED | Flag.SEND | Flag.PLACE)
_COUNT, _PLACE, _DISCARD = int(Flag.COUNT), int(Flag.PLACE), int(Flag.DISCARD)
_UNCOUNTED = int(Flag.UNCOUNTED)
_WIDE_IDS, _NEW_WEIGHTS = int(Flag.WIDE_IDS), int(Flag.NEW_WEIGHTS)
_DISPATCH, _CACHED_DISPATCH = int(Operation.DISPATCH), int(Operation.CACHED_DISPATCH)
_KERNEL = KernelName.DISPATCH
_DISCARDS = Launch(grid=1, block=32, shared_bytes=0, follows=True, local=True)
_MOST_FORMS = 256  # of rows, and of numbers of tokens, that are kept


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


class Form(NamedTuple):
    """What dispatches of rows alike say alike.

    Attributes:
        said: operation, bytes, and what the kernel is told of its launch; see `_tell`.
        launch: of the kernel that sends.
    """

    said: tuple[int, ...]
    launch: Launch


class Places(NamedTuple):
    """Where things lie in the one piece of memory of a dispatch that makes its own.

    Attributes:
        ids_at: bytes to the ids.
        own_tokens_at: bytes to the tokens whose rows stay.
        counts_at: word of the caller's counts.
        rows_at: word of the source tokens.
    """

    ids_at: int
    own_tokens_at: int
    counts_at: int
    rows_at: int


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
        self._num_local, self._device = len(experts), arena.device
        self._expanded, self._padded = config.layout.expanded, config.layout.padded
        self._topk, self._source_tokens = config.topk, config.source_tokens
        self._scales_at = RowShape.of(config).scales_at
        self._mails, self._zero_copy = not config.static_shapes, config.zero_copy
        self._outputs = OutputMaker(
            config, num_ranks=num_ranks, num_local=self._num_local, arena=arena
        )
        self._tables = TableLayout(config, num_ranks=num_ranks, num_local=self._num_local)
        self._counted = sum(self._tables.public)
        self._cached_rows_at = align(self._counted + 1, 4)
        planner = DispatchPlanner(config, blocks, num_sms)
        self.most_blocks, self._launches = planner.most_blocks, Launches(planner)
        self._number, self._max_tokens = common["communicator"], config.max_tokens_per_rank
        # By what decides them, so none of them is ever out of date.
        self._forms: dict[tuple[object, ...], Form] = {}
        self._places: dict[tuple[int, bool], Places] = {}
        # What `arguments` say now; None: something else.
        self._named: tuple[int, TableLayout] | None = None  # tables
        self._said: Form | None = None
        self._experts = torch.tensor(experts or (0,), dtype=torch.int32, device=self._device)
        columns = num_ranks + config.num_experts
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
        a, tables, outputs = self.arguments, self._tables, self._outputs
        num_tokens, weighted = call.x_TW.shape[0], call.weights_TK is not None
        wide = ids_TK.dtype is torch.int64
        flags = _UNCACHED | _WIDE_IDS if wide else _UNCACHED
        shape = outputs.expected_shape(call)
        places = self._places.get((num_tokens, wide)) or self._new_places(num_tokens, wide)
        ids_at, own_tokens_at, counts_at, rows_at = places
        if buffers is None:
            # One piece of memory: tables, ids, the caller's counts, source tokens of the rows.
            block = outputs.new_words(rows_at + outputs.source_words(shape))
            base = block.data_ptr()
            origin = base + tables.at["origin"]
            self._name_counts(base + 4 * counts_at)
        else:
            block = tables_of(buffers).block
            base, ids_at = block.data_ptr(), tables.ids_at(tables.max_tokens)
            origin = base + _origin_of(buffers, tables)
            self._name_counts_of(buffers)
        if self._named != (base, tables):
            self._name_tables(base, tables)
        a.own_tokens = base + own_tokens_at
        a.weights_of_row = base + tables.at["weights"] if weighted else None
        a.ids, a.ids_copy = ids_TK.data_ptr(), base + ids_at
        a.capacity = outputs.announced(call)
        if shape is not None:
            flags |= _PLACE
        form = self._form_of(call, _DISPATCH)
        pool_at = self._write(call, form, flags, number == 0, None, 0, origin)
        rows = None
        if shape is not None:
            rows = outputs.make(a, call, shape, weighted, pool_at, block, counts_at, block, rows_at)
        before = self._watchdog.mail_number if self._mails else 0
        self._run(_KERNEL, a, form.launch)
        mail = counts = None
        if self._mails:
            mail = self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)
            if mail.verdict is not Verdict.FINE:
                self._discard()
                return Started(None, None, mail)
            counts = mail.counts
            if not self._padded:
                needed = mail.slots if self._expanded else mail.arrivals
                outputs.remember(needed)
                if rows is None or rows.shape[0] < needed:
                    shape = (needed,)
                    try:
                        words = outputs.source_words(shape)
                        more = outputs.new_words(words) if words else block
                        rows = outputs.make(
                            a, call, shape, weighted, pool_at, block, counts_at, more, 0
                        )
                    except RuntimeError:  # no memory: the peers must not wait for this rank
                        self._discard()
                        raise
                    self._place(call)
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
        return Started(outputs.output(call, rows, counts), route, mail)

    def dispatch_cached(self, call: DispatchCall, old: Route, *, number: int) -> Started:
        """Queues a dispatch with the routing of an earlier one."""
        a, buffers, new_weights = self.arguments, call.buffers, call.weights_TK is not None
        outputs, shape = self._outputs, old.shape
        weights_block, weighted = old.weights_block, old.weighted or new_weights
        rows_at = 0
        if buffers is None:
            # One piece: the caller's counts, the transfer's number, source tokens.
            rows_at = self._cached_rows_at
            memory = outputs.new_words(rows_at + outputs.source_words(shape))
            base = memory.data_ptr()
            origin = base + 4 * self._counted
            self._name_counts(base)
            if new_weights:
                table = (self._tables.rows, self._topk)
                weights_block = torch.empty(table, dtype=torch.float32, device=self._device)
        else:
            own = tables_of(buffers)
            memory = own.block
            origin = memory.data_ptr() + _origin_of(buffers, self._tables)
            self._name_counts_of(buffers)
            if new_weights:
                weights_block = own.weights
        route = Route(
            shape,
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
        form = self._form_of(call, _CACHED_DISPATCH)
        pool_at = self._write(call, form, flags, number == 0, old.origin, old.maker, origin)
        rows = outputs.make(a, call, shape, weighted, pool_at, memory, 0, memory, rows_at)
        self._run(_KERNEL, a, form.launch)
        if not self._padded and (buffers is not None or call.output_buffer is not None):
            rows.cut(shape[0])  # those may be larger
        return Started(outputs.output(call, rows, old.counts), route, None)

    def refuse(self, error: Exception, *, number: int) -> Mail | None:
        """Takes part in a dispatch only to say that this rank refuses it."""
        config, a, tables = self._config, self.arguments, self._tables
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=self._device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=self._device),
        )
        counts_at = tables.words(0)
        block = self._outputs.new_words(counts_at + self._counted)
        base = block.data_ptr()
        self._name_tables(base, tables)
        self._name_counts(base + 4 * counts_at)
        a.own_tokens = tables.own_tokens(base, 0)
        form, origin = self._form_of(call, _DISPATCH), base + tables.at["origin"]
        self._write(call, form, _UNCACHED | _WIDE_IDS, number == 0, None, 0, origin)
        before = self._watchdog.mail_number
        a.status, a.capacity = refusal(error)
        try:
            self._run(_KERNEL, a, form.launch)
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
        words = tables.ids_at(most) // 4 + 2 * most * self._topk
        block = self._outputs.new_words(words)
        return BufferTables(block, tables.view(block, "weights").view(torch.float32))

    # -- what calls have in common ----------------------------------------------------------------

    def _form_of(self, call: DispatchCall, operation: int) -> Form:
        """What such rows say."""
        x, scales = call.x_TW, call.scales
        key = (operation, x.dtype, x.shape[1], call.weights_TK is None, call.num_sms)
        if scales is not None:
            key = (*key, metadata.row_bytes(scales))
        return self._forms.get(key) or self._new_form(key, call, operation)

    def _new_form(self, key: tuple[object, ...], call: DispatchCall, operation: int) -> Form:
        scale_bytes = metadata_bytes = header_bytes = 0
        if operation == _DISPATCH or call.weights_TK is not None or self._source_tokens:
            metadata_bytes = self._scales_at
        if call.weights_TK is not None:
            header_bytes = 4 * self._topk
        if call.scales is not None:
            scale_bytes = metadata.row_bytes(call.scales)
            metadata_bytes = self._scales_at + align(scale_bytes, 16)
            header_bytes += scale_bytes
        row_bytes = metadata.row_bytes(call.x_TW)
        counts = _COUNT if operation == _DISPATCH else 0
        *told, launch = self._launches[row_bytes, call.num_sms, True, counts]
        row = (operation, row_bytes, scale_bytes, metadata_bytes, header_bytes)
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
        form = self._forms[key] = Form((*row, *told), launch)
        return form

    def _new_places(self, num_tokens: int, wide: bool) -> Places:
        """For so many tokens with such ids."""
        tables = self._tables
        ids_at, own_tokens_at = tables.ids_at(num_tokens), tables.own_tokens(0, num_tokens)
        counts_at = ids_at // 4 + (num_tokens * self._topk << wide)
        if len(self._places) >= _MOST_FORMS:
            self._places.clear()
        places = Places(ids_at, own_tokens_at, counts_at, align(counts_at + self._counted, 4))
        self._places[num_tokens, wide] = places
        return places

    # -- arguments --------------------------------------------------------------------------------

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

    def _tell(self, form: Form) -> None:
        """Tells the kernel what rows of a form say."""
        a = self.arguments
        (
            a.operation,
            a.row_bytes,
            a.scale_bytes,
            a.metadata_bytes,
            a.header_metadata_bytes,
            a.num_senders,
            a.slot_bytes,
            a.warp_bytes,
            a.batch,
            a.groups,
        ) = form.said
        self._said = form

    def _write(
        self,
        call: DispatchCall,
        form: Form,
        flags: int,
        capturing: bool,
        subject: int | None,
        maker: int,
        origin: int,
    ) -> int:
        """Tells the kernel what is sent; returns where the pool of a zero-copy dispatch is."""
        a, x, weights = self.arguments, call.x_TW, call.weights_TK
        if self._said is not form:
            self._tell(form)
        if weights is not None:
            flags |= _NEW_WEIGHTS
            a.weights = weights.data_ptr()
        if call.scales is not None:
            a.scales = call.scales.data_ptr()
        a.flags, a.origin = flags, origin
        a.subject, a.maker = subject, maker
        a.num_tokens, a.x = x.shape[0], x.data_ptr()
        if not self._zero_copy:
            return 0
        a.pool, pool_at = self._arena.next_pool(capturing=capturing)
        return pool_at

    # -- launches that follow ---------------------------------------------------------------------

    def _place(self, call: DispatchCall) -> None:
        """Queues the kernel that places what the one before it has sent."""
        a = self.arguments
        self._said = None
        a.flags = _PLACE | a.flags & (_WIDE_IDS | _NEW_WEIGHTS)
        plan = self._launches[a.row_bytes, call.num_sms, False, 0]
        a.num_senders, a.slot_bytes, a.warp_bytes, a.batch, a.groups, launch = plan
        self._run(_KERNEL, a, launch)

    def _discard(self) -> None:
        """Lets the peers go on after a dispatch that does not happen."""
        a = self.arguments
        self._said = None
        a.flags, a.num_senders = _DISCARD, 0
        self._run(_KERNEL, a, _DISCARDS)


def _origin_of(buffers: DispatchBuffers, tables: TableLayout) -> int:
    """Bytes to the number of a transfer: a cached dispatch may read that of the one before."""
    return tables.at["origin"] + 4 * (buffers.generation % ORIGINS)
