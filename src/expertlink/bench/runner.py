"""Runs cases on ranks: on its own, or as one of torchrun's. A failing case does not end the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from expertlink.bench.cases import Case, Plan, batches
from expertlink.bench.environment import usable_cores
from expertlink.bench.measure import measure_batch
from expertlink.bench.rails import rail_environment
from expertlink.bench.records import Checked
from expertlink.errors import ClosedError, ExpertlinkError, PeerTimeoutError
from expertlink.launch import LaunchError, RankContext, RankError, RankPool

logger = logging.getLogger("expertlink")

_PROGRESS_INTERVAL_S = 0.1
_STARTUP_TIMEOUT_S = 120.0
_VERDICT_GRACE_S = 60.0
_SHORTEST_GROUP_TIMEOUT_S = 30.0
_OUT_OF_STEP = "not run: an earlier case left the ranks out of step"
_BATCH_FAILED = "not run: an earlier case of the same communicator failed"

Measure = Callable[..., Iterator[Sequence[Checked]]]
"""Measures the cases of a batch on one rank, like `measure.measure_batch`."""


@dataclass(frozen=True)
class CaseResult:
    """What became of one case."""

    case: Case
    records: Sequence[Checked]  # empty where it failed, and on torchrun's ranks other than 0
    error: str | None = None  # why it failed, in one paragraph
    details: str = ""  # what every failed rank said, tracebacks included


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be measured, who hears of it, and what has become of it."""

    cases: Sequence[Case]  # all of them on equally many ranks
    plan: Plan
    measure: Measure = measure_batch
    on_result: Callable[[CaseResult], None] = lambda result: None
    on_progress: Callable[[int, int], None] = lambda case, iterations: None
    results: list[CaseResult] = field(default_factory=list)

    def keep(self, result: CaseResult) -> None:
        """One more result."""
        self.results.append(result)
        self.on_result(result)

    def keep_failure(self, cases: Sequence[Case], error: str, details: str = "") -> None:
        """The first of these cases of a batch failed, so that the others were not run."""
        for case in cases:
            self.keep(CaseResult(case, [], error, details))
            error, details = _BATCH_FAILED, ""


