"""Edits of solver schedules that end in valid schedules.

A change of one decision can make others impossible: fewer steps leave less history, an older source frees one point
and takes another. Every edit here returns a new schedule in which such decisions are cut back to what the history
allows: orders clipped, points that are gone replaced by the nearest, no corrector on the last step. Nothing is changed
in place.
"""

from collections.abc import Sequence
from dataclasses import replace

from genlight.diffusion.solver.decisions import (
    Corrector,
    SolverSchedule,
    StepDecision,
    nearest_points,
)


def with_step(schedule: SolverSchedule, index: int, step: StepDecision) -> SolverSchedule:
    """`schedule` with another decision at `index`, cut back to its history."""
    steps = [*schedule.steps[:index], step, *schedule.steps[index + 1 :]]
    return replace(schedule, steps=fitted(steps, schedule.times))


def with_time(schedule: SolverSchedule, index: int, time: float) -> SolverSchedule:
    """`schedule` with another time at `index`; ValueError if it leaves the interval between its neighbours."""
    return replace(schedule, times=(*schedule.times[:index], float(time), *schedule.times[index + 1 :]))


def insert_step(schedule: SolverSchedule, index: int, time: float, step: StepDecision) -> SolverSchedule:
    """`schedule` with a new time before times[index], 1 <= index, and `step` as the decision that leads to it."""
    if not 1 <= index < len(schedule.times):
        raise ValueError(f"index = {index}: a step can be inserted before the times 1 to {len(schedule.times) - 1}")
    times = (*schedule.times[:index], float(time), *schedule.times[index:])
    steps = [*schedule.steps[: index - 1], step, *schedule.steps[index - 1 :]]
    return replace(schedule, times=times, steps=fitted(steps, times))


def delete_step(schedule: SolverSchedule, index: int) -> SolverSchedule:
    """`schedule` without times[index], 1 <= index < N, and without the decision that led to it."""
    if not 1 <= index < len(schedule.steps):
        raise ValueError(f"index = {index}: only the inner times 1 to {len(schedule.steps) - 1} can be deleted")
    times = (*schedule.times[:index], *schedule.times[index + 1 :])
    steps = [*schedule.steps[: index - 1], *schedule.steps[index:]]
    return replace(schedule, times=times, steps=fitted(steps, times))


def fitted(steps: Sequence[StepDecision], times: Sequence[float | None]) -> tuple[StepDecision, ...]:
    """The decisions cut back to what the history allows at each step, for times that rise or fall strictly."""
    last = len(steps) - 1
    result = []
    for index, step in enumerate(steps):
        step = step if _is_stored(step, index + 1) else _fit_history(step, stored=index + 1)
        if index == last:
            step = step if step.corrector is None else replace(step, corrector=None)
            if times[-1] is None and step.order > 1 and step.weights is None and step.variable == "half_log_snr":
                step = replace(step, order=1, points=(), scales=())
        result.append(step)
    return tuple(result)


def _is_stored(step: StepDecision, stored: int) -> bool:
    """Whether everything that a step needs is stored."""
    oldest = max(step.order if step.weights is None else 1, -step.source)
    corrector = step.corrector
    sets = step.points if corrector is None or corrector.points is None else (*step.points, *corrector.points)
    return oldest <= stored and all(-point <= stored for points in sets for point in points)


def _fit_history(step: StepDecision, stored: int) -> StepDecision:
    source = step.source if -step.source <= stored else -1
    reach = min((point for points in step.points for point in points), default=-1)
    if step.weights is not None and (-reach > stored or source != step.source):
        # explicit weights mean nothing with other points
        return StepDecision(step.prediction, source=source, corrector=_plain(step.corrector))
    order = min(step.order, stored)
    corrector = step.corrector
    if corrector is not None and corrector.points is not None and _outside(corrector.points, source, stored):
        corrector = _plain(corrector)
    if step.weights is None:
        points = tuple(_fit_points(step.points[k], k + 1, source, stored) for k in range(order - 1))
        scales = step.scales[: order - 1]
        if corrector is not None and (order, points) != (step.order, step.points):
            # its own points, weights or factors belonged to another predictor
            corrector = _plain(corrector, keep=order)
        return replace(step, order=order, source=source, points=points, scales=scales, corrector=corrector)
    return replace(step, corrector=corrector)


def _outside(sets: tuple[tuple[int, ...], ...], source: int, stored: int) -> bool:
    return any(-point > stored or point == source for points in sets for point in points)


def _plain(corrector: Corrector | None, keep: int = 0) -> Corrector | None:
    """The corrector with derived points and at most `keep` of its factors."""
    return None if corrector is None else Corrector(corrector.kind, corrector.scales[:keep])


def _fit_points(points: tuple[int, ...], least: int, source: int, stored: int) -> tuple[int, ...]:
    """The points that are stored and not the source, filled up with the nearest to at least `least`."""
    kept = [point for point in points if -point <= stored and point != source]
    for point in (p for n in range(2, stored + 1) for p in nearest_points(n, source, stored)[0]):
        if len(kept) < least and point not in kept:
            kept.append(point)
    return tuple(kept)
