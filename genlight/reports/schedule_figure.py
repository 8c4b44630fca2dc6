"""A solver schedule as a picture: where it evaluates the network, and what each step does with the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.decisions import Corrector, LinearScale, Scale, SolverSchedule, StepDecision
from genlight.diffusion.solver.levels import Level, levels_of
from genlight.reports.drawing import BLUE, GREY, ORANGE, WIDTH, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREDICTION_COLOURS = {"data": BLUE, "noise": ORANGE}
_INK = "#222222"
# heights in inches, from the top: name, λ and its numbers, the way to the columns, times, step; then rows and lines
_NAME, _AXIS, _FAN, _TIMES, _STEP, _ROW, _LINE = 0.26, 0.2, 0.34, 0.15, 0.34, 0.17, 0.135
_LEFT = 0.16
_ORDINALS = ("latest", "2nd last", "3rd last", "4th last")


@dataclass(frozen=True)
class _Column:
    """What is drawn of one step."""

    step: StepDecision
    scales: list[str]
    corrector: list[str]


def schedule_drawing(
    schedules: SolverSchedule | Sequence[tuple[str, SolverSchedule]],
    noise_schedule: NoiseSchedule,
    path: str | Path,
    title: str = "",
) -> Figure:
    """Draws solver schedules below each other, all on one axis of λ = ln(α/σ).

    Above are the levels of all evaluations on the axis, coloured by the prediction of the step that begins there;
    below, one column for each step: its time on the noise schedule, order, the stored evaluations it uses (square:
    where it starts; dot: other points; ring: points of some derivatives only), scales or weights, corrector.

    Args:
        schedules: (title, schedule) of each; or one schedule.
        path: the PNG file, 800 pixels wide.

    Raises:
        ValueError: no schedule, or one that has no meaning on the noise schedule.
    """
    titled = [("", schedules)] if isinstance(schedules, SolverSchedule) else list(schedules)
    if not titled:
        raise ValueError("schedules: a drawing needs at least one")
    levels = [levels_of(schedule, noise_schedule) for _, schedule in titled]
    columns = [[_column(schedule, i) for i in range(len(schedule.steps))] for _, schedule in titled]
    heights = [_height(each) for each in columns]
    figure = new_figure(sum(heights) + 0.62 + (0.3 if title else 0.0))
    panels = figure.subplots(len(titled), 1, squeeze=False, height_ratios=heights)[:, 0]
    ends = _ends([level for each in levels for level in each])
    for axes, (name, _), each, found, height in zip(panels, titled, columns, levels, heights, strict=True):
        axes.set(xlim=(-_LEFT, 1.01), ylim=(height, 0))
        axes.axis("off")
        _panel(axes, name, each, found, ends)
    if title:
        figure.suptitle(title, fontsize=10)
    _legend(figure, columns)
    return save_figure(figure, path)


def _panel(
    axes: Axes, name: str, columns: Sequence[_Column], levels: Sequence[Level], ends: tuple[float, float]
) -> None:
    axes.text(-_LEFT, 0.12, name, fontsize=9, fontweight="bold", va="center")
    edges = [i / len(columns) for i in range(len(columns) + 1)]
    places = [_place(float(level.half_log_snr), ends) for level in levels]
    _lambda_axis(axes, columns, places, ends, _NAME + _AXIS)
    below = _NAME + _AXIS + _FAN
    for place, edge in zip(places, edges, strict=True):
        axes.plot([place, edge], [_NAME + _AXIS, below], color=GREY, linewidth=0.7, zorder=0)
    y = below + _TIMES
    _row_name(axes, "time", below + _TIMES / 2)
    for text, edge in zip(_times(levels), edges, strict=True):
        axes.text(edge, below + _TIMES / 2, text, fontsize=_font(columns), ha="center", va="center", color=_INK)
    y = _steps(axes, columns, edges, y)
    y = _evaluations(axes, columns, edges, y)
    for label, texts in (("scale", [c.scales for c in columns]), ("corrector", [c.corrector for c in columns])):
        y = _texts(axes, label, texts, edges, y, _font(columns))


def _lambda_axis(
    axes: Axes, columns: Sequence[_Column], places: Sequence[float], ends: tuple[float, float], y: float
) -> None:
    """The axis with a piece for each step, and round numbers above it."""
    axes.text(-0.015, y, "λ", fontsize=9, ha="right", va="center", color=_INK)
    for column, left, right in zip(columns, places, places[1:]):
        axes.plot([left, right], [y, y], color=PREDICTION_COLOURS[column.step.prediction], linewidth=4, zorder=1)
    axes.plot(places, [y] * len(places), "|", color=_INK, markersize=9, markeredgewidth=1.2, zorder=2)
    low, high = ends
    unit = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if (high - low) / step <= 12)
    for number in range(math.ceil(low / unit) * unit, math.floor(high) + 1, unit):
        place = _between(number, ends)
        axes.text(place, y - 0.17, f"{number:d}".replace("-", "−"), fontsize=6.5, ha="center", va="center", color=GREY)
    for infinite, text in ((0.0, "−∞"), (1.0, "∞")):
        if infinite in places and _between(low if infinite == 0 else high, ends) != infinite:
            axes.text(infinite, y - 0.17, text, fontsize=6.5, ha="center", va="center", color=GREY)


def _steps(axes: Axes, columns: Sequence[_Column], edges: Sequence[float], y: float) -> float:
    """A box for each step in the colour of its prediction, with its order."""
    _row_name(axes, "order", y + _STEP / 2)
    for column, left, right in zip(columns, edges, edges[1:]):
        step = column.step
        axes.barh(
            y, right - left, _STEP, left, align="edge", color=PREDICTION_COLOURS[step.prediction], edgecolor="white"
        )
        text = str(step.order) + ("σ" if step.variable == "sigma" else "")
        middle = (left + right) / 2
        axes.text(middle, y + _STEP / 2, text, color="white", fontsize=11, fontweight="bold", ha="center", va="center")
    return y + _STEP + 0.06


def _evaluations(axes: Axes, columns: Sequence[_Column], edges: Sequence[float], y: float) -> float:
    """Which stored evaluations enter each step, one row for each age."""
    depth = _depth(columns)
    for age in range(1, depth + 1):
        _row_name(axes, _ORDINALS[age - 1] if age <= 4 else f"{age}th last", y + (age - 0.5) * _ROW)
    for column, left, right in zip(columns, edges, edges[1:]):
        x, step = (left + right) / 2, column.step
        used = {step.source, *step.all_points()}
        everywhere = set.intersection(*map(set, step.points)) if step.points else set()
        heights = {j: y + (-j - 0.5) * _ROW for j in range(-depth, 0)}
        axes.plot([x] * depth, list(heights.values()), ".", color="#D8D8D8", markersize=3, zorder=0)
        ends = [heights[max(used)], heights[min(used)]]
        axes.plot([x, x], ends, color=_INK, linewidth=1.0, zorder=1)
        for j in used:
            if j == step.source:
                look: dict[str, Any] = {"marker": "s", "markersize": 7, "markerfacecolor": _INK}
            else:
                look = {"marker": "o", "markersize": 6, "markerfacecolor": _INK if j in everywhere else "white"}
            axes.plot(x, heights[j], color=_INK, zorder=2, **look)
    return y + depth * _ROW + 0.05


def _texts(axes: Axes, label: str, texts: Sequence[list[str]], edges: Sequence[float], y: float, font: float) -> float:
    """A row of small texts, as high as its longest; none if all are empty."""
    lines = max(map(len, texts))
    if not lines:
        return y
    _row_name(axes, label, y + _LINE / 2)
    for content, left, right in zip(texts, edges, edges[1:]):
        for i, line in enumerate(content):
            axes.text(
                (left + right) / 2, y + (i + 0.5) * _LINE, line, fontsize=font, ha="center", va="center", color=_INK
            )
    return y + lines * _LINE + 0.05


def _legend(figure: Figure, columns: Sequence[Sequence[_Column]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    steps = [column.step for each in columns for column in each]
    handles: list[Any] = [
        Patch(color=colour, label=f"{name} prediction")
        for name, colour in PREDICTION_COLOURS.items()
        if any(step.prediction == name for step in steps)
    ]
    plain: dict[str, Any] = {"linestyle": "", "color": _INK}
    handles.append(Line2D([], [], marker="s", markersize=6, label="starts here", **plain))
    if any(step.points for step in steps):
        handles.append(Line2D([], [], marker="o", markersize=5, label="also used", **plain))
    if any(set(points) != set(step.points[0]) for step in steps for points in step.points):
        label = "in some derivatives only"
        handles.append(Line2D([], [], marker="o", markersize=5, markerfacecolor="white", label=label, **plain))
    words = ["number: order"]
    words += ["σ: polynomial in σ/(α + σ), not λ"] if any(step.variable == "sigma" for step in steps) else []
    words += ["PEC n: corrector of order n"] if any(step.corrector for step in steps) else []
    words += ["w: weights of the outputs"] if any(step.weights is not None for step in steps) else []
    if any(step.corrector and step.corrector.kind == "implicit" for step in steps):
        words.append("PECE: with one more evaluation")
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=7.5,
        frameon=False,
        title="   ".join(words),
        title_fontsize=7.5,
    )


def _column(schedule: SolverSchedule, index: int) -> _Column:
    step, corrector = schedule.steps[index], []
    if step.corrector is not None:
        name = {"pseudo": "PEC", "implicit": "PECE"}[step.corrector.kind]
        corrector = [f"{name} {_order(step, step.corrector)}", *_factors(step.corrector)]
    scales = _factors(step)
    if index == 0 and schedule.afs is not None:
        scales = [f"x₀ := {'0' if schedule.afs == 'zero' else 'mean'}", *scales]
    return _Column(step, scales, corrector)


def _order(step: StepDecision, corrector: Corrector) -> int:
    if corrector.weights is not None:
        return len(corrector.weights)
    return 1 + len(step.corrector_points())


def _factors(decision: StepDecision | Corrector) -> list[str]:
    """Scales of the derivatives; explicit weights with a w before them."""
    if decision.weights is not None:
        return [f"w {_number(weight)}" for weight in decision.weights]
    return [_scale(scale) for scale in decision.scales]


def _scale(scale: Scale) -> str:
    if isinstance(scale, LinearScale):
        return f"1{scale.omega:+.2f}h".replace("-", "−")
    return scale.replace("minus_", "−") if isinstance(scale, str) else _number(scale)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "−")


def _times(levels: Sequence[Level]) -> list[str]:
    """Times of the noise schedule in as few digits as tell them apart."""
    times = [None if level.time is None else float(level.time) for level in levels]
    texts: list[str] = []
    for digits in (3, 4, 5):
        texts = ["clean" if time is None else _plain(time, digits) for time in times]
        if len(set(texts)) == len(set(times)):
            break
    return texts


def _plain(value: float, digits: int) -> str:
    """A number in so many significant digits, one less below 1, without an exponent for thousands."""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits - (abs(value) < 1)}g}"


def _ends(levels: Sequence[Level]) -> tuple[float, float]:
    """The finite λ that the axis runs over."""
    finite = [float(level.half_log_snr) for level in levels if math.isfinite(float(level.half_log_snr))]
    low, high = min(finite, default=-1.0), max(finite, default=1.0)
    return (low, high) if high > low else (low - 1.0, high + 1.0)


def _place(half_log_snr: float, ends: tuple[float, float]) -> float:
    """Where a λ lies on [0, 1]; infinite ones at the ends, apart from the finite."""
    if math.isinf(half_log_snr):
        return 0.0 if half_log_snr < 0 else 1.0
    return _between(half_log_snr, ends)


def _between(half_log_snr: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return 0.06 + 0.88 * (half_log_snr - low) / (high - low)


def _depth(columns: Sequence[_Column]) -> int:
    return max(-min(column.step.source, *column.step.all_points(), 0) for column in columns)


def _height(columns: Sequence[_Column]) -> float:
    """Height of a panel in inches."""
    rows = [max(len(texts) for texts in each) for each in ([c.scales for c in columns], [c.corrector for c in columns])]
    texts = sum(lines * _LINE + 0.05 for lines in rows if lines)
    return _NAME + _AXIS + _FAN + _TIMES + _STEP + 0.06 + _depth(columns) * _ROW + 0.05 + texts + 0.15


def _font(columns: Sequence[_Column]) -> float:
    """Small texts shrink where columns are narrow."""
    return max(5.5, min(7.0, WIDTH * 12.0 / len(columns)))


def _row_name(axes: Axes, name: str, y: float) -> None:
    axes.text(-0.03, y, name, fontsize=7.5, ha="right", va="center", color=GREY)
