"""`expertlink bench --backward`: forward and backward pairs, checked and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import RankPools
from expertlink.bench import backward
from expertlink.bench.backward import (
    BACKWARD_PAIR,
    BackwardRecord,
    build_backward_cases,
    measure_backward,
)
from expertlink.bench.cases import Case, Plan
from expertlink.bench.inputs import WrongResultError
from expertlink.bench.options import BenchOptions
from expertlink.bench.records import latest, read_records, write_records
from expertlink.bench.report import PAGES, page_text
from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext


def pair_case(**changes: Any) -> Case:
    values: dict[str, Any] = {"ranks": 2, "tokens": 12, "hidden": 64, "topk": 2, "experts": 4}
    return Case(**{**values, **changes})


def measure(context: RankContext, cases: list[Case], wrong: str = "") -> list[list[BackwardRecord]]:
    """Runs on a rank. `wrong`: the call whose gradient is doubled."""
    plan = Plan(iters=3, warmup=1, inputs=2, command="expertlink bench --backward")
    dispatch = MoECommunicator.dispatch

    def doubled(self: MoECommunicator, x: Any, ids: Any, weights: Any = None, **rest: Any) -> Any:
        if x.requires_grad and wrong == "tokens":
            x.register_hook(lambda grad: 2 * grad)
        if weights is not None and weights.requires_grad and wrong == "weights":
            weights.register_hook(lambda grad: 2 * grad)
        return dispatch(self, x, ids, weights, **rest)

    with pytest.MonkeyPatch.context() as patch:
        if wrong:
            patch.setattr(MoECommunicator, "dispatch", doubled)
        return list(measure_backward(context, cases, plan, on_progress=lambda _: None))


def test_two_ranks(rank_pools: RankPools, tmp_path: Path) -> None:
    cases = [
        pair_case(routing="masked:0.4", uneven=True),
        pair_case(variant="cached", dtype="float32"),
    ]
    measured, nothing = rank_pools(2).run(measure, cases)
    assert nothing == [[], []]
    for case, [record] in zip(cases, measured, strict=True):
        assert (record.phase, record.variant) == (BACKWARD_PAIR, case.variant)
        assert (record.dtype, record.routing, record.uneven) == (
            case.dtype,
            case.routing,
            case.uneven,
        )
        ratio = record.time_us.median / record.forward_us.median
        assert record.backward_ratio == pytest.approx(ratio, abs=1e-3)
        assert (record.iterations, record.inputs) == (3, 2)
        assert record.kept_bytes is record.memory_peak_bytes is None  # of GPUs
    # Every choice of every token is a row: 48 in all, and at least half of them on a rank.
    [plain] = measured[1]
    assert 24 * 64 * 4 <= plain.expanded_bytes <= 48 * 64 * 4
    every = [record for [record] in measured]
    path = write_records(tmp_path / "backward-here.jsonl", every)
    assert read_records(path, BackwardRecord) == latest(every) == every
    [page] = [page for page in PAGES if page.name == "backward"]
    assert "| x forward |" in (page_text(page, tmp_path, pictures_at="records") or "")


def of_many_bytes(context: RankContext) -> list[BackwardRecord]:
    """Runs on a rank: rows as large as on GPUs, as far as records know."""
    made = backward._Pair

    class Large(made):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.expanded_bytes = (1 << 29) + 1 + context.rank

    plan = Plan(iters=1, warmup=0, inputs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "_Pair", Large)
        [records] = measure_backward(context, [pair_case()], plan, on_progress=lambda _: None)
    return records


def test_bytes_are_counted_to_the_last_one(rank_pools: RankPools) -> None:
    [record], _ = rank_pools(2).run(of_many_bytes)
    assert record.expanded_bytes == (1 << 29) + 2


@pytest.mark.parametrize("wrong", ["tokens", "weights"])
def test_wrong_gradients_are_noticed(rank_pools: RankPools, wrong: str) -> None:
    with pytest.raises(Exception, match=f"{WrongResultError.__name__}.*gradient of the {wrong}"):
        rank_pools(2).run(measure, [pair_case()], wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "token_major"}, "layout='token_major'"),
        ({"mode": "ll"}, "mode='ll'"),
        ({"quantization": "e4m3_float32"}, "quantization='e4m3_float32'"),
    ],
)
def test_cases_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_backward_cases(BenchOptions(**options), device="cpu", ranks=2)


@pytest.mark.gpu(2)
def test_two_gpus(rank_pools: RankPools) -> None:
    cases = [pair_case(variant=name) for name in ("uncached", "cached", "static")]
    measured, _ = rank_pools(2, "cuda").run(measure, cases)
    for [record] in measured:
        assert record.engine == "nvlink"
        assert record.kept_bytes
        assert record.memory_peak_bytes is not None
        peak = record.memory_peak_bytes / record.expanded_bytes
        assert record.memory_ratio == pytest.approx(peak, abs=1e-3)
