"""How even ranks would be loaded with another placement: recorded routings, replayed on paper.

In: a routing trace. Out: for every layer, rows per rank under the even placement and under one that
`propose_placement` makes from the steps before. Nothing is measured and nothing is sent.

A rank's load in a step is the number of choices that its experts receive, which is what its
products take. The figure for a step is the busiest rank's load over the mean: everybody waits for
the busiest rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from expertlink.errors import InputError
from expertlink.placement import ExpertPlacement, propose_placement
from expertlink.workloads.trace import RoutingTrace

Loads = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerBalance:
    """One layer, before and after.

    Attributes:
        layer: from 0.
        placement: the proposal.
        before: `[steps, R]` choices of every rank's experts with experts in even blocks.
        after: the same with the proposal.
    """

    layer: int
    placement: ExpertPlacement
    before: Loads
    after: Loads


@dataclass(frozen=True)
class Balance:
    """What a trace gives.

    Attributes:
        layers: all of the trace's.
        history: steps whose loads the proposals know; figures are about the others.
        domains: `[R]` the host of every rank.
        redundant: slots beyond one per expert.
    """

    layers: list[LayerBalance]
    history: int
    domains: tuple[int, ...]
    redundant: int

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.domains)

    def judged(self, loads: Loads) -> Loads:
        """The steps that no proposal knew; all of them where there is only one."""
        return loads[self.history :] if self.history < len(loads) else loads

    def by_host(self, loads: Loads) -> Loads:
        """`[steps, hosts]` choices, from those of ranks."""
        hosts = sorted(set(self.domains))
        member = np.array([[domain == host for host in hosts] for domain in self.domains])
        return loads @ member.astype(np.int64)


def busiest_over_mean(loads: Loads) -> npt.NDArray[np.float64]:
    """`[steps]`; 1 is even, also where nothing is chosen."""
    mean = loads.mean(axis=-1)
    return np.where(mean > 0, loads.max(axis=-1) / np.maximum(mean, 1e-300), 1.0)


def count_loads(trace: RoutingTrace) -> Loads:
    """`[steps, layers, E]` choices of every expert, over all ranks."""
    steps, layers, experts = trace.num_steps, trace.num_layers, trace.num_experts
    ids = trace.topk_ids.reshape(steps * layers, -1)
    counts = [np.bincount(row[row >= 0], minlength=experts) for row in ids]
    return np.array(counts, dtype=np.int64).reshape(steps, layers, experts)


def simulate(
    trace: RoutingTrace,
    *,
    num_ranks: int,
    redundant: int = 0,
    num_hosts: int = 1,
    history: float = 0.5,
) -> Balance:
    """Proposes a placement for every layer and replays the trace over it.

    The choices are dealt to the ranks as by `RoutingTrace.for_ranks`. Ids become those of copies as
    in a program: by token index, beginning at the rank.

    Args:
        trace: recorded choices.
        num_ranks: R of the simulation.
        redundant: slots beyond one per expert.
        num_hosts: ranks are dealt to as many hosts, in blocks; hosts are balanced as well.
        history: share of the steps, from the first, whose loads a proposal knows.

    Raises:
        InputError: hosts or history are not possible with this trace.
        ConfigurationError: ranks or redundant slots are not.
    """
    if num_ranks < 1:
        raise InputError(f"ranks={num_ranks} is not possible; accepted: at least 1")
    if not 1 <= num_hosts <= num_ranks or num_ranks % num_hosts:
        raise InputError(f"hosts={num_hosts} is not possible; accepted: a divisor of {num_ranks}")
    if not 0 < history <= 1:
        raise InputError(f"history={history} is not possible; accepted: above 0, up to 1")
    dealt = trace.for_ranks(num_ranks)
    known = max(1, round(history * dealt.num_steps))
    domains = tuple(rank * num_hosts // num_ranks for rank in range(num_ranks))
    even = ExpertPlacement.even(trace.num_experts, num_ranks)
    loads_SLE = count_loads(dealt)
    layers: list[LayerBalance] = []
    for layer in range(dealt.num_layers):
        placement = propose_placement(
            loads_SLE[:known, layer].sum(axis=0).tolist(),
            num_ranks=num_ranks,
            redundant=redundant,
            domains=domains,
        )
        before, after = (_rank_loads(dealt, layer, where) for where in (even, placement))
        layers.append(LayerBalance(layer, placement, before, after))
    return Balance(layers, known, domains, redundant)


def _rank_loads(trace: RoutingTrace, layer: int, placement: ExpertPlacement) -> Loads:
    """`[steps, R]` choices that every rank's experts receive."""
    physical, rank_of_P = placement.to_physical(), np.array(placement.expert_map)
    loads = np.zeros((trace.num_steps, trace.num_ranks), dtype=np.int64)
    for step, ids_RTK in enumerate(trace.topk_ids[:, layer]):
        for rank, ids_TK in enumerate(ids_RTK):
            ids = physical(torch.from_numpy(np.ascontiguousarray(ids_TK)), first=rank).numpy()
            chosen = rank_of_P[ids[ids >= 0]]
            loads[step] += np.bincount(chosen, minlength=trace.num_ranks)
    return loads
