"""The commands `bench`, `plot` and `report`: from options to cases, ranks, files and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expertlink.bench.measure import measure_batch
from expertlink.bench.options import (
    BenchOptions,
    build_cases,
    device_and_ranks,
    make_plan,
    under_torchrun,
)
from expertlink.bench.overlap import OverlapRecord, check_overlap, measure_overlaps
from expertlink.bench.records import Record, latest, read_records, write_records
from expertlink.bench.runner import CaseResult, Job, run_on_own_ranks, run_under_torchrun
from expertlink.bench.terminal import print_overlaps, print_records
from expertlink.errors import ConfigurationError, ExpertlinkError
from expertlink.files import reason, try_folder
from expertlink.launch import RankContext, torchrun_context

OK, FAILED, USAGE = 0, 1, 2
"""Exit codes: all cases measured, a case failed, the options make no sense or cannot be obeyed."""


class _UnwritableError(Exception):
    """The file of the records did not take one of them."""


def run_bench(options: BenchOptions, console: Console) -> int:
    """`expertlink bench`: measures, writes records, shows a table. Returns the exit code."""
    context = torchrun_context() if under_torchrun() else None
    if context is not None and context.rank != 0:
        console = Console(quiet=True)
    results: list[CaseResult] = []
    unwritable: _UnwritableError | None = None
    try:
        device, ranks = device_and_ranks(options, context)
        cases = build_cases(options, device=device, ranks=ranks)
        plan = make_plan(options, device)
        if plan.gemm is not None:
            check_overlap(cases)
        _check_out(options, context)
        measure = measure_batch if plan.gemm is None else measure_overlaps
        job = Job(cases=cases, plan=plan, measure=measure, results=results)
    except ExpertlinkError as error:
        _say_error(error, console)
        _leave(context)
        return USAGE
    try:
        _measure(job, options, device, context, console)
    except _UnwritableError as error:  # what was measured until then is shown
        unwritable = error
    _leave(context)
    records = [record for result in results for record in result.records]
    phases = [record for record in records if isinstance(record, Record)]
    overlaps = [record for record in records if isinstance(record, OverlapRecord)]
    if phases:
        print_records(phases, console)
    if overlaps:
        print_overlaps(overlaps, console)
    if unwritable is not None:
        _say_error(unwritable, console)
        return USAGE
    if records and options.out is not None:
        console.print(f"{len(records)} records in {escape(str(options.out))}", soft_wrap=True)
    failed = [result for result in results if result.error is not None]
    for result in failed:
        text = f"[red]failed:[/red] {escape(result.case.label())}: {escape(result.error or '')}"
        console.print(text, soft_wrap=True)
        if options.verbose and result.details:
            console.print(result.details, markup=False, highlight=False, soft_wrap=True)
    return FAILED if failed else OK


def run_plot(results: Sequence[Path], out: Path, console: Console) -> int:
    """`expertlink plot`: pictures of files of records. Returns the exit code."""
    try:
        records = latest(record for path in results for record in read_records(path))
        if not records:
            raise ConfigurationError("there are no records in the given files")
        from expertlink.bench.plots import draw_plots

        paths = draw_plots(records, out)
    except (ExpertlinkError, OSError) as error:
        _say_error(error, console)
        return USAGE
    for path in paths:
        console.print(escape(str(path)), soft_wrap=True)
    return OK


def run_report(results: Path, out: Path, console: Console, *, table: bool) -> int:
    """`expertlink report`: pages and pictures of a folder of records. Returns the exit code."""
    from expertlink.bench.report import read_folder, readme_table, write_pages

    try:
        if table:
            text = readme_table(read_folder(results))
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
            return OK
        paths = write_pages(results, out)
    except (ExpertlinkError, OSError) as error:
        _say_error(error, console)
        return USAGE
    for path in paths:
        console.print(escape(str(path)), soft_wrap=True)
    return OK


def _say_error(error: Exception, console: Console) -> None:
    console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)


def _measure(
    job: Job,
    options: BenchOptions,
    device: Literal["cpu", "cuda"],
    context: RankContext | None,
    console: Console,
) -> None:
    """Measures all cases; `job.results` gets what became of each as soon as it is known."""
    cases, iters = job.cases, job.plan.iters
    written = options.append

    def write(result: CaseResult) -> None:
        nonlocal written
        if result.records and options.out is not None:
            try:
                write_records(options.out, result.records, append=written)
            except OSError as error:
                text = f"--out {options.out}: cannot be written to: {reason(error)}"
                raise _UnwritableError(text) from error
            written = True

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(cases) * iters)

        def show(number: int, done: int) -> None:
            label = f"{number + 1}/{len(cases)} {escape(cases[number].label())}"
            progress.update(task, completed=number * iters + done, description=label)

        job = replace(job, on_result=write, on_progress=show)
        if context is None:
            threads, timeout_s = options.threads, options.timeout
            run_on_own_ranks(job, device=device, threads=threads, timeout_s=timeout_s)
            return
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        context = replace(context, device=torch.device("cpu")) if device == "cpu" else context
        run_under_torchrun(job, context)


def _leave(context: RankContext | None) -> None:
    if context is not None and dist.is_initialized():
        dist.destroy_process_group()


def _check_out(options: BenchOptions, context: RankContext | None) -> None:
    """Finds out before measuring whether rank 0, which alone writes, will be able to. Collective.

    Raises:
        ConfigurationError: it will not; on every rank.
    """
    if options.out is None:
        return
    problem = [None if context is not None and context.rank else _out_problem(options)]
    if context is not None:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise ConfigurationError(problem[0])


def _out_problem(options: BenchOptions) -> str | None:
    out = options.out
    assert out is not None
    if not out.parent.is_dir():
        return f"out={str(out)!r}: the folder {str(out.parent)!r} does not exist"
    if out.is_dir():
        return f"out={str(out)!r} is a folder, a file is needed"
    if out.exists() and not out.is_file():
        return f"out={str(out)!r} is no ordinary file"
    try:
        try_folder(out.parent)
        if options.append:
            out.open("ab").close()
    except OSError as error:
        return f"--out {out}: cannot be written to: {reason(error)}"
    return None
