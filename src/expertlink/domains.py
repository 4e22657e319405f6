"""Hosts of a group: which ranks share one NVLink domain.

In: a label per rank, such as the name of its machine. Out: hosts, numbered by their lowest rank,
and the place of every rank in its host.

A host here is an NVLink domain: one machine, or a rack whose GPUs reach each other's memory. Pure
Python, no communication.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Domains:
    """The host of every rank. Hosts may differ in size, and their ranks need not be neighbours.

    Attributes:
        host_of: per rank its host. Hosts are numbered 0, 1, ... in the order of their lowest ranks.

    Raises:
        ValueError: there is no rank, or hosts are numbered in another way; `of` numbers them.
    """

    host_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.host_of:
            raise ValueError("a group has at least one rank")
        if self.host_of != _numbered(self.host_of):
            raise ValueError(
                f"host_of={self.host_of}: hosts are numbered by their lowest rank, as "
                f"{_numbered(self.host_of)}"
            )

    @classmethod
    def of(cls, labels: Sequence[Hashable]) -> Domains:
        """Ranks with equal labels share a host; `labels[r]` belongs to rank r."""
        return cls(_numbered(labels))

    @classmethod
    def one(cls, num_ranks: int) -> Domains:
        """All ranks on one host."""
        return cls((0,) * num_ranks)

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.host_of)

    @property
    def num_hosts(self) -> int:
        """N, the number of hosts."""
        return len(self._ranks)

    @property
    def ranks_per_host(self) -> int | None:
        """G, or None where hosts differ in size."""
        sizes = {len(ranks) for ranks in self._ranks}
        return sizes.pop() if len(sizes) == 1 else None

    def ranks_of(self, host: int) -> tuple[int, ...]:
        """Ranks of a host, ascending."""
        return self._ranks[host]

    def local_of(self, rank: int) -> int:
        """Index of a rank among the ranks of its host, ascending."""
        return self._ranks[self.host_of[rank]].index(rank)

    def rank(self, host: int, local: int) -> int:
        """The rank with index `local` on a host.

        Raises:
            IndexError: the host has fewer ranks.
        """
        return self._ranks[host][local]

    def rail(self, local: int) -> tuple[int, ...]:
        """Ranks with index `local` on their host, hosts ascending; hosts without one are absent."""
        return tuple(ranks[local] for ranks in self._ranks if local < len(ranks))

    @cached_property
    def _ranks(self) -> tuple[tuple[int, ...], ...]:
        """Per host its ranks, ascending."""
        ranks: dict[int, list[int]] = {}
        for rank, host in enumerate(self.host_of):
            ranks.setdefault(host, []).append(rank)
        return tuple(map(tuple, ranks.values()))


def _numbered(labels: Sequence[Hashable]) -> tuple[int, ...]:
    """Every label's number: 0 for the first label, 1 for the next one that differs, ..."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(label, len(numbers)) for label in labels)
