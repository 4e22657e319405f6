"""What calls hold beyond inputs and outputs: as the system counts it, and as estimated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertlink import ClosedError, DispatchLayout
from expertlink.launch import RankPool
from support import life
from support.fake_gpu import FakeGpu, inputs
from support.oracle import Case
from support.small_calls import E, H, K, T, make, works


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
@pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
def test_peak_memory(layout: DispatchLayout) -> None:
    """No more than three times the rows received."""
    case = Case((6000, 5000), 2048, experts=8, topk=3, layout=layout)
    with RankPool(num_ranks=2) as pool:  # fresh processes: nothing freed earlier is reused
        for peaks in pool.run(life.peaks, case, timeout_s=120):
            assert peaks["dispatch"] <= 3.0, peaks
            assert peaks["combine"] <= 3.0, peaks
            assert peaks["dispatch"] > 0.5, "the rows sent are a copy: the counter must see them"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
@pytest.mark.parametrize("layout", [DispatchLayout.FLAT, DispatchLayout.EXPERT_MAJOR])
def test_peak_memory_of_backward(layout: DispatchLayout) -> None:
    """The gradients that arrive, and rows on the wire; nothing else is as large."""
    case = Case((6000, 5000), 2048, experts=8, topk=3, layout=layout)
    with RankPool(num_ranks=2) as pool:
        for peak in pool.run(life.peak_of_backward, case, timeout_s=120):
            assert 0.9 < peak <= 2.0


def test_the_estimate_of_the_collective_engine() -> None:
    with make() as comm:
        estimate = comm.memory_estimate()
        rows = T * H * 4  # one rank: every token is sent once, to itself
        header = 4 * (9 + 1 + E)  # int32: fields, rows for each rank, choices of each expert
        assert estimate == {
            "rows sent": rows,
            "rows received": rows,
            "ids and weights": 2 * T * K * (4 + 4),  # ids travel as int32
            "headers": 2 * header,
        }
        works(comm)
        assert comm.memory_estimate() == estimate, "it is of the largest call, not of the last"
    with pytest.raises(ClosedError):
        comm.memory_estimate()


def estimates(ctx: Any) -> dict[str, int]:
    with make(device=ctx.device, max_tokens_per_rank=10, topk=2) as comm:
        return comm.memory_estimate()


def test_the_estimate_counts_ranks(rank_pools) -> None:
    """A token is sent to at most K ranks; tokens of all ranks may come to one."""
    for estimate in rank_pools(3).run(estimates, timeout_s=60):
        assert estimate["rows sent"] == 10 * 2 * H * 4
        assert estimate["rows received"] == 10 * 3 * H * 4


@pytest.mark.parametrize(
    "fields",
    [
        {"output_layout": "token_major", "static_shapes": True},
        {"output_layout": "token_major", "static_shapes": True, "zero_copy": True},
        {"mode": "ll", "output_layout": "expert_major"},
    ],
    ids=["ht", "ht-zero_copy", "ll"],
)
@torch.no_grad()
def test_the_estimate_of_the_nvlink_engine(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """All its memory is made at the start: the regions are those bytes, whatever is called."""
    gpu = FakeGpu(monkeypatch)
    comm = gpu.communicator(**fields)
    engine: Any = comm._engine
    estimate = comm.memory_estimate()
    assert sum(estimate.values()) == engine.arena.plan.total
    assert all(size >= 0 for size in estimate.values())
    row = 64 * 2
    assert estimate["rows in transit"] >= 16 * row
    if fields.get("zero_copy"):
        assert estimate["pools of zero-copy rows"] >= 2 * 16 * row
    else:
        assert estimate.get("pools of zero-copy rows", 0) == 0
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x, ids, weights)
    comm.combine(out.tokens, handle)
    assert comm.memory_estimate() == estimate
    larger = gpu.communicator(**fields, max_tokens_per_rank=64)
    assert sum(larger.memory_estimate().values()) > sum(estimate.values())
