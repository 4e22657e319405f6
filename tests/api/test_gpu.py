"""The contract on real GPUs, one process each: the same jobs as over gloo on CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertlink import BlockFormat, DispatchLayout
from expertlink.launch import RankPool
from support import decode, faults, jobs, payloads, training
from support.cases import usual
from support.jobs import choice_of, contract
from support.oracle import Case
from support.payloads import opaque_rows, quantized_dispatch

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
RANKS = pytest.mark.parametrize(
    "ranks",
    [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2, 4, 8)],
)


def cases_for(ranks: int, layout: DispatchLayout) -> list[Case]:
    """Different dtypes, placements and routings, with empty ranks and empty calls among them."""
    tokens = (5, 0, 7, 1, 16, 3, 0, 9)[:ranks]
    cases = [
        Case(tokens, 8, experts=9, topk=3, layout=layout, seed=1),
        Case(tokens, 264, experts=64, topk=8, layout=layout, masked=0.3, seed=2),
        Case(tokens, 3, experts=5, topk=2, layout=layout, dtype=torch.float16, skew=5.0, seed=3),
        Case(tokens, 20, experts=7, topk=4, layout=layout, dtype=torch.float32, seed=4),
        Case(tokens, 20, experts=7, topk=4, layout=layout, dtype=torch.float64, seed=5),
        Case(tokens, 16, experts=9, topk=3, layout=layout, placement="scattered", seed=6),
        Case(tokens, 16, experts=9, topk=3, layout=layout, weighted=False, seed=7),
        Case(tokens, 8, experts=3000, topk=8, layout=layout, seed=11),
        Case((0,) * ranks, 16, experts=8, topk=2, layout=layout, seed=8),
        Case(tokens, 16, experts=8, topk=2, layout=layout, masked=1.0, seed=9),
    ]
    domains = tuple(rank % 2 for rank in range(ranks))  # hosts of ranks that are no neighbours
    cases.append(Case(tokens, 264, 64, topk=8, layout=layout, domains=domains, seed=12))
    if layout is DispatchLayout.FLAT:
        cases.append(Case(tokens, 16, experts=9, topk=3, layout=layout, alignment=16, seed=10))
    return cases


@RANKS
@LAYOUTS
def test_bits_over_nccl_equal_the_oracle(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    drawn = cases_for(ranks, layout)
    done = rank_pools(ranks, "cuda").run(contract, drawn, engine="collective", timeout_s=200)
    assert done == [len(drawn)] * ranks


@RANKS
@LAYOUTS
def test_decode_features(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    pool = rank_pools(ranks, "cuda")
    drawn = cases_for(ranks, layout)[:2]
    if layout.expanded:
        drawn += [dataclasses.replace(case, precision="exact") for case in drawn]
    jobs = [decode.halves, decode.buffers, decode.stale_handles]
    jobs += [decode.in_turns, decode.statistics]
    jobs += [decode.own_weights, decode.ranges] if layout.expanded else []
    for job in jobs:
        done = pool.run(decode.on_a_rank, job, drawn, engine="collective", timeout_s=100)
        assert done == [len(drawn)] * ranks
    fields = {"quantization": "e4m3_ue8m0", "scale_order": "column_major"}
    for job in (payloads.scales_in_order, payloads.buffers_of_packed_rows):
        case = dataclasses.replace(drawn[1], weighted=False)
        done = pool.run(decode.on_a_rank, job, [case], engine="collective", timeout_s=100, **fields)
        assert done == [1] * ranks


@RANKS
def test_the_engine_that_is_chosen(rank_pools, ranks: int) -> None:
    """nvlink where GPUs reach each other, unless only torch can move the rows."""
    pool = rank_pools(ranks, "cuda")
    fast = usual(ranks, DispatchLayout.FLAT).case(seed=1)
    slow = dataclasses.replace(fast, dtype=torch.float32)
    for case, name, reason in (
        (fast, "nvlink", "all GPUs share one NVLink domain"),
        (slow, "collective", "the nvlink engine cannot be used: rows are torch.float32"),
    ):
        for chosen, why in pool.run(choice_of, case, timeout_s=100):
            assert chosen == name, why
            assert reason in why


@RANKS
@LAYOUTS
def test_gradients_and_requests(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    pool = rank_pools(ranks, "cuda")
    tokens = (5, 0, 7, 3, 2, 2, 0, 9)[:ranks]
    case = Case(tokens, 8, experts=9, topk=3, layout=layout, dtype=torch.float64, masked=0.2)
    for worst in pool.run(training.gradients, case, timeout_s=60):
        assert max(worst.values()) < 1e-12, worst
    assert all(pool.run(training.weight_grads, case, timeout_s=60))
    bits = [dataclasses.replace(case, dtype=dtype) for dtype in ROW_DTYPES]
    pool.run(training.backward_bits, bits, timeout_s=60, engine="collective")
    outcomes = pool.run(training.repeated_backward, case, timeout_s=60)
    assert all(outcome == (True, True, False, True) for outcome in outcomes)
    assert all(pool.run(jobs.gradients_through_requests, case, timeout_s=60))
    half = usual(ranks, layout).case(masked=0.2)
    pool.run(training.backward_bits, [half], timeout_s=60)
    assert all(pool.run(training.weight_grads, half, timeout_s=60))
    assert all(pool.run(jobs.gradients_through_requests, half, timeout_s=60))
    assert all(pool.run(jobs.overlapping, half, timeout_s=60))
    assert all(pool.run(jobs.finished_later, half, timeout_s=60))


@RANKS
@LAYOUTS
def test_quantized_rows(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    pool = rank_pools(ranks, "cuda")
    if ranks <= 3:  # the job's case has three ranks
        for block_format in BlockFormat:
            assert all(pool.run(quantized_dispatch, layout, block_format, timeout_s=60))
    if ranks == 2:
        assert all(pool.run(opaque_rows, layout, 48, 6, torch.uint8, timeout_s=60))


@pytest.mark.gpu(4)
def test_refusals_reach_every_rank(rank_pools) -> None:
    """All ranks learn of a wrong argument, also with check_inputs=False."""
    fields = {"input": torch.randn(faults.T, 3)}
    results = rank_pools(4, "cuda").run(faults.refused_dispatch, 1, fields, timeout_s=60)
    assert results[1][0][0] == "InputError"
    assert all(results[rank][0][0] == "PeerError" for rank in (0, 2, 3))
    assert all(recovered for _, recovered in results)


@pytest.mark.gpu(4)
@pytest.mark.parametrize("phase", ["initialize", "dispatch"])
def test_a_missing_rank_is_named_in_time(phase: str) -> None:
    with RankPool(num_ranks=4, device="cuda") as pool:
        results = pool.run(
            faults.absent, 1, phase, "stays away", timeout_s=60, return_exceptions=True
        )
        pool.kill()
    for rank in (0, 2, 3):
        seen = results[rank]
        assert isinstance(seen, tuple), seen
        kind, message, missing, waited, _ = seen
        assert kind == "PeerTimeoutError", message
        assert missing == (1,), message
        assert waited < 10.0
