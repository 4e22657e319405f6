"""Hosts of a group: their numbers, the places of ranks in them, and rails."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlink.domains import Domains

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(LABELS)
def test_ranks_with_equal_labels_share_a_host(labels: list[int]) -> None:
    domains = Domains.of(labels)
    assert domains.num_ranks == len(labels)
    assert domains.num_hosts == len(set(labels))
    for a, one in enumerate(labels):
        for b, other in enumerate(labels):
            assert (domains.host_of[a] == domains.host_of[b]) == (one == other)


@given(LABELS)
def test_hosts_are_numbered_by_their_lowest_rank(labels: list[int]) -> None:
    domains = Domains.of(labels)
    lowest = [domains.ranks_of(host)[0] for host in range(domains.num_hosts)]
    assert lowest == sorted(lowest)
    assert lowest[0] == 0
    assert Domains.of([str(label) for label in labels]) == domains
    assert Domains.of(domains.host_of) == domains


@given(LABELS)
def test_every_rank_has_one_place(labels: list[int]) -> None:
    domains = Domains.of(labels)
    hosts = [domains.ranks_of(host) for host in range(domains.num_hosts)]
    assert sorted(rank for ranks in hosts for rank in ranks) == list(range(len(labels)))
    for ranks in hosts:
        assert list(ranks) == sorted(ranks)
    for rank, host in enumerate(domains.host_of):
        assert domains.rank(host, domains.local_of(rank)) == rank
    sizes = {len(ranks) for ranks in hosts}
    assert domains.ranks_per_host == (sizes.pop() if len(sizes) == 1 else None)


@given(LABELS)
def test_a_rail_has_one_rank_of_every_host_that_is_large_enough(labels: list[int]) -> None:
    domains = Domains.of(labels)
    largest = max(len(domains.ranks_of(host)) for host in range(domains.num_hosts))
    for local in range(largest):
        rail = domains.rail(local)
        assert all(domains.local_of(rank) == local for rank in rail)
        on = [domains.host_of[rank] for rank in rail]
        large = [h for h in range(domains.num_hosts) if len(domains.ranks_of(h)) > local]
        assert on == large
    assert domains.rail(largest) == ()


def test_names_of_machines() -> None:
    domains = Domains.of(["b", "a", "b", "a", "b", "a"])
    assert domains.host_of == (0, 1, 0, 1, 0, 1)
    assert (domains.num_hosts, domains.ranks_per_host) == (2, 3)
    assert domains.ranks_of(1) == (1, 3, 5)
    assert domains.rail(2) == (4, 5)
    assert domains.rank(1, 2) == 5


def test_one_host() -> None:
    assert Domains.one(3) == Domains.of("xxx")
    assert Domains.one(3).rail(1) == (1,)


@pytest.mark.parametrize("host_of", [(1,), (0, 2), (1, 0)])
def test_other_numbers_are_refused(host_of: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="numbered by their lowest rank"):
        Domains(host_of)


def test_a_group_without_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        Domains.of([])


def test_a_local_index_beyond_the_host() -> None:
    with pytest.raises(IndexError):
        Domains.of([0, 0, 1]).rank(1, 1)
