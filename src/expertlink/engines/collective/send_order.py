"""Launcher of kernels/send_order.cu: the sending half of a dispatch in two launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertlink.engines.base import DispatchCall
from expertlink.engines.ranks.header import NUM_FIELDS, HeaderFields
from expertlink.jit.compiler import Launcher
from expertlink.layouts import as_bytes
from expertlink.routing import Placement, ReturnPaths

THREADS = 256
_IDS = {torch.int64: "long long", torch.int32: "int"}
_WEIGHTS = {torch.float32: "float", torch.float64: "double"}
MAX_RANKS = 800  # nine integers per rank have to fit into a block's shared memory


def count_instances() -> dict[torch.dtype, str]:
    """Instances of `count_rows` by the type of the ids."""
    return {dtype: f"count_rows<{name}>" for dtype, name in _IDS.items()}


def order_instances() -> dict[tuple[torch.dtype, torch.dtype], str]:
    """Instances of `order_rows` by the types of ids and weights."""
    return {
        (ids, weights): f"order_rows<{id_name}, {weight_name}>"
        for ids, id_name in _IDS.items()
        for weights, weight_name in _WEIGHTS.items()
    }


class KernelSender:
    """`engines.sending.Sender` on a GPU. Building one compiles; calls only launch."""

    def __init__(self, launcher: Launcher, placement: Placement) -> None:
        self.launcher = launcher
        self.placement = placement
        self.count_kernels = {
            dtype: launcher.load("collective/send_order", instance)
            for dtype, instance in count_instances().items()
        }
        self.order_kernels = {
            dtypes: launcher.load("collective/send_order", instance)
            for dtypes, instance in order_instances().items()
        }

    def __call__(self, call: DispatchCall, fields: HeaderFields, check: bool) -> KernelSending:
        return KernelSending(self, call, fields, check)


class KernelSending:
    """`engines.sending.Sending` on a GPU."""

    def __init__(
        self, sender: KernelSender, call: DispatchCall, fields: HeaderFields, check: bool
    ) -> None:
        assert call.topk_ids_TK is not None
        self._sender = sender
        self._call = call
        ids_TK, placement = call.topk_ids_TK, sender.placement
        ranks, experts = placement.num_ranks, placement.num_experts
        self._blocks = max(1, -(-ids_TK.shape[0] // THREADS))
        # One allocation: the header, to be zeroed, and the blocks' own counts, to be overwritten.
        counts = torch.zeros(
            NUM_FIELDS + ranks + experts + self._blocks * ranks,
            dtype=torch.int32,
            device=ids_TK.device,
        )
        self._counts = counts
        self.header = counts[: NUM_FIELDS + ranks + experts]
        self._block_rows = counts.data_ptr() + self.header.nbytes
        self._shape = (*ids_TK.shape, ranks, experts)
        self._launch(
            sender.count_kernels[ids_TK.dtype],
            ranks,
            ids_TK.data_ptr(),
            placement.rank_of_E.data_ptr(),
            *self._shape,
            fields.operation,
            fields.communicator,
            fields.call,
            fields.capacity,
            fields.row_bytes,
            fields.metadata_bytes,
            int(check),
            self.header.data_ptr(),
            self._block_rows,
        )

    @property
    def rows_per_rank(self) -> Tensor:
        return self.header[NUM_FIELDS : NUM_FIELDS + self._sender.placement.num_ranks]

    def order(self) -> None:
        call, placement = self._call, self._sender.placement
        ids_TK, weights_TK = call.topk_ids_TK, call.weights_TK
        assert ids_TK is not None
        num_tokens, topk = ids_TK.shape
        ranks = placement.num_ranks
        copies = min(ranks, topk)
        bound = num_tokens * copies
        weight_dtype = torch.float32 if weights_TK is None else weights_TK.dtype
        words = topk * (1 + (0 if weights_TK is None else weight_dtype.itemsize // 4))
        # One allocation; the tables are cut out of it when they are asked for.
        tables = ids_TK.new_empty(2 * bound + num_tokens * topk, dtype=torch.int64)
        self._tables, self._copies = tables, copies
        self._extras = ids_TK.new_empty((bound, words), dtype=torch.int32)
        self._launch(
            self._sender.order_kernels[ids_TK.dtype, weight_dtype],
            ranks * (1 + THREADS // 32),
            ids_TK.data_ptr(),
            0 if weights_TK is None else weights_TK.data_ptr(),
            placement.rank_of_E.data_ptr(),
            placement.local_of_E.data_ptr(),
            *self._shape,
            self.header.data_ptr(),
            self._block_rows,
            tables.data_ptr(),
            tables.data_ptr() + 8 * bound,
            tables.data_ptr() + 16 * bound,
            self._extras.data_ptr(),
            copies,
        )

    def token_of_row(self, count: int) -> Tensor:
        return self._tables[:count]

    def metadata(self, count: int) -> Tensor | None:
        packed = as_bytes(self._extras[:count])
        scales = self._call.scales
        if scales is None:
            return packed
        rows = as_bytes(scales).index_select(0, self.token_of_row(count))
        return torch.cat([packed, rows], dim=1)

    def paths(self) -> ReturnPaths:
        num_tokens, topk, *_ = self._shape
        bound = num_tokens * self._copies
        return ReturnPaths(
            rows_of_token=self._tables[bound : 2 * bound].view(num_tokens, self._copies),
            row_of_choice=self._tables[2 * bound :].view(num_tokens, topk),
        )

    def _launch(self, kernel: Any, shared_words: int, *arguments: int) -> None:
        self._sender.launcher.launch(
            kernel, *arguments, grid=self._blocks, block=THREADS, shared_bytes=shared_words * 4
        )
