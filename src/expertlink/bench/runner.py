"""Runs cases on ranks: on its own, or as one of torchrun's. A failing case does not end the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch.distributed as dist

from expertlink.bench.cases import Case, Plan, batches
from expertlink.bench.environment import usable_cores
from expertlink.bench.measure import measure_batch
from expertlink.bench.records import Line
from expertlink.errors import ClosedError, ExpertlinkError, PeerTimeoutError
from expertlink.launch import LaunchError, RankContext, RankError, RankPool

logger = logging.getLogger("expertlink")

_PROGRESS_INTERVAL_S = 0.1
_STARTUP_TIMEOUT_S = 120.0
_VERDICT_GRACE_S = 60.0
_SHORTEST_GROUP_TIMEOUT_S = 30.0
_OUT_OF_STEP = "not run: an earlier case left the ranks out of step"
_BATCH_FAILED = "not run: an earlier case of the same communicator failed"


@dataclass(frozen=True)
class CaseResult:
    """What became of one case.

    Attributes:
        case: the case.
        records: what was measured; empty where it failed, and on torchrun's ranks other than 0.
        error: why it failed, in one paragraph; None where it did not.
        details: what every failed rank said, tracebacks included; empty where there is nothing.
    """

    case: Case
    records: Sequence[Line]
    error: str | None = None
    details: str = ""


class Measure(Protocol):
    """Measures the cases of a batch on one rank, like `measure.measure_batch`."""

    def __call__(
        self,
        context: RankContext,
        cases: Sequence[Case],
        plan: Plan,
        *,
        on_progress: Callable[[int], None],
        control: dist.ProcessGroup | None = None,
    ) -> Iterator[Sequence[Line]]: ...


def _ignore(*_: object) -> None:
    """Reports to nobody."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be measured, and who hears of it.

    Attributes:
        cases: what to measure.
        plan: how.
        measure: what every rank does with a batch of cases.
        on_result: called with every case's result as soon as it is there.
        on_progress: called with case number and iterations done while a case runs.
    """

    cases: Sequence[Case]
    plan: Plan
    measure: Measure = measure_batch
    on_result: Callable[[CaseResult], None] = _ignore
    on_progress: Callable[[int, int], None] = _ignore
    results: list[CaseResult] = field(default_factory=list)

    def keep(self, result: CaseResult) -> None:
        """One more result."""
        self.results.append(result)
        self.on_result(result)


def run_on_own_ranks(
    job: Job,
    *,
    device: Literal["cpu", "cuda"],
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> list[CaseResult]:
    """Starts ranks on this machine and measures the cases one after the other.

    Where a case fails, those of its batch that come after it are reported as not run. Cases with
    equally many ranks in a row share their processes.

    Args:
        job: what to measure; the plan's `timeout_s` is kept below that of a case.
        device: where.
        threads: CPU threads of each rank. None: a rank's share of the cores, less one for the
            thread with which gloo moves its bytes.
        timeout_s: bound of one case, from its communicator's start to its last record; a batch
            of several has the sum.
    """
    plan = replace(job.plan, timeout_s=min(job.plan.timeout_s, timeout_s / 2))
    job = replace(job, plan=plan)
    pool: RankPool | None = None
    try:
        for batch in batches(job.cases):
            first = len(job.results)
            try:
                ranks = batch[0].ranks
                if pool is None or not pool.alive or pool.num_ranks != ranks:
                    if pool is not None:
                        pool.close()
                    pool = RankPool(
                        num_ranks=ranks,
                        device=device,
                        threads=threads or max(1, usable_cores() // ranks - 1),
                        startup_timeout_s=_STARTUP_TIMEOUT_S,
                        # It also bounds the start.
                        group_timeout_s=max(plan.timeout_s, _SHORTEST_GROUP_TIMEOUT_S),
                    )
                _run_batch(job, batch, pool, timeout_s * len(batch))
            except LaunchError as error:
                missing = batch[len(job.results) - first :]
                if not missing:
                    logger.warning("ranks failed after their last case: %s", error)
                else:
                    job.keep(_failed(missing[0], error))
                for case in missing[1:]:
                    job.keep(CaseResult(case, [], _BATCH_FAILED))
                if pool is not None:
                    pool.close()  # its ranks may not be in step any more
                    pool = None
    finally:
        if pool is not None:
            pool.close()
    return job.results


@dataclass(frozen=True)
class _News:
    """What rank 0 says while it measures a batch.

    Attributes:
        done: iterations of the case at hand.
        records: not None: it is over.
    """

    done: int = 0
    records: Sequence[Line] | None = None


def _run_batch(job: Job, batch: Sequence[Case], pool: RankPool, timeout_s: float) -> None:
    """Measures a batch; keeps a result for each case."""
    first = len(job.results)

    def listen(rank: int, news: object) -> None:
        if rank != 0 or not isinstance(news, _News):
            return
        if news.records is not None:
            job.keep(CaseResult(batch[len(job.results) - first], news.records))
        else:
            job.on_progress(len(job.results), news.done)

    arguments = (batch, job.plan, job.measure)
    pool.run(_measure_on_rank, *arguments, timeout_s=timeout_s, on_message=listen)


def _measure_on_rank(
    context: RankContext, batch: Sequence[Case], plan: Plan, measure: Measure
) -> None:
    counter = _Counter(context, lambda done: context.send(_News(done=done)))
    for records in measure(context, batch, plan, on_progress=counter.count):
        counter.done = 0
        if context.rank == 0:
            context.send(_News(records=records))


class _Counter:
    """Counts iterations and reports now and then, so that reporting is not what is measured."""

    def __init__(self, context: RankContext, report: Callable[[int], None]) -> None:
        self.done = 0
        self._reports = context.rank == 0
        self._report = report
        self._last = time.monotonic()

    def count(self, step: int) -> None:
        """So many more are done."""
        self.done += step
        if self._reports and time.monotonic() - self._last > _PROGRESS_INTERVAL_S:
            self._last = time.monotonic()
            self._report(self.done)


def run_under_torchrun(job: Job, context: RankContext) -> list[CaseResult]:
    """Measures the cases as one of the ranks that torchrun started. Collective.

    After a case that left the ranks out of step the remaining ones are reported as not run. Only
    rank 0 has records.
    """
    in_step = True
    # Two groups of their own: a rank that failed asks for the verdict while others still measure.
    control = _bounded_group(job.plan.timeout_s)
    verdict = _bounded_group(2 * job.plan.timeout_s + _VERDICT_GRACE_S)
    for batch in batches(job.cases):
        if in_step:
            own, orderly = _measure_here(job, batch, context, control)
            agreed, in_step = _agree(batch, own, orderly, verdict)
        else:
            agreed = [CaseResult(case, [], _OUT_OF_STEP) for case in batch]
        for result in agreed:
            job.keep(result)
    return job.results


def _bounded_group(timeout_s: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


def _measure_here(
    job: Job, batch: Sequence[Case], context: RankContext, control: dist.ProcessGroup
) -> tuple[list[CaseResult], bool]:
    """Results up to the first failure, and whether that leaves the ranks in step if all have it."""
    results: list[CaseResult] = []

    def report(done: int) -> None:
        job.on_progress(len(job.results) + len(results), done)

    counter = _Counter(context, report)
    measure = job.measure(context, batch, job.plan, on_progress=counter.count, control=control)
    try:
        for records in measure:
            counter.done = 0
            results.append(CaseResult(batch[len(results)], records))
    except (ExpertlinkError, RuntimeError) as error:
        # Errors that are not the library's: torch, for one, reports lost peers like this.
        out_of_step = isinstance(error, (PeerTimeoutError, ClosedError))
        results = results[: len(batch) - 1]  # it may have come after the last case
        results.append(_failed(batch[len(results)], error))
        return results, isinstance(error, ExpertlinkError) and not out_of_step
    return results, True


def _agree(
    batch: Sequence[Case], own: Sequence[CaseResult], orderly: bool, verdict: dist.ProcessGroup
) -> tuple[list[CaseResult], bool]:
    """A case that failed on one rank failed. Also returns whether the ranks are still in step."""
    answers: list[Any] = [None] * dist.get_world_size()
    fine = [result for result in own if result.error is None]
    error = own[-1].error
    try:
        dist.all_gather_object(answers, (len(fine), error, orderly), group=verdict)
    except RuntimeError as lost:
        reason = error or f"ranks lost each other: {_one_line(lost)}"
        return _until_failure(batch, fine, reason), False
    errors = {rank: text for rank, (_, text, _) in enumerate(answers) if text is not None}
    if not errors:
        return list(own), True
    counts = [count for count, _, _ in answers]
    in_step = (
        len(errors) == len(answers)
        and min(counts) == max(counts)
        and all(orderly for _, _, orderly in answers)
    )
    return _until_failure(batch, fine[: min(counts)], _by_rank(errors)), in_step


def _until_failure(
    batch: Sequence[Case], fine: Sequence[CaseResult], reason: str
) -> list[CaseResult]:
    """Results of a batch of which so many are fine, and the next one failed."""
    if len(fine) == len(batch):  # the last rank to answer was lost after all of them
        fine = fine[:-1]
    rest = batch[len(fine) :]
    not_run = [CaseResult(case, [], _BATCH_FAILED) for case in rest[1:]]
    return [*fine, CaseResult(rest[0], [], reason), *not_run]


def _failed(case: Case, error: BaseException) -> CaseResult:
    if isinstance(error, RankError):
        texts = {
            rank: failure.summary().split(": ", 1)[-1] for rank, failure in error.failures.items()
        }
        return CaseResult(case, [], _by_rank(texts), str(error))
    return CaseResult(case, [], f"{type(error).__name__}: {_one_line(error)}")


def _by_rank(texts: dict[int, str]) -> str:
    """What ranks said, in one line; what several said is said once."""
    ranks_of: dict[str, list[str]] = {}
    for rank, text in texts.items():
        ranks_of.setdefault(_one_line(text), []).append(str(rank))
    return "; ".join(f"{text} (rank {', '.join(ranks)})" for text, ranks in ranks_of.items())


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
