"""Host side of kernels/collective/send_order.cu: the sending half of a dispatch in two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.config import MAX_TOPK
from expertlink.engines.base import DispatchCall
from expertlink.engines.ranks.header import NUM_FIELDS, HeaderFields, HeaderWord
from expertlink.jit.compiler import CompiledKernel, compile_kernel, constants, enum_declaration
from expertlink.jit.kernel import Arguments, Field, Kernel, Struct, architecture, load_kernel
from expertlink.layouts import as_bytes
from expertlink.routing import Placement, ReturnPaths

THREADS = 256
_WARPS = THREADS // 32
_IDS = {torch.int64: "long long", torch.int32: "int"}
_WEIGHTS = {torch.float32: "float", torch.float64: "double"}
MAX_RANKS = 800  # nine integers per rank have to fit into a block's shared memory

_COMMON = (
    Field("const void*", "ids", "[T, K] global expert ids"),
    Field("const long long*", "rank_of", "[E] rank of each expert"),
    Field("long long", "tokens", "T"),
    Field("long long", "topk", "K"),
    Field("long long", "ranks", "R"),
    Field("long long", "experts", "E"),
    Field("int*", "header", "[kNumFields + R + E]"),
    Field("int*", "block_rows", "[blocks, R] rows of each block's tokens for every rank"),
)
COUNT = Struct(
    "CountArguments",
    (
        *_COMMON,
        *(Field("int", word.name.lower(), "word of the header") for word in HeaderWord),
        Field("int", "check", "not 0: faulty ids raise the header's status"),
    ),
)
ORDER = Struct(
    "OrderArguments",
    (
        *_COMMON,
        Field("const void*", "weights", "[T, K], or null"),
        Field("const int*", "local_of", "[E] index of each expert on its rank"),
        Field("long long*", "token_of_row", "[T * D] token of each row"),
        Field("long long*", "rows_of_token", "[T, D] rows of each token, then -1"),
        Field("long long*", "row_of_choice", "[T, K] row of each choice, or -1"),
        Field("int*", "metadata", "[T * D, words] K local ids, then K weights if there are any"),
        Field("long long", "copies", "D"),
    ),
)
PRELUDE = (
    enum_declaration(HeaderWord, prefix="k")
    + constants({"kNumFields": NUM_FIELDS, "kThreads": THREADS, "kMaxTopk": MAX_TOPK})
    + COUNT.declaration
    + ORDER.declaration
)


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


def compile_instance(instance: str, arch: str) -> CompiledKernel:
    """Machine code of one instance. Needs no GPU."""
    return compile_kernel("collective/send_order", instance, arch, prelude=PRELUDE)


class KernelSender:
    """`sending.Sender` on a GPU. Building one compiles and loads; calls only launch."""

    def __init__(self, device: torch.device, placement: Placement) -> None:
        self.placement = placement
        arch = architecture(device)
        self.count_kernels = {
            dtype: load_kernel(device, compile_instance(instance, arch))
            for dtype, instance in count_instances().items()
        }
        self.order_kernels = {
            dtypes: load_kernel(device, compile_instance(instance, arch))
            for dtypes, instance in order_instances().items()
        }

    def __call__(self, call: DispatchCall, fields: HeaderFields, check: bool) -> KernelSending:
        return KernelSending(self, call, fields, check)


class KernelSending:
    """`sending.Sending` on a GPU."""

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
        self.header = counts[: NUM_FIELDS + ranks + experts]
        self._common = {
            "ids": ids_TK.data_ptr(),
            "rank_of": placement.rank_of_E.data_ptr(),
            "tokens": ids_TK.shape[0],
            "topk": ids_TK.shape[1],
            "ranks": ranks,
            "experts": experts,
            "header": counts.data_ptr(),
            "block_rows": counts.data_ptr() + self.header.nbytes,
        }
        arguments = COUNT.new(**self._common, **vars(fields), check=int(check))
        self._launch(sender.count_kernels[ids_TK.dtype], arguments, shared_words=ranks)

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
        self._metadata = ids_TK.new_empty((bound, words), dtype=torch.int32)
        arguments = ORDER.new(
            **self._common,
            weights=None if weights_TK is None else weights_TK.data_ptr(),
            local_of=placement.local_of_E.data_ptr(),
            token_of_row=tables.data_ptr(),
            rows_of_token=tables.data_ptr() + 8 * bound,
            row_of_choice=tables.data_ptr() + 16 * bound,
            metadata=self._metadata.data_ptr(),
            copies=copies,
        )
        kernel = self._sender.order_kernels[ids_TK.dtype, weight_dtype]
        self._launch(kernel, arguments, shared_words=ranks * (1 + _WARPS))

    def token_of_row(self, count: int) -> Tensor:
        return self._tables[:count]

    def metadata(self, count: int) -> Tensor | None:
        packed = as_bytes(self._metadata[:count])
        scales = self._call.scales
        if scales is None:
            return packed
        rows = as_bytes(scales).index_select(0, self.token_of_row(count))
        return torch.cat([packed, rows], dim=1)

    def paths(self) -> ReturnPaths:
        num_tokens, topk = self._common["tokens"], self._common["topk"]
        bound = num_tokens * self._copies
        return ReturnPaths(
            rows_of_token=self._tables[bound : 2 * bound].view(num_tokens, self._copies),
            row_of_choice=self._tables[2 * bound :].view(num_tokens, topk),
        )

    def _launch(self, kernel: Kernel, arguments: Arguments, *, shared_words: int) -> None:
        device = self.header.device
        with torch.cuda.device(device):  # the caller's current GPU may be another one
            kernel.launch(
                arguments,
                grid=self._blocks,
                block=THREADS,
                shared_bytes=4 * shared_words,
                stream=torch.cuda.current_stream(device).cuda_stream,
            )
