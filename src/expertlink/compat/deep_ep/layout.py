"""Where the tokens of this rank go: `get_dispatch_layout`.

Plain torch says what it is; on GPUs a kernel does the same in one launch. Experts lie in even
blocks: rank r holds experts r * E / R up to (r + 1) * E / R.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from expertlink.engines.nvlink.capture import raw_stream
from expertlink.errors import EngineUnavailableError
from expertlink.jit.compiler import CompiledKernel, compile_kernel, constants
from expertlink.jit.kernel import Field, Struct, architecture, load_kernel

THREADS = 1024
_SHARED_BYTES = 48 << 10  # what a block has without asking for more
_MAX_LOCAL_EXPERTS = (_SHARED_BYTES - 1024) // 4
_IDS = {torch.int64: "long long", torch.int32: "int"}

ARGUMENTS = Struct(
    "LayoutArguments",
    (
        Field("const void*", "ids", "[T, K] global expert ids"),
        Field("int*", "per_rank", "[R] tokens for each rank"),
        Field("int*", "per_expert", "[E] choices of each expert"),
        Field("unsigned char*", "member", "[T, R] whether a token goes to a rank"),
        Field("long long", "tokens", "T"),
        Field("int", "topk", "K"),
        Field("int", "local_experts", "E / R"),
    ),
)
PRELUDE = constants({"kThreads": THREADS}) + ARGUMENTS.declaration


class DispatchCounts(NamedTuple):
    """What `Buffer.get_dispatch_layout` returns before its event.

    Attributes:
        per_rank: `[R]` int32 tokens for each rank, each once.
        per_expert: `[E]` int32 choices of each expert.
        is_token_in_rank: `[T, R]` bool.
    """

    per_rank: Tensor
    per_expert: Tensor
    is_token_in_rank: Tensor


def counts_by_torch(topk_ids_TK: Tensor, num_experts: int, num_ranks: int) -> DispatchCounts:
    """Counts the choices of one rank's tokens; ids outside of 0..E-1 choose nobody."""
    num_tokens, device = topk_ids_TK.shape[0], topk_ids_TK.device
    # 1..E stand for the experts, 0 and E + 1 for nobody; likewise 1..R for their ranks.
    expert_TK = topk_ids_TK.to(torch.int64).clamp(-1, num_experts) + 1
    counts = torch.zeros(num_experts + 2, dtype=torch.int32, device=device)
    counts.scatter_(0, expert_TK.view(-1), 1, reduce="add")
    num_local = num_experts // num_ranks
    member_TR = torch.zeros((num_tokens, num_ranks + 2), dtype=torch.bool, device=device)
    member_TR.scatter_(1, (expert_TK + (num_local - 1)) // num_local, True)
    is_token_in_rank = member_TR[:, 1 : num_ranks + 1].contiguous()
    per_rank = is_token_in_rank.sum(dim=0, dtype=torch.int32)
    return DispatchCounts(per_rank, counts[1 : num_experts + 1], is_token_in_rank)


class KernelCounter:
    """The same on a GPU, in one launch. Not thread-safe: it has memory for one launch's arguments.

    Building one compiles and loads.

    Args:
        device: of the ids.
        num_ranks: R.

    Raises:
        EngineUnavailableError: kernels cannot be compiled here.
    """

    def __init__(self, device: torch.device, num_ranks: int) -> None:
        arch = architecture(device)
        self._device, self._num_ranks, self._stream = device, num_ranks, raw_stream(device)
        self._arguments = ARGUMENTS.new()
        self._kernels = {
            dtype: load_kernel(device, compile_instance(instance, arch))
            for dtype, instance in instances().items()
        }

    def takes(self, topk_ids_TK: Tensor, num_experts: int) -> bool:
        """Whether the kernel counts such ids: on its GPU, where a block has room for the counts."""
        return (
            topk_ids_TK.__class__ is Tensor  # others may have no memory themselves
            and topk_ids_TK.device == self._device
            and topk_ids_TK.dtype in _IDS
            and num_experts // self._num_ranks <= _MAX_LOCAL_EXPERTS
        )

    def __call__(self, topk_ids_TK: Tensor, num_experts: int) -> DispatchCounts:
        """The counts of ids that it takes, on the current stream."""
        a, num_ranks = self._arguments, self._num_ranks
        num_tokens, a.topk = topk_ids_TK.shape
        per_rank = topk_ids_TK.new_empty(num_ranks, dtype=torch.int32)
        per_expert = topk_ids_TK.new_empty(num_experts, dtype=torch.int32)
        member_TR = topk_ids_TK.new_empty((num_tokens, num_ranks), dtype=torch.bool)
        a.tokens, a.local_experts = num_tokens, num_experts // num_ranks
        a.ids, a.member = topk_ids_TK.data_ptr(), member_TR.data_ptr()
        a.per_rank, a.per_expert = per_rank.data_ptr(), per_expert.data_ptr()
        if torch.cuda.current_device() == self._device.index:
            self._launch(topk_ids_TK.dtype)
        else:
            with torch.cuda.device(self._device):
                self._launch(topk_ids_TK.dtype)
        return DispatchCounts(per_rank, per_expert, member_TR)

    def _launch(self, dtype: torch.dtype) -> None:
        a = self._arguments
        self._kernels[dtype].launch(
            a,
            grid=self._num_ranks,
            block=THREADS,
            shared_bytes=4 * a.local_experts,
            stream=self._stream(),
        )


class LayoutCounter:
    """Counts the choices of one buffer's tokens; ids outside of 0..E-1 choose nobody.

    Args:
        device: the buffer's.
        num_ranks: R.
    """

    def __init__(self, device: torch.device, num_ranks: int) -> None:
        self._device, self._num_ranks = device, num_ranks
        self._kernel: KernelCounter | None = None
        self._waits = device.type == "cuda"  # for its first call, which compiles

    def __call__(self, topk_ids_TK: Tensor, num_experts: int) -> DispatchCounts:
        """The counts, on the current stream."""
        if self._waits and not torch.cuda.is_current_stream_capturing():  # nothing loads there
            self._waits = False
            with contextlib.suppress(EngineUnavailableError):  # plain torch does as well
                self._kernel = KernelCounter(self._device, self._num_ranks)
        kernel = self._kernel
        if kernel is not None and kernel.takes(topk_ids_TK, num_experts):
            return kernel(topk_ids_TK, num_experts)
        return counts_by_torch(topk_ids_TK, num_experts, self._num_ranks)


def instances() -> dict[torch.dtype, str]:
    """Instances of the kernel by the type of the ids."""
    return {dtype: f"token_layout<{name}>" for dtype, name in _IDS.items()}


def compile_instance(instance: str, arch: str) -> CompiledKernel:
    """Machine code of one instance. Needs no GPU."""
    return compile_kernel("compat/token_layout", instance, arch, prelude=PRELUDE)


def ranks_as_experts(is_token_in_rank: Tensor) -> Tensor:
    """`[T, R]` int64 ids for a dispatch in which every rank is one expert."""
    ranks = torch.arange(
        is_token_in_rank.shape[1], dtype=torch.int64, device=is_token_in_rank.device
    )
    return torch.where(is_token_in_rank, ranks, -1)
