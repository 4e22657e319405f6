"""High-throughput mode across hosts; as mode `ht` of one host, with rails between hosts."""

from __future__ import annotations

import dataclasses

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.base import (
    CombineCall,
    Combined,
    DispatchCall,
    Dispatched,
    nothing_left,
)
from expertlink.engines.hybrid.ht import arguments
from expertlink.engines.hybrid.ht.combine import HybridCombiner
from expertlink.engines.hybrid.ht.dispatch import HybridDispatcher
from expertlink.engines.hybrid.ht.messages import Messages
from expertlink.engines.hybrid.ht.plan import HybridPlan, hybrid_constants
from expertlink.engines.hybrid.rail import Rail
from expertlink.engines.hybrid.tally import RailTally
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.arena import Plan
from expertlink.engines.nvlink.ht.blocks import BlockShape
from expertlink.engines.nvlink.ht.mode import Combiner, Dispatcher, HtMode
from expertlink.engines.nvlink.ht.plan import combine_warps
from expertlink.engines.nvlink.launch import KernelName, KernelSource, Program, Run
from expertlink.engines.nvlink.mode import Memory
from expertlink.engines.nvlink.tables import as_route
from expertlink.engines.outputs import in_scale_order, into_buffers, into_tokens
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import EngineUnavailableError
from expertlink.routing import Placement
from expertlink.types import CallStatistics, QuantScales


def unavailable_reason(config: MoECommunicatorConfig, domains: Domains) -> str | None:
    """Why these kernels cannot serve a communicator, or None. The same on all ranks."""
    if domains.num_hosts < 2:
        return "all ranks share one host"
    if domains.ranks_per_host is None:
        return "hosts have different numbers of ranks"
    if config.zero_copy:
        return "zero_copy needs one host: rows of others are staged"
    if config.combine_precision == "exact":
        return "combine_precision='exact' would send a row per choice between hosts"
    return None


class RailHtMode(HtMode):
    """See `nvlink.mode.Mode`.

    Args:
        config, wire, placement, run, num_sms, max_warps: as `Mode`. The wire joins all ranks.
        memory: of the ranks of this host, made for `plan_of`.
        domains: hosts of the ranks, all of one size.
        rail: of this rank.
    """

    routing_form = "hybrid ht"
    numbers_by_max_tokens = True

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
    ) -> None:
        reason = unavailable_reason(config, domains)
        if reason is not None:
            raise EngineUnavailableError(reason)
        self._domains, self._rail = domains, rail
        super().__init__(
            config,
            wire=wire,
            placement=placement,
            memory=memory,
            run=run,
            num_sms=num_sms,
            max_warps=max_warps,
        )

    def _callers(
        self,
        memory: Memory,
        common: dict[str, int],
        run: Run,
        num_sms: int,
        max_warps: int | None,
    ) -> tuple[Dispatcher, Combiner]:
        config, domains, arena = self._config, self._domains, memory.arena
        plan, device = arena.plan, arena.device
        assert isinstance(plan, HybridPlan)
        self._plan = plan
        blocks = BlockShape(
            config,
            num_ranks=domains.num_ranks,
            num_hosts=domains.num_hosts,
            num_local=len(self._experts),
            max_warps=max_warps,
        )
        seats = seats_of(domains)
        self._seats = torch.tensor(seats, dtype=torch.int32, device=device)
        self._ranks = torch.tensor(
            sorted(range(len(seats)), key=seats.__getitem__), dtype=torch.int32, device=device
        )
        common = {
            **common,
            "seat": seats[self._wire.rank],
            "seats": self._seats.data_ptr(),
            "ranks": self._ranks.data_ptr(),
        }
        self._rail_tally = RailTally(self._placement, self._domains, rank=self._wire.rank)
        messages = Messages(plan, rail=self._rail, device=device)
        dispatcher = HybridDispatcher(
            config,
            common=common,
            experts=self._experts,
            messages=messages,
            device=device,
            watchdog=memory.watchdog,
            run=run,
            blocks=blocks,
            num_sms=num_sms,
        )
        combiner = HybridCombiner(
            config, common=common, messages=messages, run=run, blocks=blocks, num_sms=num_sms
        )
        return dispatcher, combiner

    # -- what a communicator needs ----------------------------------------------------------------

    @staticmethod
    def plan_of(config: MoECommunicatorConfig, domains: Domains) -> HybridPlan:
        """Sizes of a host's arena, and of the rail's messages."""
        return HybridPlan.across(config, domains)

    @staticmethod
    def program_of(config: MoECommunicatorConfig, plan: Plan, domains: Domains) -> Program:
        """The kernels, for memory of this plan."""
        assert isinstance(plan, HybridPlan)
        moving, summing = tuning.HT_MAX_WARPS + 1, combine_warps(config) + 1

        def kernel(name: KernelName, source: str, function: str, warps: int) -> KernelSource:
            return KernelSource(name, f"hybrid/{source}", f"ht::{function}", max_warps=warps)

        return Program(
            constants=hybrid_constants(config, plan),
            declarations=arguments.declarations(),
            rail_words=plan.rail_words,
            kernels=(
                kernel(KernelName.COUNT, "ht_count", "count", moving),
                kernel(KernelName.PLAN, "ht_plan", "plan", moving),
                kernel(KernelName.PACK, "ht_pack", "pack", moving),
                kernel(KernelName.DISPATCH, "ht_dispatch", "dispatch_chunk", moving),
                kernel(KernelName.COMBINE, "ht_combine", "combine_chunk", summing),
                kernel(KernelName.SUM_HOSTS, "ht_sum", "sum_hosts", summing),
            ),
        )

    def message_regions(self) -> dict[str, int]:
        """Bytes by region of what the rail sends from and receives into."""
        return self._plan.message_regions()

    # -- calls ------------------------------------------------------------------------------------

    @property
    def dispatches_queued(self) -> int:
        """See `HybridMode`."""
        dispatcher = self._dispatcher
        assert isinstance(dispatcher, HybridDispatcher)
        return dispatcher.dispatches_queued

    def dispatch(self, call: DispatchCall, number: int) -> Dispatched:
        """Queues a dispatch; a new routing waits for the counts unless shapes are static."""
        call = into_tokens(call)
        if call.previous is None:
            started = self._dispatcher.dispatch(call, number=number)
        else:
            old = as_route(call.previous)
            started = self._dispatcher.dispatch_cached(call, old, number=number)
        output, route = started.output, started.route
        if output is None or route is None:
            self._raise_verdict(call, started)
        if call.buffers is None:
            if output.scales is not None:
                tensor = in_scale_order(self._config, output.scales.tensor)
                scales = QuantScales(tensor, output.scales.format)
                output = dataclasses.replace(output, scales=scales)
        else:
            output, fill = into_buffers(call.buffers, output)
            fill()
        if call.counted:
            self._rail_tally.add_dispatch(route.ids, output)
        return Dispatched(
            output=output,
            state=route,
            finish=nothing_left,
            call=self._wire.call,
            topk_ids_TK=route.ids_TK,
        )

    def combine(self, call: CombineCall) -> Combined:
        """Queues a combine."""
        combined = super().combine(call)
        self._rail_tally.add_combine(as_route(call.state).ids, combined.out_TH)
        return combined

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        return self._rail_tally.enable(super().enable_statistics())


def seats_of(domains: Domains) -> list[int]:
    """`[R]` seat of every rank: host * G + index in the host."""
    peers = domains.ranks_per_host
    assert peers is not None
    return [host * peers + domains.local_of(rank) for rank, host in enumerate(domains.host_of)]
