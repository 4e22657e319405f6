"""Low-latency mode across hosts: that of `nvlink` inside hosts, messages on rails between them."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.hybrid.ll.arguments import PACK, SUM
from expertlink.engines.hybrid.ll.combine import RailCombiner
from expertlink.engines.hybrid.ll.dispatch import RailDispatcher
from expertlink.engines.hybrid.ll.memory import Messages, message_regions
from expertlink.engines.hybrid.rail import Rail
from expertlink.engines.hybrid.tally import RailTally
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.launch import KernelName, KernelSource, Program, Run
from expertlink.engines.nvlink.ll import arguments
from expertlink.engines.nvlink.ll.combine import LlCombiner
from expertlink.engines.nvlink.ll.dispatch import LlDispatcher
from expertlink.engines.nvlink.ll.mode import LlMode
from expertlink.engines.nvlink.ll.plan import LlPlan, constants_of
from expertlink.engines.nvlink.ll.plan import unavailable_reason as unavailable_on_a_host
from expertlink.engines.nvlink.mode import Memory
from expertlink.engines.nvlink.shared import LOCATION_STRIDE
from expertlink.engines.nvlink.tables import as_route
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import InputError
from expertlink.routing import Placement
from expertlink.types import CallStatistics

_MOST_HOSTS = 32  # bits of a word


class RailLlMode(LlMode):
    """See `nvlink.mode.Mode`. Combines take no `weights_TK`: a dispatch brings them before.

    Args:
        config, wire, placement, run, num_sms, max_warps: as `Mode`. The wire joins all ranks.
        memory: of the ranks of this host, made for `plan_of`.
        domains: hosts of the ranks, all of one size.
        rail: of this rank.
    """

    routing_form = "hybrid ll"
    takes_weights = False

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
        self._domains, self.dispatches_queued = domains, 0
        self._rail_tally = RailTally(placement, domains, rank=wire.rank)
        device = memory.arena.device
        self._messages = Messages(config, domains=domains, rank=wire.rank, rail=rail, device=device)
        self._rank_of_expert = placement.rank_of_E[:-1].to(torch.int32)
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
        self, common: dict[str, int], run: Run, num_sms: int, max_warps: int
    ) -> tuple[LlDispatcher, LlCombiner]:
        location = _locations(
            self._rank_of_expert, self._expert_location, self._domains, self._wire.rank
        )
        self._expert_location = location
        common = {**common, "rank": self._messages.local, "expert_location": location.data_ptr()}
        dispatcher = RailDispatcher(
            self._config,
            common=common,
            num_ranks=self._num_ranks,
            num_local=self._num_local,
            arena=self._arena,
            run=run,
            num_sms=num_sms,
            max_warps=max_warps,
            messages=self._messages,
            rank_of_expert=self._rank_of_expert,
        )
        combiner = RailCombiner(
            self._config,
            common=common,
            arena=self._arena,
            run=run,
            num_ranks=self._num_ranks,
            num_sms=num_sms,
            max_warps=max_warps,
            messages=self._messages,
            rank_of_expert=self._rank_of_expert,
        )
        return dispatcher, combiner

    # -- what a communicator needs ----------------------------------------------------------------

    @staticmethod
    def plan_of(config: MoECommunicatorConfig, domains: Domains) -> LlPlan:
        """Sizes of a host's arena."""
        return LlPlan.of(config, domains.num_ranks, domains.num_hosts)

    @staticmethod
    def program_of(config: MoECommunicatorConfig, plan: LlPlan, domains: Domains) -> Program:
        """The kernels, for an arena of this plan."""
        num_ranks, num_hosts = domains.num_ranks, domains.num_hosts
        warps = tuning.LL_DISPATCH_WARPS
        kernels = [
            KernelSource(KernelName.DISPATCH, "ll/dispatch", "ll::dispatch", "<false>", warps),
            KernelSource(KernelName.PACK, "hybrid/ll_pack", "ll::pack", "<false>", warps),
        ]
        if config.quantization is not None:
            name = KernelName.PACK_QUANTIZED
            kernels.append(KernelSource(name, "hybrid/ll_pack", "ll::pack", "<true>", warps))
        warps = tuning.LL_COMBINE_WARPS
        kernels += [
            KernelSource(KernelName.COMBINE, "ll/combine", "ll::combine", "<false>", warps),
            KernelSource(KernelName.SUM_HOSTS, "hybrid/ll_sum", "ll::sum_hosts", "", warps),
        ]
        return Program(
            constants=constants_of(config, plan, num_ranks=num_ranks, num_hosts=num_hosts),
            declarations=arguments.declarations(num_ranks, domains)
            + PACK.declaration
            + SUM.declaration,
            kernels=tuple(kernels),
        )

    def message_regions(self) -> dict[str, int]:
        """Bytes of the messages by region, beside those of the arena."""
        return message_regions(self._config, self._messages.num_hosts)

    # -- calls ------------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall, number: int) -> Dispatched:
        """As `LlMode.dispatch`."""
        dispatched = super().dispatch(call, number)
        self.dispatches_queued += 1
        if call.counted:
            self._rail_tally.add_dispatch(as_route(dispatched.state).ids, dispatched.output)
        return dispatched

    def combine(self, call: CombineCall) -> Combined:
        """As `LlMode.combine`."""
        combined = super().combine(call)
        self._rail_tally.add_combine(as_route(call.state).ids, combined.out_TH)
        return combined

    def check(self, call: DispatchCall) -> None:
        """Raises InputError where the kernels cannot move such rows."""
        dispatcher = self._dispatcher
        assert isinstance(dispatcher, RailDispatcher)
        super().check(call)
        bound = dispatcher.bound_of(call)
        if call.x_TW.shape[0] > bound:
            raise InputError(
                f"{call.x_TW.shape[0]} tokens exceed the bound of {bound} that all ranks have set: "
                "set_tokens_bound() has to hold for each of them"
            )

    def set_tokens_bound(self, tokens_bound: int | None) -> None:
        """Messages to other hosts have room for so many tokens; None: T_max."""
        dispatcher = self._dispatcher
        assert isinstance(dispatcher, RailDispatcher)
        dispatcher.tokens_bound = tokens_bound or self._config.max_tokens_per_rank

    # -- statistics and masks ---------------------------------------------------------------------

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        counted = self._rail_tally.enable(super().enable_statistics())
        dispatcher = self._dispatcher
        assert isinstance(dispatcher, RailDispatcher)
        # What this rank sends is counted before it crosses the rail.
        dispatcher.pack.rows_sent = counted.rows_sent.data_ptr()
        dispatcher.pack.bytes_sent = counted.bytes_sent.data_ptr()
        # Kernels wait for ranks of the host only, and know them by their index.
        waits = None
        own = self._domains.ranks_of(self._messages.host)
        if own == tuple(range(own[0], own[0] + len(own))):
            waits = counted.longest_wait_ns[own[0] :].data_ptr()
        tables = list(self._tables)
        dispatches = [dispatcher.arguments, *(each.dispatch for each in tables)]
        combines = [self._combiner.arguments, *(each.combine for each in tables)]
        for a in dispatches:
            a.rows_sent = None
        for a in (*dispatches, *combines):
            a.longest_wait_ns = waits
        return counted

    def query_mask(self) -> Tensor:
        """`[R]` bool on the device: no rank is masked."""
        return torch.zeros(self._num_ranks, dtype=torch.bool, device=self._arena.device)

    def clear_mask(self) -> None:
        """There is nothing to clear."""

    def mask_peer(self, rank: int) -> None:
        """Raises InputError: the rails wait for every rank."""
        raise InputError(
            f"rank {rank} cannot be masked: the rails between hosts wait for all ranks"
        )


