"""Banks on mixtures of Gaussians, for everything that is fitted to a teacher."""

import torch
from diffusion.solver.mixture import network
from oracles.gaussian import two_modes

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.teacher import NetworkSampling, TeacherBank, TuningProblem

VP, EDM, FLOW = (
    Prediction("epsilon", VPSchedule()),
    Prediction("edm", EDMSchedule()),
    Prediction("flow", FlowSchedule()),
)
FAMILIES = [VP, EDM, FLOW]


def family(prediction: Prediction) -> str:
    return prediction.schedule.family


def bank(prediction: Prediction, seed: int, count: int) -> TeacherBank:
    """Two-dimensional noise of a seed and what 100 steps of third order make of it."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    teacher = compile_schedule(named_schedule("dpmpp_3m_exact", prediction.schedule, 100), prediction.schedule)
    return TeacherBank.of(NetworkSampling(network(prediction, two_modes()), prediction), noise, teacher)


def problem(prediction: Prediction, count: int = 128, **options) -> TuningProblem:
    """Disjoint banks of `count` for training and selection; seed 2 is left for reports."""
    model = network(prediction, two_modes())
    return TuningProblem(
        NetworkSampling(model, prediction), bank(prediction, 0, count), bank(prediction, 1, count), **options
    )
