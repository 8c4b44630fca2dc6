"""What a search of solver schedules will cost, from three candidates that are measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from genlight.diffusion.solver.teacher import TeacherBank
from genlight.loops.evaluation import noise_of
from genlight.loops.solver_banks import TeacherScoring
from genlight.reports.cost import CostEstimate, Phase, PlannedFile, estimate

if TYPE_CHECKING:
    from genlight.loops.solver_work import SolverWork

_MEASURED = 3


def solver_cost(work: SolverWork) -> CostEstimate:
    """Time, memory and disk of the whole method.

    Everything costs network evaluations, so the seconds of one sample in one evaluation are measured on candidates and
    multiplied: teacher, hand-made schedules, candidates, refinement and tuning.
    """
    method, sizes = work.method, work.method.noise
    middle = method.nfe[len(method.nfe) // 2]
    seconds = _seconds_of_one(work, middle)
    noises = sizes.search + sizes.select + sizes.report
    phases = [Phase("teacher", _times(seconds, method.teacher.steps), noises)] if work.by_teacher else []
    for nfe in method.nfe:
        plan = work.plan(nfe)
        rows = sum(plan.rows(method.settings.fidelity))
        phases.append(Phase(f"candidates, NFE {nfe}", _times(seconds, nfe), rows))
        steps = [
            (getattr(m, "iterations", 0), n)
            for m, n in ((method.refine, method.refined), (method.finetune, method.tuned))
        ]
        count = sum(iterations * starts for iterations, starts in steps)
        if work.by_teacher and count:
            central = any(getattr(step, "central", False) for step in (method.refine, method.finetune))
            tuning = _times(seconds, _evaluations_per_step(nfe, central) * sizes.search)
            phases.append(Phase(f"tuning steps, NFE {nfe}", tuning, count))
    sample = 4 * noise_of(work.datamodule, "search", 1)[0].numel()
    weights = sum(p.numel() * p.element_size() for p in work.module.parameters())
    files = [PlannedFile("teacher banks", 2 * sample * noises), PlannedFile("artifact", weights)]
    return estimate(phases, files, work.evaluations.trainer.default_root_dir)


def _seconds_of_one(work: SolverWork, nfe: int) -> list[float]:
    """Seconds of one sample in one network evaluation, from each of a few candidates; the first one warms up."""
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
    seconds = []
    for schedule in schedules:
        begun = time.monotonic()
        evaluate(schedule, count)
        seconds.append((time.monotonic() - begun) / (count * nfe))
    return seconds[1:] or seconds


def _evaluations_per_step(nfe: int, central: bool) -> int:
    """Network evaluations over the bank in one step of Levenberg-Marquardt: each entry of the table is moved, to both
    sides for central differences, and what comes after its row is sampled again; then about two proposals are tried."""
    return (1 + central) * sum((row + 2) * (nfe - row) for row in range(1, nfe)) + 2 * nfe


def _times(seconds: list[float], factor: float) -> tuple[float, ...]:
    return tuple(value * factor for value in seconds)
