"""Normal calls of the drop-in's `Buffer`, held to what DeepEP's own test asserts, and more."""

from __future__ import annotations

import pytest

from support.drop_in import intranode, normal
from support.drop_in.inputs import Shapes
from support.drop_in.place import EVERYWHERE, run

WHERE = pytest.mark.parametrize("where", EVERYWHERE)
SMALL = Shapes(tokens=9, hidden=128, experts=8, topk=3, fewer=2, masked=0.2)


@WHERE
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_intranode(rank_pools, where: str, num_ranks: int) -> None:
    shapes = Shapes(tokens=24, hidden=256, experts=16, topk=4)
    assert all(run(rank_pools, where, num_ranks, intranode.intranode, shapes))


@WHERE
def test_any_shapes_on_one_buffer(rank_pools, where: str) -> None:
    shapes = [
        SMALL,
        Shapes(tokens=5, hidden=128, experts=8, topk=3, fewer=5, seed=1),  # T=0 on a rank
        Shapes(tokens=200, hidden=128, experts=8, topk=3, fewer=190, seed=2),  # more than before
        Shapes(tokens=1, hidden=128, experts=8, topk=1, fewer=1, seed=3),  # N=0 on a rank
        Shapes(tokens=0, hidden=128, experts=8, topk=3, seed=4),  # no tokens at all
        Shapes(tokens=7, hidden=8, experts=64, topk=32, seed=5),
        Shapes(tokens=130, hidden=16, experts=64, topk=1, seed=6),
        Shapes(tokens=9, hidden=128, experts=8, topk=3, masked=1.0, seed=7),  # nobody chooses
    ]
    assert all(run(rank_pools, where, 2, normal.shapes_on_one_buffer, shapes))


@WHERE
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sums_with_weights_and_biases(rank_pools, where: str, num_ranks: int) -> None:
    job = normal.sums_with_weights_and_biases
    assert all(run(rank_pools, where, num_ranks, job, SMALL))


@WHERE
def test_long_lived_handles(rank_pools, where: str) -> None:
    assert all(run(rank_pools, where, 2, normal.long_lived_handles, SMALL))


@WHERE
def test_narrow_rows_of_a_large_dispatch(rank_pools, where: str) -> None:
    large = Shapes(tokens=150, hidden=128, experts=8, topk=3, fewer=140)
    assert all(run(rank_pools, where, 2, normal.narrow_rows_of_a_large_dispatch, SMALL, large))


@WHERE
def test_kinds_of_rows(rank_pools, where: str) -> None:
    assert all(run(rank_pools, where, 2, normal.kinds_of_rows, SMALL))


@WHERE
def test_odd_ids(rank_pools, where: str) -> None:
    assert all(run(rank_pools, where, 2, normal.odd_ids, SMALL))


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_odd_surroundings(rank_pools, where: str) -> None:
    assert all(run(rank_pools, where, 2, normal.odd_surroundings, SMALL))


def test_life_and_bad_calls(rank_pools) -> None:
    for said in run(rank_pools, "cpu", 2, normal.life, SMALL):
        assert "get_dispatch_layout returns them" in said[0]
        assert "topk and handle exclude each other" in said[1]
        assert "a multiple of 16 is needed" in said[3]
        assert "a handle is expected that a dispatch of this kind has returned" in said[4]
        assert "x is torch.float32; combine takes bfloat16" in said[10]
        assert "at most two can be added" in said[12]
        assert "unexpected keyword argument 'quant_mode'" in said[18]
        assert "all ranks share a host; dispatch() serves them" in said[20]
        assert "low_latency_mode=True" in said[23]
        assert said[24] == "this buffer has been destroyed"


def test_handle_of_another_group(rank_pools) -> None:
    for text in run(rank_pools, "cpu", 2, normal.handle_of_another_group, SMALL):
        assert "another communicator, whose ranks are not those of this one" in text


def test_after_the_process_group(rank_pools) -> None:
    assert all(run(rank_pools, "cpu", 2, normal.after_the_process_group, SMALL))
