"""Whether the nvlink engine can serve a communicator, and building it with the other ranks."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.nvlink.arena import Buffer, Plan, SymmetricBuffer
from expertlink.engines.nvlink.engine import NvlinkEngine
from expertlink.engines.nvlink.ht.blocks import BlockShape
from expertlink.engines.nvlink.ht.mode import HtMode
from expertlink.engines.nvlink.launch import DeviceRunner, Run
from expertlink.engines.nvlink.ll import plan as ll_plan
from expertlink.engines.nvlink.ll.mode import LlMode
from expertlink.engines.nvlink.mode import Memory, Mode
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.engines.ranks.wire import Wire
from expertlink.engines.weighted_backward import WeightedBackward
from expertlink.errors import ConfigurationError, EngineUnavailableError, ExpertlinkError
from expertlink.jit import compiler
from expertlink.reduction import BackwardKernel
from expertlink.routing import Placement

logger = logging.getLogger("expertlink")
_DTYPES = (torch.bfloat16, torch.float16)
_OLDEST = (9, 0)


def unavailable_reason(config: MoECommunicatorConfig, device: torch.device) -> str | None:
    """Why this rank cannot use the engine, or None."""
    if device.type != "cuda":
        return f"tensors live on {device.type}, it moves rows between GPUs"
    if config.dtype not in _DTYPES:
        return f"rows are {config.dtype}, it adds up {' and '.join(map(str, _DTYPES))} only"
    row_bytes = config.hidden_size * config.dtype.itemsize
    if row_bytes % 16:
        return f"rows have {row_bytes} bytes, it moves multiples of 16"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, it needs 9.0"
    return compiler.unavailable_reason()


def mode_of(config: MoECommunicatorConfig, placement: Placement) -> type[Mode]:
    """The mode whose kernels serve a communicator; the same on all ranks.

    Raises:
        EngineUnavailableError: that is not mode "ll", but the configuration needs what only this
            has.
    """
    if config.mode != "ll":
        return HtMode
    most = max(len(experts) for experts in placement.experts_of_rank)
    reason = ll_plan.unavailable_reason(config, num_ranks=placement.num_ranks, num_local=most)
    if reason is None:
        return LlMode
    if config.mask_lost_peers:
        raise EngineUnavailableError(f"mask_lost_peers needs low-latency kernels: {reason}")
    logger.info("mode='ll' is served by the high-throughput kernels: %s", reason)
    return HtMode


def build(
    config: MoECommunicatorConfig,
    *,
    wire: Wire,
    placement: Placement,
    check_inputs: bool,
    share_with: object | None = None,
) -> NvlinkEngine:
    """The engine of this rank. Collective; what hinders one rank is raised on all.

    Args:
        config: the communicator's.
        wire: the ranks' connection.
        placement: where the experts live.
        check_inputs: ranks agree before calls.
        share_with: engine of another communicator whose memory serves this one too.

    Raises:
        EngineUnavailableError: the GPUs cannot reach each other, or the kernels cannot be built.
        ConfigurationError: `share_with` has no memory to share, or too little.
    """
    num_ranks, device = placement.num_ranks, wire.device
    mode = mode_of(config, placement)
    plan = mode.plan(config, num_ranks)
    memory: Memory | None = None
    runner: DeviceRunner | None = None
    backward: BackwardKernel | None = None
    reason = _too_large(config, wire=wire, placement=placement) or _unreachable(wire)
    if reason is None:
        if share_with is not None:
            memory = _shared_memory(share_with, plan)
            plan = memory.arena.plan
        try:
            program = mode.program(config, plan, num_ranks=num_ranks)
            runner = DeviceRunner(config, program, num_ranks=num_ranks, device=device)
            if config.layout.expanded:
                backward = WeightedBackward(device, dtype=config.dtype)
        except (ExpertlinkError, RuntimeError) as error:
            reason = str(error) or repr(error)
    all_or_none(wire, reason)
    assert runner is not None
    if memory is None:
        memory = new_memory(config, mode, plan, wire=wire, group=nullcontext(wire.group))
    for region, size in plan.regions().items():
        logger.debug("rank %d: arena: %s: %d bytes", wire.rank, region, size)
    engine: NvlinkEngine | None = None
    try:
        engine = assemble(
            config,
            mode,
            wire=wire,
            placement=placement,
            memory=memory,
            run=runner,
            backward_kernel=backward,
            check_inputs=check_inputs,
        )
        torch.cuda.synchronize(device)  # tables are made on this stream, calls may come on others
    except RuntimeError as error:  # no room for tables, say
        reason = str(error) or repr(error)
    try:
        all_or_none(wire, reason)
    except EngineUnavailableError:
        memory.arena.leave(wire.number)
        memory.watchdog.detach(wire.publish_abort)  # others may go on using it
        raise
    assert engine is not None
    return engine


def assemble(
    config: MoECommunicatorConfig,
    mode: type[Mode],
    *,
    wire: Wire,
    placement: Placement,
    memory: Memory,
    run: Run,
    check_inputs: bool,
    backward_kernel: BackwardKernel | None = None,
    max_warps: int | None = None,
) -> NvlinkEngine:
    """The engine over memory that all ranks can reach. Local.

    Args:
        config: the communicator's.
        mode: what `mode_of` says.
        wire: the ranks' connection.
        placement: where the experts live, on this rank's GPU.
        memory: made for a plan of the mode.
        run: queues a kernel.
        check_inputs: ranks agree before calls.
        backward_kernel: as `Engine.backward_kernel`.
        max_warps: most warps of a block, if fewer than tuned: several ranks on one GPU.
    """
    properties = torch.cuda.get_device_properties(memory.arena.device)
    return NvlinkEngine(
        config,
        wire=wire,
        placement=placement,
        memory=memory,
        mode=mode(
            config,
            wire=wire,
            placement=placement,
            memory=memory,
            run=run,
            num_sms=properties.multi_processor_count,
            max_warps=max_warps,
        ),
        backward_kernel=backward_kernel,
        check_inputs=check_inputs,
    )


def make_memory(
    config: MoECommunicatorConfig,
    mode: type[Mode],
    plan: Plan,
    *,
    rank: int,
    buffer: Buffer,
    device: torch.device,
    timeout_s: float,
    domains: Domains | None = None,
) -> Memory:
    """What a rank keeps of a buffer that the plan has prepared, for communicators to share. Local.

    Those that share it have no more experts than this one, so a mail has room for their counts.
    With several `domains` the buffer is that of this rank's host.
    """
    local = rank if domains is None else domains.local_of(rank)
    arena = mode.make_arena(plan, rank=local, buffer=buffer, device=device)
    watchdog = Watchdog(
        rank=rank,
        num_ranks=arena.num_ranks if domains is None else domains.num_ranks,
        num_experts=config.num_experts,
        timeout_s=timeout_s,
        peers=None if domains is None else domains.ranks_of(domains.host_of[rank]),
        rail_words=plan.rail_words,
    )
    return Memory(arena, watchdog)


def new_memory(
    config: MoECommunicatorConfig,
    mode: type[Mode],
    plan: Plan,
    *,
    wire: Wire,
    group: AbstractContextManager[Any | None],
    domains: Domains | None = None,
) -> Memory:
    """Memory that ranks write into each other. Collective over all ranks of `wire`.

    Args:
        config: the communicator's.
        mode: what `mode_of` says.
        plan: the mode's.
        wire: the ranks' connection.
        group: the ranks that share the memory, while it is mapped; None: this one alone.
        domains: as in `make_memory`.

    Raises:
        EngineUnavailableError: some rank cannot have it; raised on all.
    """
    buffer: Buffer | None = None
    reason = None
    try:
        with group as ranks:
            buffer = SymmetricBuffer(ranks, plan.total, wire.device, plan.prepare)
    except (EngineUnavailableError, RuntimeError) as error:
        reason = str(error)
    all_or_none(wire, reason)  # also: everybody's memory is prepared before it is used
    assert buffer is not None
    memory: Memory | None = None
    try:
        memory = make_memory(
            config,
            mode,
            plan,
            rank=wire.rank,
            buffer=buffer,
            device=wire.device,
            timeout_s=wire.timeout_s,
            domains=domains,
        )
    except RuntimeError as error:  # no room for what the host reads, say
        reason = str(error) or repr(error)
    all_or_none(wire, reason)
    assert memory is not None
    return memory


def all_or_none(wire: Wire, reason: str | None) -> None:
    """Goes on only if nothing hinders any rank. Collective.

    Raises:
        EngineUnavailableError: on every rank, with the reason of the lowest one that has any.
    """
    texts = wire.gather_text(reason or "")
    for rank, text in enumerate(texts):
        if text:
            raise EngineUnavailableError(text if len(texts) == 1 else f"rank {rank}: {text}")


def _shared_memory(other: object, plan: Plan) -> Memory:
    if not isinstance(other, NvlinkEngine):
        raise ConfigurationError(
            "share_with: that communicator does not use the nvlink engine and has no such memory"
        )
    other.arena.check_fits(plan)
    return other.memory


def _too_large(config: MoECommunicatorConfig, *, wire: Wire, placement: Placement) -> str | None:
    """Why rows or counts exceed a block's shared memory, or None. One bound for both modes."""
    blocks = BlockShape(
        config,
        num_ranks=placement.num_ranks,
        num_local=len(placement.experts_of_rank[wire.rank]),
    )
    return blocks.unavailable_reason(RowShape.of(config).row)


def _unreachable(wire: Wire) -> str | None:
    """Why the ranks' GPUs cannot be direct neighbours, as far as the host can tell."""
    hosts = {peer.host for peer in wire.peers}
    if len(hosts) > 1 and not _has_fabric(wire.device):
        return f"the ranks are on {len(hosts)} hosts without a common NVLink fabric"
    return None


def _has_fabric(device: torch.device) -> bool:
    """Whether memory of this GPU can be shared across hosts of a rack."""
    import cuda.bindings.driver as driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED
    status, value = driver.cuDeviceGetAttribute(attribute, device.index)
    return not status and bool(value)
