"""Where experts live, and copies of busy ones: proposals from counted loads, and physical ids.

In: loads that were counted per expert. Out: a placement, the `expert_map` of a communicator for it,
and tables that turn a router's ids into those of copies.

A *slot* is room for one expert on one rank. With copies there are more slots than experts. The ids
of the router are *logical*, 0 to E - 1. *Physical* ids number the P slots of all ranks, rank by
rank, so they depend on how many slots each rank has, and not on what is in them: a communicator
made for the P slots serves every placement with as many slots per rank.

Pure Python and torch, no communication. Moving weights is `MoECommunicator.rebalance`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.errors import ConfigurationError, InputError
from expertlink.routing import even_blocks


@dataclass(frozen=True)
class ExpertPlacement:
    """The expert in every slot of every rank. The same on all ranks.

    Attributes:
        num_experts: E, without copies.
        experts_of_rank: logical ids of every rank's slots. They are sorted, so the order is that of
            a communicator's local experts.

    Raises:
        ConfigurationError: an expert is on no rank, on one rank twice, or does not exist.
    """

    num_experts: int
    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = tuple(tuple(sorted(map(int, experts))) for experts in self.experts_of_rank)
        object.__setattr__(self, "experts_of_rank", ranks)
        if self.num_experts < 1 or not ranks:
            raise ConfigurationError(
                f"a placement of {self.num_experts} experts on {len(ranks)} ranks is not possible; "
                "accepted: at least 1 of each"
            )
        for rank, experts in enumerate(ranks):
            for expert, after in zip(experts, [*experts[1:], None], strict=False):
                if not 0 <= expert < self.num_experts:
                    raise ConfigurationError(
                        f"rank {rank} is to hold expert {expert}; experts are "
                        f"0..{self.num_experts - 1}"
                    )
                if expert == after:
                    raise ConfigurationError(
                        f"rank {rank} is to hold expert {expert} twice; copies of an expert live "
                        "on different ranks"
                    )
        missing = set(range(self.num_experts)).difference(*ranks)
        if missing:
            raise ConfigurationError(
                f"no rank holds expert {min(missing)} ({len(missing)} of {self.num_experts} "
                "experts have no rank)"
            )

    @staticmethod
    def even(num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Blocks of experts, as a communicator without `expert_map` places them."""
        return ExpertPlacement.from_map(even_blocks(num_experts, num_ranks), num_ranks=num_ranks)

    @staticmethod
    def from_map(expert_map: Iterable[int], *, num_ranks: int) -> ExpertPlacement:
        """One copy of each expert, on the rank that the map names."""
        experts: list[list[int]] = [[] for _ in range(num_ranks)]
        count = 0
        for expert, rank in enumerate(expert_map):
            if not 0 <= rank < num_ranks:
                raise ConfigurationError(
                    f"expert_map puts expert {expert} on rank {rank}; ranks are 0..{num_ranks - 1}"
                )
            experts[rank].append(expert)
            count += 1
        return ExpertPlacement(count, tuple(map(tuple, experts)))

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.experts_of_rank)

    @property
    def num_physical(self) -> int:
        """P, slots of all ranks: `num_experts` of the communicator."""
        return sum(map(len, self.experts_of_rank))

    @property
    def slots_per_rank(self) -> tuple[int, ...]:
        """`[R]`; placements that agree in it can use one communicator."""
        return tuple(map(len, self.experts_of_rank))

    @cached_property
    def expert_map(self) -> tuple[int, ...]:
        """`[P]` rank of every physical id: `expert_map` of the communicator."""
        return tuple(rank for rank, slots in enumerate(self.slots_per_rank) for _ in range(slots))

    @cached_property
    def logical_ids(self) -> tuple[int, ...]:
        """`[P]` expert of every physical id."""
        return tuple(expert for experts in self.experts_of_rank for expert in experts)

    @cached_property
    def physical_ids(self) -> tuple[tuple[int, ...], ...]:
        """`[E]` ascending physical ids of every expert's copies."""
        copies: list[list[int]] = [[] for _ in range(self.num_experts)]
        for physical, expert in enumerate(self.logical_ids):
            copies[expert].append(physical)
        return tuple(map(tuple, copies))

    def logical_map(self) -> tuple[int, ...]:
        """`[E]` rank of every expert: `expert_map` of a communicator that takes logical ids.

        Raises:
            ConfigurationError: an expert has several copies.
        """
        for expert, copies in enumerate(self.physical_ids):
            if len(copies) > 1:
                raise ConfigurationError(
                    f"expert {expert} has {len(copies)} copies: use num_experts="
                    f"{self.num_physical}, `expert_map` and physical ids"
                )
        return tuple(self.expert_map[physical] for (physical,) in self.physical_ids)

    def to_physical(self, device: torch.device | str = "cpu") -> PhysicalIds:
        """What turns a router's ids into physical ones, on that device."""
        table, counts = self._tables()
        return PhysicalIds(
            table_ER=table.to(device), count_E=counts.to(device), num_physical=self.num_physical
        )

    def _tables(self) -> tuple[Tensor, Tensor]:
        most = self.num_ranks  # so that shapes do not depend on the number of copies
        rows = [(*copies, *copies[:1] * (most - len(copies))) for copies in self.physical_ids]
        counts = list(map(len, self.physical_ids))
        table, count = (torch.tensor(v, dtype=torch.int64, device="cpu") for v in (rows, counts))
        return table, count

    def logical_loads(self, loads_P: Tensor) -> Tensor:
        """`[..., E]` loads of experts, from those of their copies `[..., P]`.

        Raises:
            InputError: the last dimension is not P.
        """
        if loads_P.shape[-1:] != (self.num_physical,):
            raise InputError(
                f"loads have shape {list(loads_P.shape)}, expected [..., {self.num_physical}]: "
                "one per physical id"
            )
        index = torch.tensor(self.logical_ids, dtype=torch.int64, device=loads_P.device)
        loads_E = loads_P.new_zeros((*loads_P.shape[:-1], self.num_experts))
        return loads_E.index_add_(-1, index, loads_P)


