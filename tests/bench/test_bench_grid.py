"""`expertlink bench --grid` and `--budget`: what is measured, in how many iterations, and what a
page says of it."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from conftest import RankPools
from expertlink.bench import compile_ahead as ahead
from expertlink.bench import measure as bench_measure
from expertlink.bench import runner
from expertlink.bench.cases import Case, Plan
from expertlink.bench.measure import Budget, measure_batch
from expertlink.bench.options import BenchOptions, build_cases
from expertlink.bench.records import PHASES, Environment, Record, write_records
from expertlink.bench.report import PAGES, page_text
from expertlink.cli import app
from expertlink.engines.nvlink import launch
from expertlink.launch import RankContext
from support.bench_records import make_record

GRID = build_cases(BenchOptions(grid=True), device="cuda", ranks=2)


def test_a_grid_has_both_engines_and_every_size() -> None:
    assert len(GRID) == len(set(GRID)) == 2 * 7 * 4 * 4
    assert {case.engine for case in GRID} == {"nvlink", "collective"}
    assert {case.variant for case in GRID} == {"uncached"}
    assert {case.hidden for case in GRID} == {1024, 2048, 2880, 4096, 5120, 7168, 8192}
    assert {case.tokens for case in GRID} == {256, 1024, 4096, 16384}
    assert {case.topk for case in GRID} == {1, 2, 4, 8}
    given = BenchOptions(grid=True, engine="nvlink", hidden="2048", variant="cached")
    few = build_cases(given, device="cuda", ranks=2)
    assert {(case.engine, case.hidden, case.variant) for case in few} == {
        ("nvlink", 2048, "cached")
    }
    low_latency = build_cases(BenchOptions(grid=True, mode="ll"), device="cuda", ranks=2)
    assert {case.tokens for case in low_latency} == {32, 64, 128, 256, 512}


class Clock:
    """One that goes on by what it is told to, and rank 1 of which has time for `other` rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, round_s: float, other: float) -> None:
        self.now, self._round_s, self._other = 100.0, round_s, other
        self.rounds: list[Plan] = []
        monkeypatch.setattr(bench_measure.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(bench_measure, "time_steps", self._round)

    def _round(self, groups: Any, plan: Plan, *_: Any) -> None:
        self.rounds.append(plan)
        self.now += self._round_s * plan.iters

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.stack([mine, torch.full_like(mine, self._other)])


@pytest.mark.parametrize(
    ("budget_s", "other", "iters"),
    [(3.0, 1e9, 16), (3.0, 12.5, 12), (0.1, 1e9, 5), (1000.0, 1e9, 50)],
)
def test_as_many_iterations_as_fit(
    monkeypatch: pytest.MonkeyPatch, budget_s: float, other: float, iters: int
) -> None:
    clock: Any = Clock(monkeypatch, round_s=0.125, other=other)
    budget = Budget(Plan(budget_s=budget_s), 1)
    clock.now += 0.75  # what comes before: the rest is for iterations
    plan = budget.fitted(Plan(budget_s=budget_s), [], clock, from_idle=False)
    assert plan.iters == iters
    assert [round.iters for round in clock.rounds] == [1, 1]


def test_cases_of_a_batch_share_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = Clock(monkeypatch, round_s=0.125, other=1e9)
    budget = Budget(Plan(budget_s=4.0), 2)
    first = budget.fitted(Plan(), [], clock, from_idle=False)
    assert first.iters == 15  # of (4 - 2 rounds) / 2 seconds
    clock.now += 15 * 0.125
    second = budget.fitted(Plan(), [], clock, from_idle=True)
    assert second.iters == 8  # of 4 - 17 rounds - 2, each of which takes half as long again
    assert Budget(Plan(), 2).fitted(Plan(iters=7), [], clock, from_idle=True) == Plan(iters=7)


def test_a_budget_is_divided_among_the_cases_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [50.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    plan = Plan(budget_s=100.0)
    share = runner._Share(plan, 10)
    assert share.of(plan, GRID[:2]).budget_s == 20.0
    now[0] += 60.0  # longer than its share
    assert share.of(plan, GRID[:1]).budget_s == 5.0
    now[0] += 100.0
    assert share.of(plan, GRID[:7]).budget_s == 0.0
    assert runner._Share(Plan(), 10).of(Plan(), GRID[:1]) == Plan()


def measure(context: RankContext, case: Case) -> list[Record]:
    """Runs on a rank."""
    plan = Plan(iters=40, inputs=1, budget_s=0.01)
    [records] = measure_batch(context, [case], plan, on_progress=lambda _: None)
    return records


def test_a_budget_on_cpu_ranks(rank_pools: RankPools) -> None:
    case = Case(ranks=2, tokens=16, hidden=64, topk=2, experts=4)
    records, _ = rank_pools(2).run(measure, case)
    assert [record.phase for record in records] == list(PHASES)
    assert {(record.iterations, record.inputs) for record in records} == {(5, 1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "0"), "budget=0"),
        (("--budget", "9", "--layer"), "budget=9.0 cannot be measured with --layer"),
    ],
)
def test_budgets_that_are_refused(options: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", *options])
    assert result.exit_code == 2
    assert message in result.output


def test_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, ...]] = []

    def compile_kernel(source: str, instance: str, arch: str, *, prelude: str) -> None:
        compiled.append((source, instance, arch, prelude))

    monkeypatch.setattr(launch, "compile_kernel", compile_kernel)
    shape: dict[str, Any] = {"ranks": 2, "tokens": 64, "hidden": 2048, "topk": 4, "experts": 16}
    ahead.compile_for(Case(**shape, engine="nvlink"), "sm_90a")
    assert [source for source, *_ in compiled] == ["ht/dispatch", "ht/combine"]
    assert all("kMaxTokens = 64;" in prelude for *_, prelude in compiled)
    # A few communicators compile what they need; so does what has no kernels of this engine.
    with mock.patch.object(ahead, "ProcessPoolExecutor", side_effect=AssertionError):
        assert ahead.compile_ahead([Case(**shape), Case(**shape, variant="static")]) == 0
        assert ahead.compile_ahead([case for case in GRID if case.engine == "collective"]) == 0


