"""Refinement of a schedule: its times and factors are drawn to the teacher, its decisions stay.

A search decides well what is discrete and moves real numbers by chance. Here those are fitted by damped Gauss-Newton
steps on the paired distance to the teacher, on which the network's gradients are not needed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.fitting import LevenbergMarquardt, Progress, TuningRecord, fit
from genlight.diffusion.solver.teacher import TuningProblem


@torch.inference_mode(False)
def refine(
    problem: TuningProblem,
    start: Tensor,
    make_schedule: Callable[[Tensor], SolverSchedule],
    method: LevenbergMarquardt | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[SolverSchedule, TuningRecord]:
    """The schedule nearest to the teacher that a vector of real numbers makes, and how it was found.

    Args:
        start: the first vector [P], float64.
        make_schedule: the schedule of a vector; it may raise ValueError where there is none.
        method: its `iterations` are 10 where None: each moves every number of the table up and down.

    Returns the schedule of `start` if nothing is better on the selection bank. Raises ValueError if the start has no
    finite RMS.
    """
    noise_schedule = problem.prediction.schedule

    def table(raw: Tensor) -> SolverTable:
        return compile_schedule(make_schedule(raw.detach()), noise_schedule)

    raw, record = fit(problem, table, start, method or LevenbergMarquardt(iterations=10), progress)
    return make_schedule(raw), record
