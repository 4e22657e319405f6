"""Pictures show what they name, whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from expertlink.bench.plots import draw_plots, pictures
from expertlink.bench.records import PHASES
from expertlink.demo.plots import plot_expert_load, plot_loss
from expertlink.demo.train import StepRecord
from support.bench_records import make_record


def drawn(figure: Figure) -> tuple[Figure, FigureCanvasAgg]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas


def test_several_t_are_lines_and_one_t_is_bars(tmp_path: Path) -> None:
    lines = [
        make_record(phase=phase, tokens=tokens, layout=layout)
        for phase in PHASES
        for tokens in (128, 1024)
        for layout in ("flat", "rank_major")
    ]
    bars = [make_record(phase=phase, layout="token_major") for phase in PHASES]
    assert list(pictures(lines)) == ["time"]
    assert list(pictures(bars)) == ["cases"]
    paths = draw_plots([*lines, *bars], tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["time.png", "cases.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in draw_plots(lines[:1], tmp_path)] == ["cases.png"]


def test_several_budgets_are_a_picture_of_their_own() -> None:
    def named(sms: Sequence[int | None]) -> list[str]:
        return list(pictures([make_record(phase=p, num_sms=n) for p in PHASES for n in sms]))

    assert named([None, 8]) == ["cases"]
    assert named([8, 24]) == ["sms"]
    assert named([None, 8, 24]) == ["cases", "sms"]


def test_several_t_and_h_are_a_heat_map_of_time_over_wire() -> None:
    sizes = [(tokens, hidden) for tokens in (128, 1024) for hidden in (64, 256, 1024)]
    records = [
        make_record(75.0, phase=phase, tokens=tokens, hidden=hidden, topk=topk)
        for phase in PHASES
        for tokens, hidden in sizes
        for topk in (1, 2)
    ]
    assert list(pictures(records)) == ["grid"]
    assert list(pictures([*records, make_record(layout="token_major")])) == ["cases", "grid"]
    figure, _ = drawn(pictures(records)["grid"].draw())
    assert len(figure.axes) == 2 * len(PHASES)
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["64", "256", "1024"]
    for panel in figure.axes:  # 75 us, the raw exchange 50
        assert [text.get_text() for text in panel.texts] == ["1.50"] * len(sizes)


@pytest.mark.parametrize("tokens", [(128,), (1, 16)])
def test_no_picture_has_more_than_eight_series_and_every_record_has_one(
    tokens: tuple[int, ...],
) -> None:
    records = [
        make_record(tokens=count, layout=layout, variant=variant, quantization=quantization)
        for layout in ("flat", "token_major", "rank_major")
        for variant in ("uncached", "cached", "static", "graph", "zero_copy")
        for quantization in (None, "e4m3_float32")
        for count in tokens
    ]
    drawn = pictures(records).values()
    assert 4 <= len(drawn) <= 6
    for picture in drawn:
        assert len(picture.records) <= 8 * len(tokens)
    assert len({id(record) for picture in drawn for record in picture.records}) == len(records)


def test_single_calls_of_a_late_host_are_a_band() -> None:
    records = [
        make_record(time, mode="ll", variant=variant, aligned="device", tokens=tokens)
        for variant in ("eager", "graph")
        for tokens, time in ((1, 10.0), (8, 50.0), (16, 12.0))
    ]
    figure = pictures(records)["time"].draw()
    [panel] = figure.axes
    assert len(panel.collections) == 1
    dashed = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert [list(np.asarray(line.get_ydata())) for line in dashed] == [[9.0, 45.0, 10.8]]


def test_the_best_peer_is_a_line_where_a_record_has_one() -> None:
    records = [make_record(tokens=tokens, peer="some peer", peer_us=70.0) for tokens in (1, 8)]
    for own in (records, records[:1]):
        [picture] = pictures(own).values()
        figure, _ = drawn(picture.draw())
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert "best peer: some peer" in texts


def test_names_and_legend_are_whole() -> None:
    records = [
        make_record(layout=layout, variant=variant, quantization=quantization, num_sms=sms)
        for layout, variant in (("token_major", "zero_copy_cached"), ("expert_major", "uncached"))
        for quantization in (None, "e4m3_float32")
        for sms in (None, 132)
    ]
    for picture in pictures(records).values():
        figure, canvas = drawn(picture.draw())
        renderer = canvas.get_renderer()
        legend = figure.legends[0].get_window_extent(renderer)
        for panel in figure.axes:
            box = panel.xaxis.label.get_window_extent(renderer)
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            assert not box.overlaps(legend)
            for label in panel.get_yticklabels():
                assert label.get_window_extent(renderer).x0 >= 0


def steps(count: int) -> list[StepRecord]:
    last = count - 1
    return [
        StepRecord(i, 5.0 - 0.1 * i, [[1.0, 2.0]], 1.0, 4.9 if i == last else None)
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
