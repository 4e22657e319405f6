"""Low-latency combine across hosts: a combine inside each host, a message back, the last sum.

First half: `ll::combine` sums, for every token of the rail, the partial sums of the ranks of the
host, and the rail moves these sums to the tokens' ranks. Second half: `ll::sum_hosts` sums them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall
from expertlink.engines.hybrid.ll.arguments import SUM
from expertlink.engines.hybrid.ll.memory import Messages
from expertlink.engines.hybrid.ll.messages import CombineMessage
from expertlink.engines.hybrid.ll.tables import RailRoute
from expertlink.engines.hybrid.rail import Marked
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.launch import KernelName, Run
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.arguments import Flag, signature
from expertlink.engines.nvlink.ll.combine import LlCombiner, name_tables
from expertlink.engines.nvlink.ll.launch import add_half, local_launch
from expertlink.engines.nvlink.ll.tables import said_by
from expertlink.engines.ranks.header import Operation
from expertlink.jit.kernel import Arguments

_WIDE_IDS, _GRADS, _ALONE = int(Flag.WIDE_IDS), int(Flag.GRADS), int(Flag.ALONE)


class RailCombiner(LlCombiner):
    """Queues the combines of one rank whose group spans hosts.

    Args:
        config, common, arena, run, num_ranks, num_sms, max_warps: as `LlCombiner`; the arena is
            that of the host, and `common` names this rank by its index there.
        messages: those of this rank.
        rank_of_expert: `[E]` int32 on the device.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        common: dict[str, int],
        arena: LlArena,
        run: Run,
        num_ranks: int,
        num_sms: int,
        max_warps: int,
        messages: Messages,
        rank_of_expert: Tensor,
    ) -> None:
        super().__init__(
            config,
            common=common,
            arena=arena,
            run=run,
            num_ranks=num_ranks,
            num_sms=num_sms,
            max_warps=max_warps,
            num_hosts=messages.num_hosts,
        )
        self._arena, self._run, self._messages = arena, run, messages
        self._rank_of_expert = rank_of_expert
        self._warps = max(1, min(max_warps, tuning.LL_COMBINE_WARPS))
        self.arguments.host = messages.host
        self._sum = SUM.new(
            state=common["state"],
            control=common["control"],
            host=messages.host,
            rank=messages.local,
            rank_of_expert=rank_of_expert.data_ptr(),
        )

    def combine(
        self, call: CombineCall, after: Callable[[], object] | None = None
    ) -> tuple[Tensor | None, Callable[[], None] | None]:
        """As `LlCombiner.combine`; weights of the tokens' ranks come with a dispatch before."""
        route, grads, weights = call.state, call.weight_grads, call.slot_weights
        assert isinstance(route, RailRoute)
        assert call.weights_TK is None
        a = self._begin(route, halves=call.return_recv_hook)
        a.operation, a.row_bytes = int(Operation.COMBINE), self._row_bytes
        a.rows, a.slot_weights = call.rows.data_ptr(), None
        if weights is not None:
            a.slot_weights = weights.data_ptr()
        a.weights_of_row = route.weights_address() if call.weighted else None
        a.signature = self._signatures[grads is not None, False]
        return self._finish(
            a,
            route,
            grads,
            call.out_TH,
            num_sms=call.num_sms,
            halves=call.return_recv_hook,
            needs=(call,),
            after=after,
        )

    def weight_grads(self, route: RailRoute, grads: Tensor) -> Tensor:  # pyright: ignore
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        a = self._begin(route, halves=False)
        a.operation, a.row_bytes = int(Operation.WEIGHT_GRADS), 0
        a.slot_weights = a.weights_of_row = None
        a.signature = signature(Operation.WEIGHT_GRADS, row_bytes=0, weights=True)
        grads_TK, _ = self._finish(a, route, grads, None)
        assert grads_TK is not None
        return grads_TK

    def _begin(self, route: RailRoute, *, halves: bool) -> Arguments:
        """Arguments of a combine with the tables of a routing; earlier halves are launched."""
        arena = self._arena
        arena.halves.finish(arena.capture(), tuning.LL_CALLS_IN_FLIGHT - 1 if halves else 0)
        a = route.combine
        if a is None:
            a = self.arguments
            name_tables(a, route.layout, route.block, max_slots=math.prod(route.shape))
        a.communicator = said_by(self._number, of=route)
        a.ids = route.block.data_ptr() + route.layout.at["rail_ids"]
        a.num_tokens, a.bound, a.subject = route.rail_tokens, route.bound, route.origin
        return a

    def _finish(
        self,
        a: Arguments,
        route: RailRoute,
        grads: Tensor | None,
        out_TH: Tensor | None,
        *,
        num_sms: int | None = None,
        halves: bool = False,
        needs: tuple[object, ...] = (),
        after: Callable[[], object] | None = None,
    ) -> tuple[Tensor | None, Callable[[], None] | None]:
        """Queues the first half, and the second one or what queues it."""
        messages, arena = self._messages, self._arena
        flags = _ALONE if self._in_use[0] > 1 else 0
        grads_TK = None
        if grads is not None:
            flags |= _GRADS
            grads_TK = self._name_grads(a, route, grads)
        layout = CombineMessage.of(
            bound=route.bound, topk=self._topk, row_bytes=a.row_bytes, grads=grads is not None
        )
        at = messages.next_set()
        sent, size = at.send.data_ptr(), layout.nbytes
        a.messages, a.message_bytes, a.under_way = sent, size, at.under_way.data_ptr()
        a.out, a.grads_out = sent + layout.rows_at, sent + layout.grads_at
        self._launch.launch_whole(KernelName.COMBINE, a, flags, num_sms)
        # ll::combine waits for ranks of the host, so it does not say that the rail's step begins.
        s = self._sum.copy() if halves else self._sum
        s.mark_counter = s.mark_word = None
        marked, marks = Marked.NOT, messages.marks
        if marks is not None and not halves:  # else the last kernel may be launched much later
            marked = Marked.DONE
            s.mark_counter, s.mark_word = marks.done
        messages.exchange(at, size, marked)
        wide = route.wide_ids
        s.flags, s.operation = (_WIDE_IDS if wide else 0) | (flags & _GRADS), a.operation
        s.num_tokens, s.row_bytes, s.ids = route.num_tokens, a.row_bytes, route.ids_address
        s.under_way, s.message_bytes = at.under_way.data_ptr(), size
        s.rows_at, s.grads_at = layout.rows_at, layout.grads_at
        s.receive, s.own = at.receive.data_ptr(), sent + (messages.num_hosts - 1) * size
        s.out = None if out_TH is None else out_TH.data_ptr()
        s.grads_out = None if grads_TK is None else grads_TK.data_ptr()
        blocks = self.most_blocks(num_sms)
        launch, capture = local_launch(blocks, 32 * self._warps), arena.capture()
        if capture:  # as in dispatches
            launch = launch.after_all

        def add_up() -> None:
            self._run(KernelName.SUM_HOSTS, s, launch)
            if after is not None:
                after()

        if halves:
            kept = (*needs, route, grads, grads_TK, out_TH, at)
            return grads_TK, add_half(arena, capture, add_up, tables=route.block, needs=kept)
        add_up()
        return grads_TK, None
