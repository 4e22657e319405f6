"""The demo's two pictures. Colours are told apart with any kind of colour vision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from expertlink.demo.train import StepRecord

_BLUE, _ORANGE = "#0072B2", "#D55E00"  # from the palette of Okabe and Ito
_SMOOTHED = 10  # steps


def plot_loss(records: Sequence[StepRecord], path: Path, *, title: str) -> None:
    """Training and validation loss over steps, as PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    losses = np.array([record.loss for record in records])
    steps = np.arange(1, len(losses) + 1)
    few = len(losses) <= _SMOOTHED  # too few for a mean: draw points
    axes.plot(
        steps,
        losses,
        color=_BLUE,
        alpha=0.35,
        linewidth=1,
        marker="." if few else "",
        label="training, every step",
    )
    if not few:
        average = np.ones(_SMOOTHED) / _SMOOTHED
        axes.plot(
            np.convolve(steps, average, mode="valid"),
            np.convolve(losses, average, mode="valid"),
            color=_BLUE,
            linewidth=2,
            label=f"training, mean of {_SMOOTHED}",
        )
    held_out = [(r.step + 1, r.validation_loss) for r in records if r.validation_loss is not None]
    axes.plot(
        *zip(*held_out, strict=True), color=_ORANGE, marker="o", linestyle="--", label="held-out"
    )
    axes.set(xlabel="step", ylabel="cross entropy (nats per byte)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    to_bits, to_nats = partial(np.multiply, 1 / math.log(2)), partial(np.multiply, math.log(2))
    bits = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
    bits.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_expert_load(
    records: Sequence[StepRecord], experts_of_rank: Sequence[Sequence[int]], path: Path
) -> None:
    """Load of every expert over steps, one panel per layer, as PNG.

    Args:
        records: the steps.
        experts_of_rank: global expert ids of each rank.
        path: where to write.
    """
    load_SLE = np.array([record.load for record in records])
    order = [expert for experts in experts_of_rank for expert in experts]
    relative = load_SLE[..., order] / load_SLE.mean(axis=-1, keepdims=True)
    colour = np.log2(np.maximum(relative, 2.0**-3))
    num_layers = colour.shape[1]

    figure = Figure(figsize=(8, 1.2 + 2.2 * num_layers), layout="constrained")
    panels = figure.subplots(num_layers, 1, sharex=True, squeeze=False)[:, 0]
    norm = CenteredNorm(halfrange=3)
    image = None
    for layer, axes in enumerate(panels):
        image = axes.imshow(
            colour[:, layer].T,
            aspect="auto",
            interpolation="nearest",
            cmap="PuOr_r",
            norm=norm,
            extent=(0.5, len(records) + 0.5, len(order) - 0.5, -0.5),
        )
        axes.set(ylabel="expert", title=f"layer {layer}")
        axes.set_yticks(range(0, len(order), max(1, len(order) // 8)))
        axes.set_yticklabels(order[:: max(1, len(order) // 8)])
        _mark_ranks(axes, [len(experts) for experts in experts_of_rank])
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    assert image is not None
    bar = figure.colorbar(image, ax=panels, extend="both", shrink=0.6, pad=0.02, aspect=30)
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["⅛", "¼", "½", "1", "2", "4", "8"])
    bar.set_label("load of the expert / mean load")
    figure.suptitle("Expert load during training")
    figure.savefig(path, dpi=150)


def _mark_ranks(axes: Axes, sizes: Sequence[int]) -> None:
    """Lines between the experts of different ranks, and the ranks' names at the right."""
    ends = list(accumulate(sizes))
    for rank, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        if rank:
            axes.axhline(end - size - 0.5, color="black", linewidth=1)
        axes.text(
            1.01,
            end - size / 2 - 0.5,
            f"rank {rank}",
            transform=axes.get_yaxis_transform(),
            verticalalignment="center",
            fontsize="small",
        )
