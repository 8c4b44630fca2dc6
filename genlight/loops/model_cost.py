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
from genlight.loops.model_work import RULE_FINALISTS
from genlight.reports.cost import CostEstimate, Phase
from genlight.search.records import fits
from genlight.search.spaces.model_rules import evenly, single_models

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from genlight.loops.model_work import ModelWork

_MEASURED = 4


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
    share, whole = method.select / settings.fidelity, work.datamodule.num_samples / settings.fidelity
    # the report has more metrics; what two short measurements differ by may fall below nothing
    more = max(0.0, reported.fixed - beside.fixed)
    judged = [beside.scaled(line(cost), share) for cost in costs_kept(work, RULE_FINALISTS, settings.finalists)]
    shown = [more + beside.scaled(line(cost), whole) for cost in costs_kept(work, 1, 1)]
    phases += [
        Phase(name, times(spread, fmean(each) / work.evaluations.shares), len(each))
        for name, each in ((CHOICE, judged), (REPORT, shown))
    ]
    return method_cost(work.evaluations, first, phases, [artifact_of(work.module)], pictures=4)


def costs_kept(work: ModelWork, of_rule: int, of_search: int) -> list[float]:
    """Costs of the distinct schedules that are kept, if within a budget the dearest ones of a rule are its best.

    Args:
        work: of the search.
        of_rule: how many of each rule are kept for each budget, and of those that are drawn at random.
        of_search: how many that the search found, which use up their budget.
    """
    kept: dict[Hashable, float] = {}
    for limit in work.limits.values():
        of: dict[str, dict[Hashable, float]] = {}
        for rule, schedule in work.initial.values():
            if fits(cost := work.space.cost(schedule)["cost"], limit):
                of.setdefault(rule, {})[work.space.key(schedule)] = cost
        for found in of.values():
            kept.update(sorted(found.items(), key=lambda each: each[1])[-of_rule:])
    return [*kept.values(), *(limit for limit in work.limits.values() for _ in range(of_search + of_rule))]


def _line(costs: Sequence[float], seconds: Sequence[float]) -> Callable[[float], float]:
    """Seconds of a cost, by least squares; never falling, and never below the quickest."""
    if len(set(costs)) < 2:
        return lambda cost: fmean(seconds)
    slope, start = np.polyfit(np.asarray(costs), np.asarray(seconds), 1)
    return lambda cost: max(min(seconds), float(start + max(slope, 0.0) * cost))
