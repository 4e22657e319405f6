"""Lines against tokens or SMs: time, and how close to the wire it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from expertlink.bench.plot_style import (
    CEILING_LINE,
    ONLY,
    RAW_COLOR,
    RAW_LINE,
    legend_below,
    log_axes,
    series_style,
    split_names,
)
from expertlink.bench.records import PHASES, Record

_RAW_NAME = "raw all_to_all_single of the same bytes"
_CEILING_NAME = "ceiling: plain bulk copies of the same bytes"
_TIME_LABEL = "time of the slowest rank, median, µs"
_RATIO_LABEL = "time of the ceiling / time"

Value = Callable[[Record], float | None]
LineStyle = Literal["-", ":"] | tuple[int, tuple[int, int]]


def time_figure(records: Sequence[Record]) -> Figure:
    """One panel per phase, a line per case, T along the bottom; dotted: raw exchange, ceiling."""
    phases = _phases_of(records)
    figure, [panels] = _panels(records, rows=1, columns=len(phases), along="T")
    for panel, phase in zip(panels, phases, strict=True):
        here = [record for record in records if record.phase == phase]
        _draw(panel, records, here, along="T", value=_time)
        _draw(panel, records, here, along="T", value=_raw, line=RAW_LINE)
        _draw(panel, records, here, along="T", value=_ceiling, line=CEILING_LINE)
        panel.set_title(phase)
        panel.set_xlabel("tokens per rank, T")
        log_axes(panel, sorted({record.tokens for record in here}))
    panels[0].set_ylabel(_TIME_LABEL)
    dotted = {_RAW_NAME: _line(RAW_LINE)}
    if any(record.ceiling_us is not None for record in records):
        dotted[_CEILING_NAME] = _line(CEILING_LINE)
    legend_below(figure, panels, dotted)
    figure.suptitle(f"Time per call\n{split_names(records)[0]}", fontsize=10)
    return figure


def efficiency_figure(records: Sequence[Record]) -> Figure | None:
    """Ratio to the ceiling against T, a panel per phase; None where nothing has a ceiling."""
    records = [record for record in records if record.ceiling_ratio is not None]
    if not records:
        return None
    phases = _phases_of(records)
    figure, [panels] = _panels(records, rows=1, columns=len(phases), along="T")
    for panel, phase in zip(panels, phases, strict=True):
        here = [record for record in records if record.phase == phase]
        _draw(panel, records, here, along="T", value=_ratio)
        panel.set_title(phase)
        panel.set_xlabel("tokens per rank, T")
        _ratio_axes(panel, records, sorted({record.tokens for record in here}))
    panels[0].set_ylabel(_RATIO_LABEL)
    legend_below(figure, panels, {})
    title = "How close to the wire (1: as fast as plain bulk copies of the same bytes)"
    figure.suptitle(f"{title}\n{split_names(records)[0]}", fontsize=10)
    return figure


def sms_figure(records: Sequence[Record]) -> Figure | None:
    """Time, and ratio to the ceiling, of dispatch and combine against SMs; None without a sweep."""
    records = _swept(records)
    if not records:
        return None
    phases = _phases_of(records)
    with_ratio = any(record.ceiling_ratio is not None for record in records)
    figure, rows = _panels(records, rows=1 + with_ratio, columns=len(phases), along="SMs")
    for column, phase in enumerate(phases):
        here = [record for record in records if record.phase == phase]
        ticks = sorted({record.num_sms for record in here if record.num_sms is not None})
        panel = rows[0][column]
        _draw(panel, records, here, along="SMs", value=_time)
        _draw(panel, records, here, along="SMs", value=_ceiling, line=CEILING_LINE)
        panel.set_title(phase)
        log_axes(panel, ticks)
        if with_ratio:
            _draw(rows[1][column], records, here, along="SMs", value=_ratio)
            _ratio_axes(rows[1][column], records, ticks)
        rows[-1][column].set_xlabel(f"SMs for {phase}")
    rows[0][0].set_ylabel(_TIME_LABEL)
    if with_ratio:
        rows[1][0].set_ylabel(_RATIO_LABEL)
    sizes = sorted({record.ceiling_num_sms for record in records if record.ceiling_num_sms})
    name = f"{_CEILING_NAME}, with {' or '.join(map(str, sizes))} SMs"
    legend_below(figure, rows[0], {name: _line(CEILING_LINE)} if with_ratio else {})
    figure.suptitle(f"SMs\n{split_names(records, along='SMs')[0]}", fontsize=10)
    return figure


def _swept(records: Sequence[Record]) -> list[Record]:
    """Records of dispatch and combine that were measured with several SM budgets."""
    limited = [
        record for record in records if record.phase != "pair" and record.num_sms is not None
    ]
    names = split_names(limited, along="SMs")[1]
    keyed = sorted(zip(names, limited, strict=True), key=lambda item: (item[0], item[1].phase))
    swept: list[Record] = []
    for _, group in groupby(keyed, key=lambda item: (item[0], item[1].phase)):
        members = [record for _, record in group]
        if len({record.num_sms for record in members}) > 1:
            swept += members
    return swept


def _draw(
    panel: Axes,
    records: Sequence[Record],
    here: Sequence[Record],
    *,
    along: str,
    value: Value,
    line: LineStyle = "-",
) -> None:
    """A line per series through the values of its records that are in this panel."""
    names = split_names(records, along=along)[1]
    name_of = {id(record): name for record, name in zip(records, names, strict=True)}
    for place, name in enumerate(dict.fromkeys(names)):
        points = sorted(
            (record.tokens if along == "T" else record.num_sms or 0, number)
            for record in here
            if name_of[id(record)] == name and (number := value(record)) is not None
        )
        if not points:
            continue
        measured = line == "-"
        panel.plot(
            *zip(*points, strict=True),
            **series_style(place),
            linestyle=line,
            markersize=5 if measured else 3,
            label=(name or ONLY) if measured else None,
        )


def _panels(
    records: Sequence[Record], *, rows: int, columns: int, along: str
) -> tuple[Figure, list[list[Axes]]]:
    """Empty panels, with room for the legend below them."""
    names = set(split_names(records, along=along)[1])
    legend_rows = -(-(len(names) + 1) // 2)
    height = 4.2 + 3.0 * (rows - 1) + 0.22 * legend_rows
    figure = Figure(figsize=(4.2 * max(2, columns), height))
    figure.set_layout_engine("constrained")
    return figure, [
        list(row) for row in figure.subplots(rows, columns, squeeze=False, sharey="row")
    ]


def _ratio_axes(panel: Axes, records: Sequence[Record], ticks: Sequence[int]) -> None:
    panel.axhline(1.0, color="#000000", linewidth=1, linestyle="--")
    log_axes(panel, ticks, log_y=False)
    panel.set_ylim(0, 1.05 * max(1.0, *(record.ceiling_ratio or 0.0 for record in records)))


def _line(style: LineStyle) -> Line2D:
    return Line2D([], [], color=RAW_COLOR, linestyle=style, marker="o", markersize=3)


def _phases_of(records: Sequence[Record]) -> list[str]:
    return [phase for phase in PHASES if any(record.phase == phase for record in records)]


def _time(record: Record) -> float:
    return record.time_us.median


def _raw(record: Record) -> float:
    return record.raw_us.median


def _ceiling(record: Record) -> float | None:
    return None if record.ceiling_us is None else record.ceiling_us.median


def _ratio(record: Record) -> float | None:
    return record.ceiling_ratio
