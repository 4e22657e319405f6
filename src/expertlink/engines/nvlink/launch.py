"""The kernels of the nvlink engine, specialised to a communicator, and how they are launched."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.arena import HEAD_WORDS, STATE_WORDS, ArenaPlan, RowShape, round_up
from expertlink.engines.nvlink.ht import arguments as ht_arguments
from expertlink.engines.nvlink.ll import arguments as ll_arguments
from expertlink.engines.nvlink.ll import plan as ll_plan
from expertlink.jit.compiler import CompiledKernel, compile_kernel, constants
from expertlink.jit.kernel import Arguments, load_kernel
from expertlink.routing import Placement
from expertlink.types import DispatchLayout

HOME_STRIDE = 1 << 16  # an expert's home is its rank times this, plus its index there
LATENCY_WARPS = 16  # most warps of a block of the low-latency kernels
_COMBINE_WARPS = 12  # of ll_combine's: more registers for each
SHARED_BYTES = 227 * 1024  # of a block on sm_90 and later
STATIC_BYTES = 10 * 1024  # of which barriers and small tables take this much at most
_SHARED_SLOTS = 512  # first slots that placing keeps in shared memory
_SHARED_TABLE = 16 * 1024  # words of count rows that planning keeps there
_MAX_WARPS = 15  # that move rows; one more announces them


class KernelName(enum.IntEnum):
    """The kernels that a mode may have. (Integers are hashed faster than other enumerations.)"""

    DISPATCH = 0
    DISPATCH_QUANTIZED = 1
    """Dispatch that quantizes the rows."""
    COMBINE = 2


@dataclass(frozen=True)
class Launch:
    """Grid of one launch.

    Attributes:
        grid: blocks.
        block: threads.
        shared_bytes: dynamic shared memory of a block.
        follows: may start before the kernel before it is over.
        local: waits for no other rank.
    """

    grid: int
    block: int
    shared_bytes: int
    follows: bool = False
    local: bool = False


Run = Callable[[str, Arguments, Launch], None]
"""Queues a kernel by its name, with its arguments, on the current stream."""

KernelPlan = ArenaPlan | ll_plan.LatencyPlan


def kernel_constants(
    config: MoECommunicatorConfig, plan: KernelPlan, *, num_ranks: int
) -> dict[str, int]:
    """What a communicator fixes, under the names that the kernels know; the same on all ranks."""
    layout = config.layout
    common = {
        "kNumRanks": num_ranks,
        "kNumExperts": config.num_experts,
        "kTopk": config.topk,
        "kCopies": min(num_ranks, config.topk),
        "kMaxTokens": config.max_tokens_per_rank,
        "kExpanded": int(layout.expanded),
        "kPadded": int(layout.padded),
        "kLayoutIsRankMajor": int(layout is DispatchLayout.RANK_MAJOR),
        "kAlignment": config.expert_alignment,
        "kIsBfloat16": int(config.dtype is torch.bfloat16),
        "kHomeStride": HOME_STRIDE,
        # What the device code declares as well, and asserts to be the same.
        "kHostHeadWords": HEAD_WORDS,
        "kHostStateWords": STATE_WORDS,
    }
    if isinstance(plan, ll_plan.LatencyPlan):
        return {
            **common,
            "kDispatchWarps": LATENCY_WARPS,
            "kCombineWarps": _COMBINE_WARPS,
            **ll_plan.constants_of(config, plan, num_ranks=num_ranks),
            **ll_arguments.FLAG_CONSTANTS,
        }
    shape = RowShape.of(config)
    return {
        **common,
        "kStagingStride": shape.staged,
        "kBesideStride": shape.beside,
        "kScalesAt": shape.scales_at,
        "kMaxWarps": _MAX_WARPS,
        "kMostSharedSlots": _SHARED_SLOTS,
        "kMostSharedTable": _SHARED_TABLE,
        "kGradBytes": round_up(4 * config.topk, 16),
        **plan.offsets(num_ranks),
        **ht_arguments.FLAG_CONSTANTS,
    }


def compile_for(
    config: MoECommunicatorConfig,
    plan: KernelPlan,
    *,
    num_ranks: int,
    arch: str,
    hosted: bool = False,
) -> dict[str, CompiledKernel]:
    """Machine code of the kernels by name. Needs no GPU.

    Args:
        config: the communicator's.
        plan: of its arena.
        num_ranks: R.
        arch: target such as `sm_90a`.
        hosted: entry points for several ranks on one GPU, whose argument is a table of structs.
    """
    latency = isinstance(plan, ll_plan.LatencyPlan)
    structs = ll_arguments if latency else ht_arguments
    prelude = "struct State;\nstruct Control;\nstruct Counters;\n"
    prelude += constants(kernel_constants(config, plan, num_ranks=num_ranks))
    prelude += structs.DISPATCH.declaration + structs.COMBINE.declaration
    suffix = "_hosted" if hosted else ""
    return {
        name: compile_kernel(source, kernel + suffix + variant, arch, prelude=prelude)
        for name, source, kernel, variant in _instances(config, latency=latency)
    }


def _instances(
    config: MoECommunicatorConfig, *, latency: bool
) -> Iterator[tuple[str, str, str, str]]:
    """Name, source, kernel and template arguments of every kernel that a communicator launches."""
    if not latency:
        yield "dispatch", "ht/dispatch", "dispatch", ""
        yield "combine", "ht/combine", "combine", ""
        return
    yield "ll_dispatch", "ll/dispatch", "ll_dispatch", "<false>"
    if config.quantization is not None:
        yield "ll_dispatch_quantized", "ll/dispatch", "ll_dispatch", "<true>"
    yield "ll_combine", "ll/combine", "ll_combine", ""


def latency_warps(name: str, most: int = LATENCY_WARPS) -> int:
    """Warps of a block of a low-latency kernel, `most` at most."""
    return min(most, _COMBINE_WARPS if name == "ll_combine" else LATENCY_WARPS)


class DeviceRunner:
    """Launches this rank's kernels on torch's current stream. Building one compiles and loads."""

    def __init__(
        self,
        config: MoECommunicatorConfig,
        plan: KernelPlan,
        *,
        num_ranks: int,
        device: torch.device,
    ) -> None:
        self._stream = raw_stream(device)
        compiled = compile_for(config, plan, num_ranks=num_ranks, arch=architecture(device))
        self._kernels = {
            name: load_kernel(device, code, max_shared_bytes=SHARED_BYTES - STATIC_BYTES)
            for name, code in compiled.items()
        }

    def __call__(self, name: str, arguments: Arguments, launch: Launch) -> None:
        self._kernels[name].launch(
            arguments,
            grid=launch.grid,
            block=launch.block,
            shared_bytes=launch.shared_bytes,
            stream=self._stream(),
            follows=launch.follows,
        )


def homes_of(placement: Placement) -> torch.Tensor:
    """`[E]` int32: where every expert lives, in one number."""
    homes = placement.rank_of_E[:-1] * HOME_STRIDE + placement.local_of_E[:-1]
    return homes.to(torch.int32)


def raw_stream(device: torch.device) -> Callable[[], int]:
    """What gives the handle of torch's current stream of a GPU, without making a stream object."""
    current, index = torch._C._cuda_getCurrentRawStream, device.index

    def stream() -> int:
        return current(index)

    return stream


