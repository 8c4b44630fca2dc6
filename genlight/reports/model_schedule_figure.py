"""Pictures of model schedules: score over cost of what each method found, and which member works at which noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight.diffusion.model_schedule import ModelSchedule, solver_schedule
from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.levels import half_log_snrs_of
from genlight.reports.drawing import (
    COLOURS,
    GREY,
    MARKERS,
    finish_axes,
    log_axis,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#222222"
_HATCHES = ("", "////", "....")
Point = tuple[float, float]


def pareto_figure(
    methods: Mapping[str, Sequence[Point]],
    path: str | Path,
    *,
    baselines: Mapping[str, Sequence[Point]] | None = None,
    budgets: Sequence[float] = (),
    mode: str = "min",
    xlabel: str = "cost",
    ylabel: str = "score",
    title: str = "",
) -> Figure:
    """Draws what each method found as (cost, score), on logarithmic axes; that of scores is linear where more is better
    or some are not positive.

    Args:
        methods: points of each method, such as one for each budget.
        baselines: points of what is compared with; their lower envelope is a step line: the best score for at most a
            cost. Pale dots are the points themselves.
        budgets: costs drawn as dotted lines.
        mode: whether the lowest or the highest score is best.

    Raises:
        ValueError: no point at all, or a value that is not finite.
    """
    baselines = dict(baselines or {})
    points = [point for of in (*methods.values(), *baselines.values()) for point in of]
    if not points or not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f"methods and baselines: {len(points)} points; finite ones are needed, and one at least")
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    right = max(*(cost for cost, _ in points), *budgets) if budgets else max(cost for cost, _ in points)
    for place, (name, of) in enumerate(baselines.items()):
        colour = COLOURS[(len(methods) + place) % len(COLOURS)]
        envelope = _envelope(of, mode)
        axes.scatter([cost for cost, _ in of], [score for _, score in of], s=7, color=colour, alpha=0.25, linewidths=0)
        costs, scores = zip(*[*envelope, (right, envelope[-1][1])], strict=True)
        axes.plot(costs, scores, drawstyle="steps-post", color=colour, linewidth=1.3, label=name)
    for place, (name, of) in enumerate(methods.items()):
        style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
        axes.plot(*zip(*sorted(of), strict=True), linestyle=":", linewidth=1.0, markersize=7, label=name, **style)
    log_axis(axes, "x", [cost for cost, _ in points], 1.0)
    if mode == "min":
        log_axis(axes, "y", [score for _, score in points], 1.0)
    for budget in budgets:
        axes.axvline(budget, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        above = axes.get_xaxis_transform()
        axes.text(budget, 1.01, f"{budget:g}", transform=above, fontsize=7.5, ha="center", color=GREY)
    finish_axes(axes, xlabel, ylabel, "")
    axes.grid(visible=False, which="minor")
    if title:
        figure.suptitle(title, fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return save_figure(figure, path)


def strips_figure(
    schedules: Sequence[tuple[str, ModelSchedule, float]],
    noise_schedule: NoiseSchedule,
    path: str | Path,
    *,
    members: Sequence[str] = (),
    slots: int | None = None,
    title: str = "",
) -> Figure:
    """Draws each schedule as a strip along λ = ln(α/σ), from noise on the left to data on the right.

    An evaluation is a bar from its λ to that of the next; colour says which member makes it, height the order of its
    step (a third, two thirds or the whole of the strip), and a black mark below where a step begins.

    Args:
        schedules: (name, schedule, cost) from top to bottom.
        members: the zoo, which fixes the colours; empty: those that occur.
        slots: length of the grid of schedules of kind "ddim".

    Raises:
        ValueError: no schedule, or a member that is not in `members`.
    """
    if not schedules:
        raise ValueError("schedules: a drawing needs at least one")
    used = list(dict.fromkeys(name for _, schedule, _ in schedules for name in schedule.members))
    zoo = list(members) or sorted(used)
    if unknown := [name for name in used if name not in zoo]:
        raise ValueError(f"members: {', '.join(unknown)} not among {', '.join(zoo)}")
    figure = new_figure(0.42 * len(schedules) + 1.1 + (0.25 if title else 0.0))
    axes = figure.add_subplot()
    for row, (name, schedule, cost) in enumerate(schedules):
        axes.text(-0.01, row + 0.5, name, transform=_rows(axes), fontsize=8, ha="right", va="center", color=_INK)
        words = f"{cost:.3g}, {schedule.nfe} NFE"
        axes.text(1.01, row + 0.5, words, transform=_rows(axes), fontsize=7.5, ha="left", va="center", color=GREY)
        _strip(axes, row, schedule, noise_schedule, slots, zoo)
    axes.set_ylim(len(schedules) + 0.08, -0.08)
    axes.set_yticks([])
    axes.margins(x=0.01)
    axes.set_xlabel("λ = ln(α/σ): noise on the left, data on the right", fontsize=8.5)
    axes.tick_params(labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    _legend(figure, zoo, used)
    return save_figure(figure, path)


def _strip(
    axes: Axes, row: int, schedule: ModelSchedule, noise_schedule: NoiseSchedule, slots: int | None, zoo: Sequence[str]
) -> None:
    places = _drawable(half_log_snrs_of(solver_schedule(schedule, noise_schedule, slots), noise_schedule))
    evaluation = 0
    for index, step in enumerate(schedule.steps):
        order = schedule.orders[index] if schedule.orders else len(step)
        axes.plot([places[evaluation]] * 2, [row + 0.9, row + 1.0], color=_INK, linewidth=1.1, zorder=3)
        for name in step:
            left, right = places[evaluation], places[evaluation + 1]
            height = 0.82 * min(order, 3) / 3
            axes.barh(
                row + 0.88 - height / 2,
                right - left,
                height,
                left,
                color=_colour(zoo, name),
                hatch=_hatch(zoo, name),
                edgecolor="white",
                linewidth=0.8,
            )
            evaluation += 1
    axes.plot([places[-1]] * 2, [row + 0.9, row + 1.0], color=_INK, linewidth=1.1, zorder=3)
    axes.plot([places[0], places[-1]], [row + 0.89] * 2, color=_INK, linewidth=0.5, zorder=3)


def _legend(figure: Figure, zoo: Sequence[str], used: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=_colour(zoo, name), hatch=_hatch(zoo, name), edgecolor="white", label=name)
        for name in zoo
        if name in used
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 7),
        fontsize=8,
        frameon=False,
        title="height: order of the step; mark: a step begins",
        title_fontsize=7.5,
    )


def _drawable(half_log_snrs: Sequence[float]) -> list[float]:
    """Infinite ends one unit beyond the finite λ."""
    finite = [value for value in half_log_snrs if math.isfinite(value)] or [0.0]
    return [min(max(value, min(finite) - 1.0), max(finite) + 1.0) for value in half_log_snrs]


def _rows(axes: Axes) -> Any:
    """x in fractions of the axes, y in rows."""
    return axes.get_yaxis_transform()


def _colour(zoo: Sequence[str], name: str) -> str:
    return COLOURS[list(zoo).index(name) % len(COLOURS)]


def _hatch(zoo: Sequence[str], name: str) -> str:
    """Colours that come again are hatched."""
    return _HATCHES[(list(zoo).index(name) // len(COLOURS)) % len(_HATCHES)]


def _envelope(points: Sequence[Point], mode: str) -> list[Point]:
    """The points that no cheaper or equally cheap one beats, by cost."""
    sign = 1.0 if mode == "min" else -1.0
    kept: list[Point] = []
    for cost, score in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not kept or sign * score < sign * kept[-1][1]:
            kept.append((cost, score))
    return kept
