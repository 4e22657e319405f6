"""Pictures of records: time against tokens, ratio to the raw exchange, bandwidth per rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter

from expertlink.bench.records import PHASES, Record
from expertlink.bench.report import dtype_label, routing_label

# Okabe and Ito, "Color Universal Design": told apart by colour-blind readers too.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#882255")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_PHASE_COLORS: dict[str, str] = dict(zip(PHASES, _COLORS, strict=False))
_RAW_COLOR = "#999999"
_DPI = 150
_BAR = 0.26
_MAX_BARS = 60
_ONLY = "measured"  # name of a series that differs from no other

_NAMES: dict[str, Callable[[Record], object]] = {
    "engine": lambda record: record.engine,
    "mode": lambda record: record.mode,
    "layout": lambda record: record.layout,
    "variant": lambda record: record.variant,
    "routing": routing_label,
    "dtype": dtype_label,
    "R": lambda record: record.ranks,
    "H": lambda record: record.hidden,
    "K": lambda record: record.topk,
    "E": lambda record: record.experts,
    "SMs": lambda record: "auto" if record.num_sms is None else record.num_sms,
    "on": lambda record: record.hardware,
}
_BARE = ("engine", "mode", "layout", "variant", "routing", "dtype")  # values that name themselves


def draw_plots(records: Sequence[Record], out: str | Path) -> list[Path]:
    """Draws `time.png`, `ratio.png` and `bandwidth.png`.

    Args:
        records: at least one, each key once (`records.latest`).
        out: folder of the pictures; made where it does not exist.

    Returns:
        Paths of the pictures.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "time.png": _time_figure(records),
        "ratio.png": _bar_figure(
            records,
            lambda record: record.raw_ratio,
            title="Time relative to the raw exchange of the same bytes",
            label="median time / median time of all_to_all_single (lower is better)",
            reference=(1.0, "raw all_to_all_single"),
        ),
        "bandwidth.png": _bar_figure(
            records,
            lambda record: record.wire_gbps,
            title="Wire bandwidth per rank",
            label="GB/s that leave the average rank, rows and scales (higher is better)",
            marks=(
                (lambda record: record.raw_gbps, "raw all_to_all_single", _RAW_COLOR),
                (lambda record: record.ceiling_gbps, "ceiling of the wire", "#000000"),
            ),
        ),
    }
    paths: list[Path] = []
    for name, figure in figures.items():
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, dpi=_DPI)
        paths.append(folder / name)
    return paths


