"""Runs cases on ranks: on its own, or as one of torchrun's. A failing case does not end the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch.distributed as dist

from expertlink.bench.cases import Case, Plan
from expertlink.bench.environment import usable_cores
from expertlink.bench.measure import measure_case
from expertlink.bench.records import Line
from expertlink.errors import ClosedError, ExpertlinkError, PeerTimeoutError
from expertlink.launch import LaunchError, RankContext, RankError, RankPool

_PROGRESS_INTERVAL_S = 0.1
_STARTUP_TIMEOUT_S = 120.0
_VERDICT_GRACE_S = 60.0
_SHORTEST_GROUP_TIMEOUT_S = 30.0


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


Progress = Callable[[int, int], None]
"""Called with (case number, iterations done) while a case runs."""


class Measure(Protocol):
    """A function of a module that measures one case on one rank, like `measure.measure_case`."""

    def __call__(
        self,
        context: RankContext,
        case: Case,
        plan: Plan,
        *,
        on_progress: Callable[[int], None],
        control: dist.ProcessGroup | None = None,
    ) -> Sequence[Line]: ...


def run_on_own_ranks(
    cases: Sequence[Case],
    plan: Plan,
    *,
    device: Literal["cpu", "cuda"],
    threads: int | None = None,
    timeout_s: float = 300.0,
    measure: Measure = measure_case,
    on_result: Callable[[CaseResult], None],
    on_progress: Progress | None = None,
) -> list[CaseResult]:
    """Starts ranks on this machine and measures the cases one after the other.

    Args:
        cases: what to measure; cases with equally many ranks in a row share their processes.
        plan: how to measure; its `timeout_s` is kept below that of a case.
        device: where.
        threads: CPU threads of each rank. None: a rank's share of the cores, less one for the
            thread with which gloo moves its bytes.
        timeout_s: bound of one case, from its communicator's start to its last record.
        measure: what every rank does with a case.
        on_result: called with every case's result as soon as it is there.
        on_progress: called while a case runs.
    """
    plan = replace(plan, timeout_s=min(plan.timeout_s, timeout_s / 2))
    results: list[CaseResult] = []
    pool: RankPool | None = None
    try:
        for number, case in enumerate(cases):
            try:
                if pool is None or not pool.alive or pool.num_ranks != case.ranks:
                    if pool is not None:
                        pool.close()
                    pool = _start(case.ranks, device, threads, group_timeout_s=plan.timeout_s)
                records = _measure(pool, number, case, plan, measure, timeout_s, on_progress)
                result = CaseResult(case, records)
            except LaunchError as error:
                result = _failed(case, error)
                if pool is not None:
                    pool.close()  # its ranks may not be in step any more
                    pool = None
            results.append(result)
            on_result(result)
    finally:
        if pool is not None:
            pool.close()
    return results


def run_under_torchrun(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    measure: Measure = measure_case,
    on_result: Callable[[CaseResult], None],
    on_progress: Progress | None = None,
) -> list[CaseResult]:
    """Measures the cases as one of the ranks that torchrun started. Collective.

    After a case that left the ranks out of step the remaining ones are reported as not run.

    Args:
        context: this rank, from `launch.torchrun_context`.
        cases: what to measure, each with as many ranks as there are.
        plan: how to measure.
        measure: what every rank does with a case.
        on_result: called with every case's result; only rank 0 has records.
        on_progress: called while a case runs.
    """
    results: list[CaseResult] = []
    in_step = True
    # Two groups of their own: a rank that failed asks for the verdict while others still measure.
    control = _bounded_group(plan.timeout_s)
    verdict = _bounded_group(2 * plan.timeout_s + _VERDICT_GRACE_S)
    for number, case in enumerate(cases):
        if in_step:
            result, orderly = _measure_here(
                context, number, case, plan, measure, on_progress, control
            )
            result, in_step = _agree(result, orderly, verdict)
        else:
            result = CaseResult(case, [], "not run: an earlier case left the ranks out of step")
        results.append(result)
        on_result(result)
    return results


def _start(
    ranks: int, device: Literal["cpu", "cuda"], threads: int | None, *, group_timeout_s: float
) -> RankPool:
    return RankPool(
        num_ranks=ranks,
        device=device,
        threads=threads or max(1, usable_cores() // ranks - 1),
        startup_timeout_s=_STARTUP_TIMEOUT_S,
        group_timeout_s=max(group_timeout_s, _SHORTEST_GROUP_TIMEOUT_S),  # it also bounds the start
    )


def _measure(
    pool: RankPool,
    number: int,
    case: Case,
    plan: Plan,
    measure: Measure,
    timeout_s: float,
    on_progress: Progress | None,
) -> Sequence[Line]:
    def listen(rank: int, done: object) -> None:
        if rank == 0 and isinstance(done, int) and on_progress is not None:
            on_progress(number, done)

    results = pool.run(
        _measure_on_rank, case, plan, measure, timeout_s=timeout_s, on_message=listen
    )
    return results[0]


def _measure_on_rank(
    context: RankContext, case: Case, plan: Plan, measure: Measure
) -> Sequence[Line]:
    return measure(context, case, plan, on_progress=_reporter(context, context.send))


def _reporter(context: RankContext, report: Callable[[int], None]) -> Callable[[int], None]:
    """Counts iterations and reports now and then, so that reporting is not what is measured."""
    done = 0
    last = time.monotonic()

    def count(step: int) -> None:
        nonlocal done, last
        done += step
        if context.rank == 0 and time.monotonic() - last > _PROGRESS_INTERVAL_S:
            last = time.monotonic()
            report(done)

    return count


def _bounded_group(timeout_s: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


def _measure_here(
    context: RankContext,
    number: int,
    case: Case,
    plan: Plan,
    measure: Measure,
    on_progress: Progress | None,
    control: dist.ProcessGroup,
) -> tuple[CaseResult, bool]:
    """The result, and whether it leaves the ranks in step if all of them have such a one."""

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(number, done)

    try:
        records = measure(
            context, case, plan, on_progress=_reporter(context, report), control=control
        )
    except (PeerTimeoutError, ClosedError) as error:
        return _failed(case, error), False
    except ExpertlinkError as error:
        return _failed(case, error), True
    except RuntimeError as error:  # torch, for one, reports lost peers like this
        return _failed(case, error), False
    return CaseResult(case, records), True


def _agree(
    result: CaseResult, orderly: bool, verdict: dist.ProcessGroup
) -> tuple[CaseResult, bool]:
    """A case that failed on one rank failed. Also returns whether the ranks are still in step."""
    answers: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(answers, (result.error, orderly), group=verdict)
    except RuntimeError as error:
        reason = result.error or f"ranks lost each other: {_one_line(error)}"
        return replace(result, records=[], error=reason), False
    errors = {rank: error for rank, (error, _) in enumerate(answers) if error is not None}
    if not errors:
        return result, True
    in_step = len(errors) == len(answers) and all(orderly for _, orderly in answers)
    return replace(result, records=[], error=_by_rank(errors)), in_step


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
