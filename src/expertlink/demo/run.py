"""The demo from end to end: train on some ranks, check against one rank, write the report."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from expertlink.demo.model import ModelConfig
from expertlink.demo.report import Check, Report, write_report
from expertlink.demo.text import Corpus
from expertlink.demo.train import RankReport, StepRecord, TrainConfig, train_rank
from expertlink.errors import ConfigurationError, InputError
from expertlink.files import reason, try_folder
from expertlink.launch import RankContext, RankPool

CHECKED_STEPS = 5
TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of the command line.

    Attributes:
        out: folder of the results; made if it does not exist.
        ranks: None: 4 on CPU, all GPUs of the host otherwise.
        device: "auto" uses the GPUs of a host that has several, else the CPU.
        text: a file to learn from. None: the sources of Python's standard library.
        layout: receive layout; None for the mode's own.
        balance_weight: of the load-balancing loss.
    """

    out: Path
    steps: int
    ranks: int | None = None
    mode: str = "ht"
    layout: str | None = None
    balance_weight: float = 0.1
    seed: int = 0
    text: Path | None = None
    device: str = "auto"


def run_demo(options: DemoOptions, console: Console) -> bool:
    """Runs the demo and reports on the console.

    Returns:
        True if the losses agree with those of one rank.

    Raises:
        ExpertlinkError: the options cannot work, or a rank failed.
    """
    device = _device(options.device)
    config = _config(options, device)
    num_ranks = _num_ranks(options.ranks, device, config)
    sample_bytes = config.model.sequence + 1
    if options.text is None:
        corpus = Corpus.from_standard_library(sample_bytes=sample_bytes)
    else:
        corpus = Corpus.from_file(options.text, sample_bytes=sample_bytes)
    out = _writable(options.out)
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    console.print(
        f"Training on [bold]{corpus.name}[/] ({_size(len(corpus.train))}) with {ranks} on {device}",
        highlight=False,
    )
    with _progress(console) as progress:
        task = progress.add_task("starting ranks", total=config.steps, status="")
        threads = max(1, _cores() // num_ranks)
        with RankPool(num_ranks=num_ranks, device=device, threads=threads) as pool:
            progress.update(task, description="training")
            ranks = pool.run(
                train_rank,
                config,
                corpus,
                timeout_s=TIMEOUT_S,
                on_message=lambda _, record: _show(progress, task, record, config.tokens),
            )
        torch.set_num_threads(threads)
        check = _check(config, corpus, ranks[0], device, progress)
    report = Report(config=config, corpus=corpus.name, device=device, ranks=ranks, check=check)
    try:
        write_report(report, out, console)
    except OSError as error:
        raise _unwritable(out, error) from None
    return check.passed


def _size(count: int) -> str:
    """Bytes, in a unit that fits."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _check(
    config: TrainConfig, corpus: Corpus, trained: RankReport, device: str, progress: Progress
) -> Check:
    """Repeats the first steps on one rank, without any process group."""
    steps = min(CHECKED_STEPS, config.steps)
    task = progress.add_task("same on one rank", total=steps, status="")
    alone = RankContext(
        rank=0,
        num_ranks=1,
        device=torch.device("cpu" if device == "cpu" else "cuda:0"),
        listener=lambda record: _show(progress, task, record, config.tokens),
    )
    reference = train_rank(alone, config, corpus, stop_after=steps)
    return Check(
        losses=[record.loss for record in trained.records[:steps]],
        reference=[record.loss for record in reference.records],
        dtype=config.dtype,
    )


def _config(options: DemoOptions, device: str) -> TrainConfig:
    if options.steps < 1:
        raise ConfigurationError(f"--steps {options.steps} is not possible; accepted: at least 1")
    if not 0 <= options.seed < 2**31:
        raise ConfigurationError(f"--seed {options.seed} is not possible; accepted: 0 to 2**31 - 1")
    if not 0 <= options.balance_weight < math.inf:
        raise ConfigurationError(
            f"--balance-weight {options.balance_weight} is not possible; accepted: a number from 0"
        )
    config = TrainConfig(
        model=ModelConfig(seed=options.seed),
        steps=options.steps,
        seed=options.seed,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        mode=options.mode,
        layout=options.layout,
        balance_weight=options.balance_weight,
    )
    config.communicator_config(num_ranks=1, device=torch.device(device))  # checks mode and layout
    return config


def _device(asked: str) -> Literal["cpu", "cuda"]:
    if asked == "cpu" or (asked == "auto" and torch.cuda.device_count() < 2):
        return "cpu"
    if asked not in ("auto", "cuda"):
        raise ConfigurationError(f"--device {asked} is not possible; accepted: auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise ConfigurationError("--device cuda is not possible: torch finds no GPU here")
    return "cuda"


def _num_ranks(asked: int | None, device: str, config: TrainConfig) -> int:
    most = min(config.model.num_experts, config.batch)
    if device == "cuda":
        most = min(most, torch.cuda.device_count())
    ranks = asked if asked is not None else (4 if device == "cpu" else most)
    if not 1 <= ranks <= most:
        limits = f"{config.model.num_experts} experts, {config.batch} samples per step"
        if device == "cuda":
            limits += f", {torch.cuda.device_count()} GPUs"
        raise ConfigurationError(
            f"--ranks {ranks} is not possible; accepted: 1 to {most} ({limits})"
        )
    return ranks


def _writable(folder: Path) -> Path:
    """Makes the folder, and checks before training that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_folder(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"--out {folder}: cannot be written to: {reason(error)}")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


def _show(progress: Progress, task: TaskID, record: object, tokens: int) -> None:
    assert isinstance(record, StepRecord)
    status = f"loss {record.loss:.3f}   {tokens / record.seconds:,.0f} tokens/s"
    progress.update(task, advance=1, status=status)
