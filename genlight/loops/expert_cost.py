"""What a search of experts will cost, from a few candidates that are measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

import numpy as np

from genlight.loops.cost import (
    CHOICE,
    REPORT,
    FirstValidation,
    method_cost,
    rehearsal_of,
    report_line,
    sample_line,
    search_phase,
    timed,
    times,
)
from genlight.loops.expert_work import REPEATS, TIMED_BATCHES, ExpertWork
from genlight.reports.cost import CostEstimate, Phase, PlannedFile

_MEASURED = 3
# pruned and merged
_SEARCHED = 2
# pictures of one number of experts
_PICTURES = 3


def expert_cost(works: Sequence[ExpertWork], first: FirstValidation) -> CostEstimate:
    """Time and disk of the whole method."""
    phases = [phase for work in works for phase in _phases(work)]
    model = works[0]
    size = model.parameters(None) * model.bytes_per_parameter
    files = [PlannedFile("artifact", size, len(works))]
    return method_cost(model.evaluations, first, phases, files, pictures=_PICTURES * len(works) + 1)


def _phases(work: ExpertWork) -> list[Phase]:
    method, settings, shares = work.method, work.method.settings, work.evaluations.shares
    objective = work.objective("search")
    measure = partial(objective.evaluate, fidelity=settings.fidelity)
    # a run may be without baselines
    first = next(iter(work.baselines.values()), None) or work.space.sample(np.random.default_rng(settings.seed))
    (rough,) = timed([partial(measure, first)])
    rehearsal = rehearsal_of(work.task.problem, work.task.plan, rough)
    seconds = timed([partial(measure, each) for each in (first, *rehearsal.some(_MEASURED))])
    each = rehearsal.mean([trial.fidelity / settings.fidelity for trial in rehearsal.trials])
    line = sample_line(partial(objective.evaluate, first), settings.fidelity)
    judged = [line.scaled(value, method.select / settings.fidelity) / shares for value in seconds]
    # of an edited model, which is what the report is about
    whole, some = (
        report_line(work.evaluations, work.module, data).seconds(data.num_samples)
        for data in (work.datamodule, work.task_data)
    )
    chosen = len(work.baselines) + _SEARCHED * settings.finalists + 1
    # the whole model, and one with fewer experts
    speed = 2 * (REPEATS + 1) * TIMED_BATCHES * work.task_data.eval_batch_size
    scored = line.each * (speed + method.calibration)
    shown = len(method.baselines) + _SEARCHED
    report = (shown * whole + method.random_draws * some) / shares + scored
    ending = f", {work.num_experts} experts"
    return [
        search_phase(work.name, work.evaluations, times(seconds, each), rehearsal),
        Phase(CHOICE + ending, tuple(judged), chosen),
        Phase(REPORT + ending, tuple(report * value / fmean(seconds) for value in seconds), 1),
    ]
