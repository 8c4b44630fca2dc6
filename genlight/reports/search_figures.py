"""Pictures of a search: each is made of plain values, written as a PNG of 800 pixels width and returned as a Figure."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genlight.reports.drawing import (
    BLACK,
    COLOURS,
    DPI,
    GREY,
    MARKERS,
    finish_axes,
    log_axis,
    new_figure,
    save_figure,
    whole_numbers,
)
from genlight.reports.figures import sample_grid
from genlight.reports.schedule_figure import schedule_drawing as schedule_drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# operators of the search engine, in the order of their colours; others take what is left
_SOURCES = ("guided", "mutation", "crossover", "promotion", "cma_es", "random", "initial")

Record = tuple[int, float | None, str, int]


def quality_against_nfe(
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    ylabel: str,
    *,
    value: str = "rmse",
    thin: Collection[str] | None = None,
    title: str = "",
) -> Figure:
    """Draws one line for each sampler over its number of network evaluations, named at its right end.

    Args:
        rows: mappings with "nfe", "sampler" and `value`, lower being better, and where known "low" and "high", the ends
            of an interval. Several rows of one sampler and nfe, such as those of several seeds, become their median
            with a bar from the smallest to the largest. Rows without `value` are left out.
        thin: samplers to draw as thin grey lines; None: all but the seven that are best on the whole.

    Raises:
        ValueError: no row has a finite value.
    """
    lines = _lines(rows, value)
    if not lines:
        raise ValueError(f"rows: none of them has a finite {value!r}")
    grey = set(_but_the_best(lines, len(COLOURS)) if thin is None else thin)
    coloured = [name for name in lines if name not in grey]
    # names stand below each other on the right: many need a higher picture
    figure = new_figure(max(4.4, 0.17 * len(lines) + 1.0))
    axes = figure.add_subplot()
    labels = []
    for name in sorted(lines, key=lambda name: name not in grey):  # grey lines first, below the others
        x, points = list(lines[name]), list(lines[name].values())
        y = [middle for _, middle, _ in points]
        style: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "marker": ".", "markersize": 4}
        if name in coloured:
            place = coloured.index(name)
            again = place // len(COLOURS)  # colours that come again are dashed, with another marker
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + again) % len(MARKERS)]}
            style |= {"linewidth": 1.8, "markersize": 5, "linestyle": "--" if again else "-"}
            if any(low < high for low, _, high in points):
                ends = [low for low, _, _ in points], [high for _, _, high in points]
                axes.vlines(x, *ends, color=style["color"], linewidth=1.2, alpha=0.6)
        axes.plot(x, y, label=name, **style)
        labels.append((name, x[-1], y[-1], style["color"], name in coloured))
    log_axis(axes, "y", [y for of in lines.values() for point in of.values() for y in point], 1.0)
    numbers = sorted({nfe for of in lines.values() for nfe in of})
    if numbers[-1] > 8 * numbers[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(numbers, [str(nfe) for nfe in numbers])
    finish_axes(axes, "network evaluations (NFE)", ylabel, title)
    _name_lines(axes, labels)
    return save_figure(figure, path)


def search_curve(
    records: Iterable[Record], path: str | Path, ylabel: str = "score", *, title: str = "", best: str = "best so far"
) -> Figure:
    """Draws the score of every candidate of a search in the order of evaluation, and the best so far.

    Args:
        records: (index, score, source, fidelity); the score is None for a failure, lower is better. Colour and marker
            say which operator made a candidate; scores of different fidelities are not compared, so each fidelity has
            its own best so far, and lower ones have smaller dots.

    Raises:
        ValueError: no records.
    """
    records = sorted(records, key=lambda record: record[0])
    if not records:
        raise ValueError("records: a search curve needs at least one")
    scored = [(index, score, source, fidelity) for index, score, source, fidelity in records if score is not None]
    fidelities = sorted({fidelity for *_, fidelity in scored})
    sizes = {fidelity: 14 + 16 * place / max(1, len(fidelities) - 1) for place, fidelity in enumerate(fidelities)}
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    for source, place in _places({source for _, _, source, _ in scored}).items():
        x, y, area = zip(*((i, score, sizes[f]) for i, score, s, f in scored if s == source), strict=True)
        style: dict[str, Any] = {"color": COLOURS[place], "marker": MARKERS[place], "alpha": 0.75, "linewidths": 0}
        axes.scatter(x, y, s=area, label=f"{source} ({len(x)})", **style)
    for fidelity in fidelities:
        points = [(index, score) for index, score, _, f in scored if f == fidelity]
        style = {"color": GREY, "linewidth": 1.0, "linestyle": "--"}
        if fidelity == fidelities[-1]:
            style = {"color": BLACK, "linewidth": 1.6}
        name = best if len(fidelities) == 1 else f"{best}, {fidelity} samples"
        axes.plot(*_best_so_far(points, records[-1][0]), label=name, drawstyle="steps-post", **style)
    if failed := [index for index, score, *_ in records if score is None]:
        above = axes.get_xaxis_transform()
        label = f"failed ({len(failed)})"
        axes.plot(failed, [0.985] * len(failed), "|", transform=above, color=BLACK, markersize=8, label=label)
    log_axis(axes, "y", [score for _, score, *_ in scored], 1.0)
    whole_numbers(axes, [index for index, *_ in records])
    finish_axes(axes, "candidate", ylabel, title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return save_figure(figure, path)


def pareto_picture(
    points: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    path: str | Path,
    xlabel: str,
    ylabel: str,
    *,
    labels: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draws what was measured as dots, and the front that nothing beats as a step line; both are minimised.

    Args:
        points: (cost, quality) of all.
        front: (cost, quality) of those on the front.
        labels: a word for each point of the front.

    Raises:
        ValueError: an empty front, or another number of labels.
    """
    if not front or (labels is not None and len(labels) != len(front)):
        raise ValueError(f"front: {len(front)} points with {len(labels or ())} labels; it needs one point at least")
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    if points:
        costs, qualities = zip(*points, strict=True)
        axes.scatter(costs, qualities, s=12, color=GREY, alpha=0.6, linewidths=0, label=f"measured ({len(points)})")
    x, y = zip(*sorted(front), strict=True)
    log_axis(axes, "x", [cost for cost, _ in (*points, *front)])
    log_axis(axes, "y", [quality for _, quality in (*points, *front)])
    whole_numbers(axes, [cost for cost, _ in (*points, *front)])
    axes.margins(0.08)
    right = axes.get_xlim()[1]
    # what a budget between two points of the front buys is the cheaper one
    axes.plot([*x, right], [*y, y[-1]], drawstyle="steps-post", color=COLOURS[0], linewidth=1.6)
    axes.plot(x, y, "o", color=COLOURS[0], markersize=5, label=f"front ({len(front)})")
    axes.set_xlim(right=right)
    for (cost, quality), word in zip(front, labels or [], strict=False):
        axes.annotate(word, (cost, quality), xytext=(4, 4), textcoords="offset points", fontsize=7.5)
    finish_axes(axes, xlabel, ylabel, title)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def predictor_scatter(
    predicted: Sequence[float], true: Sequence[float], path: str | Path, tau: float, *, title: str = ""
) -> Figure:
    """Draws predicted over true scores, with the best by either and Kendall's rank correlation `tau`.

    Raises:
        ValueError: no values, or different numbers of them.
    """
    if len(predicted) != len(true) or not len(true):
        raise ValueError(f"predicted and true: {len(predicted)} and {len(true)} values; equally many are needed")
    figure = new_figure(4.4)
    axes = figure.add_subplot()
    x, y = [float(value) for value in true], [float(value) for value in predicted]
    axes.scatter(x, y, s=16, color=COLOURS[1], alpha=0.6, linewidths=0)
    for place, values, word in ((2, x, "best measured"), (0, y, "best predicted")):
        best = values.index(min(values))
        style: dict[str, Any] = {"edgecolors": COLOURS[place], "marker": MARKERS[place], "linewidths": 1.6}
        axes.scatter([x[best]], [y[best]], s=70, facecolors="none", label=word, **style)
    log_axis(axes, "x", x)
    finish_axes(axes, "measured", "predicted", title or f"Kendall's tau = {tau:.2f}, {len(x)} candidates")
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def sampler_comparison(samples: Mapping[str, Tensor], path: str | Path, *, count: int = 8) -> None:
    """Writes one row of images for each sampler: column i is made from the same noise in all rows.

    Args:
        samples: [N, C, H, W] in [-1, 1] by name, such as teacher, baseline and S³; equal shapes.
        count: images in a row, at most.

    Raises:
        ValueError: no sampler, or different shapes.
    """
    if len({value.shape for value in samples.values()}) != 1:
        raise ValueError(f"samples: one shape is needed, not {[list(value.shape) for value in samples.values()]}")
    rows = [value[:count] for value in samples.values()]
    # the font of the labels has plain letters and digits only
    names = [unicodedata.normalize("NFKC", name) for name in samples]
    labels = [word for name, row in zip(names, rows) for word in (name, *[""] * (len(row) - 1))]
    sample_grid(torch.cat(rows), path, rows=len(rows), labels=labels)