def architecture(device: torch.device) -> str:
    """Compiler target of a GPU, such as `sm_90a`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}a"


class BlockShape:
    """Threads and shared memory of blocks for rows of a size.

    Args:
        config: the communicator's.
        num_ranks: R.
        num_local: E_loc.
        max_warps: most warps of a block.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        num_ranks: int,
        num_local: int,
        max_warps: int = _MAX_WARPS,
    ) -> None:
        self._beside = RowShape.of(config).beside
        self._room = SHARED_BYTES - STATIC_BYTES
        self._columns = num_ranks + config.num_experts
        table = num_ranks * (HEAD_WORDS + self._columns)
        table = table if table <= _SHARED_TABLE else 0
        self._plan_bytes = 4 * (2 * num_ranks + num_local + 1 + table)
        self._max_warps = max_warps

    def slot_bytes(self, row_bytes: int) -> int:
        """Shared memory of a warp that moves rows."""
        return round_up(row_bytes + self._beside, 128)

    def warps(self, row_bytes: int) -> int:
        """Warps that move rows, each with one of its own in shared memory."""
        return max(1, min(self._max_warps, self._room // self.slot_bytes(row_bytes)))

    def threads(self, row_bytes: int) -> int:
        """Threads of a block."""
        return 32 * (self.warps(row_bytes) + 1)

    def groups(self, warps: int) -> int:
        """Masks of 32 tokens that counting can hold at a time."""
        return min(warps, self._room // (4 * self._columns) - 2)

    def shared_bytes(self, row_bytes: int, *, counts: bool) -> int:
        """Dynamic shared memory of a block."""
        warps = self.warps(row_bytes)
        ring = warps * self.slot_bytes(row_bytes)
        if not counts:
            return ring
        return max(ring, 4 * (self.groups(warps) + 2) * self._columns, self._plan_bytes)

    def unavailable_reason(self, row_bytes: int) -> str | None:
        """Why a communicator is too large for these kernels, or None."""
        if self.slot_bytes(row_bytes) > self._room:
            return f"rows of {row_bytes} bytes exceed the shared memory of a block"
        if self.groups(1) < 1 or self._plan_bytes > self._room:
            return f"{self._columns} ranks and experts exceed the shared memory of a block"
        return None


def split_blocks(total: int, *, senders: float) -> tuple[int, int]:
    """Blocks that send, and all blocks, of `total`; a single block does both."""
    if total == 1:
        return 1, 1
    return min(total - 1, max(1, round(total * senders))), total
