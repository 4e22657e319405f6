"""Compiled layers on several ranks: the bits of the layers that are not, in one graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertlink import DispatchLayout
from support import compiled
from support.oracle import Case

FLAT = Case((20, 20), 8, experts=5, topk=2, layout=DispatchLayout.FLAT, dtype=torch.float32)
LAYOUTS = [dataclasses.replace(FLAT, layout=layout) for layout in DispatchLayout]


def test_every_layout_is_one_graph(rank_pools) -> None:
    """Forward and backward, ten numbers of tokens, no break, no recompilation."""
    cases = [*LAYOUTS, dataclasses.replace(FLAT, alignment=4, placement="scattered")]
    for found in rank_pools(2).run(compiled.steps, cases, "aot_eager", timeout_s=120):
        assert found == [(1, 0)] * len(cases)


def test_ranks_without_experts_and_hosts(rank_pools) -> None:
    """Nothing of such a rank's graph depends on a parameter; backward is collective all the same.

    The ranks are on two hosts, of each of which combine rounds a sum.
    """
    case = dataclasses.replace(FLAT, tokens=(20,) * 4, experts=3)
    case = dataclasses.replace(case, domains=(0, 0, 1, 1), dtype=torch.bfloat16)
    for found in rank_pools(4).run(compiled.steps, [case], "aot_eager", timeout_s=120):
        assert found == [(1, 0)]


def test_inductor(rank_pools) -> None:
    for found in rank_pools(2).run(compiled.steps, [FLAT], "inductor", timeout_s=200):
        assert found == [(1, 0)]


@pytest.mark.parametrize("layout", [DispatchLayout.FLAT, DispatchLayout.TOKEN_MAJOR])
def test_quantized_rows(rank_pools, layout: DispatchLayout) -> None:
    case = dataclasses.replace(FLAT, layout=layout)
    for found in rank_pools(2).run(compiled.quantized, case, timeout_s=60):
        assert found == (1, 0)


def test_the_demo_learns_the_same(rank_pools) -> None:
    """Its experts loop over counts: graphs end there, and handles go from one to another."""
    for plain, fast in rank_pools(2).run(
        compiled.language_model, DispatchLayout.RANK_MAJOR, timeout_s=120
    ):
        assert plain == fast
        assert plain[0] != plain[-1]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_around_a_layer(rank_pools, wrapper: str) -> None:
    rank_pools(2).run(compiled.wrapped, FLAT, wrapper, timeout_s=120)
