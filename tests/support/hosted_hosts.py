"""Several hosts in one process on one GPU: see hosted.py.

The ranks of a host know each other's memory only. Rails between hosts copy from thread to thread.
"""

from __future__ import annotations

from typing import Any

import torch

from expertlink import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.ht.mode import RailHtMode
from expertlink.engines.hybrid.ht.plan import HybridPlan
from expertlink.engines.hybrid.ll.mode import RailLlMode, unavailable_reason
from expertlink.engines.hybrid.rail import CopyRail
from expertlink.engines.nvlink.arena import Plan
from expertlink.engines.nvlink.build import make_memory
from expertlink.engines.nvlink.engine import NvlinkEngine
from expertlink.engines.nvlink.launch import Program
from expertlink.engines.nvlink.mode import Memory
from support import hosted
from support.cases import LL, SMS
from support.hosted import Fleet, HostedBuffer
from support.jobs import config_of
from support.oracle import Case

_PATIENCE_S = 60.0


class HostsFleet(Fleet):
    """The common launches of all ranks of all hosts.

    Args:
        config: of every rank's communicator.
        domains: hosts of the ranks.
        chunk_rows: mode "ht": most tokens of a chunk; None: as many as usual.
        options: as `Fleet`.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        domains: Domains,
        *,
        chunk_rows: int | None = None,
        **options: Any,
    ) -> None:
        self.domains, self._chunk_rows = domains, chunk_rows
        super().__init__(config, domains.num_ranks, **options)
        most = max(len(experts) for experts in self.placement.experts_of_rank)
        if self.mode is RailLlMode:
            assert unavailable_reason(config, domains, num_local=most) is None

    def _mode(self) -> Any:
        return RailLlMode if self.config.mode == "ll" else RailHtMode

    def _plan(self) -> Plan:
        if self.config.mode == "ll":
            return RailLlMode.plan_of(self.config, self.domains)
        return HybridPlan.across(self.config, self.domains, chunk_rows=self._chunk_rows)

    def _program(self) -> Program:
        return self._mode().program_of(self.config, self.plan, self.domains)

    def _num_peers(self) -> int | None:
        return self.domains.ranks_per_host

    def reset(self) -> None:
        """As `Fleet.reset`, with new rails."""
        super().reset()
        hosts, domains = self.domains.num_hosts, self.domains
        self._rails = [
            CopyRail.connected(hosts, timeout_s=_PATIENCE_S) for _ in domains.ranks_of(0)
        ]

    def memory(self, rank: int) -> HostedBuffer:
        """This rank's buffer, and those of the ranks of its host."""
        peers = self.domains.ranks_of(self.domains.host_of[rank])
        buffers = [self._buffers[peer] for peer in peers]
        addresses = [buffer.data_ptr() for buffer in buffers]
        return HostedBuffer(self._buffers[rank], addresses, buffers)

    def make_memory(self, rank: int, timeout_s: float) -> Memory:
        """As `Fleet.make_memory`."""
        return make_memory(
            self.config,
            self.mode,
            self.plan,
            rank=rank,
            buffer=self.memory(rank),
            device=hosted.DEVICE,
            timeout_s=timeout_s,
            domains=self.domains,
        )

    def assemble(self, config: MoECommunicatorConfig, **parts: Any) -> NvlinkEngine:
        """As `Fleet.assemble`."""
        wire, memory = parts["wire"], parts["memory"]
        check, backward = parts.pop("check_inputs"), parts.pop("backward_kernel")
        host, local = self.domains.host_of[wire.rank], self.domains.local_of(wire.rank)
        properties = torch.cuda.get_device_properties(hosted.DEVICE)
        mode = self._mode()(
            config,
            **parts,
            num_sms=properties.multi_processor_count,
            domains=self.domains,
            rail=self._rails[local][host],
        )
        return NvlinkEngine(
            config,
            wire=wire,
            placement=self.placement,
            memory=memory,
            mode=mode,
            backward_kernel=backward,
            check_inputs=check,
        )

    def break_up(self) -> None:
        """Ends all waiting between threads."""
        super().break_up()
        for rail in self._rails:
            rail[0].abort()


def hosts_fleet_of(
    case: Case,
    *,
    mode: str = "ll",
    chunk_rows: int | None = None,
    warps: int | None = None,
    **fields: Any,
) -> HostsFleet:
    """Hosted ranks of several hosts for the configuration of a case; `fields` of it.

    `warps`: most of a block; None: as many as fit.
    """
    usual = {**(LL if mode == "ll" else {}), **SMS, "engine": "hybrid", **fields}
    assert case.domains is not None
    config = config_of(case, hosted.DEVICE, **usual)
    return HostsFleet(config, Domains(case.domains), chunk_rows=chunk_rows, max_warps=warps)
