"""The commands `bench` and `plot`: from options to cases, ranks, files and a table."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expertlink.bench.cases import Case, Plan, default_fields, grid, parse_ints, parse_names
from expertlink.bench.environment import usable_cores
from expertlink.bench.measure import measure_case
from expertlink.bench.overlap import (
    DEFAULT_GEMM,
    OverlapRecord,
    check_overlap,
    measure_overlap,
    print_overlap,
)
from expertlink.bench.records import Line, Record, latest, read_records, write_records
from expertlink.bench.report import print_records
from expertlink.bench.runner import CaseResult, run_on_own_ranks, run_under_torchrun
from expertlink.errors import ConfigurationError, ExpertlinkError
from expertlink.launch import RankContext, torchrun_context

OK, FAILED, USAGE = 0, 1, 2
"""Exit codes: all cases measured, a case failed, the options make no sense."""

_DEFAULT_CPU_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `expertlink bench` as they were typed; lists are separated by commas.

    None leaves a choice to the machine (see `cases.default_fields`) or, for `topk` and `experts`,
    to the trace.
    """

    ranks: int | None = None
    tokens: str | None = None
    hidden: str | None = None
    topk: str | None = None
    experts: str | None = None
    dtype: str = "bfloat16"
    layout: str = "flat"
    routing: str | None = None
    uneven: bool = False
    mode: str = "ht"
    variant: str = "uncached,cached"
    quantization: str | None = None
    engine: str = "auto"
    num_sms: str | None = None
    num_sms_dispatch: str | None = None
    num_sms_combine: str | None = None
    ceiling_sms: int = 24
    overlap: bool = False
    gemm: str | None = None
    device: str = "auto"
    threads: int | None = None
    iters: int = 50
    warmup: int = 5
    inputs: int = 4
    seed: int = 0
    timeout: float = 300.0
    trace: Path | None = None
    out: Path | None = None
    append: bool = False
    verbose: bool = False


def run_bench(options: BenchOptions, console: Console) -> int:
    """`expertlink bench`: measures, writes records, shows a table. Returns the exit code."""
    context = torchrun_context() if _under_torchrun() else None
    if context is not None and context.rank != 0:
        console = Console(quiet=True)
    try:
        device, ranks = _device_and_ranks(options, context)
        cases = build_cases(options, device=device, ranks=ranks)
        plan = _plan(options, device)
        if plan.gemm is not None:
            check_overlap(cases)
        _check_out(options.out)
    except ExpertlinkError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        _leave(context)
        return USAGE
    results = _measure(options, cases, plan, device, context, console)
    _leave(context)
    records = [record for result in results for record in result.records]
    if records:
        _print(records, console)
        if options.out is not None:
            console.print(f"{len(records)} records in {escape(str(options.out))}", soft_wrap=True)
    failed = [result for result in results if result.error is not None]
    for result in failed:
        text = f"[red]failed:[/red] {escape(result.case.label())}: {escape(result.error or '')}"
        console.print(text, soft_wrap=True)
        if options.verbose and result.details:
            console.print(result.details, markup=False, highlight=False, soft_wrap=True)
    return FAILED if failed else OK


def _print(records: Sequence[Line], console: Console) -> None:
    phases = [record for record in records if isinstance(record, Record)]
    overlaps = [record for record in records if isinstance(record, OverlapRecord)]
    if phases:
        print_records(phases, console)
    if overlaps:
        print_overlap(overlaps, console)


