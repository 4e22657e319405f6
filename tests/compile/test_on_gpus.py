"""Compiled layers on GPUs: kernels of inductor, graph trees, both engines."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from expertlink import DispatchLayout
from support import compiled
from support.oracle import Case
from support.side_by_side import Rank, World

HT: dict[str, Any] = {"static_shapes": True, "output_layout": "flat"}
DEDUPLICATED: dict[str, Any] = {"static_shapes": True, "output_layout": "rank_major"}
LL: dict[str, Any] = {"mode": "ll", "output_layout": "expert_major"}
FIELDS = pytest.mark.parametrize(
    "fields", [HT, DEDUPLICATED, LL], ids=["ht", "ht-deduplicated", "ll"]
)
FLAT = Case((20,) * 4, 64, experts=8, topk=2, layout=DispatchLayout.FLAT)


@pytest.mark.gpu
@FIELDS
def test_graph_trees(fields: dict[str, Any]) -> None:
    """Forward and backward are replayed; handles lie in the memory of the graphs."""
    comm = Rank(World(1), 0, **fields)
    assert compiled.replayed(comm, 16) >= 2
    comm.close()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["flat", "token_major", "rank_major"])
def test_calls_that_wait_stay_outside_of_graphs(layout: str) -> None:
    """Not in parts either: torch hands the list of an operator's results to the next graph."""
    comm = Rank(World(1), 0, output_layout=layout)
    whole = inductor_config.patch(graph_partition=False)
    with compiled.exact_kernels(), compiled.counting(), whole:
        layer = compiled.Layer(comm)
        fast = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
        for step in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            sent = [compiled.inputs(comm, 16, seed=step, dynamic=False) for _ in range(2)]
            expected = compiled.trained(layer, sent[0], [layer.weight])
            actual = compiled.trained(fast, sent[1], [layer.weight])
            compiled.equal(actual, expected, f"step {step}")
    comm.close()


@pytest.mark.gpu(4)
@pytest.mark.parametrize("engine", ["nvlink", "collective"])
def test_four_gpus(rank_pools, engine: str) -> None:
    cases = [dataclasses.replace(FLAT, layout=layout) for layout in DispatchLayout]
    for found in rank_pools(4, "cuda").run(compiled.on_gpus, cases, engine=engine, timeout_s=280):
        assert found == [(1, 0)] * len(cases)


@pytest.mark.gpu(2)
@FIELDS
def test_graph_trees_of_two_gpus(rank_pools, fields: dict[str, Any]) -> None:
    case = Case((16, 12), 64, experts=8, topk=2, layout=DispatchLayout(fields["output_layout"]))
    rest = {name: value for name, value in fields.items() if name != "output_layout"}
    for recorded in rank_pools(2, "cuda").run(
        compiled.replayed_on_ranks, case, timeout_s=250, **rest
    ):
        assert recorded >= 2