def unavailable_reason(
    config: MoECommunicatorConfig, domains: Domains, *, num_local: int
) -> str | None:
    """Why calls of few tokens cannot have kernels of their own across these hosts, or None.

    `num_local`: most experts of a rank.
    """
    if config.combine_precision == "exact":
        return "combine_precision='exact' would send a row for every choice between hosts"
    if config.mask_lost_peers:
        return "mask_lost_peers=True leaves ranks out, but the rails between hosts wait for all"
    if domains.num_hosts > _MOST_HOSTS:
        return f"there are {domains.num_hosts} hosts, they serve up to {_MOST_HOSTS}"
    return unavailable_on_a_host(
        config,
        num_ranks=domains.num_ranks,
        num_local=num_local,
        num_hosts=domains.num_hosts,
    )


def _locations(ranks_E: Tensor, locations_E: Tensor, domains: Domains, rank: int) -> Tensor:
    """`[E]` int32: locations by index on this rank's host, -1 for experts of other hosts."""
    index_R = torch.full((domains.num_ranks,), -1, dtype=torch.int32, device=ranks_E.device)
    for index, other in enumerate(domains.ranks_of(domains.host_of[rank])):
        index_R[other] = index
    index_E = index_R[ranks_E.long()]
    return torch.where(index_E < 0, -1, index_E * LOCATION_STRIDE + locations_E % LOCATION_STRIDE)
