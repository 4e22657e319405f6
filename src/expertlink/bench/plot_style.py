"""What all pictures share: colours, names of series, axes, the legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter

from expertlink.bench.records import PHASES, Record
from expertlink.bench.terminal import dtype_label, routing_label, sms_label

# Okabe and Ito, "Color Universal Design": told apart by colour-blind readers too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#882255")
PHASE_COLORS: dict[str, str] = dict(zip(PHASES, COLORS, strict=False))
RAW_COLOR = "#999999"
RAW_LINE = ":"
CEILING_LINE = (0, (1, 3))  # dotted, further apart
GRID_COLOR = "#DDDDDD"
ONLY = "measured"  # name of a series that differs from no other
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

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
    "T": lambda record: record.tokens,
    "SMs": sms_label,
    "on": lambda record: record.hardware,
}
_BARE = ("engine", "mode", "layout", "variant", "routing", "dtype")  # values that name themselves


def split_names(
    records: Sequence[Record], *, along: str | None = "T", said: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """What all records share, and for each record a name made of what they do not share.

    Args:
        records: what is drawn.
        along: what an axis or a label says already, and names leave out.
        said: more of that.
    """
    shared: list[str] = []
    varying: list[str] = []
    for name, read in _NAMES.items():
        if name == along or name in said:
            continue
        values = {read(record) for record in records}
        if len(values) == 1:
            shared.append(_value_text(name, values.pop()))
        else:
            varying.append(name)
    names = [
        " ".join(_value_text(name, _NAMES[name](record)) for name in varying) for record in records
    ]
    return ", ".join(shared), names


def series_style(place: int) -> dict[str, Any]:
    """Colour and marker of the series in this place."""
    return {
        "color": COLORS[place % len(COLORS)],
        "marker": _MARKERS[(place + place // len(COLORS)) % len(_MARKERS)],
    }


def log_axes(panel: Axes, ticks: Sequence[int], *, log_y: bool = True) -> None:
    """Powers of two along the bottom; logarithmic or plain numbers upwards."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    if log_y:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(base=10, subs=[1.0, 2.0, 5.0]))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(visible=True, which="major", color=GRID_COLOR, linewidth=0.6)
    panel.set_axisbelow(True)


def legend_below(figure: Figure, panels: Sequence[Axes], extra: dict[str, Any]) -> None:
    """One legend for the labelled lines of all panels, then for what `extra` names."""
    handles: dict[str, Any] = {}
    for panel in panels:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    handles |= extra
    figure.legend(
        [*handles.values()],
        [*handles],
        loc="outside lower center",
        ncols=2,
        fontsize=8,
        frameon=False,
    )


def _value_text(name: str, value: object) -> str:
    if name in _BARE:
        return str(value)
    return f"{name} {value}" if name == "on" else f"{name}={value}"
