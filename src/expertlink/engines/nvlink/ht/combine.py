"""High-throughput combine of one rank: arguments and launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall
from expertlink.engines.nvlink.ht.arguments import COMBINE, Flag
from expertlink.engines.nvlink.launch import BlockShape, KernelName, Launch, Run, split_blocks
from expertlink.engines.nvlink.tables import Route, as_route
from expertlink.engines.ranks.header import Operation

_SENDERS = {True: 0.78, False: 0.6}  # share of the blocks that send; expanded layouts or not

# Plain numbers: the operators of enumerations take microseconds.
_WIDE_IDS, _GRADS = int(Flag.WIDE_IDS), int(Flag.GRADS)


class Combiner:
    """Builds and queues the combines of one rank.

    Args:
        config: the communicator's.
        common: arguments that all calls share, by name.
        run: queues a kernel.
        blocks: shape of the blocks.
        num_sms: SMs to use where a call does not say.
        max_sms: multiprocessors of the GPU.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        common: dict[str, int],
        run: Run,
        blocks: BlockShape,
        num_sms: int,
        max_sms: int,
    ) -> None:
        self._config, self._run, self._blocks = config, run, blocks
        self._num_sms, self._max_sms = num_sms, max_sms
        self._arguments: Any = COMBINE.new(**common)
        self._launches: dict[tuple[int, int | None], tuple[int, int, Launch]] = {}

    def combine(self, call: CombineCall) -> Tensor | None:
        """Queues a combine; returns the weight gradients if the call asks for them."""
        return self._return(
            as_route(call.state),
            Operation.COMBINE,
            rows=call.rows,
            out_TH=call.out_TH,
            weighted=call.weighted,
            grads=call.weight_grads,
            num_sms=call.num_sms,
        )

    def weight_grads(self, route: Route, grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        returned = self._return(
            route,
            Operation.WEIGHT_GRADS,
            rows=None,
            out_TH=None,
            weighted=False,
            grads=grads,
            num_sms=None,
        )
        assert returned is not None
        return returned

    def _return(
        self,
        route: Route,
        operation: Operation,
        *,
        rows: Tensor | None,
        out_TH: Tensor | None,
        weighted: bool,
        grads: Tensor | None,
        num_sms: int | None,
    ) -> Tensor | None:
        a, config = self._arguments, self._config
        row_bytes = 0
        if rows is not None and out_TH is not None:
            rows = _aligned(rows)
            row_bytes = config.hidden_size * config.dtype.itemsize
            a.rows, a.out = rows.data_ptr(), out_TH.data_ptr()
        grads_TK = None
        flags = _WIDE_IDS if route.ids_TK.dtype is torch.int64 else 0
        if grads is not None:
            grads = grads.to(torch.float32).contiguous()
            grads_TK = torch.empty(
                (route.num_tokens, config.topk), dtype=torch.float32, device=route.block.device
            )
            a.slot_grads, a.grads_out = grads.data_ptr(), grads_TK.data_ptr()
            flags |= _GRADS
        tables, block = route.layout, route.block.data_ptr()
        a.operation, a.row_bytes, a.flags = int(operation), row_bytes, flags
        a.header_metadata_bytes = 0 if grads is None else 4 * config.topk
        a.subject = route.origin
        a.num_tokens = route.num_tokens
        a.max_slots = math.prod(route.shape)
        a.ids = route.ids_TK.data_ptr()
        a.slots_of_token = tables.address(block, "slots")
        a.rows_from = tables.address(block, "rows_from")
        a.first_row = tables.address(block, "first_row")
        a.choices_of_row = tables.address(block, "choices")
        a.weights_of_row = route.weights_address() if weighted else None
        key = (row_bytes, num_sms)
        known = self._launches.get(key)
        if known is None:
            known = self._launches[key] = self._plan(*key)
        a.num_senders, a.slot_bytes, launch = known
        self._run(KernelName.COMBINE, a, launch)
        return grads_TK

    def _plan(self, row_bytes: int, num_sms: int | None) -> tuple[int, int, Launch]:
        """Sending blocks, shared memory of a warp, and the grid."""
        total = min(self._max_sms, num_sms or self._num_sms)
        senders, total = split_blocks(total, senders=_SENDERS[self._config.layout.expanded])
        launch = Launch(
            grid=total,
            block=self._blocks.threads(row_bytes),
            shared_bytes=self._blocks.shared_bytes(row_bytes, counts=False),
        )
        return senders, self._blocks.slot_bytes(row_bytes), launch


def _aligned(rows: Tensor) -> Tensor:
    """Rows at an address that bulk copies accept."""
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
