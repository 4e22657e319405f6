"""Mode "ll" with a process for each rank: graphs, streams, other engines, deaths."""

from __future__ import annotations

import dataclasses

import pytest

from expertlink import BlockFormat, DispatchLayout, PeerError
from expertlink.launch import RankPool
from support import decode, jobs, lost_ranks, payloads, processes, training
from support.cases import EXPANDED, LL, exact, routings, usual
from support.oracle import Case

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
RANKS = pytest.mark.parametrize(
    "ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2, 4)]
)
MANY = pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (2, 4)])


def steady(ranks: int, layout: DispatchLayout) -> list[Case]:
    """Routings with the same number of tokens on every rank, as graphs need them."""
    tokens = (40, 0, 23, 38, 7, 40, 1, 12)[:ranks]
    shape = usual(ranks, layout)
    return [
        shape.case(tokens, seed=1),
        shape.case(tokens, masked=0.4, seed=2),
        shape.case(tokens, skew=3.0, seed=3),
        shape.case(tokens, only_rank=ranks - 1, seed=4),
        shape.case(tokens, masked=1.0, seed=5),
    ]


@MANY
@LAYOUTS
def test_what_decode_asks_for(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    pool = rank_pools(ranks, "cuda")
    drawn = routings(usual(ranks, layout))
    some = drawn[:3]
    for job in (
        decode.halves,
        decode.in_turns,
        decode.buffers,
        decode.forgotten_hooks,
        decode.three_in_flight,
        decode.dropped_results,
        payloads.any_bits,
    ):
        assert all(pool.run(processes.on_a_rank, job, some, timeout_s=100))
    for whole in (
        decode.many_turns,
        decode.halves_and_whole_calls,
        decode.buffers_of_every_call,
    ):
        assert all(pool.run(processes.with_all, whole, drawn, timeout_s=100))
    for fmt in BlockFormat:
        done = pool.run(
            processes.on_a_rank, payloads.quantized, some, timeout_s=100, quantization=fmt
        )
        assert all(done)
    if layout.expanded:
        for job in (decode.own_weights, decode.topk_weights, decode.ranges):
            assert all(pool.run(processes.on_a_rank, job, some, timeout_s=100))
    assert all(pool.run(processes.on_a_rank, decode.statistics, drawn[:1], timeout_s=100))


@MANY
@LAYOUTS
def test_gradients_and_requests(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    pool = rank_pools(ranks, "cuda")
    case = usual(ranks, layout).case(masked=0.2)
    assert all(pool.run(training.weight_grads, case, timeout_s=60, **LL))
    if layout is not DispatchLayout.TOKEN_MAJOR:  # see test_ll.py
        for worst in pool.run(training.gradients, case, timeout_s=60, **LL):
            assert max(worst.values()) < 0.05, worst
    for job in (jobs.overlapping, jobs.finished_later):
        assert all(pool.run(job, case, timeout_s=60, **LL))


# -- graphs ---------------------------------------------------------------------------------------


@RANKS
@LAYOUTS
def test_graphs(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    """Replays with other routings, weights and rows, between them eager calls."""
    pool = rank_pools(ranks, "cuda")
    drawn = steady(ranks, layout)
    assert all(pool.run(processes.graphs, drawn, timeout_s=120))
    assert all(pool.run(processes.graphs_of_halves, drawn, timeout_s=120))


@RANKS
@EXPANDED
@pytest.mark.parametrize("precision", ["wire", "exact"])
def test_graphs_with_weights_of_the_tokens_ranks(
    rank_pools, precision: str, ranks: int, layout: DispatchLayout
) -> None:
    """Replays with other weights, of a dispatch that has none."""
    drawn = [dataclasses.replace(case, precision=precision) for case in steady(ranks, layout)]
    pool = rank_pools(ranks, "cuda")
    assert all(pool.run(processes.graphs_with_weights, drawn, timeout_s=120))


# -- several communicators and streams ------------------------------------------------------------


@MANY
@LAYOUTS
def test_modes_side_by_side(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    drawn = routings(usual(ranks, layout))
    assert all(rank_pools(ranks, "cuda").run(processes.mixed_modes, drawn, timeout_s=120))


@MANY
@LAYOUTS
def test_shared_memory(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    pool = rank_pools(ranks, "cuda")
    drawn = routings(usual(ranks, layout))
    assert all(pool.run(processes.shared_memory, drawn, timeout_s=120))
    assert all(pool.run(processes.other_streams, drawn[0], timeout_s=120))


@MANY
def test_waits_are_measured(rank_pools, ranks: int) -> None:
    """Whoever comes late is seen by all others; it has not waited for them as long itself."""
    case = usual(ranks, DispatchLayout.EXPERT_MAJOR).case((24,) * ranks, seed=1)
    for late in range(ranks):
        waits = rank_pools(ranks, "cuda").run(processes.longest_waits, case, late, timeout_s=60)
        for rank, longest in enumerate(waits):
            if rank != late:
                assert longest[late] > 0
                assert longest[late] == max(longest), f"rank {rank}: {longest}"


# -- ranks that die -------------------------------------------------------------------------------


@pytest.mark.gpu(4)
@pytest.mark.parametrize("phase", ["dispatch", "combine", "halves"])
@LAYOUTS
def test_survivors_of_a_killed_rank_go_on(layout: DispatchLayout, phase: str) -> None:
    shape = usual(4, layout)
    cases = [shape.case((9, 4, 7, 5), seed=1), shape.case((5, 40, 0, 2), masked=0.3, seed=2)]
    with RankPool(num_ranks=4, device="cuda") as pool:
        results = pool.run(
            lost_ranks.killed_and_masked, cases, 1, phase, timeout_s=120, return_exceptions=True
        )
    for rank in (0, 2, 3):
        assert results[rank] == ("nvlink",), results[rank]


@pytest.mark.gpu(4)
@LAYOUTS
def test_a_rank_killed_at_any_moment(layout: DispatchLayout) -> None:
    shape = usual(4, layout)
    cases = [shape.case((9, 4, 7, 5), seed=1), shape.case((5, 40, 0, 2), masked=0.3, seed=2)]
    precise = [dataclasses.replace(case, precision="exact") for case in cases]
    for drawn in (cases, precise) if layout.expanded else (cases,):
        with RankPool(num_ranks=4, device="cuda") as pool:
            results = pool.run(
                lost_ranks.killed_in_the_middle, drawn, 2, timeout_s=120, return_exceptions=True
            )
        for rank in (0, 1, 3):
            assert results[rank] == 400, results[rank]


@pytest.mark.gpu(2)
@LAYOUTS
def test_ranks_in_different_calls_end(rank_pools, layout: DispatchLayout) -> None:
    """Both are alive, so neither masks the other one: each is told that the calls differ."""
    case, timeout_s = usual(2, layout).case((40, 0), seed=1), 0.5
    seen = rank_pools(2, "cuda").run(lost_ranks.crossed_calls, case, timeout_s, timeout_s=60)
    for lost in seen:
        assert isinstance(lost.error, PeerError), lost.error
        assert "rank 0 is in combine #4 of dispatch #3; rank 1 is in dispatch #4" in str(lost.error)
        assert lost.later == ("ClosedError", "ClosedError")
        assert lost.gpu_works


@MANY
@LAYOUTS
def test_a_rank_that_was_given_up_comes_back(
    rank_pools, ranks: int, layout: DispatchLayout
) -> None:
    plain = usual(ranks, layout)
    for shape in (plain, exact(plain)) if layout.expanded else (plain,):
        cases = [shape.case((9, 4, 7, 5)[:ranks], seed=1), shape.case((40,) * ranks, seed=2)]
        pool = rank_pools(ranks, "cuda")
        done = pool.run(lost_ranks.late_beyond_the_timeout, cases, 1, timeout_s=60)
        assert done == [True] * ranks
