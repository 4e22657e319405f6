"""What both modes of the nvlink engine promise, with a process and a GPU for each rank."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from expertlink import DispatchLayout
from support import processes
from support.cases import LAYOUTS, MODES, exact, fields_of, half_shapes, routings, usual
from support.jobs import contract

RANKS = pytest.mark.parametrize(
    "ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2, 4, 8)]
)
MANY = pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (2, 4)])


@MODES
@RANKS
@LAYOUTS
def test_bits_equal_the_oracle(rank_pools, mode: str, ranks: int, layout: DispatchLayout) -> None:
    pool, fields = rank_pools(ranks, "cuda"), fields_of(mode)
    shape = usual(ranks, layout)
    drawn = [*routings(shape), shape.case(placement="scattered", seed=8)]
    assert pool.run(contract, drawn, timeout_s=200, **fields) == [len(drawn)] * ranks
    if mode == "ll":
        if layout.expanded and ranks == 2:
            drawn = routings(exact(shape))
            assert pool.run(contract, drawn, timeout_s=200, **fields) == [len(drawn)] * ranks
        return
    variants: list[dict[str, bool]] = [{"static_shapes": True}]
    if not layout.expanded:
        variants.append({"zero_copy": True})
    for variant in variants:
        done = pool.run(contract, drawn[:2], timeout_s=100, **fields, **variant)
        assert done == [2] * ranks
    if shape in half_shapes():
        half = dataclasses.replace(shape, dtype=torch.float16)
        assert pool.run(contract, [half.case(seed=1)], timeout_s=100, **fields) == [1, 1]


@MANY
@MODES
@pytest.mark.parametrize("check", [False, True])
def test_groups_of_gloo(rank_pools, mode: str, ranks: int, check: bool) -> None:
    """Ranks meet, agree and refuse through host tensors; rows never touch the group."""
    fields = {**fields_of(mode), "check_inputs": check}
    drawn = routings(usual(ranks, DispatchLayout.EXPERT_MAJOR))[:3]
    results = rank_pools(ranks, "cuda").run(processes.over_gloo, drawn, fields, timeout_s=120)
    for done, refused in results:
        assert done == len(drawn)
        # Which of the two torch tells depends on its version.
        assert re.search("no backend for cuda tensors|backend for cuda tensors is gloo", refused)


@MANY
@LAYOUTS
def test_communicators_that_share_memory(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    """In mode "ht"; for mode "ll", on two streams and in halves, see test_ll_processes.py."""
    large = usual(ranks, layout)
    small = dataclasses.replace(large, experts=large.experts // 4)
    pairs = list(zip(routings(large), routings(small), strict=True))
    done = rank_pools(ranks, "cuda").run(processes.ht_shared_memory, pairs, timeout_s=120)
    assert done == [len(pairs)] * ranks
