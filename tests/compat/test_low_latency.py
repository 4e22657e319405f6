"""Low-latency calls of the drop-in's `Buffer`, held to what DeepEP's own test asserts, and more."""

from __future__ import annotations

import pytest

from support.drop_in import decode
from support.drop_in.inputs import Shapes
from support.drop_in.place import EVERYWHERE, run

WHERE = pytest.mark.parametrize("where", EVERYWHERE)
ON_GPUS = pytest.mark.parametrize("where", EVERYWHERE[1:])
SMALL = Shapes(tokens=4, hidden=512, experts=8, topk=3, fewer=1, masked=0.2)


@WHERE
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_low_latency(rank_pools, where: str, num_ranks: int) -> None:
    shapes = Shapes(tokens=8, hidden=1024, experts=16, topk=4, masked=0.1)
    assert all(run(rank_pools, where, num_ranks, decode.low_latency, shapes))


@WHERE
def test_ranks_with_fewer_tokens_and_none(rank_pools, where: str) -> None:
    for shapes in (SMALL, Shapes(tokens=2, hidden=512, experts=8, topk=1, fewer=2)):
        assert all(run(rank_pools, where, 2, decode.low_latency, shapes))


@WHERE
def test_handles_that_outlive_buffers(rank_pools, where: str) -> None:
    assert all(run(rank_pools, where, 2, decode.handles_that_outlive_buffers, SMALL))


@WHERE
def test_two_micro_batches_in_threads_that_alternate(rank_pools, where: str) -> None:
    batches = [SMALL, Shapes(tokens=4, hidden=512, experts=8, topk=3, seed=1)]
    assert all(run(rank_pools, where, 2, decode.micro_batches, batches))


@WHERE
def test_nothing_keeps_outputs(rank_pools, where: str) -> None:
    assert all(run(rank_pools, where, 2, decode.references, SMALL))


def test_masks_without_gpus(rank_pools) -> None:
    for said in run(rank_pools, "cpu", 2, decode.masks_without_gpus, SMALL):
        assert "peers can be masked on GPUs of one NVLink domain" in said[0]
        assert "low_latency_clean_mask_buffer() unmasks all" in said[1]
        assert "mask_status must be int32 [2]" in said[2]
        assert "enable_shrink=True" in said[3]


@pytest.mark.gpu(2)
def test_masks(rank_pools) -> None:
    assert all(run(rank_pools, "cuda", 2, decode.masks, SMALL))


def test_bad_calls(rank_pools) -> None:
    for said in run(rank_pools, "cpu", 2, decode.bad_calls, SMALL):
        assert "async_finish and return_recv_hook exclude each other" in said[0]
        assert "use_ue8m0 needs round_scale=True" in said[1]
        assert "x must be [T, H] bfloat16" in said[2]
        assert "is not a multiple of 2 ranks" in said[3]
        assert "e4m3 rows" in said[4]
        assert "e4m3 rows" in said[5]
        assert "rows travel as bfloat16" in said[6]
        assert "single-batch overlap" in said[7]
        assert "ask for the combine buffer first" in said[8]
        assert "a handle is expected" in said[9]
        assert said[10].startswith("TypeError")
        assert "waits are not measured" in said[11]
        assert "destroyed" in said[12]


@pytest.mark.gpu(2)
def test_in_cuda_graphs(rank_pools) -> None:
    assert all(run(rank_pools, "cuda", 2, decode.in_graphs, SMALL))
