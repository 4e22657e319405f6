"""The kernels of the nvlink engine, specialised to a communicator, and how they are launched."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink import shared, tuning
from expertlink.engines.nvlink.ht import arguments as ht_arguments
from expertlink.engines.nvlink.ht import plan as ht_plan
from expertlink.engines.nvlink.ht.plan import HtPlan
from expertlink.engines.nvlink.ll import arguments as ll_arguments
from expertlink.engines.nvlink.ll import plan as ll_plan
from expertlink.engines.nvlink.ll.plan import LlPlan
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.tuning import SHARED_BYTES, STATIC_BYTES
from expertlink.jit.compiler import CompiledKernel, compile_kernel, constants
from expertlink.jit.kernel import Arguments, architecture, load_kernel
from expertlink.layouts import align
from expertlink.types import DispatchLayout

LATENCY_WARPS = tuning.LL_DISPATCH_WARPS


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


Run = Callable[[KernelName, Arguments, Launch], None]
"""Queues a kernel with its arguments on the current stream."""

KernelPlan = HtPlan | LlPlan


def kernel_constants(config: MoECommunicatorConfig, *, num_ranks: int) -> dict[str, int | bool]:
    """What a communicator fixes for the kernels of both modes; the same on all ranks."""
    layout = config.layout
    return {
        "kNumRanks": num_ranks,
        "kNumExperts": config.num_experts,
        "kTopk": config.topk,
        "kCopies": min(num_ranks, config.topk),
        "kMaxTokens": config.max_tokens_per_rank,
        "kExpanded": layout.expanded,
        "kPadded": layout.padded,
        "kLayoutIsRankMajor": layout is DispatchLayout.RANK_MAJOR,
        "kAlignment": config.expert_alignment,
        "kIsBfloat16": config.dtype is torch.bfloat16,
    }


def prelude_of(config: MoECommunicatorConfig, plan: KernelPlan, *, num_ranks: int) -> str:
    """C++ text in front of a communicator's kernels: all that the host has to tell them."""
    values = kernel_constants(config, num_ranks=num_ranks)
    if isinstance(plan, LlPlan):
        values |= ll_plan.constants_of(config, plan, num_ranks=num_ranks)
        structs = ll_arguments.declarations(num_ranks)
    else:
        values |= ht_plan.constants_of(config, plan, num_ranks=num_ranks)
        structs = ht_arguments.declarations()
    return constants(values) + shared.declarations(num_ranks, config.num_experts) + structs


def compile_for(
    config: MoECommunicatorConfig,
    plan: KernelPlan,
    *,
    num_ranks: int,
    arch: str,
    hosted: bool = False,
) -> dict[KernelName, CompiledKernel]:
    """Machine code of a communicator's kernels. Needs no GPU.

    Args:
        config: the communicator's.
        plan: of its arena.
        num_ranks: R.
        arch: target such as `sm_90a`.
        hosted: entry points for several ranks on one GPU, whose argument is a table of structs.
    """
    prelude = prelude_of(config, plan, num_ranks=num_ranks)
    suffix = "_hosted" if hosted else ""
    return {
        name: compile_kernel(source, function + suffix + variant, arch, prelude=prelude)
        for name, source, function, variant in _instances(config, is_ll=isinstance(plan, LlPlan))
    }


def _instances(
    config: MoECommunicatorConfig, *, is_ll: bool
) -> Iterator[tuple[KernelName, str, str, str]]:
    """Name, source, function and template arguments of a communicator's kernels."""
    if not is_ll:
        yield KernelName.DISPATCH, "ht/dispatch", "ht::dispatch", ""
        yield KernelName.COMBINE, "ht/combine", "ht::combine", ""
        return
    yield KernelName.DISPATCH, "ll/dispatch", "ll::dispatch", "<false>"
    if config.quantization is not None:
        yield KernelName.DISPATCH_QUANTIZED, "ll/dispatch", "ll::dispatch", "<true>"
    yield KernelName.COMBINE, "ll/combine", "ll::combine", ""


def latency_warps(name: KernelName, most: int = LATENCY_WARPS) -> int:
    """Warps of a block of an `ll` kernel, `most` at most."""
    is_combine = name is KernelName.COMBINE
    return min(most, tuning.LL_COMBINE_WARPS if is_combine else tuning.LL_DISPATCH_WARPS)


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

    def __call__(self, name: KernelName, arguments: Arguments, launch: Launch) -> None:
        self._kernels[name].launch(
            arguments,
            grid=launch.grid,
            block=launch.block,
            shared_bytes=launch.shared_bytes,
            stream=self._stream(),
            follows=launch.follows,
        )


def raw_stream(device: torch.device) -> Callable[[], int]:
    """What gives the handle of torch's current stream of a GPU, without making a stream object."""
    current, index = torch._C._cuda_getCurrentRawStream, device.index

    def stream() -> int:
        return current(index)

    return stream


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
        max_warps: int = tuning.HT_MAX_WARPS,
    ) -> None:
        self._metadata = RowShape.of(config).metadata
        self._room = SHARED_BYTES - STATIC_BYTES
        self._columns = ht_plan.count_columns(config, num_ranks)
        table = ht_plan.shared_table_words(config, num_ranks)
        self._plan_bytes = 4 * (2 * num_ranks + num_local + 1 + table)
        self._max_warps = max_warps

    def slot_bytes(self, row_bytes: int) -> int:
        """Shared memory of a warp that moves rows."""
        return align(row_bytes + self._metadata, 128)

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
