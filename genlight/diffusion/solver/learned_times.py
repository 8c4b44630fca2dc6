"""Times learned by gradient through a fixed solver, in the manner of LD3.

Tong et al. 2024, "Learning to Discretize Denoising Diffusion ODEs": the student's samples are drawn to the teacher's by
gradients in the times alone, which stay in order by construction; the solver's coefficients follow the times. Here the
gaps are softplus-positive in λ = ln(α/σ) and the loss is the squared RMS distance. Left out of LD3: its soft teacher
(targets that may move within a ball around the noise), separate times for the network's input, and perceptual losses.
"""

from dataclasses import replace

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.finetune import schedule_times
from genlight.diffusion.solver.fitting import Adam, LevenbergMarquardt, Progress, TuningRecord, fit
from genlight.diffusion.solver.teacher import TuningProblem

DEFAULT_METHOD = Adam(steps=200, learning_rate=0.05)


@torch.inference_mode(False)
def learn_times(
    problem: TuningProblem,
    schedule: SolverSchedule,
    method: Adam | LevenbergMarquardt | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[SolverSchedule, TuningRecord]:
    """The schedule with the inner times that bring it nearest to the teacher, and how they were found.

    Args:
        schedule: decisions stay as they are, and so do both ends and times that coincide.
        method: `DEFAULT_METHOD` where None; LD3 too descends. Levenberg-Marquardt needs no gradients of the model.

    Raises ValueError if the start has no finite RMS, or there is no inner time.
    """
    if problem.integer_timesteps:
        raise ValueError("times: a network with integer timesteps has no gradients in time")
    noise_schedule = problem.prediction.schedule
    monotone, times = schedule_times(schedule, noise_schedule)

    def table(raw: Tensor) -> SolverTable:
        return compile_schedule(schedule, noise_schedule, times=times(raw))

    raw, record = fit(problem, table, monotone.start, method or DEFAULT_METHOD, progress)
    if record.best_step == 0:
        return schedule, record
    return with_times(schedule, times(raw), noise_schedule), record


def with_times(schedule: SolverSchedule, times: Tensor, noise_schedule: NoiseSchedule) -> SolverSchedule:
    """The schedule with the finite inner times of a tensor [N + 1]; the ends, and so infinite ones, are its own."""
    inner = times[1:-1].detach().tolist()
    result = replace(schedule, times=(schedule.times[0], *inner, schedule.times[-1]))
    with torch.no_grad():
        compile_schedule(result, noise_schedule)  # what has no table is no schedule
    return result
