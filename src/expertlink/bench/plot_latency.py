"""Latency against tokens: how calls of mode "ll" are launched, quantized or not, and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from expertlink.bench.plot_style import (
    legend_below,
    log_axes,
    series_style,
    split_names,
)
from expertlink.bench.records import PHASES, Record
from expertlink.bench.terminal import dtype_label

_LINES = ("-", "--", "-.", ":")  # by element type on the wire
_FLOOR_NAME = "floor: bytes at the bandwidth of large copies, and two flags"
_FLOOR_COLOR = "#000000"
_SAID = ("dtype", "layout")  # by the line, by the title of a panel


def latency_figure(records: Sequence[Record]) -> Figure:
    """A row of panels per layout, a panel per phase; records of prepared calls, at least one.

    Colour and marker say the variant, the line says the element type.
    """
    # A sweep of budgets has a picture of its own.
    records = [record for record in records if record.num_sms is None] or records
    layouts = sorted({record.layout for record in records})
    phases = [phase for phase in PHASES if any(record.phase == phase for record in records)]
    dtypes = sorted({dtype_label(record) for record in records}, key=lambda text: (len(text), text))
    shared, names = split_names(records, said=_SAID)
    series = list(dict.fromkeys(names))
    name_of = {id(record): name for record, name in zip(records, names, strict=True)}
    legend_rows = -(-(len(series) + len(dtypes) + 1) // 2)
    figure = Figure(
        figsize=(4.2 * max(2, len(phases)), 1.2 + 3.4 * len(layouts) + 0.22 * legend_rows)
    )
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(layouts), len(phases), squeeze=False, sharey="row")
    for row, layout in zip(panels, layouts, strict=True):
        for panel, phase in zip(row, phases, strict=True):
            here = [
                record for record in records if (record.layout, record.phase) == (layout, phase)
            ]
            for line, dtype in zip(_LINES, dtypes, strict=False):
                of_dtype = [record for record in here if dtype_label(record) == dtype]
                for place, name in enumerate(series):
                    own = [record for record in of_dtype if name_of[id(record)] == name]
                    _draw(panel, own, series_style(place), line)
                _draw_floor(panel, of_dtype, line)
            panel.set_title(f"{phase}, {layout}")
            panel.set_xlabel("tokens per rank, T")
            log_axes(panel, sorted({record.tokens for record in records}))
        row[0].set_ylabel("time of the slowest rank, median, µs")
    legend: dict[str, Line2D] = {
        name or "measured": Line2D([], [], **series_style(place))
        for place, name in enumerate(series)
    }
    for line, dtype in zip(_LINES, dtypes, strict=False):
        legend[dtype] = Line2D([], [], color="#999999", linestyle=line)
    if any(record.floor_us is not None for record in records):
        legend[_FLOOR_NAME] = Line2D([], [], color=_FLOOR_COLOR, linestyle="-", linewidth=1)
    legend_below(figure, [], legend)
    figure.suptitle(f"Latency per call\n{shared}", fontsize=10)
    return figure


def _draw(panel: Axes, records: Sequence[Record], style: dict[str, Any], line: str) -> None:
    points = sorted((record.tokens, record.time_us.median) for record in records)
    if points:
        panel.plot(*zip(*points, strict=True), **style, linestyle=line, markersize=4, linewidth=1.2)


def _draw_floor(panel: Axes, records: Sequence[Record], line: str) -> None:
    """One floor for all variants: the lowest that any of them was compared with."""
    floors: dict[int, float] = {}
    for record in records:
        if record.floor_us is not None:
            floors[record.tokens] = min(record.floor_us, floors.get(record.tokens, record.floor_us))
    if floors:
        points = zip(*sorted(floors.items()), strict=True)
        panel.plot(*points, color=_FLOOR_COLOR, linestyle=line, linewidth=1)
