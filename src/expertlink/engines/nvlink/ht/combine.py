"""High-throughput combine of one rank: arguments and launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ht.arguments import COMBINE, Flag
from expertlink.engines.nvlink.ht.blocks import BlockShape, split_blocks
from expertlink.engines.nvlink.launch import KernelName, Launch, Launches, Run
from expertlink.engines.nvlink.mode import ALIGNMENT
from expertlink.engines.nvlink.tables import Route, as_route
from expertlink.engines.ranks.header import Operation

# Plain numbers: the operators of enumerations take microseconds.
_WIDE_IDS, _GRADS = int(Flag.WIDE_IDS), int(Flag.GRADS)
_COMBINE, _WEIGHT_GRADS = int(Operation.COMBINE), int(Operation.WEIGHT_GRADS)
_KERNEL = KernelName.COMBINE


class CombineLaunch(NamedTuple):
    """A launch, and what the kernel is told of it: sending blocks, the warps' memory."""

    num_senders: int
    slot_bytes: int
    warp_bytes: int
    batch: int
    launch: Launch


@dataclass(frozen=True)
class CombinePlanner:
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
        """Blocks of a launch for a caller's number of SMs."""
        return min(self.num_sms, num_sms or self.config.num_sms_combine or self.blocks.default_sms)

    def __call__(self, row_bytes: int, num_sms: int | None) -> CombineLaunch:
        """The launch for rows of a size (0: gradients only) and a caller's number of SMs."""
        config, blocks = self.config, self.blocks
        total = self.most_blocks(num_sms)
        movers = blocks.combine(row_bytes)
        share = tuning.HT_COMBINE_SENDERS
        if config.layout.expanded:
            share = tuning.HT_COMBINE_SENDERS_EXPANDED
            if blocks.most_copies <= 2:
                share = tuning.HT_COMBINE_SENDERS_EXPANDED_TWO_RANKS
        elif movers.batch > 1:
            share = tuning.HT_COMBINE_SENDERS_SHORT_ROWS
        senders, total = split_blocks(total, senders=share)
        launch = Launch(
            grid=total,
            block=movers.threads,
            shared_bytes=blocks.shared_bytes(movers, counts=False),
        )
        return CombineLaunch(
            num_senders=senders,
            slot_bytes=movers.slot_bytes,
            warp_bytes=movers.warp_bytes,
            batch=movers.batch,
            launch=launch,
        )


class HtCombiner:
    """Queues the combines of one rank.

    Args:
        config: the communicator's.
        common: arguments that all calls share, by name.
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
        run: Run,
        blocks: BlockShape,
        num_sms: int,
    ) -> None:
        self._topk, self._max_tokens, self._run = config.topk, config.max_tokens_per_rank, run
        self._row_bytes = config.hidden_size * config.dtype.itemsize
        self.arguments = COMBINE.new(**common)
        planner = CombinePlanner(config, blocks, num_sms)
        self.most_blocks, self._launches = planner.most_blocks, Launches(planner)

    def combine(self, call: CombineCall) -> Tensor | None:
        """Queues a combine; returns the weight gradients if the call asks for them."""
        rows, route = call.rows, as_route(call.state)
        if rows.data_ptr() % ALIGNMENT:  # bulk copies do not accept that
            rows = rows.clone()
        a = self.arguments
        a.rows, a.out = rows.data_ptr(), call.out_TH.data_ptr()
        a.weights_of_row = route.weights_address() if call.weighted else None
        return self._return(
            route, _COMBINE, self._row_bytes, grads=call.weight_grads, num_sms=call.num_sms
        )

    def weight_grads(self, route: Route, grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        self.arguments.weights_of_row = None
        returned = self._return(route, _WEIGHT_GRADS, 0, grads=grads, num_sms=None)
        assert returned is not None
        return returned

    def _return(
        self,
        route: Route,
        operation: int,
        row_bytes: int,
        *,
        grads: Tensor | None,
        num_sms: int | None,
    ) -> Tensor | None:
        """Writes what all calls say, and launches.

        The struct is used again: a new one takes more time than everything else a call does.
        """
        a, at, block = self.arguments, route.layout.at, route.block.data_ptr()
        grads_TK = None
        flags = _WIDE_IDS if route.wide_ids else 0
        a.header_metadata_bytes = 0
        if grads is not None:
            grads = grads.to(torch.float32).contiguous()
            grads_TK = torch.empty(
                (route.num_tokens, self._topk), dtype=torch.float32, device=route.block.device
            )
            a.slot_grads, a.grads_out = grads.data_ptr(), grads_TK.data_ptr()
            a.header_metadata_bytes = 4 * self._topk
            flags |= _GRADS
        a.operation, a.row_bytes, a.flags = operation, row_bytes, flags
        a.subject, a.maker = route.origin, route.maker
        a.num_tokens, a.max_slots = route.num_tokens, math.prod(route.shape)
        a.ids = route.ids_address
        slots = route.slots_for(self._max_tokens)  # kept until the launch
        a.slots_of_token = block + at["slots"] if slots is None else slots.data_ptr()
        a.rows_from, a.rows_to = block + at["rows_from"], block + at["rows_to"]
        a.first_row = block + at["first_row"]
        a.choices_of_row = block + at["choices"]
        plan = self._launches[row_bytes, num_sms]
        a.num_senders, a.slot_bytes, a.warp_bytes, a.batch, launch = plan
        self._run(_KERNEL, a, launch)
        return grads_TK
