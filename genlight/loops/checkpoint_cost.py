"""What a search of combinations will cost, from a few that are measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from genlight.reports.cost import CostEstimate, Phase, PlannedFile, estimate

if TYPE_CHECKING:
    from genlight.loops.checkpoint_work import CheckpointWork

_MEASURED = 3


def combination_cost(work: CheckpointWork) -> CostEstimate:
    """Time, memory and disk of the whole method: every combination costs mixing, sampling and the metric."""
    method, settings = work.method, work.method.settings
    objective = work.objective("search")
    seconds = []
    for candidate in list(work.baselines.values())[: _MEASURED + 1]:
        begun = time.monotonic()
        work.apply(candidate)
        objective.evaluate_applied(settings.fidelity)
        seconds.append(time.monotonic() - begun)
    work.space.restore()
    searches = 1 + method.random_search
    count = searches * work.task().plan.budget.evaluations
    again = work.evaluations.shares
    per_candidate = tuple(value / again for value in seconds[1:] or seconds)
    chosen = settings.finalists * searches + 3 * len({name.split(" ")[0] for name in work.baselines})
    share = method.select / settings.fidelity
    phases = [
        Phase("combinations", per_candidate, count),
        Phase("choice", tuple(value * share for value in per_candidate), chosen),
    ]
    weights = sum(p.numel() * p.element_size() for p in work.module.parameters())
    return estimate(phases, [PlannedFile("artifact", weights)], work.evaluations.trainer.default_root_dir)
