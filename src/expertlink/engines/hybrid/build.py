"""Building the hybrid engine with the other ranks: memory of the host, rail, monitor.

Every step is agreed on by all ranks before the next one: what hinders one of them hinders all.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.connect import connect
from expertlink.engines.hybrid.engine import Connection, HybridEngine
from expertlink.engines.hybrid.ht import mode as ht
from expertlink.engines.hybrid.ll import mode as ll
from expertlink.engines.hybrid.mode import HybridMode
from expertlink.engines.hybrid.monitor import Monitor, Neighbours
from expertlink.engines.hybrid.rail import Rail
from expertlink.engines.hybrid.watched_rail import WatchedRail
from expertlink.engines.hybrid.words import DeviceWords
from expertlink.engines.nvlink.arena import Plan
from expertlink.engines.nvlink.build import all_or_none, new_memory
from expertlink.engines.nvlink.launch import DeviceRunner
from expertlink.engines.nvlink.mode import Memory
from expertlink.engines.ranks.wire import Wire
from expertlink.engines.weighted_backward import WeightedBackward
from expertlink.errors import ConfigurationError, EngineUnavailableError, ExpertlinkError
from expertlink.reduction import BackwardKernel
from expertlink.routing import Placement
from expertlink.settings import RAIL_CTAS

logger = logging.getLogger("expertlink")
_ANSWER_S = 0.5  # how long the monitor waits for the group's store
_MEETING = 0.75  # of the time-out: ranks that fail at once wait for the answer of those that do not


def mode_of(
    config: MoECommunicatorConfig, placement: Placement, domains: Domains
) -> type[HybridMode]:
    """The mode whose kernels serve a communicator; the same on all ranks.

    Raises:
        EngineUnavailableError: there is none.
    """
    if config.mode != "ll":
        reason = ht.unavailable_reason(config, domains)
        if reason is not None:
            raise EngineUnavailableError(f"mode='ht' cannot be served across hosts: {reason}")
        return ht.RailHtMode
    most = max(len(experts) for experts in placement.experts_of_rank)
    reason = ll.unavailable_reason(config, domains, num_local=most)
    if reason is not None:
        raise EngineUnavailableError(f"mode='ll' cannot be served across hosts: {reason}")
    return ll.RailLlMode  # pyright: ignore[reportReturnType] - it takes plans of its own only


def build(
    config: MoECommunicatorConfig,
    *,
    wire: Wire,
    placement: Placement,
    domains: Domains,
    check_inputs: bool,
    share_with: object | None = None,
) -> HybridEngine:
    """The engine of this rank. Collective; what hinders one rank is raised on all.

    Args:
        config: the communicator's.
        wire: the connection of the ranks of all hosts.
        placement: where the experts live.
        domains: hosts of the ranks, all of one size.
        check_inputs: ranks agree before calls.
        share_with: engine of another communicator whose memory and rail serve this one too.

    Raises:
        EngineUnavailableError: a mode, memory, kernels or the rail cannot be had.
        ConfigurationError: `share_with` has no memory to share, or too little; the ranks disagree
            about EXPERTLINK_RAIL_CTAS.
    """
    assert domains.ranks_per_host is not None
    device = wire.device
    max_ctas = _agreed_ctas(wire)
    mode = mode_of(config, placement, domains)
    plan = mode.plan_of(config, domains)
    memory: Memory | None = None
    connection: Connection | None = None
    if share_with is not None:
        memory, connection = _shared(share_with, plan)
        plan = memory.arena.plan
    runner: DeviceRunner | None = None
    backward: BackwardKernel | None = None
    reason = None
    try:
        runner = DeviceRunner(
            config,
            mode.program_of(config, plan, domains),
            num_ranks=domains.num_ranks,
            num_peers=domains.ranks_per_host,
            device=device,
        )
        if config.layout.expanded:
            backward = WeightedBackward(device, dtype=config.dtype)
    except (ExpertlinkError, RuntimeError) as error:
        reason = str(error) or repr(error)
    all_or_none(wire, reason)
    assert runner is not None
    if memory is None or connection is None:
        group = _host_group(wire, domains)
        memory = new_memory(config, mode, plan, wire=wire, group=group, domains=domains)
        connection = _connect(wire, domains, memory, max_ctas=max_ctas)
    engine: HybridEngine | None = None
    reason = None
    try:
        made = mode(
            config,
            wire=wire,
            placement=placement,
            memory=memory,
            run=runner,
            num_sms=torch.cuda.get_device_properties(device).multi_processor_count,
            domains=domains,
            rail=connection.rail,
        )
        engine = HybridEngine(
            config,
            wire=wire,
            placement=placement,
            memory=memory,
            mode=made,
            connection=connection,
            backward_kernel=backward,
            check_inputs=check_inputs,
        )
        torch.cuda.synchronize(device)  # tables are made on this stream, calls may come on others
    except (ExpertlinkError, RuntimeError) as error:  # no room for its messages, say
        reason = str(error) or repr(error)
    try:
        all_or_none(wire, reason)
    except ExpertlinkError:
        connection.leave(wire.number)
        memory.arena.leave(wire.number)
        memory.watchdog.detach(wire.publish_abort)  # others may go on using it
        if share_with is None:
            connection.rail.close()
        raise
    assert engine is not None
    for region, size in engine.memory_estimate().items():
        logger.debug("rank %d: %s: %d bytes", wire.rank, region, size)
    return engine


def _agreed_ctas(wire: Wire) -> int | None:
    """EXPERTLINK_RAIL_CTAS, which NCCL needs to be the same on all ranks. Collective."""
    reason: str | None = None
    try:
        mine = str(RAIL_CTAS.read() or "")
    except ConfigurationError as error:
        mine, reason = "unreadable", str(error)
    texts = wire.gather_text(mine)
    if len(set(texts)) > 1 or reason is not None:
        said = ", ".join(f"rank {rank}: {text or 'unset'}" for rank, text in enumerate(texts))
        raise ConfigurationError(reason or f"ranks disagree about {RAIL_CTAS.name}: {said}")
    return int(mine) if mine else None


def _shared(other: object, plan: Plan) -> tuple[Memory, Connection]:
    if not isinstance(other, HybridEngine):
        raise ConfigurationError(
            "share_with: that communicator does not use the hybrid engine and has no such memory"
        )
    other.arena.check_fits(plan)
    return other.memory, other.connection


@contextlib.contextmanager
def _host_group(wire: Wire, domains: Domains) -> Iterator[Any | None]:
    """A group of the ranks of this host, for as long as their memory is mapped; None: one rank.

    With a name of the communicator's own. `dist.new_group` makes names out of the number of groups
    that a process has, which may differ between ranks.
    """
    ranks, parent = domains.ranks_of(domains.host_of[wire.rank]), wire.group
    if len(ranks) == 1 or parent is None:
        yield None
        return
    name = f"expertlink-{wire.number}-host-{domains.host_of[wire.rank]}"
    of_world = [dist.get_global_rank(parent, rank) for rank in ranks]
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(wire.rank),
        of_world,
        "gloo",
        parent.get_group_store(),
        distributed_c10d.GroupName(name) if hasattr(distributed_c10d, "GroupName") else name,  # pyright: ignore[reportArgumentType]
        timeout=datetime.timedelta(seconds=_MEETING * wire.timeout_s),
    )
    distributed_c10d._world.pg_group_ranks[group] = {
        rank: index for index, rank in enumerate(of_world)
    }
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _connect(wire: Wire, domains: Domains, memory: Memory, *, max_ctas: int | None) -> Connection:
    """The rail of this rank. Collective over all ranks."""
    group = wire.group
    assert group is not None
    local, host = domains.local_of(wire.rank), domains.host_of[wire.rank]
    rail: Rail | None = None
    words: DeviceWords | None = None
    reason = None
    try:
        words = DeviceWords(wire.device)
        rail = connect(
            dist.PrefixStore(f"expertlink-{wire.number}-rail-{local}", group.get_group_store()),
            index=host,
            size=domains.num_hosts,
            device=wire.device,
            max_ctas=max_ctas,
            timeout_s=_MEETING * wire.timeout_s,
        )
    except (ExpertlinkError, RuntimeError) as error:
        reason = f"rail {local} between {domains.num_hosts} hosts cannot be used: {error}"
    try:
        all_or_none(wire, reason)
    except EngineUnavailableError:
        if rail is not None:
            rail.close()
        raise
    assert rail is not None
    assert words is not None
    peers, watchdog = wire.peers, memory.watchdog
    monitor = Monitor(
        words=words,
        ranks=Neighbours(
            rank=wire.rank,
            domains=domains,
            describe=lambda rank: peers[rank].describe(),
            has_exited=lambda rank: peers[rank].has_exited(),
        ),
        status=wire.status_store(answer_s=_ANSWER_S),
        timeout_s=wire.timeout_s,
        doing=lambda: (wire.phase, wire.call),
        fault=lambda: watchdog.expired_wait(wire.call),
        # First what is quick: NCCL waits for its kernels, which may be queued behind ours.
        end=[memory.arena.post_abort, rail.abort],
    )
    return Connection(WatchedRail(rail, words=words, monitor=monitor), monitor)
