"""Data N(mean, std²) has an exact denoiser, and its probability-flow ODE is affine: x_T keeps its distance
from the mean in units of the standard deviation, mean + std (x_T - α_T mean) / √(α_T² std² + σ_T²)."""

import functools
import math

import diffusers
import pytest
import torch

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.prediction import mix
from genlight.modules.diffusion import DiffusionModule

MEAN, STD = 0.3, 0.25
EXACT = [
    (VPSchedule("squaredcos_cap_v2"), "v_prediction", diffusers.DDIMScheduler, {"clip_sample": False}),
    (VPSchedule("scaled_linear", 0.00085, 0.012), "epsilon", diffusers.DPMSolverMultistepScheduler, {}),
    (VPSchedule("linear"), "sample", diffusers.DDIMScheduler, {"clip_sample": False}),
    (FlowSchedule(), "flow", diffusers.FlowMatchEulerDiscreteScheduler, {}),
    (FlowSchedule(shift=3.0), "flow", diffusers.FlowMatchEulerDiscreteScheduler, {}),
    (EDMSchedule(sigma_data=0.5), "edm", diffusers.EDMEulerScheduler, {}),
    (EDMSchedule(sigma_data=0.4), "edm", diffusers.EDMDPMSolverMultistepScheduler, {}),
]


def _oracle(schedule, prediction_type):
    """The forward of a network that has learned the Gaussian exactly."""

    def forward(sample, timestep, class_labels=None, return_dict=False):
        timestep = timestep.double()
        t = {"vp": timestep, "flow": timestep / 1000, "edm": torch.exp(4 * timestep)}[schedule.family]
        alpha, sigma = schedule.alpha(t).view(-1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1)
        x_t = sample.double() / schedule.input_scale(t).view(-1, 1, 1, 1)
        x0 = MEAN + STD**2 * alpha / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
        a, b = mix(prediction_type, alpha, sigma, schedule.sigma_data)
        return ((a * x0 + b * (x_t - alpha * x0) / sigma).float(),)

    return forward


def _module(tiny, schedule, prediction_type, scheduler, options, steps):
    choice = functools.partial(scheduler, **options)
    network = tiny.unet()
    network.forward = _oracle(schedule, prediction_type)
    return DiffusionModule(network, schedule, prediction_type, scheduler=choice, num_inference_steps=steps)


@pytest.mark.parametrize(("schedule", "prediction_type", "scheduler", "options"), EXACT)
def test_ode_samplers_map_noise_to_the_gaussian(tiny, schedule, prediction_type, scheduler, options):
    if "timestep_spacing" in scheduler.__init__.__wrapped__.__code__.co_varnames:
        options = {**options, "timestep_spacing": "trailing"}
    module = _module(tiny, schedule, prediction_type, scheduler, options, 500)
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    units = (noise * schedule.init_noise_sigma - alpha * MEAN) / math.hypot(alpha * STD, sigma)
    torch.testing.assert_close(module.sample_latents(noise), MEAN + STD * units, atol=0.015, rtol=0.0)


def test_ancestral_sampling_has_the_moments_of_the_gaussian(tiny):
    schedule = VPSchedule("linear")
    module = _module(tiny, schedule, "epsilon", diffusers.DDPMScheduler, {"clip_sample": False}, 1000)
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = module.sample_latents(noise).flatten()
    count = len(samples)
    assert samples.mean().item() == pytest.approx(MEAN, abs=5 * STD / count**0.5)
    assert samples.std().item() == pytest.approx(STD, abs=5 * STD / (2 * count) ** 0.5 + 0.005)
    # the noise of the steps is fresh: what was drawn first says nothing of the outcome
    assert abs(torch.corrcoef(torch.stack([samples, noise.flatten()]))[0, 1].item()) < 0.1
