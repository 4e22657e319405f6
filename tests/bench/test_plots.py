"""Pictures show what they name, whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from expertlink.bench import plots
from expertlink.demo.plots import plot_expert_load, plot_loss
from expertlink.demo.train import StepRecord
from support.bench_records import make_record


def drawn(figure: Figure) -> tuple[Figure, FigureCanvasAgg]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas


@pytest.mark.parametrize("name", ["ratio.png", "bandwidth.png"])
def test_labels_beside_long_names_are_whole(name: str) -> None:
    records = [
        make_record(layout=layout, variant=variant, quantization=quantization, num_sms=sms)
        for layout, variant in (("token_major", "zero_copy_cached"), ("expert_major", "uncached"))
        for quantization in (None, "e4m3_float32")
        for sms in (None, 132)
    ]
    chosen = plots._call_figures(records)[name]
    assert chosen is not None
    figure, canvas = drawn(chosen)
    [panel] = figure.axes
    box = panel.xaxis.label.get_window_extent(canvas.get_renderer())
    assert len(panel.get_xlabel()) > 40
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    legend = figure.legends[0].get_window_extent(canvas.get_renderer())
    assert not box.overlaps(legend)


def test_numbers_stand_before_the_line_that_crosses_them() -> None:
    figure = plots._call_figures([make_record()])["ratio.png"]
    assert figure is not None
    [panel] = figure.axes
    line = next(line for line in panel.lines if line.get_linestyle() == "--")
    assert panel.texts
    for text in panel.texts:
        patch = text.get_bbox_patch()
        assert patch is not None
        assert patch.get_alpha() in (None, 1)
        assert text.get_zorder() > line.get_zorder()


def steps(count: int) -> list[StepRecord]:
    last = count - 1
    return [
        StepRecord(i, 5.0 - 0.1 * i, 1.0, [[1.0, 2.0]], 1.0, 4.9 if i == last else None)
        for i in range(count)
    ]


def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures, in place of the files that they would be saved to."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


@pytest.mark.parametrize("count", [1, 3, 10, 11, 150])
def test_every_name_in_the_legend_of_the_losses_is_to_be_seen(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = saved(monkeypatch)
    plot_loss(steps(count), Path("loss.png"), title="")
    axes: Axes = figures[0].axes[0]
    for line in axes.lines:
        assert np.size(line.get_xdata()) > 1 or line.get_marker() not in ("", "None"), line
    assert sum(str(line.get_label()).startswith("training, mean") for line in axes.lines) == (
        count > 10
    )


@pytest.mark.parametrize("count", [1, 3, 150])
def test_steps_are_whole_numbers(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = saved(monkeypatch)
    plot_loss(steps(count), Path("loss.png"), title="")
    plot_expert_load(steps(count), [[0], [1]], Path("load.png"))
    for figure in figures:
        drawn(figure)
        ticks = [
            tick
            for axes in figure.axes
            if axes.get_xlabel() == "step"
            for tick in axes.get_xticks()
        ]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