def run_plot(results: Sequence[Path], out: Path, console: Console) -> int:
    """`expertlink plot`: pictures of results files. Returns the exit code."""
    try:
        records = latest(record for path in results for record in read_records(path))
        if not records:
            raise ConfigurationError("there are no records in the given files")
        from expertlink.bench.plots import draw_plots

        paths = draw_plots(records, out)
    except (ExpertlinkError, OSError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return USAGE
    for path in paths:
        console.print(escape(str(path)), soft_wrap=True)
    return OK


def build_cases(options: BenchOptions, *, device: str, ranks: int) -> list[Case]:
    """All combinations of the listed options.

    Raises:
        ExpertlinkError: an option, or a combination of options, cannot be measured.
    """
    shape = default_fields(device)
    if options.trace is not None:
        shape |= _trace_shape(options.trace)
    for name in ("tokens", "hidden", "topk", "experts"):
        text = getattr(options, name)
        if text is not None:
            shape[name] = parse_ints(text, name=name)
    routing = options.routing or ("balanced" if options.trace is None else "trace")
    quantization = parse_names(options.quantization or "none")
    lists: dict[str, Sequence[Any]] = {
        "engine": parse_names(options.engine),
        "mode": parse_names(options.mode),
        "dtype": parse_names(options.dtype),
        "quantization": [None if name == "none" else name for name in quantization],
        "routing": parse_names(routing),
        **shape,
        "layout": parse_names(options.layout),
        "variant": parse_names(options.variant),
    }
    trace = None if options.trace is None else str(options.trace)
    fixed = {"ranks": ranks, "uneven": options.uneven, "trace": trace}
    cases = [
        case
        for dispatch, combine in _budgets(options)
        for case in grid(
            fixed={**fixed, "num_sms_dispatch": dispatch, "num_sms_combine": combine}, **lists
        )
    ]
    for case in cases:
        if device == "cpu" and case.calls.needs_nvlink:
            raise ConfigurationError(
                f"variant={case.variant!r} cannot be measured on CPU ranks: it needs the nvlink "
                "engine, which moves rows between GPUs"
            )
        if case.routing != "trace":
            continue
        recorded = _trace_shape(Path(case.trace or ""))
        if [case.topk] != recorded["topk"] or [case.experts] != recorded["experts"]:
            raise ConfigurationError(
                f"topk={case.topk}, experts={case.experts} cannot be replayed from the trace, "
                f"which has topk={recorded['topk'][0]}, experts={recorded['experts'][0]}"
            )
    return cases


def _budgets(options: BenchOptions) -> list[tuple[int | None, int | None]]:
    """SMs of dispatch and combine, in pairs; a single value stands beside each of the others."""
    both = options.num_sms
    if both is not None and (options.num_sms_dispatch or options.num_sms_combine):
        raise ConfigurationError(
            f"num_sms={both!r} is for dispatch and combine alike; accepted: either that, or "
            "num_sms_dispatch and num_sms_combine"
        )
    lists: list[Sequence[int | None]] = []
    for name in ("num_sms_dispatch", "num_sms_combine"):
        text = getattr(options, name) or both
        lists.append([None] if text is None else parse_ints(text, name=name))
    longest = max(map(len, lists))
    if any(len(values) not in (1, longest) for values in lists):
        raise ConfigurationError(
            f"num_sms_dispatch={options.num_sms_dispatch!r} and num_sms_combine="
            f"{options.num_sms_combine!r} go pairwise; accepted: equally many values, or one"
        )
    dispatch, combine = ([*values] * longest if len(values) == 1 else [*values] for values in lists)
    return list(dict.fromkeys(zip(dispatch, combine, strict=True)))


def _measure(
    options: BenchOptions,
    cases: list[Case],
    plan: Plan,
    device: Literal["cpu", "cuda"],
    context: RankContext | None,
    console: Console,
) -> list[CaseResult]:
    measure = measure_case if plan.gemm is None else measure_overlap
    written = options.append

    def keep(result: CaseResult) -> None:
        nonlocal written
        if result.records and options.out is not None:
            write_records(options.out, result.records, append=written)
            written = True

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(cases) * plan.iters)

        def show(number: int, done: int) -> None:
            label = f"{number + 1}/{len(cases)} {escape(cases[number].label())}"
            progress.update(task, completed=number * plan.iters + done, description=label)

        if context is None:
            return run_on_own_ranks(
                cases,
                plan,
                device=device,
                threads=options.threads,
                timeout_s=options.timeout,
                measure=measure,
                on_result=keep,
                on_progress=show,
            )
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        context = replace(context, device=torch.device("cpu")) if device == "cpu" else context
        return run_under_torchrun(
            context, cases, plan, measure=measure, on_result=keep, on_progress=show
        )


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_WORLD_SIZE" in os.environ


