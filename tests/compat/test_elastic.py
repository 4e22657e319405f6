"""The drop-in's `ElasticBuffer`, held to what DeepEP's own test asserts, and more."""

from __future__ import annotations

from typing import Any

import pytest

from support.drop_in import elastic
from support.drop_in.inputs import Shapes
from support.drop_in.place import EVERYWHERE, run

WHERE = pytest.mark.parametrize("where", EVERYWHERE)
SMALL = Shapes(tokens=10, hidden=256, experts=8, topk=3, fewer=1, masked=0.3)


@WHERE
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("fields", [{}, {"allow_multiple_reduction": False}], ids=["many", "once"])
def test_ep(rank_pools, where: str, num_ranks: int, fields: dict[str, Any]) -> None:
    assert all(run(rank_pools, where, num_ranks, elastic.elastic, SMALL, fields))


@WHERE
def test_ranks_without_tokens(rank_pools, where: str) -> None:
    shapes = Shapes(tokens=3, hidden=256, experts=8, topk=3, fewer=3)
    assert all(run(rank_pools, where, 2, elastic.elastic, shapes, {}))


@WHERE
def test_handles_that_outlive_communicators(rank_pools, where: str) -> None:
    assert all(run(rank_pools, where, 2, elastic.handles_that_outlive_communicators, SMALL))


def test_constructor_and_bad_calls(rank_pools) -> None:
    for said in run(rank_pools, "cpu", 2, elastic.constructor, SMALL):
        assert "either num_bytes, or num_max_tokens_per_rank and hidden" in said[0]
        assert "must be a multiple of 2 MiB" in said[1]
        assert "buffers on the host are not supported" in said[2]
        assert "are needed without a handle" in said[3]
        assert "are needed without a handle" in said[4]
        assert "topk_idx and handle exclude each other" in said[5]
        assert "do_cpu_sync and handle exclude each other" in said[6]
        assert "the handle's is 8" in said[7]
        assert "num_max_tokens_per_rank=10" in said[8]
        assert "do_zero_padding needs do_expand" in said[9]
        assert "the dispatch had" in said[10]
        assert "topk_weights must be float32" in said[11]
        assert "an EPHandle is expected, not tuple" in said[12]
        assert "was not returned by a dispatch" in said[13]
        assert said[14].startswith("TypeError")
        assert "explicitly_destroy=True" in said[15]
        assert "destroyed" in said[16]


@pytest.mark.gpu(2)
def test_in_a_cuda_graph(rank_pools) -> None:
    shapes = Shapes(tokens=10, hidden=256, experts=8, topk=3)
    assert all(run(rank_pools, "cuda", 2, elastic.in_graph, shapes))
