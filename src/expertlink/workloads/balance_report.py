"""What `expertlink balance` says about a trace: a table, and a picture if asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertlink.engines.ranks.rebalance import plan_moves
from expertlink.errors import InputError
from expertlink.files import reason, try_folder
from expertlink.placement import ExpertPlacement
from expertlink.workloads.balance import Balance, LayerBalance, busiest_over_mean, simulate
from expertlink.workloads.trace import RoutingTrace

_BEFORE, _AFTER = "#0072B2", "#D55E00"  # from the palette of Okabe and Ito
_DPI = 150


@dataclass(frozen=True, kw_only=True)
class BalanceOptions:
    """The options of the command line; None: the ranks of the trace."""

    trace: Path
    ranks: int | None = None
    redundant: int = 0
    hosts: int = 1
    history: float = 0.5
    plot: Path | None = None


def run_balance(options: BalanceOptions, console: Console) -> None:
    """Simulates, prints the table and draws the picture.

    Raises:
        ExpertlinkError: the trace cannot be read, the options cannot work, or the picture cannot
            be written.
    """
    if options.plot is not None:
        _try_picture(options.plot)
    trace = RoutingTrace.load(options.trace)
    balance = simulate(
        trace,
        num_ranks=trace.num_ranks if options.ranks is None else options.ranks,
        redundant=options.redundant,
        num_hosts=options.hosts,
        history=options.history,
    )
    table = _table(balance, title=f"{options.trace.name}: {_title(trace, balance)}")
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table).maximum)
    console.print(table)
    console.print(_legend(balance), style="dim", highlight=False)
    if options.plot is not None:
        try:
            draw(balance, options.plot, title=_title(trace, balance))
        except (OSError, ValueError) as error:
            text = reason(error) if isinstance(error, OSError) else str(error)
            raise InputError(f"--plot {options.plot}: cannot be written: {text}") from None
        console.print(f"Written to [bold]{escape(str(options.plot))}[/]", highlight=False)


def rows_of(balance: Balance) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and a row of text for every layer; the last one is about all."""
    by_host = len(set(balance.domains)) > 1
    names = ["layer", "before", "worst", "after", "worst", "moved"]
    names += ["host before", "host after"] if by_host else []
    rows = [[str(layer.layer), *_figures(balance, [layer])] for layer in balance.layers]
    return names, [*rows, ["all", *_figures(balance, balance.layers)]]


def _figures(balance: Balance, layers: list[LayerBalance]) -> list[str]:
    parts: list[str] = []
    before, after = (
        np.concatenate([busiest_over_mean(balance.judged(getattr(one, side))) for one in layers])
        for side in ("before", "after")
    )
    for found in (before, after):
        parts += [f"{found.mean():.2f}", f"{found.max():.2f}"]
    parts.append(str(sum(map(_moved, layers))))
    if len(set(balance.domains)) > 1:
        for side in ("before", "after"):
            loads = [balance.by_host(balance.judged(getattr(one, side))) for one in layers]
            parts.append(f"{np.concatenate([*map(busiest_over_mean, loads)]).mean():.2f}")
    return parts


def _moved(layer: LayerBalance) -> int:
    """Experts that travel on the way from even blocks to the proposal."""
    old = ExpertPlacement.even(layer.placement.num_experts, layer.placement.num_ranks)
    plans = [plan_moves(old, layer.placement, rank) for rank in range(old.num_ranks)]
    return sum(len(slots) for plan in plans for slots in plan.received)


def _title(trace: RoutingTrace, balance: Balance) -> str:
    title = f"{trace.num_experts} experts, top {trace.topk}, {balance.num_ranks} ranks"
    hosts = len(set(balance.domains))
    if hosts > 1:
        title += f" on {hosts} hosts"
    return title + (f", {balance.redundant} redundant" if balance.redundant else "")


def _legend(balance: Balance) -> str:
    steps = len(balance.layers[0].before)
    judged = steps - balance.history or steps
    seen = "the same" if balance.history == steps else "the others"
    return (
        f"busiest rank over mean: mean and worst of {judged} steps; 1 is even. Placements know the "
        f"loads of {balance.history} steps of {steps} and are judged by {seen}. moved: experts "
        "that other ranks send."
    )


def _table(balance: Balance, *, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    names, rows = rows_of(balance)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    return table


def draw(balance: Balance, path: Path, *, title: str) -> None:
    """Busiest over mean by step, and the load of every rank, a panel of each per layer, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = len(balance.layers)
    figure = Figure(figsize=(10, 0.8 + 2.3 * count), layout="constrained")
    panels = figure.subplots(count, 2, squeeze=False)
    ranks = np.arange(balance.num_ranks)
    for layer, (by_step, by_rank) in zip(balance.layers, panels, strict=True):
        steps = np.arange(len(layer.before))
        for side, color, shift in (("before", _BEFORE, -0.2), ("after", _AFTER, 0.2)):
            loads = getattr(layer, side)
            label = f"{side}: {'even blocks' if side == 'before' else 'proposal'}"
            style = {"color": color, "label": label}
            by_step.plot(steps, busiest_over_mean(loads), marker=".", **style)
            judged = balance.judged(loads).sum(axis=0)
            by_rank.bar(ranks + shift, judged / max(judged.mean(), 1), width=0.4, **style)
        if balance.history < len(steps):
            by_step.axvspan(-0.5, balance.history - 0.5, color="#DDDDDD", label="known")
        by_step.set(ylabel=f"layer {layer.layer}\nbusiest rank / mean", ylim=(0.95, None))
        by_step.margins(x=0.01)
        by_rank.set(ylabel="load / mean")
        by_rank.axhline(1, color="black", linewidth=0.8)
        for axes in (by_step, by_rank):
            axes.grid(alpha=0.3, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1][0].set_xlabel("recorded step")
    panels[-1][1].set_xlabel("rank")
    panels[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=_DPI, format="png")


def _try_picture(path: Path) -> None:
    """Before the work: whether the picture can be there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
    except OSError as error:
        raise InputError(f"--plot {path}: cannot be written: {reason(error)}") from None
