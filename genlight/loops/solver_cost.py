"""What a search of solver schedules will cost, from three candidates that are measured."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from genlight.diffusion.solver.fitting import LevenbergMarquardt
from genlight.diffusion.solver.jacobian import goes_both_ways
from genlight.diffusion.solver.teacher import NetworkSampling, TeacherBank
from genlight.loops.cost import (
    CHOICE,
    REPORT,
    FirstValidation,
    SampleLine,
    artifact_of,
    method_cost,
    rehearsal_of,
    report_line,
    search_phase,
    timed,
    times,
)
from genlight.loops.evaluation import noise_of
from genlight.loops.solver_banks import TeacherScoring
from genlight.loops.solver_work import BEST_BASELINES, TEACHER_TIME, TUNING, SolverWork
from genlight.reports.cost import CostEstimate, Phase, PlannedFile
from genlight.search.records import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

_MEASURED = 3
# beside the best hand-made ones: what was searched, refined and tuned, and what people use
_REPORTED = 7
_WITH_METRICS = 3
# that a step of Levenberg-Marquardt tries, on the noise of search and choice
_PROPOSALS = 3


def solver_cost(work: SolverWork, first: FirstValidation) -> CostEstimate:
    """Time, memory and disk of the whole method.

    Everything costs network evaluations, so the seconds of one sample in one evaluation are measured on candidates and
    multiplied: teacher, hand-made schedules, candidates, refinement and tuning, report.
    """
    method, sizes = work.method, work.method.noise
    seconds = _seconds_of_one(work, method.nfe[len(method.nfe) // 2])
    noises = sizes.search + sizes.select + sizes.report
    phases = [Phase(TEACHER_TIME, times(seconds, method.teacher.steps), noises)] if work.by_teacher else []
    choice = tuning = report = 0.0
    metrics: list[tuple[float, ...]] = []
    measured = getattr(work.module, "metrics", None) is not None
    line = report_line(work.evaluations, work.module, work.datamodule) if measured else None
    for nfe in method.nfe:
        phases.append(_search(work, nfe, seconds))
        compared = min(BEST_BASELINES, len(work.hand_made(nfe)))
        made = _of_hand_made(work, nfe)
        choice += sizes.select * (made * compared + nfe * method.settings.finalists)
        if work.by_teacher:
            tuning += _tuning(work, nfe)
            report += sizes.report * (made * compared + nfe * _REPORTED)
        if line is not None:
            metrics.append(_metric_seconds(work, nfe, seconds, line))
    phases.append(Phase(CHOICE, times(seconds, choice), 1))
    phases.append(Phase(TUNING, times(seconds, tuning), 1))
    # the distances take one sum, the metrics some validations
    values = [sum(parts) * _WITH_METRICS for parts in zip(*metrics, strict=True)] or [0.0] * len(seconds)
    phases.append(Phase(REPORT, tuple(a + b for a, b in zip(times(seconds, report), values, strict=False)), 1))
    sample = 4 * noise_of(work.datamodule, "search", 1)[0].numel()
    files = [PlannedFile("teacher banks", 2 * sample * noises), artifact_of(work.module)]
    return method_cost(work.evaluations, first, phases, files, pictures=len(method.nfe) + 2)


def _search(work: SolverWork, nfe: int, seconds: Sequence[float]) -> Phase:
    settings = work.method.settings
    space = work.searched_space(nfe)
    problem = Problem(space, settings.seed, settings.fidelity)
    whole = nfe * settings.fidelity * fmean(seconds)
    rehearsal = rehearsal_of(problem, work.plan(nfe, space), whole)
    made = {space.key(schedule) for _, schedule in work.hand_made(nfe)}
    count = {True: _of_hand_made(work, nfe), False: nfe}
    evaluations = rehearsal.mean([float(t.fidelity * count[t.key in made]) for t in rehearsal.trials])
    return search_phase(f"nfe{nfe}", work.evaluations, times(seconds, evaluations), rehearsal)


def _of_hand_made(work: SolverWork, nfe: int) -> int:
    """Evaluations of a hand-made schedule: where a network is sampled, all share the first one with others."""
    return nfe - 1 if work.by_teacher and isinstance(work.banks.sampling, NetworkSampling) else nfe


def _tuning(work: SolverWork, nfe: int) -> float:
    """Evaluations of one sample in refinement and tuning."""
    method = work.method
    steps = ((method.refine, method.refined), (method.finetune, method.tuned))
    count = sum(getattr(each, "iterations", 0) * starts for each, starts in steps)
    dtype = getattr(work.banks.sampling, "dtype", torch.float32)
    central = any(
        goes_both_ways(dtype, each.difference, each.central)
        for each, _ in steps
        if isinstance(each, LevenbergMarquardt)
    )
    proposals = _PROPOSALS * nfe * (method.noise.search + method.noise.select)
    return float(count * (_evaluations_of_jacobian(nfe, central) * method.noise.search + proposals))


def _metric_seconds(work: SolverWork, nfe: int, seconds: Sequence[float], line: SampleLine) -> tuple[float, ...]:
    """Of one validation with a schedule: as with the module's own sampler, with other evaluations."""
    count = work.datamodule.num_samples
    own = int(getattr(work.module, "num_inference_steps", nfe))
    return tuple(max(line.fixed, line.seconds(count) + value * count * (nfe - own)) for value in seconds)


def _seconds_of_one(work: SolverWork, nfe: int) -> tuple[float, ...]:
    """Seconds of one sample in one network evaluation, from each of a few candidates."""
    schedules = [schedule for _, schedule in work.hand_made(nfe)][: _MEASURED + 1]
    if work.by_teacher:
        count = work.method.settings.fidelity
        noise, conditions = noise_of(work.datamodule, "search", count)
        bank = TeacherBank(noise, noise, conditions if work.banks.uses_labels else {}).to(work.banks.device)
        objective: TeacherScoring = TeacherScoring(work.module, work.banks.sampling, bank, work.evaluations)
        evaluate = objective.evaluate
    else:
        count = min(work.method.settings.fidelity, work.datamodule.num_samples)
        evaluate = work.metric(work.space(nfe), "search").evaluate
    found = timed([partial(evaluate, schedule, count) for schedule in schedules])
    return times(found, 1 / (count * nfe))


def _evaluations_of_jacobian(nfe: int, central: bool) -> int:
    """Network evaluations over the bank in one step of Levenberg-Marquardt: each entry of the table is moved, to both
    sides for central differences, and what comes after its row is sampled again."""
    return (1 + central) * sum((row + 2) * (nfe - row) for row in range(1, nfe))
