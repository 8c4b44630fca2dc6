"""What else gives a solver few evaluations: times learned through it, and times by dynamic programming."""

from __future__ import annotations

from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.finetune import schedule_times
from genlight.diffusion.solver.fitting import LevenbergMarquardt
from genlight.diffusion.solver.gits import gits_times
from genlight.diffusion.solver.learned_times import learn_times
from genlight.diffusion.solver.presets import preset
from genlight.diffusion.solver.spacings import End
from genlight.diffusion.solver.teacher import NetworkSampling, TuningProblem
from genlight.search.spaces.solver_objective import teacher_schedule

# the grid and the samples of the warm-up in the paper of GITS
_GRID, _SAMPLES = 60, 256
_GITS_SOLVERS = ("ddim", "ipndm_3", "dpmpp_2m")


def rival_schedules(problem: TuningProblem, name: str, schedule: SolverSchedule, end: End) -> dict[str, SolverSchedule]:
    """Schedules of other methods with as many evaluations, by name.

    Times are learned where there are inner ones, and where those need not be integers or are rounded.

    Args:
        problem: bank and network.
        name, schedule: the best hand-made schedule, whose solver is kept.
        end: of the search.
    """
    found: dict[str, SolverSchedule] = {}
    sampling, noise_schedule, integers = problem.sampling, problem.prediction.schedule, problem.integer_timesteps
    if not problem.fixed_times and len(schedule_times(schedule, noise_schedule)[0].start):
        learned, _ = learn_times(problem, schedule, LevenbergMarquardt())
        found[f"learned times ({name.split('/')[0]})"] = learned
    if not isinstance(sampling, NetworkSampling):
        return found
    bank = problem.train.rows(slice(0, _SAMPLES))
    times = gits_times(
        sampling.model,
        bank.noise,
        teacher_schedule(noise_schedule, _GRID, end=end, integer_times=integers),
        sampling.prediction,
        schedule.nfe,
        conditions=bank.conditions,
        integer_timesteps=integers,
    )
    for solver in dict.fromkeys((name.split("/")[0], *_GITS_SOLVERS)):
        try:
            made = preset(solver, noise_schedule, times, integer_times=integers)
            compile_schedule(made, noise_schedule)
        except ValueError:
            continue  # a solver with more evaluations than steps, or none on this family
        if made.nfe == schedule.nfe:
            found[f"GITS times ({solver})"] = made
    return found
