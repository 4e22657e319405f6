"""How kernels are described, compiled and launched; the same for every mode."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink import shared
from expertlink.engines.nvlink.capture import raw_stream
from expertlink.engines.nvlink.tuning import SHARED_BYTES, STATIC_BYTES
from expertlink.jit.compiler import CompiledKernel, compile_kernel, constants
from expertlink.jit.kernel import Arguments, Configuration, architecture, load_kernel
from expertlink.types import DispatchLayout

Planned = TypeVar("Planned")
_CONFIGURATIONS = 256  # launches on streams that are kept prepared


class KernelName(enum.IntEnum):
    """The kernels that a mode may have. (Integers are hashed faster than other enumerations.)"""

    DISPATCH = 0
    DISPATCH_QUANTIZED = 1
    """Dispatch that quantizes the rows."""
    COMBINE = 2
    COMBINE_WEIGHTS = 3
    """Combine that brings weights of the tokens' ranks to the ranks that sum their rows."""
    PACK = 4
    """Several hosts: writes messages for other hosts."""
    PACK_QUANTIZED = 5
    """The same, of rows that it quantizes."""
    SUM_HOSTS = 6
    """Several hosts: sums what they have sent back."""
    COUNT = 7
    """Several hosts: where the tokens of a rank go."""
    PLAN = 8
    """Several hosts: slots of all rows, and in which chunks they move."""


@dataclass(frozen=True)
class KernelSource:
    """Where the device code of a kernel is.

    Attributes:
        name: what the host calls it.
        source: file below kernels/, without its ending.
        function: name of the `__global__` function.
        template: its template arguments, such as `<true>`.
        max_warps: most warps of a block, for which the compiler has to find registers.
    """

    name: KernelName
    source: str
    function: str
    template: str = ""
    max_warps: int = 32


@dataclass(frozen=True)
class Program:
    """The kernels of a mode, and what it tells the compiler beside what is common to all modes.

    Attributes:
        constants: what a communicator fixes, by the names in device code; alike on all ranks.
        declarations: C++ text of what a launch tells the kernels.
        kernels: the kernels.
        rail_words: as in `shared.control`.
    """

    constants: dict[str, int | bool]
    declarations: str
    kernels: tuple[KernelSource, ...]
    rail_words: int = 0


@dataclass(frozen=True, eq=False)
class Launch:
    """Grid of one launch. Compared by identity, since every launch looks up its own.

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

    @cached_property
    def after_all(self) -> Launch:
        """The same, but it starts when all before it is over."""
        return dataclasses.replace(self, follows=False)


Run = Callable[[KernelName, Arguments, Launch], None]
"""Queues a kernel with its arguments on the current stream."""


class Launches(dict[Any, Planned]):
    """Launches of a kernel by what decides them; each is planned at its first use.

    Args:
        plan: makes one from the parts of its key. It must not refer to the owner of the launches:
            a communicator that is dropped has to be freed without the collector of cycles.
    """

    def __init__(self, plan: Callable[..., Planned]) -> None:
        super().__init__()
        self._plan = plan

    def __missing__(self, key: tuple[Hashable, ...]) -> Planned:
        planned = self[key] = self._plan(*key)
        return planned


def common_constants(
    config: MoECommunicatorConfig, *, num_ranks: int, num_peers: int | None = None
) -> dict[str, int | bool]:
    """What a communicator fixes for the kernels of every mode; the same on all ranks.

    `num_peers`: G, ranks whose memory a rank can address; None: all of them.
    """
    layout, num_peers = config.layout, num_peers or num_ranks
    return {
        "kNumRanks": num_ranks,
        "kNumSources": num_ranks,
        "kNumPeers": num_peers,
        "kNumHosts": num_ranks // num_peers,
        "kSpansHosts": num_peers < num_ranks,
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


def compile_program(
    config: MoECommunicatorConfig,
    program: Program,
    *,
    num_ranks: int,
    arch: str,
    num_peers: int | None = None,
    hosted: bool = False,
) -> dict[KernelName, CompiledKernel]:
    """Machine code of a communicator's kernels. Needs no GPU.

    Args:
        config: the communicator's.
        program: its mode's kernels.
        num_ranks: R.
        arch: target such as `sm_90a`.
        num_peers: as in `common_constants`.
        hosted: entry points for several ranks on one GPU, whose argument is a table of structs.
    """
    common = common_constants(config, num_ranks=num_ranks, num_peers=num_peers)
    fixed = {**common, **program.constants}
    prelude = constants(fixed)
    prelude += shared.declarations(num_ranks, config.num_experts, program.rail_words)
    prelude += program.declarations
    suffix = "_hosted" if hosted else ""
    return {
        kernel.name: compile_kernel(
            kernel.source, kernel.function + suffix + kernel.template, arch, prelude=prelude
        )
        for kernel in program.kernels
    }


class DeviceRunner:
    """Launches this rank's kernels on torch's current stream. Building one compiles and loads."""

    def __init__(
        self,
        config: MoECommunicatorConfig,
        program: Program,
        *,
        num_ranks: int,
        device: torch.device,
        num_peers: int | None = None,
    ) -> None:
        self._stream = raw_stream(device)
        compiled = compile_program(
            config,
            program,
            num_ranks=num_ranks,
            arch=architecture(device),
            num_peers=num_peers,
        )
        self._kernels = {
            name: load_kernel(device, code, max_shared_bytes=SHARED_BYTES - STATIC_BYTES)
            for name, code in compiled.items()
        }

        self._prepared: dict[tuple[KernelName, Launch, int], Configuration] = {}

    def __call__(self, name: KernelName, arguments: Arguments, launch: Launch) -> None:
        key = (name, launch, self._stream())
        configuration = self._prepared.get(key)
        if configuration is None:
            configuration = self._prepare(*key)
        self._kernels[name].launch_as(arguments, configuration)

    def _prepare(self, name: KernelName, launch: Launch, stream: int) -> Configuration:
        if len(self._prepared) >= _CONFIGURATIONS:  # streams that come and go
            self._prepared.clear()
        configuration = self._kernels[name].configuration(
            launch.grid, launch.block, launch.shared_bytes, stream, launch.follows
        )
        self._prepared[name, launch, stream] = configuration
        return configuration
