"""Arguments that one rank of the drop-in alone gets wrong are refused on all ranks."""

from __future__ import annotations

import pytest

from support.drop_in import refusals
from support.drop_in.inputs import Shapes
from support.drop_in.place import run

SMALL = Shapes(tokens=9, hidden=128, experts=8, topk=3, fewer=2, masked=0.2)
DECODE = Shapes(tokens=4, hidden=512, experts=8, topk=3, fewer=1, masked=0.2)


BAD_RANK = pytest.mark.parametrize("bad_rank", [0, 1])


@BAD_RANK
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_normal(rank_pools, num_ranks: int, bad_rank: int) -> None:
    shapes = SMALL if num_ranks == 2 else Shapes(tokens=9, hidden=128, experts=9, topk=3)
    assert all(run(rank_pools, "cpu", num_ranks, refusals.normal, shapes, bad_rank))


@BAD_RANK
def test_low_latency(rank_pools, bad_rank: int) -> None:
    assert all(run(rank_pools, "cpu", 2, refusals.low_latency, DECODE, bad_rank))


@BAD_RANK
def test_elastic(rank_pools, bad_rank: int) -> None:
    assert all(run(rank_pools, "cpu", 2, refusals.elastic, SMALL, bad_rank))
