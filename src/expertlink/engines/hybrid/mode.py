"""The seam between the hybrid engine and its modes: what they have beside `nvlink.mode.Mode`.

The engine gives a mode the memory of the ranks of one host, and a rail to the other hosts. Which
rows cross the rail, when, and what happens to them inside a host is the mode's business.
"""

from __future__ import annotations

from typing import Protocol

from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.rail import Rail
from expertlink.engines.nvlink.arena import Plan
from expertlink.engines.nvlink.launch import Program, Run
from expertlink.engines.nvlink.mode import Memory, Mode
from expertlink.engines.ranks.wire import Wire
from expertlink.routing import Placement


class HybridMode(Mode, Protocol):
    """How one rank makes its calls, over the memory of its host and over its rail.

    Attributes:
        dispatches_queued: how many this rank has queued as a whole, or up to the hook of a call in
            halves: no peer waits for it in them, whether or not it has an output.

    Args:
        config, placement, run, num_sms, max_warps: as `Mode`.
        wire: the connection of the ranks of all hosts.
        memory: of the ranks of this host, made for `plan_of`.
        domains: hosts of the ranks, all of one size.
        rail: of this rank.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        memory: Memory,
        run: Run,
        num_sms: int,
        domains: Domains,
        rail: Rail,
        max_warps: int | None = None,
    ) -> None: ...

    @property
    def dispatches_queued(self) -> int: ...

    @staticmethod
    def plan_of(config: MoECommunicatorConfig, domains: Domains) -> Plan:
        """Sizes of a host's arena."""
        ...

    @staticmethod
    def program_of(config: MoECommunicatorConfig, plan: Plan, domains: Domains) -> Program:
        """The kernels, for an arena of this plan."""
        ...

    def message_regions(self) -> dict[str, int]:
        """Bytes by region of what the rail sends from and receives into."""
        ...
