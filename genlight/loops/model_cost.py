"""What a search of model schedules will cost, from a few that are measured."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from genlight.loops.cost import (
    CHOICE,
    REPORT,
    FirstValidation,
    artifact_of,
    method_cost,
    rehearsal_of,
    report_line,
    sample_line,
    search_phase,
    timed,
    times,
)
from genlight.reports.cost import CostEstimate, Phase
from genlight.search.spaces.model_rules import evenly, single_models

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from genlight.loops.model_work import ModelWork

_MEASURED = 4
# of what is chosen among, the share that is reported: the best of each rule
_PER_RULE = 2


def model_cost(work: ModelWork, first: FirstValidation) -> CostEstimate:
    """Time, memory and disk of the whole method: schedules cost what their members do, and something beside.

    Of a few single models with costs over the whole range the seconds are measured; a line through them says what
    others take.
    """
    method, settings = work.method, work.method.settings
    objective = work.draws.objective(work.space, "search")
    every = sorted(single_models(work.space), key=lambda each: work.space.cost(each.schedule)["cost"])
    chosen = evenly(every, _MEASURED)
    schedules = [each.schedule for each in (chosen[0], *chosen)]  # the first one twice, to warm up
    seconds = timed([partial(work.evaluated, objective, schedule, settings.fidelity) for schedule in schedules])
    costs = [work.space.cost(schedule)["cost"] for schedule in schedules[1:]]
    line = _line(costs, seconds)
    # what measurements have around the line, for the interval
    spread = [value / line(cost) for cost, value in zip(costs, seconds, strict=False)]
    # what a measurement takes beside its samples, by the cheapest of them
    beside = sample_line(partial(work.evaluated, objective, schedules[0]), settings.fidelity)
    reported = report_line(work.evaluations, work.module, work.datamodule)
    task = work.task
    rehearsal = rehearsal_of(task.problem, task.plan, fmean(seconds))
    mean_cost = rehearsal.mean([trial.cost["cost"] for trial in rehearsal.trials])
    phases = [search_phase(task.name, work.evaluations, times(spread, line(mean_cost)), rehearsal)]
    limits, rules = list(work.limits.values()), len(method.rules) + 1
    share, whole = method.select / settings.fidelity, work.datamodule.num_samples / settings.fidelity
    choice = sum(beside.scaled(line(limit), share) for limit in limits) / work.evaluations.shares
    # the report has more metrics; what two short measurements differ by may fall below nothing
    more = max(0.0, reported.fixed - beside.fixed)
    report = sum(more + beside.scaled(line(limit), whole) for limit in limits) / work.evaluations.shares
    phases += [
        Phase(CHOICE, times(spread, choice), settings.finalists + _PER_RULE * rules),
        Phase(REPORT, times(spread, report), rules + 1),
    ]
    return method_cost(work.evaluations, first, phases, [artifact_of(work.module)], pictures=4)


def _line(costs: Sequence[float], seconds: Sequence[float]) -> Callable[[float], float]:
    """Seconds of a cost, by least squares; never falling, and never below the quickest."""
    if len(set(costs)) < 2:
        return lambda cost: fmean(seconds)
    slope, start = np.polyfit(np.asarray(costs), np.asarray(seconds), 1)
    return lambda cost: max(min(seconds), float(start + max(slope, 0.0) * cost))
