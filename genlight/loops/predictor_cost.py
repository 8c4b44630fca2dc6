"""What a comparison of predictors and its searches will cost, from the smallest and the largest comparison."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from genlight.loops.cost import FirstValidation, artifact_of, method_cost, rehearsal_of, search_phase, timed
from genlight.reports.cost import CostEstimate, Phase

if TYPE_CHECKING:
    from genlight.loops.predictor_work import PredictorWork

COMPARISONS, PREDICTOR = "comparisons", "predictor and proposals"
# seconds of reading a true score and keeping it
_READ = 0.003


def predictor_cost(work: PredictorWork, first: FirstValidation) -> CostEstimate:
    """Time of the whole method; what is measured for it is kept, and counts as done."""
    method, seed = work.method, work.datamodule.label_seed
    measured = sorted({work.numbers[0], work.numbers[-1]})
    pieces = [partial(work.cell, labels, seed, again=True) for labels in measured]
    seconds = [timed([piece])[0] for piece in pieces]
    shares = work.evaluations.shares
    left = max(0, len(work.numbers) * method.label_seeds - len(measured))
    phases = [Phase(COMPARISONS, tuple(value / shares for value in seconds), left)]
    for name in work.searches:
        task = work.task(name, method.settings.seed)
        phase = search_phase(task.name, work.evaluations, (_READ,), rehearsal_of(task.problem, task.plan, _READ))
        phases.append(Phase(f"search {name}", phase.seconds, phase.count * method.search_seeds))
    phases.append(Phase(PREDICTOR, (fmean(seconds) / len(method.predictors),), 1 + bool(method.propose)))
    return method_cost(work.evaluations, first, phases, [artifact_of(work.network)], pictures=3)