@dataclass(frozen=True)
class PhysicalIds:
    """Turns logical ids into physical ones; made by `ExpertPlacement.to_physical`.

    Token t takes copy `(t + first) % count` of each of its experts, counted in the order of
    physical ids. The choice depends on the token's index alone: not on its other experts, on other
    tokens, or on other ranks. So a token's copies, and with `combine_precision="wire"` the
    roundings of its sum, change with its index in the batch; with "exact" results do not depend on
    the copy. No host wait; can be captured and compiled.

    Attributes:
        table_ER: `[E, R]` int64 physical ids of every expert's copies, then the first one again.
        count_E: `[E]` int64 copies of every expert.
        num_physical: P.
    """

    table_ER: Tensor
    count_E: Tensor
    num_physical: int

    def set_(self, placement: ExpertPlacement) -> None:
        """Takes over another placement, in place: graphs that were captured go on with it.

        Raises:
            ConfigurationError: it has other numbers of experts, ranks or slots.
        """
        table, counts = placement._tables()
        if table.shape != self.table_ER.shape or placement.num_physical != self.num_physical:
            raise ConfigurationError(
                f"a placement of {list(table.shape)} experts and ranks in {placement.num_physical} "
                f"slots cannot replace one of {list(self.table_ER.shape)} in {self.num_physical}"
            )
        self.table_ER.copy_(table)
        self.count_E.copy_(counts)

    def __call__(self, topk_ids: Tensor, *, first: int | Tensor = 0) -> Tensor:
        """Physical ids in the shape and dtype of `topk_ids`.

        Args:
            topk_ids: `[T, K]` logical ids. Negative ones mean "no expert" and stay as they are.
                Those from E on, which are faulty, become faulty physical ids.
            first: added to the index of every token. Give it the rank where batches are short, so
                that ranks begin with different copies. An integer, or a scalar on the device.
        """
        num_experts, num_tokens = self.table_ER.shape[0], topk_ids.shape[0]
        ids_TK = topk_ids.to(torch.int64)
        known_TK = ids_TK.clamp(0, num_experts - 1)
        index_T1 = torch.arange(num_tokens, device=ids_TK.device)[:, None] + first
        physical_TK = self.table_ER[known_TK, index_T1 % self.count_E[known_TK]]
        faulty_TK = ids_TK + (self.num_physical - num_experts)
        physical_TK = torch.where(ids_TK < num_experts, physical_TK, faulty_TK)
        return torch.where(ids_TK < 0, ids_TK, physical_TK).to(topk_ids.dtype)


def propose_placement(
    loads: Tensor | Sequence[float],
    *,
    num_ranks: int,
    redundant: int = 0,
    domains: Sequence[int] | None = None,
) -> ExpertPlacement:
    """A placement that spreads counted loads evenly. Deterministic: equal arguments, equal result.

    Greedy, in two steps. First the `redundant` slots: each goes to the expert whose copies carry
    most. Then all copies, the busiest first, each to the rank with the least load that has a free
    slot and none of the expert's copies; with `domains` to the least loaded rank of the least
    loaded domain. Ties go to the lower number. Ranks get equal numbers of slots, the first ones
    one more where they cannot be equal.

    Args:
        loads: `[E]` counted loads, such as tokens per expert. All ranks pass the same.
        num_ranks: R.
        redundant: slots beyond one per expert, P - E.
        domains: `[R]` the host, or the NVLink domain, of every rank. Their loads are balanced
            before those of ranks.

    Raises:
        InputError: loads are no list of finite numbers from 0.
        ConfigurationError: so many ranks, redundant slots or domains are not possible.
    """
    loads_E = _checked_loads(loads)
    num_experts = len(loads_E)
    if num_ranks < 1:
        raise ConfigurationError(f"num_ranks={num_ranks} is not possible; accepted: at least 1")
    most = num_experts * (num_ranks - 1)
    if not 0 <= redundant <= most:
        raise ConfigurationError(
            f"redundant={redundant} is not possible; accepted: 0 to {most}, a copy of each of "
            f"{num_experts} experts on each of {num_ranks} ranks"
        )
    domain_of_rank = list(range(num_ranks)) if domains is None else [int(d) for d in domains]
    if len(domain_of_rank) != num_ranks:
        raise ConfigurationError(
            f"domains has {len(domain_of_rank)} entries; accepted: one per rank, {num_ranks}"
        )
    copies = _copies(loads_E, num_ranks, redundant)
    shares = [load / count for load, count in zip(loads_E, copies, strict=True)]
    order = sorted(range(num_experts), key=lambda expert: (-shares[expert], expert))
    packing = _Packing(num_experts + redundant, domain_of_rank, shares)
    for expert in order:
        for _ in range(copies[expert]):
            packing.add(expert)
    return ExpertPlacement(num_experts, tuple(map(tuple, packing.experts_of_rank)))


