"""High-throughput dispatch of one rank: outputs, arguments, launches. Combine: combiner.py.

Knows addresses and nothing of process groups, so that several ranks can live in one process. The
host's time counts here: a tensor made is as dear as a kernel launched.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.nvlink.ht.arena import HtArena
from expertlink.engines.nvlink.ht.arguments import DISPATCH, Flag
from expertlink.engines.nvlink.ht.combine import Combiner
from expertlink.engines.nvlink.ht.outputs import Outputs
from expertlink.engines.nvlink.launch import (
    BlockShape,
    KernelName,
    Launch,
    Run,
    split_blocks,
)
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import Verdict, expert_locations
from expertlink.engines.nvlink.tables import Route, TableLayout, as_route
from expertlink.engines.nvlink.watchdog import Mail, Watchdog
from expertlink.engines.ranks import capacity, metadata
from expertlink.engines.ranks.header import Operation
from expertlink.layouts import align
from expertlink.routing import Placement
from expertlink.types import DispatchLayout, DispatchOutput

# Shares and SMs: docs/architecture.md, "How many SMs".
DEFAULT_SMS = 24
_SENDERS = {True: 0.34, False: 0.36}  # share of dispatch's blocks that send; expanded or not
_SENDERS_OF_SHORT_ROWS = 0.42  # rows of at most half the bytes of an unquantized one
_SLACK = 32  # outputs are made a 32nd larger than the most that recent calls needed
_CALLS_REMEMBERED = 8

# Plain numbers: the operators of enumerations take microseconds.
_UNCACHED = int(Flag.COUNT | Flag.SEND)
_IS_CACHED = int(Flag.CACHED)
_CACHED = int(Flag.CACHED | Flag.SEND | Flag.PLACE)
_COUNT = int(Flag.COUNT)
_PLACE = int(Flag.PLACE)
_WIDE_IDS, _NEW_WEIGHTS = int(Flag.WIDE_IDS), int(Flag.NEW_WEIGHTS)
_DISCARD = int(Flag.DISCARD)


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


class HighThroughput:
    """Builds and queues the calls of one rank.

    Args:
        config: the communicator's.
        rank: this rank.
        placement: where the experts live, on this rank's GPU.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        run: queues a kernel.
        num_sms: multiprocessors of the GPU.
        communicator: tells communicators apart, the same on all ranks.
        check: look for faulty ids.
        blocks: shape of the blocks.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        rank: int,
        placement: Placement,
        arena: HtArena,
        watchdog: Watchdog,
        run: Run,
        num_sms: int,
        communicator: int,
        check: bool,
        blocks: BlockShape | None = None,
    ) -> None:
        self._config, self._arena = config, arena
        self._watchdog, self._run = watchdog, run
        self._num_ranks = placement.num_ranks
        self._layout = config.layout
        self._shape = RowShape.of(config)
        experts = placement.experts_of_rank[rank]
        self._num_local = len(experts)
        self._limit = math.prod(
            capacity.largest_shape(config, num_ranks=self._num_ranks, num_local=self._num_local)
        )
        self._num_sms = num_sms
        self._blocks = blocks or BlockShape(
            config, num_ranks=self._num_ranks, num_local=self._num_local
        )
        self._tables = TableLayout(config, num_ranks=self._num_ranks, num_local=self._num_local)
        self._launches: dict[tuple[int, int | None, bool, int], tuple[int, int, int, Launch]] = {}
        self._needed: collections.deque[int] = collections.deque(maxlen=_CALLS_REMEMBERED)
        self._mails = not config.static_shapes
        self._zero_copy = config.zero_copy
        self._pool_at = 0
        device = arena.device
        self._expert_location = expert_locations(placement)
        self._experts = torch.tensor(experts or (0,), dtype=torch.int32, device=device)
        columns = self._num_ranks + config.num_experts
        self._histogram = torch.empty(num_sms * columns, dtype=torch.int32, device=device)
        self._ordinals = torch.empty(
            config.max_tokens_per_rank * config.topk, dtype=torch.int32, device=device
        )
        self._faulty = torch.zeros(1, dtype=torch.int32, device=device)
        common: dict[str, int] = {
            "bases": arena.bases.data_ptr(),
            "state": arena.state.data_ptr(),
            "control": watchdog.address,
            "rank": rank,
            "communicator": communicator,
            "expert_location": self._expert_location.data_ptr(),
        }
        self._dispatch: Any = DISPATCH.new(
            **common,
            experts=self._experts.data_ptr(),
            num_local=self._num_local,
            histogram=self._histogram.data_ptr(),
            ordinals=self._ordinals.data_ptr(),
            faulty=self._faulty.data_ptr(),
        )
        self.combiner = Combiner(
            config,
            common=common,
            run=run,
            blocks=self._blocks,
            num_sms=config.num_sms_combine or DEFAULT_SMS,
            max_sms=num_sms,
        )

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall, *, number: int) -> Started:
        """Queues a dispatch; an uncached one waits for the counts unless shapes are static.

        `number` is the host's, 0 in a capture.
        """
        if call.previous is not None:
            return self._cached_dispatch(call, as_route(call.previous), number)
        assert call.topk_ids_TK is not None
        a, config = self._dispatch, self._config
        num_tokens = call.x_TW.shape[0]
        block = self._new_block(num_tokens)
        kept_ids = torch.empty_like(call.topk_ids_TK)
        public, _ = self._new_public()
        self._set_rows(call, Operation.DISPATCH, _UNCACHED, number)
        self._set_tables(block.data_ptr(), num_tokens)
        weighted = call.weights_TK is not None
        a.weights_of_row = self._tables.address(block.data_ptr(), "weights") if weighted else None
        a.ids, a.ids_copy = call.topk_ids_TK.data_ptr(), kept_ids.data_ptr()
        a.subject, a.origin = None, self._tables.address(block.data_ptr(), "origin")
        a.capacity = capacity.announced(config, call.output_buffer)
        if config.static_shapes and a.capacity < 0 and not self._layout.padded:
            a.capacity = self._limit
        outputs = Outputs()
        shape = self._expected_shape(call)
        if shape is not None:
            a.flags |= _PLACE
            self._make(outputs, call, shape, weighted)
        before = self._watchdog.mail_number
        self._launch_dispatch(call, sends=True)
        mail = counts = None
        if self._mails:
            mail = self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)
            if mail.verdict != Verdict.FINE:
                self._discard()
                return Started(None, None, mail)
            counts = mail.counts
            if not self._layout.padded:
                rows = mail.slots if self._layout.expanded else mail.arrivals
                self._needed.append(rows)
                if outputs.tokens is None or outputs.shape[0] < rows:
                    try:
                        self._make(outputs, call, (rows,), weighted)
                    except RuntimeError:  # no memory: the peers must not wait for this rank
                        self._discard()
                        raise
                    a.flags = _PLACE | a.flags & (_WIDE_IDS | _NEW_WEIGHTS)
                    self._launch_dispatch(call, sends=False)
                outputs.cut(rows)
        route = Route(
            shape=outputs.shape,
            num_tokens=num_tokens,
            ids_TK=kept_ids,
            layout=self._tables,
            block=block,
            weights_block=None,
            weighted=weighted,
            counts=counts,
            origin=a.origin,
            number=number,
        )
        return Started(outputs.finish(call, self._layout, public, counts), route, mail)

    def _cached_dispatch(self, call: DispatchCall, old: Route, number: int) -> Started:
        a = self._dispatch
        public, own = self._new_public(old.block)
        weights_block = old.weights_block
        if call.weights_TK is not None:
            weights_block = torch.empty(
                (self._tables.rows, self._tables.topk),
                dtype=torch.float32,
                device=self._arena.device,
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
            origin=own.data_ptr() + 4 * sum(self._tables.public),
            keeps=own,
            number=number,
        )
        self._set_rows(call, Operation.CACHED_DISPATCH, _CACHED, number)
        self._set_tables(old.block.data_ptr(), old.num_tokens)
        a.weights_of_row = route.weights_address()
        a.subject, a.origin = old.origin, route.origin
        outputs = Outputs()
        self._make(outputs, call, old.shape, route.weighted)
        self._launch_dispatch(call, sends=True)
        if not self._layout.padded:
            outputs.cut(old.shape[0])
        return Started(outputs.finish(call, self._layout, public, old.counts), route, None)

    def refuse(self, operation: Operation, *, number: int) -> Mail | None:
        """Takes part in an uncached dispatch only to say that this rank refuses it."""
        config, a, device = self._config, self._dispatch, self._arena.device
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=device),
        )
        block = self._new_block(0)
        public, _ = self._new_public()
        self._set_rows(call, operation, _UNCACHED, number)
        self._set_tables(block.data_ptr(), 0)
        a.subject, a.origin = None, self._tables.address(block.data_ptr(), "origin")
        a.capacity, a.status = capacity.UNBOUNDED, 1
        before = self._watchdog.mail_number
        try:
            self._launch_dispatch(call, sends=True)
        finally:
            a.status = 0
        mail = None
        if self._mails:
            mail = self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)
        self._discard()
        del public
        return mail

    def _new_block(self, num_tokens: int) -> Tensor:
        """Memory for the tables of a routing."""
        words = self._tables.words(num_tokens)
        return torch.empty(words, dtype=torch.int32, device=self._arena.device)

    def _new_public(
        self, block: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The caller's own counts, offsets and rows from each rank; copies of a block's tables.

        And the memory that they lie in, with a word behind them.
        """
        sizes = self._tables.public
        total = sum(sizes) + 1
        if block is None:
            memory = torch.empty(total, dtype=torch.int32, device=self._arena.device)
        else:
            memory = block[:total].clone()
        address, a = memory.data_ptr(), self._dispatch
        a.counts_out, a.offsets_out = address, address + 4 * sizes[0]
        a.rows_from_out = address + 4 * (sizes[0] + sizes[1])
        counts, offsets, rows_from, _ = memory.split_with_sizes([*sizes, 1])
        return (counts, offsets, rows_from), memory

    def _set_rows(self, call: DispatchCall, operation: Operation, flags: int, number: int) -> None:
        """What is sent."""
        a = self._dispatch
        x, scales, weights = call.x_TW, call.scales, call.weights_TK
        if weights is not None:
            flags |= _NEW_WEIGHTS
            a.weights = weights.data_ptr()
        if call.topk_ids_TK is not None and call.topk_ids_TK.dtype is torch.int64:
            flags |= _WIDE_IDS
        row_bytes = metadata.row_bytes(x)
        scale_bytes = metadata_bytes = 0
        if not flags & _IS_CACHED or weights is not None:
            metadata_bytes = self._shape.scales_at
        if scales is not None:
            scale_bytes = metadata.row_bytes(scales)
            metadata_bytes = self._shape.scales_at + align(scale_bytes, 16)
            a.scales = scales.data_ptr()
        a.operation, a.flags = int(operation), flags
        a.row_bytes, a.scale_bytes, a.metadata_bytes = row_bytes, scale_bytes, metadata_bytes
        a.header_metadata_bytes = scale_bytes + (0 if weights is None else 4 * self._tables.topk)
        a.num_tokens, a.x = x.shape[0], x.data_ptr()
        if self._zero_copy:
            a.pool, self._pool_at = self._arena.next_pool(capturing=number == 0)

    def _set_tables(self, block: int, num_tokens: int) -> None:
        """Where the tables of the routing are."""
        a, tables = self._dispatch, self._tables
        a.slots_of_token = tables.address(block, "slots")
        a.own_tokens = tables.own_tokens(block, num_tokens)
        a.rows_from = tables.address(block, "rows_from")
        a.first_row = tables.address(block, "first_row")
        a.first_sent = tables.address(block, "first_sent")
        a.first_slot = tables.address(block, "first_slot")
        a.tokens_per_expert = tables.address(block, "counts")
        a.expert_offsets = tables.address(block, "offsets")
        a.choices_of_row = tables.address(block, "choices")

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
        return (min(most + most // _SLACK, self._limit),) if most else None

    def _make(
        self, outputs: Outputs, call: DispatchCall, shape: tuple[int, ...], weighted: bool
    ) -> None:
        """Allocates what a dispatch of a leading shape returns, and tells the kernel."""
        a, x = self._dispatch, call.x_TW
        outputs.shape = shape
        full = (*shape, x.shape[1])
        if self._zero_copy:
            nbytes = math.prod(full) * x.element_size()
            pool = self._arena.local[self._pool_at : self._pool_at + nbytes]
            tokens = pool.view(x.dtype).view(full)
        elif call.output_buffer is not None:
            tokens = call.output_buffer
        else:
            tokens = x.new_empty(full)
        outputs.tokens = tokens
        a.tokens, a.max_slots = tokens.data_ptr(), math.prod(shape)
        if call.scales is not None:
            outputs.scales = call.scales.new_empty((*shape, call.scales.shape[1]))
            a.scales_out = outputs.scales.data_ptr()
        if not self._layout.expanded:
            choices = (*shape, self._tables.topk)
            outputs.ids = torch.empty(choices, dtype=torch.int64, device=x.device)
            a.topk_ids, a.topk_weights = outputs.ids.data_ptr(), None
            if weighted:
                outputs.weights = torch.empty(choices, dtype=torch.float32, device=x.device)
                a.topk_weights = outputs.weights.data_ptr()
        if call.zero_padding and self._layout.padded:
            tokens.zero_()
            if outputs.scales is not None:
                outputs.scales.zero_()

    def _launch_dispatch(self, call: DispatchCall, *, sends: bool) -> None:
        """Queues one kernel; without `sends` it places what the one before it has sent."""
        a = self._dispatch
        key = (a.row_bytes, call.num_sms, sends, a.flags & _COUNT)
        known = self._launches.get(key)
        if known is None:
            known = self._launches[key] = self._plan_dispatch(*key)
        a.num_senders, a.slot_bytes, a.groups, launch = known
        self._run(KernelName.DISPATCH, a, launch)

    def _plan_dispatch(
        self, row_bytes: int, num_sms: int | None, sends: bool, counts: int
    ) -> tuple[int, int, int, Launch]:
        """Sending blocks, shared memory of a warp, groups counted at once, and the grid."""
        total = min(self._num_sms, num_sms or self._config.num_sms_dispatch or DEFAULT_SMS)
        share = _SENDERS[self._layout.expanded]
        if 2 * row_bytes <= self._shape.row and not self._layout.expanded:
            share = _SENDERS_OF_SHORT_ROWS
        senders, total = split_blocks(total, senders=share)
        if self._zero_copy:  # little is left to do for those who do not send
            senders = max(1, total - max(1, total // 12))
        blocks = self._blocks
        launch = Launch(
            grid=total if sends else max(1, total - senders),
            block=blocks.threads(row_bytes),
            shared_bytes=blocks.shared_bytes(row_bytes, counts=bool(counts)),
            follows=not sends,
            local=not sends,
        )
        groups = blocks.groups(blocks.warps(row_bytes))
        return senders if sends else 0, blocks.slot_bytes(row_bytes), groups, launch

    def _discard(self) -> None:
        """Lets the peers go on after a dispatch that does not happen."""
        a = self._dispatch
        a.flags, a.num_senders = _DISCARD, 0
        launch = Launch(grid=1, block=32, shared_bytes=0, follows=True, local=True)
        self._run(KernelName.DISPATCH, a, launch)
