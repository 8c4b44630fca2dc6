"""The picture of methods that follow each other: quality, network evaluations and bytes after each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight.reports.drawing import BLUE, GREY, ORANGE, finish_axes, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stages_picture(rows: Sequence[Mapping[str, Any]], path: str | Path, metric: str) -> Figure:
    """Draws a bar for each stage in three fields; a dashed line is the plain model.

    Args:
        rows: ``stage``, the metric, ``nfe`` and ``megabytes``, each a number; the first is the plain model.
        metric: its name in the rows.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows: a picture of stages needs the plain model at least")
    figure = new_figure(0.9 + 0.42 * len(rows))
    names = [str(row["stage"]) for row in rows]
    fields = {metric: metric, "nfe": "network evaluations", "megabytes": "megabytes"}
    every = figure.subplots(1, len(fields), sharey=True)
    for axes, (key, label) in zip(every, fields.items(), strict=True):
        values = [float(row[key]) for row in rows]
        bars = axes.barh(names, values, color=[GREY, *[ORANGE if key == metric else BLUE] * (len(rows) - 1)])
        axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8, padding=2)
        axes.axvline(values[0], color=GREY, linewidth=0.8, linestyle="--")
        axes.margins(x=0.2)
        finish_axes(axes, label, "", "")
    every[0].invert_yaxis()
    return save_figure(figure, path)
