"""Arguments that one rank of the drop-in alone gets wrong are refused on all ranks."""

from __future__ import annotations

import pytest

from support.drop_in import refusals
from support.drop_in.inputs import Shapes
from support.drop_in.place import EVERYWHERE, run

SMALL = Shapes(tokens=9, hidden=128, experts=8, topk=3, fewer=2, masked=0.2)
DECODE = Shapes(tokens=4, hidden=512, experts=8, topk=3, fewer=1, masked=0.2)


WHERE = pytest.mark.parametrize("where", EVERYWHERE)
BAD_RANK = pytest.mark.parametrize("bad_rank", [0, 1])


@WHERE
@BAD_RANK
def test_normal(rank_pools, where: str, bad_rank: int) -> None:
    assert all(run(rank_pools, where, 2, refusals.normal, SMALL, bad_rank))


@WHERE
@BAD_RANK
def test_constructors(rank_pools, where: str, bad_rank: int) -> None:
    assert all(run(rank_pools, where, 2, refusals.constructors, bad_rank))


@BAD_RANK
def test_normal_among_three(rank_pools, bad_rank: int) -> None:
    shapes = Shapes(tokens=9, hidden=128, experts=9, topk=3)
    assert all(run(rank_pools, "cpu", 3, refusals.normal, shapes, bad_rank))


@BAD_RANK
def test_low_latency(rank_pools, bad_rank: int) -> None:
    assert all(run(rank_pools, "cpu", 2, refusals.low_latency, DECODE, bad_rank))


@WHERE
@BAD_RANK
def test_elastic(rank_pools, where: str, bad_rank: int) -> None:
    assert all(run(rank_pools, where, 2, refusals.elastic, SMALL, bad_rank))