class _Pool:
    """Workers that run nothing: each task fails as it is told to, by the name of its function."""

    def __init__(self, failures: dict[str, Exception]) -> None:
        self._failures = failures

    def __call__(self, *_: object, **__: object) -> _Pool:
        return self

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, task: Any, *_: object) -> Future[Any]:
        future: Future[Any] = Future()
        error = self._failures.get(task.__name__)
        future.set_result("sm_90a") if error is None else future.set_exception(error)
        return future


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("_architecture", RuntimeError("CUDA error: the GPU is in exclusive use")),
        ("compile_for", BrokenProcessPool("a worker was killed")),
        ("compile_for", OSError("no space left")),
    ],
)
def test_a_run_goes_on_where_nothing_can_be_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, task: str, error: Exception
) -> None:
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", _Pool({task: error}))
    monkeypatch.setattr(ahead.compiler, "unavailable_reason", lambda: None)
    assert ahead.compile_ahead([case for case in GRID if case.engine == "nvlink"]) == 0


def test_a_page_says_what_is_slower_than_nccl(tmp_path: Path) -> None:
    values = {**vars(make_record().environment), "backend": "nccl", "gpu": "a GPU"}
    shared: dict[str, Any] = {"engine": "nvlink", "environment": Environment(**values)}
    shared |= {"ceiling_us": make_record(40.0).time_us, "ceiling_ratio": 0.8}
    records = [
        make_record(50.0, tokens=tokens, raw_ratio=ratio, wire_bytes=num_bytes, **shared)
        for tokens, ratio, num_bytes in ((64, 1.5, 999_999), (256, 1.25, 1_000_000))
    ]
    records.append(make_record(50.0, tokens=512, raw_ratio=0.75, wire_bytes=1 << 21, **shared))
    write_records(tmp_path / "nvlink-here.jsonl", records)
    [page] = [page for page in PAGES if page.name == "nvlink-ht"]
    text = page_text(page, tmp_path, pictures_at="records") or ""
    assert "| 1.25 /  /  |" in text
    assert "1 of 2 calls of 1 MB a rank and more take longer than NCCL's" in text
    assert "\n- measured, T=256: dispatch 1.25\n" in text
    assert "T=64:" not in text
