"""Small banks of solver schedules, and the loop in which pipelines call a scheduler."""

from typing import Any

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.serialization import SolverBank

VP, EDM, FLOW = VPSchedule("scaled_linear", 0.00085, 0.012), EDMSchedule(), FlowSchedule(shift=3.0)
ZERO_SNR = VPSchedule(rescale_zero_terminal_snr=True)
EPS = Prediction("epsilon", VP)


def model(x: Tensor, timestep: Tensor) -> Tensor:
    return torch.tanh(0.7 * x + timestep.reshape(-1, *[1] * (x.ndim - 1)).to(x) / 1000)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 4), generator=torch.Generator().manual_seed(0))


def run(scheduler: Any, steps: int, start: Tensor, network: Any = model) -> Tensor:
    """The loop of a pipeline."""
    scheduler.set_timesteps(steps)
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x, return_dict=False)[0]
    return x


def bank(name: str = "dpmpp_2m", prediction: Prediction = EPS, counts: tuple[int, ...] = (5,)) -> SolverBank:
    return SolverBank.of(prediction, {n: named_schedule(name, prediction.schedule, n) for n in counts})


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    size = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=tolerance)
