"""Whether the nvlink engine can serve a communicator, and building it with the other ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.arena import Arena, Buffer, SymmetricBuffer
from expertlink.engines.nvlink.engine import NvlinkBase
from expertlink.engines.nvlink.ht.arena import HtArena
from expertlink.engines.nvlink.ht.dispatch import HighThroughput
from expertlink.engines.nvlink.ht.engine import NvlinkEngine
from expertlink.engines.nvlink.ht.plan import HtPlan
from expertlink.engines.nvlink.launch import (
    LATENCY_WARPS,
    BlockShape,
    DeviceRunner,
    KernelPlan,
    Run,
)
from expertlink.engines.nvlink.ll import plan as ll_plan
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.dispatch import LowLatency
from expertlink.engines.nvlink.ll.engine import LatencyEngine
from expertlink.engines.nvlink.ll.plan import LlPlan
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import ConfigurationError, EngineUnavailableError, ExpertlinkError
from expertlink.jit import compiler
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


def build(
    config: MoECommunicatorConfig,
    *,
    wire: Wire,
    placement: Placement,
    check_inputs: bool,
    share_with: Any | None = None,
) -> NvlinkBase:
    """The engine of this rank. Collective; what is in the way of one rank is raised on all.

    Raises:
        EngineUnavailableError: the GPUs cannot reach each other, or the kernels cannot be built.
        ConfigurationError: `share_with` has no memory to share, or too little.
    """
    num_ranks, device = placement.num_ranks, wire.device
    num_local = len(placement.experts_of_rank[wire.rank])
    blocks = BlockShape(config, num_ranks=num_ranks, num_local=num_local)
    latency = serves_latency(config, placement)
    plan: KernelPlan = (LlPlan if latency else HtPlan).of(config, num_ranks)
    reason = blocks.unavailable_reason(RowShape.of(config).row) or _unreachable(wire)
    runner: DeviceRunner | None = None
    if reason is None:
        if share_with is not None:
            shared: Any = _shared_arena(share_with, plan).plan
            plan = shared
        try:
            runner = DeviceRunner(config, plan, num_ranks=num_ranks, device=device)
        except ExpertlinkError as error:
            reason = str(error)
    _all_or_none(wire, reason)
    assert runner is not None
    if share_with is not None:
        arena, watchdog = share_with.arena, share_with.watchdog
    else:
        buffer = error_text = None
        try:
            buffer = SymmetricBuffer(wire.group, plan.total, device, plan.prepare)
        except EngineUnavailableError as error:
            error_text = str(error)
        _all_or_none(wire, error_text)  # also: everybody's memory is prepared before it is used
        assert buffer is not None
        arena = make_arena(plan, rank=wire.rank, buffer=buffer, device=device)
        watchdog = Watchdog(
            rank=wire.rank,
            num_ranks=num_ranks,
            num_experts=config.num_experts,
            timeout_s=wire.timeout_s,
        )
    for region, size in plan.regions().items():
        logger.debug("rank %d: arena: %s: %d bytes", wire.rank, region, size)
    engine = assemble(
        config,
        wire=wire,
        placement=placement,
        arena=arena,
        watchdog=watchdog,
        run=runner,
        check_inputs=check_inputs,
        blocks=blocks,
    )
    torch.cuda.synchronize(device)  # tables are made on this stream, calls may come on others
    return engine


def assemble(
    config: MoECommunicatorConfig,
    *,
    wire: Wire,
    placement: Placement,
    arena: Arena,
    watchdog: Watchdog,
    run: Run,
    check_inputs: bool,
    blocks: BlockShape | None = None,
    latency_warps: int = LATENCY_WARPS,
) -> NvlinkEngine | LatencyEngine:
    """The engine over memory that all ranks can reach; its mode is that of the arena. Local.

    Args:
        config: the communicator's.
        wire: the ranks' connection.
        placement: where the experts live.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        run: queues a kernel.
        check_inputs: ranks agree before calls.
        blocks: high throughput: shape of the blocks.
        latency_warps: low latency: most warps of a block.
    """
    num_sms = torch.cuda.get_device_properties(arena.device).multi_processor_count
    common: dict[str, Any] = {
        "rank": wire.rank,
        "placement": placement,
        "watchdog": watchdog,
        "run": run,
        "num_sms": num_sms,
        "communicator": wire.number,
    }
    seams: dict[str, Any] = {
        "wire": wire,
        "placement": placement,
        "watchdog": watchdog,
        "check": check_inputs,
    }
    if isinstance(arena, LlArena):
        low = LowLatency(config, arena=arena, warps=latency_warps, **common)
        return LatencyEngine(config, arena=arena, calls=low, **seams)
    assert isinstance(arena, HtArena)
    calls = HighThroughput(config, arena=arena, check=check_inputs, blocks=blocks, **common)
    return NvlinkEngine(config, arena=arena, calls=calls, **seams)


def make_arena(plan: KernelPlan, *, rank: int, buffer: Buffer, device: torch.device) -> Arena:
    """The arena of a plan's mode."""
    if isinstance(plan, LlPlan):
        return LlArena(plan, rank=rank, buffer=buffer, device=device)
    return HtArena(plan, rank=rank, buffer=buffer, device=device)


def serves_latency(config: MoECommunicatorConfig, placement: Placement) -> bool:
    """Whether calls have the low-latency kernels; the same on all ranks.

    Raises:
        EngineUnavailableError: they do not, but the configuration needs what only these have.
    """
    if config.mode != "ll":
        return False
    most = max(len(experts) for experts in placement.experts_of_rank)
    why_not = ll_plan.unavailable_reason(config, num_ranks=placement.num_ranks, num_local=most)
    if why_not is None:
        return True
    if config.mask_lost_peers:
        raise EngineUnavailableError(f"mask_lost_peers needs low-latency kernels: {why_not}")
    logger.info("mode='ll' is served by the high-throughput kernels: %s", why_not)
    return False


def _shared_arena(other: object, plan: KernelPlan) -> Arena:
    if not isinstance(other, NvlinkBase):
        raise ConfigurationError(
            "share_with: that communicator does not use the nvlink engine and has no such memory"
        )
    other.arena.check_fits(plan)
    return other.arena


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


def _all_or_none(wire: Wire, reason: str | None) -> None:
    """Goes on only if nothing is in the way of any rank."""
    texts = wire.gather_text(reason or "")
    blocked = {rank: text for rank, text in enumerate(texts) if text}
    if blocked:
        rank, text = next(iter(blocked.items()))
        raise EngineUnavailableError(text if len(texts) == 1 else f"rank {rank}: {text}")