def _time_figure(records: Sequence[Record]) -> Figure:
    """One panel per phase, a line per case, T along the bottom; dotted: the raw exchange."""
    phases = [phase for phase in PHASES if any(record.phase == phase for record in records)]
    shared, series = _split_names(records)
    names = list(dict.fromkeys(series))
    legend_rows = -(-(len(names) + 1) // 2)
    figure = Figure(figsize=(4.2 * max(2, len(phases)), 4.2 + 0.22 * legend_rows))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(phases), squeeze=False, sharey=True)[0]
    for panel, phase in zip(panels, phases, strict=True):
        for place, name in enumerate(names):
            points = sorted(
                (record.tokens, record.time_us.median, record.raw_us.median)
                for record, owner in zip(records, series, strict=True)
                if owner == name and record.phase == phase
            )
            if not points:
                continue
            tokens, times, raws = zip(*points, strict=True)
            color = _COLORS[place % len(_COLORS)]
            marker = _MARKERS[(place + place // len(_COLORS)) % len(_MARKERS)]
            panel.plot(tokens, times, color=color, marker=marker, markersize=5, label=name or _ONLY)
            panel.plot(tokens, raws, color=color, linestyle=":", marker=marker, markersize=3)
        panel.set_title(phase)
        panel.set_xlabel("tokens per rank, T")
        _log_axes(panel, sorted({record.tokens for record in records if record.phase == phase}))
    panels[0].set_ylabel("time of the slowest rank, median, µs")
    handles: dict[str, Any] = {}
    for panel in panels:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    [dotted] = panels[0].plot([], [], color=_RAW_COLOR, linestyle=":", marker="o", markersize=3)
    figure.legend(
        [*handles.values(), dotted],
        [*handles, "raw all_to_all_single of the same bytes"],
        loc="outside lower center",
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(f"Time per call\n{shared}", fontsize=10)
    return figure


def _log_axes(panel: Axes, tokens: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(tokens, [str(count) for count in tokens])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=[1.0, 2.0, 5.0]))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)


def _bar_figure(
    records: Sequence[Record],
    value: Callable[[Record], float],
    *,
    title: str,
    label: str,
    reference: tuple[float, str] | None = None,
    marks: Sequence[tuple[Callable[[Record], float | None], str, str]] = (),
) -> Figure:
    """Horizontal bars, one group per case with a bar per phase.

    Args:
        records: what to draw.
        value: length of a record's bar.
        title: title, to which what all records share is added.
        label: label of the axis, with its unit.
        reference: place and name of a line across all bars.
        marks: further values to mark at each bar, with their names and colours.
    """
    shared, series = _split_names(records)
    groups: dict[str, dict[str, Record]] = {}
    for record, name in zip(records, series, strict=True):
        group = f"T={record.tokens}  {name}".strip()
        groups.setdefault(group, {})[record.phase] = record
    left_out = max(0, len(groups) - _MAX_BARS)
    groups = dict(list(groups.items())[:_MAX_BARS])
    figure = Figure(figsize=(9, 1.9 + 0.62 * len(groups)))
    figure.set_layout_engine("constrained")
    panel = figure.subplots()
    legend: dict[str, Any] = {}
    widest = 0.0
    phases = [phase for phase in PHASES if any(record.phase == phase for record in records)]
    for index, phase in enumerate(phases):
        bars = [
            (place + (index - (len(phases) - 1) / 2) * _BAR, by_phase[phase])
            for place, by_phase in enumerate(groups.values())
            if phase in by_phase
        ]
        for y, record in bars:
            length = end = value(record)
            text = f"{length:.3g}"
            legend[phase] = panel.barh(y, length, _BAR * 0.9, color=_PHASE_COLORS[phase])
            for read, name, color in marks:
                number = read(record)
                if number is not None:
                    half = _BAR * 0.45
                    legend[name] = panel.vlines(number, y - half, y + half, color=color, lw=2.5)
                    text += f", {name.split()[0]} {number:.3g}"
                    end = max(end, number)
            widest = max(widest, end)
            panel.annotate(
                text,
                (end, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    if reference is not None:
        legend[reference[1]] = panel.axvline(reference[0], color="#000000", lw=1, ls="--")
    panel.set_yticks(range(len(groups)), list(groups), fontsize=8)
    panel.set_ylim(len(groups) - 0.4, -0.6)
    panel.set_xlabel(label if not left_out else f"{label}; {left_out} further cases not drawn")
    panel.set_xlim(0, 1.2 * widest or 1.0)  # room for the numbers
    panel.grid(visible=True, axis="x", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    figure.legend(
        [legend[name] for name in sorted(legend, key=_legend_place)],
        sorted(legend, key=_legend_place),
        loc="outside lower center",
        ncols=len(legend),
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(f"{title}\n{shared}", fontsize=10)
    return figure


def _legend_place(name: str) -> tuple[int, str]:
    return (PHASES.index(name) if name in PHASES else len(PHASES)), name


def _split_names(records: Sequence[Record]) -> tuple[str, list[str]]:
    """What all records share, and for each record a name made of what they do not share."""
    shared: list[str] = []
    varying: list[str] = []
    for name, read in _NAMES.items():
        values = {read(record) for record in records}
        if len(values) == 1:
            shared.append(_value_text(name, values.pop()))
        else:
            varying.append(name)
    names = [
        " ".join(_value_text(name, _NAMES[name](record)) for name in varying) for record in records
    ]
    return ", ".join(shared), names


def _value_text(name: str, value: object) -> str:
    if name in _BARE:
        return str(value)
    return f"{name} {value}" if name == "on" else f"{name}={value}"
