"""The commands `bench`, `plot` and `report`: from options to cases, ranks, files and a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expertlink.bench.backward import build_backward_cases, measure_backward
from expertlink.bench.cases import Case
from expertlink.bench.compile_ahead import compile_ahead
from expertlink.bench.drop_in import measure_drop_in
from expertlink.bench.drop_in_cases import build_drop_in_cases
from expertlink.bench.host_time import measure_host_times
from expertlink.bench.layer import measure_layers
from expertlink.bench.layer_cases import build_layer_cases
from expertlink.bench.layer_record import LayerRecord
from expertlink.bench.measure import measure_batch
from expertlink.bench.options import (
    BenchOptions,
    build_cases,
    device_and_ranks,
    hosts_of,
    make_plan,
    rail_of,
    under_torchrun,
)
from expertlink.bench.overlap import measure_overlaps
from expertlink.bench.rails import rail_environment
from expertlink.bench.records import Record, latest, read_records, write_records
from expertlink.bench.runner import CaseResult, Job, Measure, run_on_own_ranks, run_under_torchrun
from expertlink.bench.tables import LISTINGS
from expertlink.bench.terminal import print_listing, print_records
from expertlink.errors import ConfigurationError, ExpertlinkError
from expertlink.files import reason, try_folder
from expertlink.launch import RankContext, torchrun_context

OK, FAILED, USAGE = 0, 1, 2
"""Exit codes: all cases measured, a case failed, the options make no sense or cannot be obeyed."""


class _UnwritableError(Exception):
    """The file of the records did not take one of them."""


def run_bench(options: BenchOptions, console: Console) -> int:
    """`expertlink bench`: measures, writes records, shows a table. Returns the exit code."""
    if under_torchrun():
        _pretend_hosts(options)
    context = torchrun_context() if under_torchrun() else None
    if context is not None and context.rank != 0:
        console = Console(quiet=True)
    try:
        code = _run_bench(options, context, console)
    except (ExpertlinkError, _UnwritableError) as error:
        code = _say_error(error, console)
    if context is not None and dist.is_initialized():
        dist.destroy_process_group()
    return code


def _run_bench(options: BenchOptions, context: RankContext | None, console: Console) -> int:
    device, ranks = device_and_ranks(options, context)
    measure, cases = _what_to_measure(options, device, ranks)
    plan = make_plan(options, device)
    _check_out(options, context)
    job = Job(cases=cases, plan=plan, measure=measure)
    try:
        _measure(job, options, device, context, console)
    finally:  # also where the file of the records is full: what was measured until then
        records = [record for result in job.results for record in result.records]
        print_records([one for one in records if isinstance(one, Record)], console)
        for listing in LISTINGS:
            of_kind = [one for one in records if isinstance(one, listing.record)]
            print_listing(listing, of_kind, console)
    if records and options.out is not None:
        console.print(f"{len(records)} records in {escape(str(options.out))}", soft_wrap=True)
    failed = [result for result in job.results if result.error is not None]
    for result in failed:
        text = f"[red]failed:[/red] {escape(result.case.label())}: {escape(result.error or '')}"
        console.print(text, soft_wrap=True)
        if options.verbose and result.details:
            console.print(result.details, markup=False, highlight=False, soft_wrap=True)
    return FAILED if failed else OK


def _what_to_measure(
    options: BenchOptions, device: str, ranks: int
) -> tuple[Measure, Sequence[Case]]:
    """The cases of the options, and what measures them."""
    kinds = ("layer", "drop_in", "backward", "host_time", "overlap")
    wanted = [name for name in kinds if getattr(options, name)]
    if wanted and options.budget is not None:
        raise ConfigurationError(
            f"budget={options.budget} cannot be measured with --{wanted[0].replace('_', '-')}; "
            "accepted: --iters"
        )
    if len(wanted) > 1:
        flags = (f"--{name.replace('_', '-')}" for name in wanted)
        raise ConfigurationError(f"either {' or '.join(flags)}")
    if options.layer:
        hosts_of(options, ranks)  # refuses several
        return measure_layers, build_layer_cases(options, device=device, ranks=ranks)
    if options.drop_in:
        return measure_drop_in, build_drop_in_cases(options, device=device, ranks=ranks)
    if options.backward:
        return measure_backward, build_backward_cases(options, device=device, ranks=ranks)
    cases = build_cases(options, device=device, ranks=ranks)
    if options.overlap:
        return measure_overlaps, cases
    return (measure_host_times if options.host_time else measure_batch), cases


def _pretend_hosts(options: BenchOptions) -> None:
    """Sets what NCCL of this rank of torchrun reads when it starts."""
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if rank.isdecimal() and ranks.isdecimal() and (options.virtual_hosts or options.rail_ctas):
        os.environ |= rail_environment(
            int(rank),
            ranks=int(ranks),
            hosts=options.virtual_hosts or 2,
            rail=rail_of(options),
            ctas=options.rail_ctas,
        )


def run_plot(results: Sequence[Path], out: Path, console: Console) -> int:
    """`expertlink plot`: pictures of files of records. Returns the exit code."""
    try:
        records = latest(record for path in results for record in read_records(path))
        layers = latest(record for path in results for record in read_records(path, LayerRecord))
        if not records and not layers:
            raise ConfigurationError("there are no records in the given files")
        from expertlink.bench.layer_plots import draw_layers
        from expertlink.bench.plots import draw_plots

        return _say_paths([*draw_plots(records, out), *draw_layers(layers, out)], console)
    except (ExpertlinkError, OSError) as error:
        return _say_error(error, console)


def run_report(results: Path, out: Path, console: Console, *, table: bool) -> int:
    """`expertlink report`: pages and pictures of a folder of records. Returns the exit code."""
    from expertlink.bench.report import read_folder, readme_table, write_pages

    try:
        if not table:
            return _say_paths(write_pages(results, out), console)
        text = readme_table(read_folder(results))
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    except (ExpertlinkError, OSError) as error:
        return _say_error(error, console)
    return OK


def _say_error(error: Exception, console: Console) -> int:
    console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
    return USAGE


def _say_paths(paths: Iterable[Path], console: Console) -> int:
    for path in paths:
        console.print(escape(str(path)), soft_wrap=True)
    return OK


def _measure(
    job: Job,
    options: BenchOptions,
    device: Literal["cpu", "cuda"],
    context: RankContext | None,
    console: Console,
) -> None:
    """Measures all cases; `job.results` gets what became of each as soon as it is known."""
    cases, iters = job.cases, job.plan.iters
    append = options.append

    def write(result: CaseResult) -> None:
        nonlocal append
        if result.records and options.out is not None:
            try:
                write_records(options.out, result.records, append=append)
            except OSError as error:
                raise _UnwritableError(_unwritable(options.out, error)) from error
            append = True

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = not console.is_terminal
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=hidden
    ) as progress:
        task = progress.add_task("", total=len(cases) * iters)

        def show(number: int, done: int) -> None:
            label = f"{number + 1}/{len(cases)} {escape(cases[number].label())}"
            progress.update(task, completed=number * iters + done, description=label)

        job = replace(job, on_result=write, on_progress=show)
        if context is None:
            threads, timeout_s = options.threads, options.timeout
            if device == "cuda":
                compile_ahead(job.cases)
            run_on_own_ranks(job, device=device, threads=threads, timeout_s=timeout_s)
            return
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        context = replace(context, device=torch.device("cpu")) if device == "cpu" else context
        run_under_torchrun(job, context)


def _check_out(options: BenchOptions, context: RankContext | None) -> None:
    """Finds out before measuring whether rank 0, which writes records, will be able to; and for
    the folder of traces, to which all ranks write. Collective.

    Raises:
        ConfigurationError: it will not; on every rank.
    """
    if options.out is None and options.profile is None:
        return
    problem = [None if context is not None and context.rank else _out_problem(options)]
    if context is not None:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise ConfigurationError(problem[0])


def _out_problem(options: BenchOptions) -> str | None:
    if options.profile is not None:
        try:
            options.profile.mkdir(parents=True, exist_ok=True)
            try_folder(options.profile)
        except OSError as error:
            return f"--profile {options.profile}: cannot be written to: {reason(error)}"
    out = options.out
    if out is None:
        return None
    if out.exists() and not out.is_file():
        return f"out={str(out)!r} is no ordinary file"
    try:
        try_folder(out.parent)
        if options.append:
            out.open("ab").close()
    except OSError as error:
        return _unwritable(out, error)
    return None


def _unwritable(out: Path, error: OSError) -> str:
    return f"--out {out}: cannot be written to: {reason(error)}"
