"""A picture of combinations of checkpoints: how much each counts, over the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight.reports.drawing import COLOURS, MARKERS, finish_axes, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def weights_over_steps(
    steps: Sequence[int], weights: Mapping[str, Sequence[float]], path: str | Path, *, title: str = ""
) -> Figure:
    """Draws one line for each combination: its weights [K], which sum to one, over the steps [K] of the checkpoints.

    Raises:
        ValueError: no combination, or another number of weights than steps.
    """
    if not weights or any(len(values) != len(steps) for values in weights.values()):
        raise ValueError(f"weights: {len(steps)} for each combination are needed")
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    axes.axhline(0.0, color="#8A8A8A", linewidth=0.8)
    for place, (name, values) in enumerate(weights.items()):
        style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
        axes.plot(steps, values, label=name, markersize=3.5, linewidth=1.4, **style)
    finish_axes(axes, "optimizer step of the checkpoint", "weight", title)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)
