"""A process for each rank, on pretended hosts: NCCL over sockets between them, bit for bit against
`collective` with the same domains and against the oracle.

The jobs themselves are checked on CPUs, with `collective` on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from expertlink import DispatchLayout, PeerTimeoutError
from expertlink.launch import RankError, RankPool
from support import across_hosts
from support.across_hosts import cases_on, hosts_of, pool_on
from support.cases import LAYOUTS, Shape, usual

ENGINES = ("hybrid", "collective")
BOTH_COLLECTIVE = ("collective", "collective")
TIMEOUT_S = 3.0
SLACK_S = 2.0
ON_HOSTS = pytest.mark.parametrize(
    ("hosts", "ranks"),
    [
        pytest.param(2, 2, marks=pytest.mark.gpu(2), id="2x1"),
        pytest.param(2, 4, marks=pytest.mark.gpu(4), id="2x2"),
        pytest.param(4, 4, marks=pytest.mark.gpu(4), id="4x1"),
    ],
)
PHASES = ("dispatch", "cached dispatch", "combine", "replay")


@pytest.fixture(scope="module")
def pools() -> Iterator[Any]:
    """`pools(hosts, ranks)`: ranks on GPUs that live as long as these tests."""
    running: dict[tuple[int, int], RankPool] = {}

    def pool_of(hosts: int, ranks: int) -> RankPool:
        pool = running.get((hosts, ranks))
        if pool is None or not pool.alive:
            pool = running[hosts, ranks] = pool_on(hosts, ranks, "cuda")
        return pool

    yield pool_of
    for pool in running.values():
        pool.close()


def cases_of(hosts: int, ranks: int, layout: DispatchLayout) -> list[Any]:
    return cases_on(usual(ranks, layout), hosts_of(hosts, ranks))


@ON_HOSTS
@LAYOUTS
@pytest.mark.parametrize(
    ("mode", "fields"),
    [("ht", {}), ("ht", {"static_shapes": True}), ("ll", {})],
    ids=["ht", "static", "ll"],
)
def test_bits_equal_collective(
    pools, mode: str, fields: dict[str, Any], layout: DispatchLayout, hosts: int, ranks: int
) -> None:
    cases = cases_of(hosts, ranks, layout)
    job = across_hosts.side_by_side
    done = pools(hosts, ranks).run(job, cases, ENGINES, mode, timeout_s=240, **fields)
    assert done == [len(cases)] * ranks


@ON_HOSTS
@LAYOUTS
@pytest.mark.parametrize("mode", ["ht", "ll"])
def test_graphs_with_changing_routing(
    pools, mode: str, layout: DispatchLayout, hosts: int, ranks: int
) -> None:
    cases = cases_of(hosts, ranks, layout)[:3]  # of equal T
    done = pools(hosts, ranks).run(across_hosts.replays, cases, ENGINES, mode, timeout_s=240)
    assert done == [2 * len(cases)] * ranks


@ON_HOSTS
@pytest.mark.parametrize("mode", ["ht", "ll"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank_is_named(phase: str, mode: str, hosts: int, ranks: int) -> None:
    with pool_on(hosts, ranks, "cuda") as pool:
        check_killed(pool, hosts, phase, mode, "hybrid", TIMEOUT_S)


def check_killed(
    pool: RankPool, hosts: int, phase: str, mode: str, engine: str, timeout_s: float
) -> None:
    """All that are left name the last rank, in time, and go on."""
    ranks = pool.num_ranks
    culprit = ranks - 1
    case = cases_of(hosts, ranks, DispatchLayout.EXPERT_MAJOR)[1]
    found: list[Any] = pool.run(
        across_hosts.killed,
        case,
        culprit,
        phase,
        engine,
        mode,
        timeout_s,
        timeout_s=120,
        return_exceptions=True,
    )
    died = found.pop(culprit)
    assert isinstance(died, RankError)
    assert died.failures[culprit].kind == "died"
    for lost in found:
        assert isinstance(lost, across_hosts.Lost), lost
        assert isinstance(lost.error, PeerTimeoutError), lost.error
        assert lost.error.missing == (culprit,), lost.error
        assert lost.seconds < timeout_s + SLACK_S, lost
        assert lost.later == ("ClosedError", "ClosedError")
        assert lost.works
        assert lost.close_s < 10, lost


# -- the jobs, on CPUs ----------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden": 24, "experts": 12, "topk": 4, "max_tokens": 19}
HOSTS, RANKS = 2, 4


def small_cases(layout: DispatchLayout, domains: tuple[int, ...]) -> list[Any]:
    return cases_on(Shape(RANKS, layout, **SMALL), domains)


@pytest.mark.parametrize("mode", ["ht", "ll"])
def test_jobs_on_cpus(rank_pools, mode: str) -> None:
    layout = DispatchLayout.RANK_MAJOR if mode == "ht" else DispatchLayout.EXPERT_MAJOR
    cases, pool = small_cases(layout, hosts_of(HOSTS, RANKS)), rank_pools(RANKS)
    some = [cases[0], cases[3], cases[5]]
    done = pool.run(across_hosts.side_by_side, some, BOTH_COLLECTIVE, mode, timeout_s=60)
    assert done == [len(some)] * RANKS
    done = pool.run(across_hosts.replays, cases[:2], BOTH_COLLECTIVE, mode, timeout_s=60)
    assert done == [4] * RANKS


def test_jobs_can_fail(rank_pools) -> None:
    """Sums that other hosts round are other bits."""
    layout = DispatchLayout.FLAT
    one, other = (small_cases(layout, domains)[0] for domains in ((0, 0, 1, 1), (0, 1, 2, 3)))
    found = rank_pools(RANKS).run(
        across_hosts.other_hosts, (one, other), BOTH_COLLECTIVE, timeout_s=60
    )
    assert any("combine differs" in text for text in found), found


def test_a_killed_rank_is_named_on_cpus() -> None:
    with RankPool(num_ranks=2) as pool:
        check_killed(pool, HOSTS, "dispatch", "ht", "collective", timeout_s=1.0)
