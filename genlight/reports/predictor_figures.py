"""Pictures of predictors: rank correlation over labels, regret of searches, weights of a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from genlight.reports.drawing import BLUE, COLOURS, GREY, MARKERS, finish_axes, log_axis, new_figure, save_figure
from genlight.reports.intervals import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def tau_over_labels(
    values: Mapping[str, Mapping[int, Sequence[float]]], path: str | Path, *, title: str = ""
) -> Figure:
    """Draws Kendall's tau of each predictor over the number of labels: the mean, and its 95 % interval where known.

    Args:
        values: tau of each choice of labels, by predictor and number of labels.

    Raises:
        ValueError: no predictor.
    """
    if not values:
        raise ValueError("values: one predictor is needed")
    figure = new_figure(4.4)
    axes = figure.add_subplot()
    for place, (name, of) in enumerate(values.items()):
        numbers = sorted(of)
        _line(axes, numbers, [mean_interval(of[number]) for number in numbers], place, name)
    numbers = sorted({number for of in values.values() for number in of})
    log_axis(axes, "x", numbers, 4.0)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    finish_axes(axes, "labelled candidates", "Kendall's tau, held out", title)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(figure, path)


def regret_curves(
    regrets: Mapping[str, Sequence[Sequence[float]]], path: str | Path, begin: int = 1, *, title: str = ""
) -> Figure:
    """Draws how far the best so far stays behind the best of all: the mean over seeds, and its 95 % interval.

    Args:
        regrets: after each evaluation, by search and seed; equally many in all seeds of a search.
        begin: the first evaluation that is drawn, unless a search has no more than these.

    Raises:
        ValueError: no search.
    """
    if not regrets:
        raise ValueError("regrets: one search is needed")
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    begin = min([begin, *(len(seed) for seeds in regrets.values() for seed in seeds)])
    for place, (name, seeds) in enumerate(regrets.items()):
        points = [mean_interval(values) for values in zip(*seeds)][begin - 1 :]
        _line(axes, range(begin, begin + len(points)), points, place, name, marker="")
    axes.set_ylim(bottom=0.0)
    finish_axes(axes, "candidates measured", "regret", title)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def gate_weights(names: Sequence[str], weights: ArrayLike, path: str | Path, *, title: str = "") -> Figure:
    """Draws how much each expert counts: mean over candidates as a bar, 5 to 95 % of them as a line.

    Args:
        names: of the E experts.
        weights: [E, N], which add up to 1 for each candidate.

    Raises:
        ValueError: another number of names.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 2 or len(values) != len(names):
        raise ValueError(f"weights: [{len(names)}, candidates] is needed, not {list(values.shape)}")
    order = np.argsort(values.mean(axis=1), kind="stable")
    figure = new_figure(max(2.2, 0.24 * len(names) + 1.0))
    axes = figure.add_subplot()
    places = np.arange(len(names))
    low, high = np.quantile(values[order], [0.05, 0.95], axis=1)
    axes.barh(places, values[order].mean(axis=1), color=BLUE, alpha=0.75, label="mean over candidates")
    axes.hlines(places, low, high, color="#000000", linewidth=1.4, label="5 to 95 % of them")
    axes.axvline(1 / len(names), color=GREY, linewidth=0.9, linestyle="--", label="equal weights")
    axes.set_yticks(places, [names[number] for number in order])
    finish_axes(axes, "weight of the gate", "", title)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    return save_figure(figure, path)


def _line(
    axes: Axes,
    x: Sequence[int],
    points: Sequence[tuple[float, float, float]],
    place: int,
    name: str,
    marker: str | None = None,
) -> None:
    """Means as a line, intervals as a band where they are known."""
    again = place // len(COLOURS)  # colours that come again are dashed, with another marker
    style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.5, "markersize": 4}
    style |= {"marker": MARKERS[(place + again) % len(MARKERS)] if marker is None else marker}
    axes.plot(x, [mean for mean, _, _ in points], label=name, linestyle="--" if again else "-", **style)
    if all(math.isfinite(low) for _, low, _ in points):
        ends = [low for _, low, _ in points], [high for _, _, high in points]
        axes.fill_between(x, *ends, color=style["color"], alpha=0.1, linewidth=0)
