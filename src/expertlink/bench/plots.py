"""Pictures of records: time against T, bars by case where there is one T, time against SMs, and
heat maps of time over wire where both T and H vary.

A picture shows at most `MOST_SERIES` cases; more of them become several pictures, split where they
differ most visibly.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from expertlink.bench.records import PHASES, WORDS, Record, names_of
from expertlink.bench.texts import number

MOST_SERIES = 8
# Okabe and Ito, "Color Universal Design": told apart by colour-blind readers too.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666", "#882255")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RAW, _PEER, _GRID, _BLACK = "#999999", "#CC79A7", "#DDDDDD", "#000000"
_BOUNDS = ("-", ":", "-.", "--")  # by format
_DPI = 150
_LETTERS = 13  # of a title, in an inch
_MEDIAN = "time of the slowest rank, median"
_TIME = f"{_MEDIAN}, µs"
_WIRE_NAME = "the wire: plain bulk copies of the same bytes"
_FLOOR_NAME = "floor: bytes at full bandwidth, two flags a call"
_RAW_NAME = "raw all_to_all_single of the same bytes"
_PALE, _WORST = 1.7, 2.0  # ratios to the wire: text above the first is white, the last is reddest
_BAND_NAME = "dashed: the fastest call; band: up to the median"

Series = dict[str, list[Record]]
"""Records of one phase, by the name of their line or of their bar."""


@dataclass(frozen=True)
class _Kind:
    """One kind of picture."""

    name: str  # of its files
    along: tuple[str, ...]  # words that axes say, so that names of series leave them out
    draw: Callable[[dict[str, Series], list[str]], Figure]  # of every phase's, and all names

    def series(self, record: Record) -> tuple[object, ...]:
        """What the records of one line, or of one bar per phase, have in common."""
        return tuple(read(record) for word, read in WORDS.items() if word not in self.along)

    def with_several(self, records: Sequence[Record], *fields: str) -> list[Record]:
        """Records of the series in which each of the fields has several values."""
        for field in fields:
            values: dict[object, set[object]] = {}
            for record in records:
                values.setdefault(self.series(record), set()).add(getattr(record, field))
            records = [record for record in records if len(values[self.series(record)]) > 1]
        return list(records)


@dataclass(frozen=True)
class Picture:
    """A picture that can be drawn: what is in it, and what all of that has in common."""

    kind: _Kind
    records: list[Record]

    @property
    def title(self) -> str:
        """What all records share."""
        return names_of(self.records, without=self.kind.along)[0]

    def draw(self) -> Figure:
        """The figure, without a canvas."""
        names = names_of(self.records, without=self.kind.along)[1]
        phases: dict[str, Series] = {}
        for phase in PHASES:
            for record, name in zip(self.records, names, strict=True):
                if record.phase == phase:
                    phases.setdefault(phase, {}).setdefault(name, []).append(record)
        figure = self.kind.draw(phases, list(dict.fromkeys(names)))
        letters = int(_LETTERS * figure.get_figwidth())
        figure.suptitle(textwrap.fill(self.title, letters), fontsize=10)
        return figure


def draw_plots(records: Sequence[Record], out: str | Path) -> list[Path]:
    """Draws `time*.png` (cases with several T), `cases*.png` (cases with one), `grid*.png` (cases
    with several T and H) and `sms*.png` (cases with several SM budgets) into a folder, which is
    made where it does not exist.

    `records`: at least one, each key once (`records.latest`). Returns the paths of the pictures.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, picture in pictures(records).items():
        figure = picture.draw()
        FigureCanvasAgg(figure)
        figure.savefig(folder / f"{name}.png", dpi=_DPI, metadata={"Software": None})
        paths.append(folder / f"{name}.png")
    return paths


def pictures(records: Sequence[Record]) -> dict[str, Picture]:
    """The pictures of records, by the name of their file."""
    limited = [record for record in records if record.num_sms is not None]
    swept = _SMS.with_several([one for one in limited if one.phase != "pair"], "num_sms")
    cases = {_SMS.series(record) for record in swept}
    rest = [one for one in records if one not in limited or _SMS.series(one) not in cases]
    grids = _GRIDS.with_several(rest, "tokens", "hidden")
    rest = [record for record in rest if record not in grids]
    lines = _LINES.with_several(rest, "tokens")
    bars = [record for record in rest if record not in lines]
    named: dict[str, Picture] = {}
    for kind, own in ((_LINES, lines), (_BARS, bars), (_GRIDS, grids), (_SMS, swept)):
        parts = _split(kind, own) if own else []
        for place, part in enumerate(parts, start=1):
            named[kind.name + ("" if len(parts) == 1 else f"-{place}")] = Picture(kind, part)
    return named


