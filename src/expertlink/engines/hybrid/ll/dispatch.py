"""Low-latency dispatch across hosts: a message on the rail, then a dispatch inside each host.

First half: `ll::pack` writes this rank's tokens into a message for each other host, and the rail
moves them. Second half: `ll::dispatch` sends the tokens of the whole rail to the ranks of the host.
In a graph it has no programmatic dependency: these join two kernels, and what the rail leaves in a
capture is up to NCCL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.hybrid.ll.arguments import PACK
from expertlink.engines.hybrid.ll.memory import Messages, MessageSet
from expertlink.engines.hybrid.ll.messages import DispatchMessage
from expertlink.engines.hybrid.ll.tables import RailRoute, RailTableLayout
from expertlink.engines.hybrid.rail import Marked
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.launch import KernelName, Run
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.arguments import Flag
from expertlink.engines.nvlink.ll.dispatch import LlDispatcher
from expertlink.engines.nvlink.ll.launch import add_half, local_launch
from expertlink.engines.nvlink.ll.plan import REFUSED
from expertlink.engines.nvlink.ll.tables import BufferTables, LlTableLayout, said_by
from expertlink.engines.nvlink.shared import ScaleKind
from expertlink.engines.nvlink.tables import ORIGINS
from expertlink.engines.outputs import without_weights
from expertlink.jit.kernel import Arguments
from expertlink.types import DispatchOutput

_WIDE_IDS, _NEW_WEIGHTS = int(Flag.WIDE_IDS), int(Flag.NEW_WEIGHTS)
_ALONE = int(Flag.ALONE)


class RailDispatcher(LlDispatcher):
    """Queues the dispatches of one rank whose group spans hosts.

    Args:
        config, common, num_ranks, num_local, arena, run, num_sms, max_warps: as `LlDispatcher`; the
            arena is that of the host, and `common` names this rank by its index there.
        messages: those of this rank.
        rank_of_expert: `[E]` int32 on the device.

    Attributes:
        tokens_bound: B of new dispatches, the same on all ranks.
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
        messages: Messages,
        rank_of_expert: Tensor,
    ) -> None:
        super().__init__(
            config,
            common=common,
            num_ranks=num_ranks,
            num_local=num_local,
            arena=arena,
            run=run,
            num_sms=num_sms,
            max_warps=max_warps,
            num_hosts=messages.num_hosts,
        )
        self._messages, self._run, self._rank_of_expert = messages, run, rank_of_expert
        self.tokens_bound = config.max_tokens_per_rank
        self._warps = max(1, min(max_warps, tuning.LL_DISPATCH_WARPS))
        self.arguments.host = messages.host
        self.pack = PACK.new(
            state=common["state"],
            control=common["control"],
            host=messages.host,
            rank=messages.local,
            rank_of_expert=rank_of_expert.data_ptr(),
        )
        if messages.marks is not None:
            self.pack.mark_counter, self.pack.mark_word = messages.marks.begun

    def bound_of(self, call: DispatchCall) -> int:
        """B: tokens that every rank sends in a dispatch."""
        previous = call.previous
        return previous.bound if isinstance(previous, RailRoute) else self.tokens_bound

    def dispatch(
        self, call: DispatchCall, number: int
    ) -> tuple[DispatchOutput, RailRoute, Callable[[], None] | None]:
        """As `LlDispatcher.dispatch`."""
        previous = call.previous
        ids, weights = call.topk_ids_TK, call.weights_TK
        weighted = weights is not None
        if previous is not None:
            assert isinstance(previous, RailRoute)
            ids = previous.ids()
            if weights is None and previous.weighted:
                weighted = True
                weights = previous.table("own_weights").view(torch.float32)
        assert ids is not None
        halves = self._arena.halves
        capture = self._arena.capture()
        halves.finish(capture, tuning.LL_CALLS_IN_FLIGHT - 1 if call.return_recv_hook else 0)
        tables = None if call.buffers is None else call.buffers.tables
        if isinstance(tables, BufferTables):  # a half that is left may read them
            halves.finish_those_of(tables.block)
        a, output, route = self._open_rail(call, ids, weighted)
        if not call.counted:
            a = a.copy()
            a.rows_received = a.tokens_stat = None
        route.number, route.epoch = number, self._restarts[0]
        if call.zero_padding and self._layout.padded:
            output.tokens.zero_()
            if output.scales is not None:
                output.scales.tensor.zero_()
        self._say(a, self._form_of(call, weighted))
        self._name_rows(a, call)
        a.communicator = said_by(self._number, of=previous)
        a.subject = None if previous is None else previous.origin
        a.origin = route.origin
        flags = (_ALONE if self._in_use[0] > 1 else 0) | (_NEW_WEIGHTS if weighted else 0)
        at = self._pack(
            a,
            route,
            ids,
            weights,
            call.num_sms,
            quantizes=call.quantize_to is not None,
            halves=call.return_recv_hook,
            counted=call.counted,
        )
        if call.return_recv_hook:
            a = a.copy()  # the next call changes the arguments
        needs = (output, route, call.x_TW, call.scales, ids, weights, at)

        def forward() -> None:
            self._launch.launch_whole(
                KernelName.DISPATCH, a, flags, call.num_sms, after_all=capture != 0
            )
            if output.source_tokens is not None:
                route.write_source_tokens(output.source_tokens)

        if call.return_recv_hook:
            return (
                output,
                route,
                add_half(self._arena, capture, forward, tables=route.block, needs=needs),
            )
        forward()
        return output, route, None

    def refuse(self) -> None:
        """Lets the other ranks know that this rank will not make the dispatch that they make.

        Its messages have the size of those of the configured rows: both ends of a rail move as
        many bytes.
        """
        config = self._config
        ids = torch.empty((0, config.topk), dtype=torch.int64, device=self._device)
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=self._device),
            topk_ids_TK=ids,
            quantize_to=config.block_format,
        )
        self._arena.halves.finish(self._arena.capture())
        a, _, route = self._open_rail(call, ids, weighted=False)
        self._say(a, self._form_of(call, weighted=False))
        self._name_rows(a, call)
        a.signature, a.communicator, a.subject, a.origin = REFUSED, self._number, None, route.origin
        self._pack(a, route, ids, None, None, quantizes=False, halves=False)
        flags = _ALONE if self._in_use[0] > 1 else 0
        self._launch.launch_whole(KernelName.DISPATCH, a, flags, None)

    # -- the first half ---------------------------------------------------------------------------

    def _pack(
        self,
        a: Arguments,
        route: RailRoute,
        ids: Tensor,
        weights: Tensor | None,
        num_sms: int | None,
        *,
        quantizes: bool,
        halves: bool,
        counted: bool = True,
    ) -> MessageSet:
        """Queues the messages; afterwards `a` reads what has been received instead of the input."""
        messages, config, p = self._messages, self._config, self.pack
        if not counted:
            p = p.copy()
            p.rows_sent = None
        at, bound = messages.next_set(), route.bound
        layout = DispatchMessage.of(
            bound=bound, topk=config.topk, row_bytes=a.row_bytes, scale_bytes=a.scale_bytes
        )
        received = at.receive.data_ptr()
        block, tables = route.block.data_ptr(), self.tables.at
        p.operation, p.num_tokens, p.row_bytes = a.operation, a.num_tokens, a.row_bytes
        p.communicator, p.signature, p.subject = a.communicator, a.signature, a.subject
        p.x, p.input_bytes, p.scales = a.x, a.input_bytes, a.scales
        p.scale_kind, p.scale_bytes = a.scale_kind, a.scale_bytes
        p.flags = _WIDE_IDS if ids.dtype is torch.int64 else 0
        p.weights = None
        if weights is not None:
            p.flags |= _NEW_WEIGHTS
            p.weights = weights.data_ptr()
        p.ids, p.ids_copy = ids.data_ptr(), route.ids_address
        p.weights_copy, p.rows_to = block + tables["own_weights"], block + tables["rows_to"]
        p.bound, p.message_bytes, p.under_way = bound, layout.nbytes, at.under_way.data_ptr()
        p.ids_at, p.weights_at = layout.ids_at, layout.weights_at
        p.scales_at, p.rows_at = layout.scales_at, layout.rows_at
        p.send = at.send.data_ptr()
        p.own = received + (messages.num_hosts - 1) * layout.nbytes
        blocks = self.most_blocks(num_sms)
        launch = local_launch(blocks, 32 * self._warps)
        self._run(KernelName.PACK_QUANTIZED if quantizes else KernelName.PACK, p, launch)
        a.mark_counter = a.mark_word = None
        marked, marks = Marked.NOT, messages.marks
        if marks is not None:
            marked = Marked.BEGUN
            if not halves:  # else the kernel behind the rail may be launched much later
                marked |= Marked.DONE
                a.mark_counter, a.mark_word = marks.done
        messages.exchange(at, layout.nbytes, marked)
        a.num_tokens, a.bound = messages.num_hosts * bound, bound
        a.messages, a.message_bytes = received, layout.nbytes
        a.under_way = at.under_way.data_ptr()
        a.ids, a.ids_copy = received + layout.ids_at, block + tables["rail_ids"]
        a.weights = received + layout.weights_at
        a.x, a.input_bytes = received + layout.rows_at, a.row_bytes
        a.scale_kind = ScaleKind.NOT_QUANTIZED
        a.scales = received + layout.scales_at if a.scale_bytes else None
        return at

    # -- memory -----------------------------------------------------------------------------------

    def _open_rail(
        self, call: DispatchCall, ids: Tensor, weighted: bool
    ) -> tuple[Arguments, DispatchOutput, RailRoute]:
        """Arguments that name a call's tables and outputs."""
        num_tokens, bound, wide = call.x_TW.shape[0], self.bound_of(call), ids.dtype is torch.int64
        if call.buffers is None:
            form, forwarded = self._form_of(call, weighted), self._messages.num_hosts * bound
            output, block, address = self._make_output(call, form, forwarded, wide)
            route = self._new_rail_route(output, num_tokens, bound, block, weighted, address, wide)
            return self.arguments, output, route
        tables, output = call.buffers.tables, call.buffers.output
        assert isinstance(tables, BufferTables)
        if not weighted and output.topk_weights is not None:
            output = without_weights(output)
        a, arrived = tables.dispatch, output.topk_weights
        a.topk_weights = None if arrived is None else arrived.data_ptr()
        # A cached dispatch may read the number of the dispatch before.
        which = call.buffers.generation % ORIGINS
        route = self._new_rail_route(
            output, num_tokens, bound, tables.block, weighted, tables.ids_address, wide, which
        )
        route.combine = tables.combine
        return a, output, route

    def _new_rail_route(
        self,
        output: DispatchOutput,
        num_tokens: int,
        bound: int,
        block: Tensor,
        weighted: bool,
        ids_address: int,
        wide_ids: bool,
        which: int = 0,
    ) -> RailRoute:
        return RailRoute(
            shape=tuple(output.tokens.shape[:-1]),
            num_tokens=num_tokens,
            ids_TK=None,
            layout=self.tables,
            block=block,
            weights_block=None,
            weighted=weighted,
            counts=None,
            origin=block.data_ptr() + self.tables.at["origin"] + 4 * which,
            maker=self._number,
            ids_address=ids_address,
            wide_ids=wide_ids,
            restarts=self._restarts,
            bound=bound,
        )

    def _most_table_tokens(self) -> int:
        return self._messages.num_hosts * self._config.max_tokens_per_rank

    def _table_layout(self, num_hosts: int) -> LlTableLayout:
        return RailTableLayout(
            self._config,
            num_ranks=self._num_ranks,
            num_local=self._num_local,
            num_hosts=num_hosts,
        )
