"""Pictures of whole layers: what is computed, what communication costs beside it, and the phases
of a run one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from expertlink.bench.layer_record import LAYER_PHASES, LayerRecord
from expertlink.bench.tables import layer_name
from expertlink.bench.texts import number

_DPI = 150
_BLUE, _ORANGE, _GRID = "#56B4E9", "#E69F00", "#DDDDDD"
_COLORS = {  # Okabe and Ito; a backward phase has the colour of its forward one, hatched
    "gate": "#CC79A7",
    "dispatch": "#0072B2",
    "products": "#009E73",
    "shared": "#F0E442",
    "combine": "#D55E00",
    "rest": "#999999",
}
_BACKWARD = "_backward"


def draw_layers(records: Sequence[LayerRecord], out: str | Path) -> list[Path]:
    """Draws `layers.png` (compute and exposed communication) and `timeline.png` (phases) into a
    folder, which is made where it does not exist.

    `records`: each key once (`records.latest`). Returns the paths of the pictures; none where
    there are no records.
    """
    folder = Path(out)
    paths: list[Path] = []
    for name, draw in (("layers", draw_exposed), ("timeline", draw_timeline)):
        if not records:
            break
        folder.mkdir(parents=True, exist_ok=True)
        figure = draw(records)
        FigureCanvasAgg(figure)
        figure.savefig(folder / f"{name}.png", dpi=_DPI, metadata={"Software": None})
        paths.append(folder / f"{name}.png")
    return paths


def draw_exposed(records: Sequence[LayerRecord]) -> Figure:
    """A bar per record: compute, and beside it what the whole layer takes more."""
    figure, panels = _panels(records)
    for phase, panel in panels.items():
        own = [record for record in records if record.phase == phase]
        for y, record in enumerate(own):
            compute = record.compute_us.median
            panel.barh(y, compute, 0.62, color=_BLUE, label="compute")
            exposed = max(record.exposed_us, 0.0)
            style: dict[str, Any] = {
                "left": compute,
                "color": _ORANGE,
                "label": "exposed communication",
            }
            panel.barh(y, exposed, 0.62, **style)
            if record.floor_us is not None:
                at = compute + record.floor_us
                style = {"color": "black", "lw": 2, "label": "compute and the wire's floor"}
                panel.vlines(at, y - 0.38, y + 0.38, **style)
            text = f"{number(record.time_us.median)} ({number(record.exposed_us)} exposed)"
            panel.annotate(
                text, (0, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
    _finish(figure, panels, "µs, median of the slowest rank")
    return figure


def draw_timeline(records: Sequence[LayerRecord]) -> Figure:
    """A bar per record, made of its phases in their order."""
    figure, panels = _panels(records)
    for phase, panel in panels.items():
        own = [record for record in records if record.phase == phase]
        for y, record in enumerate(own):
            left = 0.0
            for name, took in record.phases_us.items():
                style: dict[str, Any] = {"color": _COLORS.get(name.removesuffix(_BACKWARD), _GRID)}
                if name.endswith(_BACKWARD):
                    style |= {"hatch": "///", "edgecolor": "white"}
                panel.barh(y, took, 0.62, left=left, label=name.replace("_", " "), **style)
                left += took
    _finish(figure, panels, "µs, medians of the average rank, calls launched one by one")
    return figure


def _panels(records: Sequence[LayerRecord]) -> tuple[Figure, dict[str, Axes]]:
    """A panel per phase, one above the other, a place for each of its records."""
    names: dict[str, list[str]] = {}
    for phase in LAYER_PHASES:
        for record in records:
            if record.phase == phase:
                names.setdefault(phase, []).append(f"{record.engine} · {layer_name(record)}")
    rows = [0.7 + 0.32 * len(own) for own in names.values()]
    figure = Figure(figsize=(9.0, 0.9 + sum(rows)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(names), 1, squeeze=False, height_ratios=rows)[:, 0]
    panels = dict(zip(names, axes, strict=True))
    for phase, panel in panels.items():
        panel.set_title(phase.replace("_", ", "), fontsize=10)
        panel.set_axisbelow(True)
        panel.set_yticks(range(len(names[phase])), names[phase], fontsize=8)
        panel.set_ylim(len(names[phase]) - 0.4, -0.6)
        panel.grid(visible=True, axis="x", color=_GRID, linewidth=0.6)
    return figure, panels


def _finish(figure: Figure, panels: dict[str, Axes], unit: str) -> None:
    """The unit, and a legend of what the panels show."""
    shown = {}
    for panel in panels.values():
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.supxlabel(unit, fontsize=8)
    style = {"loc": "outside upper center", "fontsize": 8, "frameon": False}
    figure.legend([*shown.values()], [*shown], ncols=min(6, len(shown)), **style)
