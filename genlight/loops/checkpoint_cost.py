"""What a search of combinations will cost, from a few that are measured."""

from __future__ import annotations

from collections import Counter
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from genlight.checkpoints.trajectory import average_files
from genlight.loops.checkpoint_work import BEST_OF_KIND, DESCENT, TRACKING
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
)
from genlight.reports.cost import CostEstimate, Phase

if TYPE_CHECKING:
    from genlight.loops.checkpoint_work import CheckpointWork

_MEASURED = 3
# passes over the samples in one step of gradient descent: forwards without and with gradients, and backwards
_PASSES = 4


def combination_cost(work: CheckpointWork, first: FirstValidation) -> CostEstimate:
    """Time, memory and disk of the whole method: every combination costs mixing, sampling and the metric."""
    method, settings, shares = work.method, work.method.settings, work.evaluations.shares
    measure = partial(work.measured, work.objective("search"), count=settings.fidelity)
    baseline = next(iter(work.baselines.values()))
    (rough,) = timed([partial(measure, baseline)])
    phases: list[Phase] = []
    every: list[float] = []
    for kind in work.searched_kinds:
        task = work.task(kind)
        rehearsal = rehearsal_of(task.problem, task.plan, rough)
        some = rehearsal.some(_MEASURED)
        # the first mixture of several members makes what the others find made, which a baseline does not
        seconds = timed([partial(measure, each) for each in (*some[:1], *some) or (baseline,)])
        every += seconds
        phases.append(search_phase(task.name, work.evaluations, seconds, rehearsal))
    line = sample_line(work.objective("search").evaluate_applied, settings.fidelity)
    whole = report_line(work.evaluations, work.module, work.datamodule).seconds(work.datamodule.num_samples)
    work.space.restore()
    of_kind = Counter(name.split(" ")[0] for name in work.baselines)
    averages = (0 if work.averages is None else len(average_files(work.averages)), len(work.post_hoc))
    descents = 0 if method.gradient is None else 2
    kinds = len(of_kind) + len(work.searched_kinds) + sum(map(bool, (*averages, descents)))
    kept = descents + settings.finalists * len(work.searched_kinds)
    kept += sum(min(count, BEST_OF_KIND) for count in (*averages, *of_kind.values()))
    choice = [line.scaled(value, method.select / settings.fidelity) / shares for value in every]
    phases += [
        Phase(TRACKING, tuple(value / shares for value in every), sum(averages)),
        Phase(CHOICE, tuple(choice), kept),
        Phase(REPORT, tuple(whole * value / fmean(every) / shares for value in every), kinds),
    ]
    if method.gradient is not None:
        step = line.each * _PASSES * method.gradient.samples / shares
        phases.append(Phase(DESCENT, (step,), descents * method.gradient.steps))
    return method_cost(
        work.evaluations, first, phases, [artifact_of(work.module)], pictures=2 + len(work.searched_kinds)
    )
