"""Pictures of records: time, ratios to the raw exchange and to the wire, bandwidth, SMs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from expertlink.bench.plot_latency import latency_figure
from expertlink.bench.plot_lines import efficiency_figure, sms_figure, time_figure
from expertlink.bench.plot_style import GRID_COLOR, PHASE_COLORS, RAW_COLOR, split_names
from expertlink.bench.records import PHASES, Record

_DPI = 150
_BAR = 0.26
_MAX_BARS = 60


def draw_plots(records: Sequence[Record], out: str | Path) -> list[Path]:
    """Draws `time.png`, `ratio.png` and `bandwidth.png` of ordinary calls, `latency.png` of
    prepared ones (mode "ll") and, where records allow it, `efficiency.png` (they have ceilings)
    and `sms.png` (they have several SM budgets).

    Args:
        records: at least one, each key once (`records.latest`).
        out: folder of the pictures; made where it does not exist.

    Returns:
        Paths of the pictures.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = [record for record in records if record.latency]
    ordinary = [record for record in records if not record.latency]
    figures: dict[str, Figure | None] = _call_figures(ordinary) if ordinary else {}
    figures["sms.png"] = sms_figure(records)
    figures["latency.png"] = latency_figure(prepared) if prepared else None
    paths: list[Path] = []
    for name, figure in figures.items():
        if figure is None:
            continue
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, dpi=_DPI)
        paths.append(folder / name)
    return paths


def _call_figures(records: Sequence[Record]) -> dict[str, Figure | None]:
    return {
        "time.png": time_figure(records),
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
                (lambda record: record.raw_gbps, "raw all_to_all_single", RAW_COLOR),
                (lambda record: record.ceiling_gbps, "ceiling of the wire", "#000000"),
            ),
        ),
        "efficiency.png": efficiency_figure(records),
    }


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
    shared, series = split_names(records)
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
            legend[phase] = panel.barh(y, length, _BAR * 0.9, color=PHASE_COLORS[phase])
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
                bbox={"boxstyle": "square,pad=0.1", "color": "#FFFFFF"},  # above lines, not in them
            )
    if reference is not None:
        legend[reference[1]] = panel.axvline(reference[0], color="#000000", lw=1, ls="--")
    panel.set_yticks(range(len(groups)), list(groups), fontsize=8)
    panel.set_ylim(len(groups) - 0.4, -0.6)
    label += f"; {left_out} further cases not drawn" if left_out else ""
    panel.set_xlabel(label, loc="right")  # longer than the panel is wide beside long names
    panel.set_xlim(0, 1.2 * widest or 1.0)  # room for the numbers
    panel.grid(visible=True, axis="x", color=GRID_COLOR, linewidth=0.6)
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
