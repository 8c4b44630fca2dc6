"""Order of convergence of diffusers' solvers, driven through our schedules, to exact solutions of the ODE.

The data is a Gaussian, with its ODE solved in closed form, or a mixture of two. A wrong α, σ, timestep or conversion
anywhere leaves an error that does not vanish with more steps. Runs stop before the step to the clean image, which is
first order by construction, and, but for EDM, start an eighth of the way down, where the mixture is not yet resolved.
"""

from itertools import pairwise
from math import log2
from typing import Any

import pytest
import torch
from oracles.gaussian import Gaussian, GaussianMixture, two_modes
from torch import Tensor

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.schedulers import build_scheduler

# 4096 timesteps divide evenly into 2^k steps; β keeps its integral
FINE: dict[str, Any] = {"num_train_timesteps": 4096, "beta_start": 0.1 / 4096, "beta_end": 20 / 4096}
VP = [VPSchedule("linear", **FINE), VPSchedule("scaled_linear", **FINE), VPSchedule("squaredcos_cap_v2", **FINE)]
EDM = EDMSchedule(sigma_min=0.05, sigma_max=10.0)
DATA = [
    pytest.param(Gaussian(torch.tensor([0.4, -0.3]), 0.35), id="gaussian"),
    pytest.param(two_modes(), id="mixture"),
]
# solver, order of convergence, how near to it the measured order must be, options
DDIM = ("DDIMScheduler", 1, 0.05, {"clip_sample": False, "timestep_spacing": "trailing"})
DPM_2M = ("DPMSolverMultistepScheduler", 2, 0.25, {"timestep_spacing": "trailing"})
UNIPC_2 = ("UniPCMultistepScheduler", 3, 0.7, {"timestep_spacing": "trailing"})  # its corrector adds an order


def _exact(schedule: NoiseSchedule, data: GaussianMixture, x: Tensor, t_from: float, t_to: float) -> Tensor:
    (alpha, sigma), (alpha_to, sigma_to) = ((schedule.alpha(t), schedule.sigma(t)) for t in (t_from, t_to))
    if isinstance(data, Gaussian):
        return data.flow(x, alpha, sigma, alpha_to, sigma_to)
    return alpha_to * data.solve_ode(x / alpha, sigma / alpha, sigma_to / alpha_to)


def _error(scheduler: Any, schedule: NoiseSchedule, data: GaussianMixture, prediction_type: str, steps: slice) -> float:
    """RMS distance to the exact solution after the steps of the slice, the network being the ideal one."""
    if schedule.family == "vp":
        times = scheduler.timesteps.double().tolist()
    else:
        times = scheduler.sigmas[:-1].double().clamp(schedule.t_min, schedule.t_max).tolist()
    times = times[steps]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(steps.start)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    start = x = schedule.alpha(times[0]) * data.sample(16, generator) + schedule.sigma(times[0]) * noise
    for timestep, t in zip(scheduler.timesteps[steps], times[:-1]):
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x_t = seen.double() / schedule.input_scale(t)
        said = data.output(prediction_type, x_t, schedule.alpha(t), schedule.sigma(t))
        x = scheduler.step(said, timestep, x).prev_sample
    return (x.double() - _exact(schedule, data, start, times[0], times[-1])).square().mean().sqrt().item()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    "solver, schedule, prediction_type",
    [
        *[
            (solver, s, p)
            for solver in (DDIM, DPM_2M, UNIPC_2)
            for s in VP
            for p in ("epsilon", "v_prediction", "sample")
        ],
        *[(UNIPC_2, s, "epsilon") for s in VP],
        *[(DPM_2M, FlowSchedule(shift=shift), p) for shift in (1.0, 3.0) for p in ("flow", "epsilon")],
        *[
            (("FlowMatchEulerDiscreteScheduler", 1, 0.05, {}), FlowSchedule(shift=shift), "flow")
            for shift in (1.0, 3.0)
        ],
        (("EDMEulerScheduler", 1, 0.1, {}), EDM, "edm"),
        (("EDMDPMSolverMultistepScheduler", 2, 0.3, {}), EDM, "edm"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else getattr(value, "beta_schedule", str(value)[:20]),
)
def test_order(
    solver: tuple[str, int, float, dict[str, Any]], schedule: NoiseSchedule, prediction_type: str, data: GaussianMixture
) -> None:
    name, order, tolerance, options = solver
    errors = []
    for steps in (32, 64, 128):
        scheduler = build_scheduler(name, schedule, prediction_type, **options)
        ends_counted = name.startswith(("EDM", "FlowMatch"))  # their grids of n points have n - 1 steps
        scheduler.set_timesteps(steps + 1 if ends_counted else steps)
        window = slice(0, steps + 1) if schedule.family == "edm" else slice(steps // 8, steps // 4 * 3 + 1)
        errors.append(_error(scheduler, schedule, data, prediction_type, window))
    assert [log2(coarse / fine) for coarse, fine in pairwise(errors)] == pytest.approx([order, order], abs=tolerance)