def _split(kind: _Kind, records: Sequence[Record]) -> list[list[Record]]:
    """Pictures of at most `MOST_SERIES` series, split at the first words that tell them apart."""

    def count(picture: Iterable[Record]) -> int:
        return len({kind.series(record) for record in picture})

    def packed(parts: Iterable[list[Record]]) -> list[list[Record]]:
        full: list[list[Record]] = []
        for part in parts:
            if full and count(full[-1] + part) <= MOST_SERIES:
                full[-1] += part
            else:
                full.append(part)
        return full

    pictures = [list(records)]
    for word, read in [*WORDS.items(), ("", kind.series)]:
        parts: list[list[Record]] = []
        for picture in pictures:
            if count(picture) <= MOST_SERIES or word in kind.along:
                parts.append(picture)
                continue
            values = list(dict.fromkeys(read(record) for record in picture))
            picture.sort(key=lambda record: values.index(read(record)))
            parts += packed(list(part) for _, part in groupby(picture, key=read))
        pictures = parts
    return packed(pictures)


# -- lines ----------------------------------------------------------------------------------------


def _draw_lines(
    phases: dict[str, Series], names: list[str], *, along_tokens: bool = True
) -> Figure:
    """A panel per phase, a line per series; along the bottom T, else the SMs of the phase."""

    def x(record: Record) -> int:
        return record.tokens if along_tokens else record.num_sms or 0

    figure, panels = _panels(phases, height=4.6)
    legend: dict[str, dict[str, Any]] = {
        name: {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.3}
        for name, color, marker in zip(names, _COLORS, _MARKERS, strict=False)
    }
    for phase, panel in panels.items():
        for name, own in phases[phase].items():
            style = legend[name]
            own = sorted(own, key=x)
            places, medians = [x(one) for one in own], [one.time_us.median for one in own]
            if own[0].variant == "eager" and own[0].aligned == "device":
                # A late host makes single calls slow, so their median goes up and down.
                fastest = [record.time_us.min for record in own]
                panel.plot(places, fastest, **style, linestyle="--")
                band = {"color": style["color"], "alpha": 0.15, "lw": 0}
                panel.fill_between(places, fastest, medians, **band)
                legend[_BAND_NAME] = {"color": _RAW, "linestyle": "--"}
            else:
                panel.plot(places, medians, **style)
        here = [record for own in phases[phase].values() for record in own]
        if along_tokens or len({record.tokens for record in here}) == 1:
            _draw_bounds(panel, here, x, legend)
        _log_axes(panel, sorted({x(record) for record in here}))
        panel.set_xlabel("tokens per rank, T" if along_tokens else f"SMs for {phase}")
    _legend(figure, {name: Line2D([], [], **style) for name, style in legend.items()})
    return figure


def _draw_bounds(
    panel: Axes, records: Sequence[Record], x: Callable[[Record], int], legend: dict[str, Any]
) -> None:
    """What the times are compared with: for each format the lowest of all series at each place."""
    formats = list(dict.fromkeys(WORDS["format"](record) for record in records))
    bounds: dict[tuple[str, str, object], dict[int, float]] = {}
    for record in records:
        compared = {(_FLOOR_NAME, _BLACK): record.floor_us}
        if not record.prepared:
            compared[_WIRE_NAME, _BLACK] = _ceiling(record)
        if not record.floor_us and not record.ceiling_us:
            compared[_RAW_NAME, _RAW] = record.raw_us.median
        compared[f"best peer: {record.peer}", _PEER] = record.peer_us
        for (name, color), value in compared.items():
            if value is not None:
                lowest = bounds.setdefault((name, color, WORDS["format"](record)), {})
                lowest[x(record)] = min(value, lowest.get(x(record), value))
    order = [_FLOOR_NAME, _WIRE_NAME, _RAW_NAME, *dict.fromkeys(name for name, _, _ in bounds)]
    for name, color, wanted in sorted(
        bounds, key=lambda k: (order.index(k[0]), formats.index(k[2]))
    ):
        linestyle = _BOUNDS[formats.index(wanted) % len(_BOUNDS)]
        style = {"color": color, "linestyle": linestyle, "lw": 1}
        panel.plot(*zip(*sorted(bounds[name, color, wanted].items()), strict=True), **style)
        legend[f"{name}, {wanted}" if len(formats) > 1 else name] = style


def _ceiling(record: Record) -> float | None:
    return None if record.ceiling_us is None else record.ceiling_us.median


def _panels(phases: dict[str, Series], *, height: float) -> tuple[Figure, dict[str, Axes]]:
    """An empty panel per phase."""
    figure = Figure(figsize=(4.3 * max(2, len(phases)), height))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(phases), squeeze=False, sharey=True)[0]
    panels = dict(zip(phases, axes, strict=True))
    for phase, panel in panels.items():
        panel.set_title(phase, fontsize=10)
        panel.set_axisbelow(True)
    axes[0].set_ylabel(_TIME)
    return figure, panels