def _lines(rows: Iterable[Mapping[str, Any]], value: str) -> dict[str, dict[int, tuple[float, float, float]]]:
    """(low, median, high) by sampler and number of evaluations."""
    middles: dict[tuple[str, int], list[float]] = {}
    ends: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row.get(value) is None or not math.isfinite(row[value]):
            continue
        key = str(row["sampler"]), int(row["nfe"])
        middles.setdefault(key, []).append(float(row[value]))
        ends.setdefault(key, []).extend(float(row[end]) for end in (value, "low", "high") if row.get(end) is not None)
    lines: dict[str, dict[int, tuple[float, float, float]]] = {name: {} for name, _ in middles}
    for (name, nfe), ys in sorted(middles.items(), key=lambda item: item[0][1]):
        lines[name][nfe] = (min(ends[name, nfe]), statistics.median(ys), max(ends[name, nfe]))
    return lines


def _but_the_best(lines: Mapping[str, Mapping[int, tuple[float, float, float]]], count: int) -> list[str]:
    """The names beyond the `count` that are lowest on average, each measured against the best of each nfe."""
    best: dict[int, float] = {}
    for of in lines.values():
        for nfe, (_, y, _) in of.items():
            best[nfe] = min(y, best.get(nfe, y))

    def excess(name: str) -> float:
        return statistics.fmean(y / best[n] if best[n] > 0 else y - best[n] for n, (_, y, _) in lines[name].items())

    return sorted(lines, key=excess)[count:]