def _leave(context: RankContext | None) -> None:
    if context is not None and dist.is_initialized():
        dist.destroy_process_group()


def _device_and_ranks(
    options: BenchOptions, context: RankContext | None
) -> tuple[Literal["cpu", "cuda"], int]:
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(
            f"device={options.device!r} cannot be measured; accepted: auto, cpu, cuda"
        )
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and gpus == 0:
        raise ConfigurationError("device='cuda' cannot be measured: no GPU was found")
    if context is not None:
        if options.ranks not in (None, context.num_ranks):
            raise ConfigurationError(
                f"ranks={options.ranks} cannot be measured: torchrun started {context.num_ranks}"
            )
        wanted = context.device.type if options.device == "auto" else options.device
        return ("cuda" if wanted == "cuda" else "cpu"), context.num_ranks
    on_gpu = options.device == "cuda"
    if options.device == "auto":
        on_gpu = gpus >= (options.ranks or 1) and gpus > 0
    ranks = options.ranks
    if ranks is None:
        ranks = gpus if on_gpu else min(_DEFAULT_CPU_RANKS, max(2, usable_cores()))
    if on_gpu and ranks > gpus:
        raise ConfigurationError(f"ranks={ranks} cannot be measured on {gpus} GPUs")
    return ("cuda" if on_gpu else "cpu"), ranks


def _plan(options: BenchOptions, device: str) -> Plan:
    least_of = {"iters": 1, "warmup": 0, "inputs": 1, "seed": 0, "threads": 1, "ceiling_sms": 1}
    for name, least in least_of.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigurationError(
                f"{name}={value} cannot be measured; accepted: at least {least}"
            )
    if not (math.isfinite(options.timeout) and options.timeout > 0):
        raise ConfigurationError(
            f"timeout={options.timeout}: a positive number of seconds is needed"
        )
    return Plan(
        iters=options.iters,
        warmup=options.warmup,
        inputs=options.inputs,
        seed=options.seed,
        timeout_s=options.timeout / 2,
        command=_command_line(),
        ceiling_num_sms=options.ceiling_sms,
        gemm=_gemm(options, device) if options.overlap else None,
    )


def _gemm(options: BenchOptions, device: str) -> tuple[int, int, int]:
    if options.gemm is None:
        return DEFAULT_GEMM[device]
    sizes = parse_ints(options.gemm, name="gemm")
    if len(sizes) != 3 or min(sizes) < 1:
        raise ConfigurationError(
            f"gemm={options.gemm!r} cannot be measured; accepted: m,n,k, each at least 1"
        )
    return sizes[0], sizes[1], sizes[2]


def _command_line() -> str:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    if _under_torchrun():
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "?")
        words = ["torchrun", f"--nproc-per-node={ranks}", "-m" if as_module else "--no-python"]
    else:
        words = ["python", "-m"] if as_module else []
    words += ["expertlink", *sys.argv[1:]]
    return shlex.join(words)


def _check_out(out: Path | None) -> None:
    if out is not None and not out.parent.is_dir():
        raise ConfigurationError(f"out={str(out)!r}: the folder {str(out.parent)!r} does not exist")
    if out is not None and out.is_dir():
        raise ConfigurationError(f"out={str(out)!r} is a folder, a file is needed")


def _trace_shape(path: Path) -> dict[str, list[int]]:
    from expertlink.bench.trace import RoutingTrace

    trace = RoutingTrace.load(path)
    return {"topk": [trace.topk], "experts": [trace.num_experts]}


__all__ = ["BenchOptions", "Record", "build_cases", "run_bench", "run_plot"]
