"""Pictures of experts: one field for each expert of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genlight.reports.drawing import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def expert_heatmaps(
    panels: Mapping[str, Sequence[Sequence[float]]], path: str | Path, *, label: str, title: str = ""
) -> Figure:
    """Draws a field for each layer (down) and expert (across) of each model, all on one scale.

    Args:
        panels: values [layers, experts] by name of the model, of one shape, not negative.
        label: what the values are.

    Raises:
        ValueError: no model, or different shapes.
    """
    shapes = {(len(rows), *sorted({len(row) for row in rows})) for rows in panels.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"panels: values [layers, experts] of one shape are needed, not {sorted(shapes)}")
    layers, experts = next(iter(shapes))
    figure = new_figure(min(9.0, 1.6 + 0.22 * layers))
    highest = max(value for rows in panels.values() for row in rows for value in row) or 1.0
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, rows) in zip(every, panels.items(), strict=True):
        image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("expert", fontsize=9)
        axes.set_xticks(range(0, experts, max(1, experts // 8)))
        axes.set_yticks(range(0, layers, max(1, layers // 8)))
        axes.tick_params(labelsize=8)
    every[0].set_ylabel("layer", fontsize=9)
    figure.colorbar(image, ax=list(every), shrink=0.9).set_label(label, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)