def _name_lines(axes: Axes, labels: Sequence[tuple[str, float, float, str, bool]]) -> None:
    """Each name beside the right end of its line (x, y), moved up or down until no two overlap."""
    axes.figure.canvas.draw()  # limits and the size of the axes are final only now
    gap = 11.5 * DPI / 72 / axes.bbox.height
    inverse = axes.transAxes.inverted()
    wanted = sorted(
        (inverse.transform(axes.transData.transform((x, y)))[1], i) for i, (_, x, y, *_) in enumerate(labels)
    )
    heights = [height for height, _ in wanted]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    top = max(1.0, (len(heights) - 1) * gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top - (len(heights) - 1 - i) * gap)
    for height, (_, i) in zip(heights, wanted, strict=True):
        name, x, y, colour, bold = labels[i]
        axes.annotate(
            name,
            (x, y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            fontweight="bold" if bold else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _best_so_far(points: Sequence[tuple[int, float]], end: int) -> tuple[list[int], list[float]]:
    x: list[int] = []
    y: list[float] = []
    for index, score in points:
        if not y or score < y[-1]:
            x.append(index)
            y.append(score)
    return [*x, max(end, x[-1])], [*y, y[-1]]


def _places(sources: Collection[str]) -> dict[str, int]:
    """Colour and marker of each source, the same in every picture for those of the engine."""
    known = [*_SOURCES, *sorted(set(sources) - set(_SOURCES))]
    return {source: place % len(COLOURS) for place, source in enumerate(known) if source in sources}
