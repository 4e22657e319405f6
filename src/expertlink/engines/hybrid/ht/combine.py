"""High-throughput combine across hosts of one rank: chunks, messages, arguments, launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall
from expertlink.engines.hybrid.ht.arguments import COMBINE
from expertlink.engines.hybrid.ht.chunks import (
    exchange,
    full_message,
    tell_chunk,
    tell_tables,
)
from expertlink.engines.hybrid.ht.messages import Messages
from expertlink.engines.hybrid.ht.order import Step, combine_steps
from expertlink.engines.hybrid.ht.plan import RailRow, head_rows
from expertlink.engines.hybrid.ht.tables import HybridRoute, HybridTables, as_hybrid_route
from expertlink.engines.nvlink.ht.arguments import Flag
from expertlink.engines.nvlink.ht.blocks import BlockShape
from expertlink.engines.nvlink.ht.combine import CombinePlanner
from expertlink.engines.nvlink.launch import KernelName, Launch, Launches, Run
from expertlink.engines.nvlink.mode import ALIGNMENT
from expertlink.engines.nvlink.shared import HEADER_WORDS
from expertlink.engines.nvlink.tables import Route
from expertlink.engines.ranks.header import Operation

_GRADS, _WITHIN_HOST = int(Flag.GRADS), int(Flag.WITHIN_HOST)


class ChunkLaunches(NamedTuple):
    """Launches of a combine, and what the kernels are told of them."""

    num_senders: int
    slot_bytes: int
    warp_bytes: int
    batch: int
    move: Launch
    add: Launch


@dataclass(frozen=True)
class HybridCombinePlanner:
    """Plans launches. `inside` plans those inside a host."""

    inside: CombinePlanner

    def __call__(self, row_bytes: int, num_sms: int | None) -> ChunkLaunches:
        """The launches for rows of a size (0: gradients only) and a caller's number of SMs."""
        *told, move = self.inside(row_bytes, num_sms)
        # Sums of hosts: all warps add up.
        add = Launch(
            grid=move.grid, block=move.block - 32, shared_bytes=move.shared_bytes, local=True
        )
        return ChunkLaunches(*told, move=move, add=add)


class HybridCombiner:
    """Queues the combines of one rank.

    Args:
        config: the communicator's.
        common: arguments that all calls share, by name.
        messages: what the rail carries.
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
        messages: Messages,
        run: Run,
        blocks: BlockShape,
        num_sms: int,
    ) -> None:
        self._topk, self._run, self._messages = config.topk, run, messages
        self._row_bytes = config.hidden_size * config.dtype.itemsize
        self._host = common["seat"] // messages.plan.num_peers
        self.arguments = COMBINE.new(**common)
        inside = CombinePlanner(config, blocks, num_sms)
        self.most_blocks = inside.most_blocks
        self._launches: Launches[ChunkLaunches] = Launches(HybridCombinePlanner(inside))

    def combine(self, call: CombineCall) -> Tensor | None:
        """Queues a combine; returns the weight gradients if the call asks for them."""
        rows, route = call.rows, as_hybrid_route(call.state)
        if rows.data_ptr() % ALIGNMENT:  # bulk copies do not accept that
            rows = rows.clone()
        a = self.arguments
        a.rows, a.out = rows.data_ptr(), call.out_TH.data_ptr()
        call.out_TH[self._moved(route) :].zero_()
        a.weights_of_row = route.weights_address() if call.weighted else None
        return self._return(
            route, Operation.COMBINE, self._row_bytes, grads=call.weight_grads, num_sms=call.num_sms
        )

    def weight_grads(self, route: Route, grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        self.arguments.weights_of_row = None
        returned = self._return(
            as_hybrid_route(route), Operation.WEIGHT_GRADS, 0, grads=grads, num_sms=None
        )
        assert returned is not None
        return returned

    def _return(
        self,
        route: HybridRoute,
        operation: Operation,
        row_bytes: int,
        *,
        grads: Tensor | None,
        num_sms: int | None,
    ) -> Tensor | None:
        """Writes what all calls say, and moves the chunks."""
        a, block, layout = self.arguments, route.block, route.layout
        assert isinstance(layout, HybridTables)
        grads_TK, flags, grad_bytes = None, 0, 0
        if grads is not None:
            grads = grads.to(torch.float32).contiguous()
            grads_TK = torch.empty(
                (route.num_tokens, self._topk), dtype=torch.float32, device=block.device
            )
            grads_TK[self._moved(route) :].zero_()
            a.slot_grads, a.grads_out = grads.data_ptr(), grads_TK.data_ptr()
            flags, grad_bytes = _GRADS, 4 * self._topk
        a.operation, a.row_bytes, a.flags = int(operation), row_bytes, flags
        a.header_metadata_bytes = grad_bytes
        a.subject, a.maker = route.origin, route.maker
        a.num_tokens, a.max_slots = route.num_tokens, math.prod(route.shape)
        tell_tables(a, layout, block.data_ptr(), route.num_tokens)
        a.rail_stride = a.sum_stride = RailRow(row_bytes, 0, grad_bytes).stride
        a.own_sums = self._messages.own_sums.data_ptr()
        a.head_rows = head_rows(HEADER_WORDS, a.rail_stride)
        self._move(route, self._launches[row_bytes, num_sms])
        return grads_TK

    def _moved(self, route: HybridRoute) -> int:
        """First token behind the chunks that move: nothing comes back for it."""
        starts = self._messages.plan.starts
        return starts[-1 if route.rows is None else len(route.rows)]

    def _move(self, route: HybridRoute, launches: ChunkLaunches) -> None:
        a, messages, plan = self.arguments, self._messages, self._messages.plan
        a.num_senders, a.slot_bytes, a.warp_bytes, a.batch = launches[:4]
        flags = a.flags
        num_chunks = plan.num_chunks if route.rows is None else len(route.rows)
        for step, chunk in combine_steps(num_chunks):
            tell_chunk(a, messages, chunk)
            a.message_bytes = full_message(a, plan, chunk) if route.rows is None else 0
            if step is Step.DRAIN:
                messages.wait(chunk)
                self._run(KernelName.SUM_HOSTS, a, launches.add)
                continue
            a.flags = flags | (_WITHIN_HOST if step is Step.OWN else 0)
            self._run(KernelName.COMBINE, a, launches.move)
            a.flags = flags
            if step is Step.FILL:
                exchange(a, messages, chunk, route.rows, host=self._host, back=True)