def _log_axes(panel: Axes, ticks: Sequence[int]) -> None:
    """Powers of two along the bottom, plain numbers upwards."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=[1.0, 2.0, 5.0]))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(visible=True, which="major", color=_GRID, linewidth=0.6)


def _legend(figure: Figure, handles: dict[str, Line2D | Patch]) -> None:
    columns = 3 if len(handles) > 4 else 2
    style = {"loc": "outside lower center", "fontsize": 8, "frameon": False}
    figure.legend([*handles.values()], [*handles], ncols=columns, **style)


# -- bars -----------------------------------------------------------------------------------------


def _draw_bars(phases: dict[str, Series], names: list[str]) -> Figure:
    """A panel per phase with a bar per case; marks: what its time is compared with."""
    figure, panels = _panels(phases, height=2.2 + 0.42 * len(names))
    legend: dict[str, Line2D | Patch] = {"measured": Patch(color=_COLORS[5])}
    for phase, panel in panels.items():
        widest = 0.0
        for name, [record, *_] in phases[phase].items():
            y, median = names.index(name), record.time_us.median
            panel.barh(y, median, 0.62, color=_COLORS[5])
            marks: list[tuple[str, float | None, str]] = [
                (_RAW_NAME, record.raw_us.median, _RAW),
                (_WIRE_NAME, _ceiling(record), _BLACK),
                (f"best peer: {record.peer}", record.peer_us, _COLORS[3]),
            ]
            for label, value, color in marks:
                if value:
                    panel.vlines(value, y - 0.38, y + 0.38, color=color, lw=2)
                    legend[label] = Line2D([], [], color=color, lw=2)
                    widest = max(widest, value)
            widest = max(widest, median)
            label = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            panel.annotate(number(median), (0, y), fontsize=8, **label)
        panel.set_xlim(0, 1.06 * widest or 1.0)
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.grid(visible=True, axis="x", color=_GRID, linewidth=0.6)
        panel.set_ylabel("")
        panel.set_xlabel("µs, median of the slowest rank", fontsize=8)
    _legend(figure, legend)
    return figure


# -- heat maps ------------------------------------------------------------------------------------


def _draw_grid(phases: dict[str, Series], names: list[str]) -> Figure:
    """A row of panels per series, a panel per phase: time over wire by H and T."""
    records = [record for own in phases.values() for some in own.values() for record in some]
    tokens = sorted({record.tokens for record in records})
    hidden = sorted({record.hidden for record in records})
    width, height = 0.6 + 0.62 * len(tokens), 1.0 + 0.3 * len(hidden)  # of a panel
    figure = Figure(figsize=(max(6.5, 1.6 + len(phases) * width), 1.2 + len(names) * height))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(names), len(phases), squeeze=False, sharex=True, sharey=True)
    for row, name in zip(axes, names, strict=True):
        for (phase, series), panel in zip(phases.items(), row, strict=True):
            ratios = [[math.nan] * len(tokens) for _ in hidden]
            for record in series.get(name, []):
                place = hidden.index(record.hidden), tokens.index(record.tokens)
                ratio = ratios[place[0]][place[1]] = record.time_us.median / _bound(record)[1]
                style = {"ha": "center", "va": "center", "fontsize": 7}
                color = "white" if ratio > _PALE else "black"
                panel.text(place[1], place[0], f"{ratio:.2f}", color=color, **style)
            panel.imshow(ratios, cmap="YlOrRd", vmin=1.0, vmax=_WORST, aspect="auto")
            panel.set_title(f"{name}: {phase}" if len(names) > 1 else phase, fontsize=9)
            panel.set_xticks(range(len(tokens)), [str(value) for value in tokens], fontsize=8)
            panel.set_yticks(range(len(hidden)), [str(value) for value in hidden], fontsize=8)
        row[0].set_ylabel("hidden size, H", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("tokens per rank, T", fontsize=8)
    bounds = {_bound(record)[0] for record in records}
    figure.supxlabel(f"{_MEDIAN}, over that of {' or '.join(sorted(bounds))}", fontsize=8)
    return figure


def _bound(record: Record) -> tuple[str, float]:
    """What a time is compared with, the wire where it was measured: a name, and microseconds."""
    ceiling = _ceiling(record)
    if ceiling:
        return _WIRE_NAME, ceiling
    if record.floor_us:
        return _FLOOR_NAME, record.floor_us
    return _RAW_NAME, record.raw_us.median


_LINES = _Kind("time", ("T",), _draw_lines)
_BARS = _Kind("cases", (), _draw_bars)
_GRIDS = _Kind("grid", ("H", "T"), _draw_grid)
_SMS = _Kind("sms", ("SMs",), partial(_draw_lines, along_tokens=False))