def run_on_own_ranks(
    job: Job,
    *,
    device: Literal["cpu", "cuda"],
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> list[CaseResult]:
    """Starts ranks on this machine and measures the cases one after the other.

    Args:
        job: what to measure; the plan's `timeout_s` is kept below that of a case.
        device: where.
        threads: CPU threads of each rank. None: its share of the cores, less one for gloo's.
        timeout_s: bound of one case with the start of its communicator; a batch has the sum.
    """
    plan = replace(job.plan, timeout_s=min(job.plan.timeout_s, timeout_s / 2))
    ranks = job.cases[0].ranks
    pool: RankPool | None = None
    share = _Share(plan, len(job.cases))

    def listen(rank: int, news: Any) -> None:
        if isinstance(news, int):
            job.on_progress(len(job.results), news)
        else:
            job.keep(CaseResult(job.cases[len(job.results)], news))

    try:
        for batch in batches(job.cases):
            first = len(job.results)
            try:
                if pool is None or not pool.alive:
                    pool = RankPool(
                        num_ranks=ranks,
                        device=device,
                        threads=threads or max(1, usable_cores() // ranks - 1),
                        environments=[
                            _environment(job.cases[0], rank, device) for rank in range(ranks)
                        ],
                        startup_timeout_s=_STARTUP_TIMEOUT_S,
                        # It also bounds the start.
                        group_timeout_s=max(plan.timeout_s, _SHORTEST_GROUP_TIMEOUT_S),
                    )
                call = (_measure_on_rank, batch, share.of(plan, batch), job.measure)
                pool.run(*call, timeout_s=timeout_s * len(batch), on_message=listen)
            except LaunchError as error:
                if pool is not None:
                    pool.close()  # its ranks may not be in step any more
                    pool = None
                missing = batch[len(job.results) - first :]
                if not missing:
                    logger.warning("ranks failed after their last case: %s", error)
                job.keep_failure(missing, *_reasons(error))
    finally:
        if pool is not None:
            pool.close()
    return job.results


class _Share:
    """Divides a plan's budget of time among cases: what is left goes to those that are left."""

    def __init__(self, plan: Plan, cases: int) -> None:
        self._budget_s, self._left = plan.budget_s, cases
        self._began = time.monotonic()

    def of(self, plan: Plan, batch: Sequence[Case]) -> Plan:
        """The plan of the next batch."""
        if self._budget_s is None:
            return plan
        left_s = self._budget_s - (time.monotonic() - self._began)
        mine_s = max(left_s, 0.0) * len(batch) / max(self._left, 1)
        self._left -= len(batch)
        return replace(plan, budget_s=mine_s)


def _environment(case: Case, rank: int, device: str) -> dict[str, str]:
    # What takes the GPU where there is one does not on CPU ranks.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return hidden | rail_environment(
        rank, ranks=case.ranks, hosts=case.hosts, rail=case.rail, ctas=case.rail_ctas
    )


def _measure_on_rank(
    context: RankContext, batch: Sequence[Case], plan: Plan, measure: Measure
) -> None:
    """Rank 0 sends iterations done now and then, and the records of every case."""
    send = context.send if context.rank == 0 else lambda _: None
    for records in measure(context, batch, plan, on_progress=_now_and_then(send)):
        send(records)


def _now_and_then(report: Callable[[int], None]) -> Callable[[int], None]:
    """Reports seldom, so that reporting is not what is measured."""
    last = time.monotonic()

    def report_if_due(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > _PROGRESS_INTERVAL_S:
            last = time.monotonic()
            report(done)

    return report_if_due


def run_under_torchrun(job: Job, context: RankContext) -> list[CaseResult]:
    """Measures the cases as one of the ranks that torchrun started. Collective.

    After a case that left the ranks out of step the remaining ones are reported as not run. Only
    rank 0 has records.
    """
    in_step = True
    # Two groups of their own: a rank that failed asks for the verdict while others still measure.
    control = _bounded_group(job.plan.timeout_s)
    verdict = _bounded_group(2 * job.plan.timeout_s + _VERDICT_GRACE_S)
    share = _Share(job.plan, len(job.cases))
    for batch in batches(job.cases):
        if not in_step:
            for case in batch:
                job.keep(CaseResult(case, [], _OUT_OF_STEP))
            continue
        own = replace(job, plan=share.of(job.plan, batch))
        records, error, orderly = _measure_here(own, batch, context, control)
        done, error, in_step = _agree(len(records), error, orderly, verdict)
        if error is not None:
            done = min(done, len(batch) - 1)  # it may have come after the last case
        for case, own in zip(batch, records[:done], strict=False):
            job.keep(CaseResult(case, own))
        job.keep_failure(batch[done:], error or "")
    return job.results


def _bounded_group(timeout_s: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


def _measure_here(
    job: Job, batch: Sequence[Case], context: RankContext, control: dist.ProcessGroup
) -> tuple[list[Sequence[Checked]], str | None, bool]:
    """Records up to the first failure, its reason, and whether the ranks stay in step if all have
    it."""
    records: list[Sequence[Checked]] = []
    show = _now_and_then(lambda done: job.on_progress(len(job.results) + len(records), done))
    try:
        for own in job.measure(context, batch, job.plan, on_progress=show, control=control):
            records.append(own)  # noqa: PERF402 - those before an error count
    except (ExpertlinkError, RuntimeError) as error:
        # Errors that are not the library's: torch, for one, reports lost peers like this.
        out_of_step = isinstance(error, (PeerTimeoutError, ClosedError))
        orderly = isinstance(error, ExpertlinkError) and not out_of_step
        return records, _reasons(error)[0], orderly
    return records, None, True


def _agree(
    done: int, error: str | None, orderly: bool, verdict: dist.ProcessGroup
) -> tuple[int, str | None, bool]:
    """A case that failed on one rank failed: cases that all ranks have measured, why the next one
    failed, and whether the ranks are still in step."""
    answers: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(answers, (done, error, orderly), group=verdict)
    except RuntimeError as lost:
        return done, error or f"ranks lost each other: {_one_line(lost)}", False
    errors = {rank: text for rank, (_, text, _) in enumerate(answers) if text is not None}
    counts = {count for count, _, _ in answers}
    alike = len(counts) == 1 and all(orderly for _, _, orderly in answers)
    in_step = not errors or (len(errors) == len(answers) and alike)
    return min(counts), _by_rank(errors) or None, in_step


def _reasons(error: BaseException) -> tuple[str, str]:
    """Why a case failed in one line, and what every rank said of it."""
    if not isinstance(error, RankError):
        return f"{type(error).__name__}: {_one_line(error)}", ""
    texts = {rank: failure.summary().split(": ", 1)[-1] for rank, failure in error.failures.items()}
    return _by_rank(texts), str(error)


def _by_rank(texts: dict[int, str]) -> str:
    """What ranks said, in one line; what several said is said once."""
    ranks_of: dict[str, list[str]] = {}
    for rank, text in texts.items():
        ranks_of.setdefault(_one_line(text), []).append(str(rank))
    return "; ".join(f"{text} (rank {', '.join(ranks)})" for text, ranks in ranks_of.items())


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