def _checked_loads(loads: Tensor | Sequence[float]) -> list[float]:
    values = loads.tolist() if isinstance(loads, Tensor) else list(loads)
    if not values or any(isinstance(value, list) for value in values):
        shape = list(loads.shape) if isinstance(loads, Tensor) else len(values)
        raise InputError(f"loads have shape {shape}, expected [E]: one number per expert")
    for expert, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise InputError(f"expert {expert} has load {value}, expected a finite number from 0")
    return [float(value) for value in values]


def _copies(loads_E: list[float], num_ranks: int, redundant: int) -> list[int]:
    """Copies of every expert."""
    copies = [1] * len(loads_E)
    for _ in range(redundant):
        busiest = max(
            (expert for expert, count in enumerate(copies) if count < num_ranks),
            key=lambda expert: (loads_E[expert] / copies[expert], -expert),
        )
        copies[busiest] += 1
    return copies


class _Packing:
    """Slots that are being filled.

    Args:
        num_slots: P, dealt to the ranks as evenly as possible.
        domain_of_rank: domain of every rank.
        shares: load of one copy of every expert.
    """

    def __init__(self, num_slots: int, domain_of_rank: list[int], shares: list[float]) -> None:
        ranks = range(len(domain_of_rank))
        self._shares = shares
        slots = even_blocks(num_slots, len(ranks))
        self._room = [slots.count(rank) for rank in ranks]
        self.experts_of_rank: list[list[int]] = [[] for _ in ranks]
        self._members = [
            [rank for rank in ranks if domain_of_rank[rank] == domain] for domain in domain_of_rank
        ]

    def add(self, expert: int) -> None:
        """Places one more copy."""
        free = [rank for rank, room in enumerate(self._room) if self._used(rank) < room]
        open_ranks = [rank for rank in free if expert not in self.experts_of_rank[rank]]
        if open_ranks:
            rank = min(open_ranks, key=lambda rank: (*self._crowding(rank), rank))
        else:
            rank = self._make_room(expert, free[0])
        self.experts_of_rank[rank].append(expert)

    def _used(self, rank: int) -> int:
        return len(self.experts_of_rank[rank])

    def _load(self, rank: int) -> float:
        return math.fsum(self._shares[expert] for expert in self.experts_of_rank[rank])

    def _crowding(self, rank: int) -> tuple[float, float, int]:
        members = self._members[rank]
        return sum(map(self._load, members)) / len(members), self._load(rank), self._used(rank)

    def _make_room(self, expert: int, free: int) -> int:
        """All ranks with a free slot have the expert: moves something from another rank there.

        There is always something: ranks differ by at most one slot, so a full rank without the
        expert holds more than a rank with the expert and a free slot could hold of the same.
        """
        there = self.experts_of_rank[free]
        moves = [
            (self._shares[other], rank, other)
            for rank, experts in enumerate(self.experts_of_rank)
            if expert not in experts
            for other in experts
            if other not in there
        ]
        _, rank, other = min(moves)
        self.experts_of_rank[rank].remove(other)
        there.append(other)
        return rank


class _Rebalances(Protocol):
    """What `gather_loads` needs of a communicator."""

    config: MoECommunicatorConfig
    num_ranks: int

    def rebalance(self, tensors: Sequence[Tensor], new: ExpertPlacement) -> list[Tensor]:
        """As `MoECommunicator.rebalance`."""
        ...


def gather_loads(
    comm: _Rebalances, tokens_per_expert: Tensor, placement: ExpertPlacement | None = None
) -> Tensor:
    """`[E]` loads of all experts, on every rank. Collective.

    Args:
        comm: the communicator that counted.
        tokens_per_expert: `[E_loc]` this rank's, as in `CallStatistics`.
        placement: what is in the communicator's slots; None: it takes logical ids.

    Raises:
        InputError: the counts are not those of the communicator's local experts, on some rank.
    """
    count = comm.config.num_experts
    everywhere = ExpertPlacement(count, (tuple(range(count)),) * comm.num_ranks)
    [loads_P] = comm.rebalance([tokens_per_expert], everywhere)
    return loads_P if placement is None else placement.logical_loads(loads_P)
