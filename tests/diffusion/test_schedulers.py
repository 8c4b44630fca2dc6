"""Schedulers built from our schedules: the same process, the same conversions, refusals that help."""

import inspect
import warnings
from typing import Any

import diffusers
import pytest
import torch

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import (
    _SUPPORTED,
    _ZERO_TERMINAL_SNR,
    build_scheduler,
    check_scheduler,
    read_scheduler,
)

SCHEDULES: list[NoiseSchedule] = [
    VPSchedule("linear"),
    VPSchedule("scaled_linear", 0.00085, 0.012),
    VPSchedule("squaredcos_cap_v2"),
    VPSchedule("linear", rescale_zero_terminal_snr=True),
    VPSchedule("scaled_linear", 0.00085, 0.012, rescale_zero_terminal_snr=True),
    VPSchedule("squaredcos_cap_v2", rescale_zero_terminal_snr=True),
    EDMSchedule(),
    EDMSchedule(sigma_data=1.0),
    FlowSchedule(),
    FlowSchedule(shift=3.0),
]
STOCHASTIC = {
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
}
STOCHASTIC |= {"SASolverScheduler"}
OFF_PATH = STOCHASTIC | {"PNDMScheduler"}  # the states between PNDM's Runge-Kutta stages are not on the ODE's path
# these end at the smallest σ of the table, not at the clean image
END_AT_SIGMA_MIN = {"DEISMultistepScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler"}


def _makes_sense(name: str, schedule: NoiseSchedule, prediction_type: str) -> bool:
    try:
        check_scheduler(name, schedule, prediction_type)
    except ValueError:
        return False
    return True


CASES = [
    pytest.param(name, schedule, prediction_type, id=f"{name}-{index}-{prediction_type}")
    for index, schedule in enumerate(SCHEDULES)
    for name, types in _SUPPORTED[schedule.family].items()
    for prediction_type in types
    if _makes_sense(name, schedule, prediction_type)
]


def build(name: str, schedule: NoiseSchedule, prediction_type: str, **options: Any) -> Any:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    if "clip_sample" in parameters:
        options.setdefault("clip_sample", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_scheduler(name, schedule, prediction_type, **options)


def _time(scheduler: Any, schedule: NoiseSchedule, index: int) -> float:
    """Our time at step `index`, from what the network is told (or, where that is cut to an integer, from σ)."""
    timestep = scheduler.timesteps[index].double()
    if schedule.family == "vp":
        return timestep.item()
    if schedule.family == "edm":
        return torch.exp(4 * timestep).clamp(schedule.t_min, schedule.t_max).item()
    if type(scheduler).__name__.startswith("FlowMatch"):
        return timestep.item() / 1000
    return min(scheduler.sigmas[index].item(), 1.0)


@pytest.mark.parametrize("name, schedule, prediction_type", CASES)
def test_a_network_that_knows_the_image_returns_it(name: str, schedule: NoiseSchedule, prediction_type: str) -> None:
    """With x_0 known, ε = (x - αx_0)/σ is constant along the ODE: every solver is exact, whatever its order.

    So α, σ, timesteps, input scaling and the meaning of the network's output must all agree with ours.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 4, 4, generator=generator) * 1.6 - 0.8
    noise = torch.randn(2, 3, 4, 4, generator=generator)
    # the cosine schedule begins at σ/α = 2e4, where diffusers' float32 leaves errors of 1e-3: begin a step later
    late = schedule.family == "vp" and 1e3 < schedule.noise_level(schedule.t_max) < 1e9
    later = {"lambda_min_clipped": -5.1} if "Singlestep" in name else {"timestep_spacing": "leading"}
    scheduler = build(name, schedule, prediction_type, **later if late else {})
    prediction = Prediction(prediction_type, schedule)
    scheduler.set_timesteps(8)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

    x = schedule.add_noise(image, noise, _time(scheduler, schedule, 0))
    if hasattr(scheduler, "scale_model_input") and schedule.family == "vp":
        x = x / scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])  # x/α where the solver works on that
        scheduler._step_index = None
    for index, timestep in enumerate(scheduler.timesteps):
        t = _time(scheduler, schedule, index)
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x_t = seen / schedule.input_scale(t)
        if name not in OFF_PATH:
            expected = schedule.add_noise(image, noise, t)
            torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=2e-4, check_dtype=False)
        eps = (x_t.double() - schedule.alpha(t) * image) / schedule.sigma(t)
        x = scheduler.step(prediction.target(image, eps, t), timestep, x, **options).prev_sample
    tolerance = (
        5 * schedule.sigma(schedule.t_min) if name in END_AT_SIGMA_MIN else 1e-5 if schedule.family != "edm" else 1e-4
    )
    assert (x - image).abs().max() < tolerance


@pytest.mark.parametrize("name, schedule, prediction_type", CASES)
def test_add_noise(name: str, schedule: NoiseSchedule, prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(1)
    image, noise = torch.randn(2, 1, 3, 4, 4, generator=generator)
    scheduler = build(name, schedule, prediction_type)
    scheduler.set_timesteps(7)
    for index in (0, 2, 4, 6):
        timestep, t = scheduler.timesteps[index], _time(scheduler, schedule, index)
        if name.startswith("FlowMatch"):
            noisy = scheduler.scale_noise(image, timestep[None], noise)
        else:
            noisy = scheduler.add_noise(image, noise, timestep[None])
        if schedule.family == "vp" and hasattr(scheduler, "scale_model_input"):
            noisy = scheduler.scale_model_input(noisy, timestep)  # from x/α where the solver works on that
        scheduler._step_index = None
        expected = schedule.add_noise(image, noise, t)
        tolerance = 1e-5 if schedule.alpha(t) > 0 or name.startswith("DD") else 1e-3  # others: α(t_max) = 2^-12, not 0
        torch.testing.assert_close(noisy, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("name, schedule, prediction_type", CASES)
def test_what_is_built_reads_back(name: str, schedule: NoiseSchedule, prediction_type: str, tmp_path: Any) -> None:
    build(name, schedule, prediction_type).save_pretrained(tmp_path)
    scheduler = getattr(diffusers, name).from_pretrained(tmp_path)
    read_schedule, read_type = read_scheduler(scheduler)
    assert (read_schedule.fingerprint(), read_type) == (schedule.fingerprint(), prediction_type)
    assert read_scheduler(dict(scheduler.config))[0].fingerprint() == schedule.fingerprint()


def test_the_table_of_support_is_what_diffusers_says() -> None:
    for family, classes in _SUPPORTED.items():
        for name in classes:
            parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
            if family == "vp":
                assert ("rescale_betas_zero_snr" in parameters) == (name in _ZERO_TERMINAL_SNR)
            if family == "flow" and not name.startswith("FlowMatch"):
                assert {"use_flow_sigmas", "flow_shift"} <= parameters.keys()


def test_classes_names_and_paths_are_the_same() -> None:
    for scheduler in ("DDIMScheduler", "diffusers.DDIMScheduler", diffusers.DDIMScheduler):
        assert type(build_scheduler(scheduler, VPSchedule(), "epsilon")) is diffusers.DDIMScheduler


def test_zero_terminal_snr_is_sampled_from_its_end() -> None:
    schedule = VPSchedule("scaled_linear", rescale_zero_terminal_snr=True)
    scheduler = build_scheduler("DDIMScheduler", schedule, "v_prediction")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == schedule.t_max
    assert (
        build_scheduler("DDIMScheduler", schedule, "sample", timestep_spacing="linspace").config.timestep_spacing
        == "linspace"
    )


VP, ZERO, EDM, FLOW = VPSchedule(), VPSchedule(rescale_zero_terminal_snr=True), EDMSchedule(), FlowSchedule()


@pytest.mark.parametrize(
    "scheduler, schedule, prediction_type, problem, remedy",
    [
        ("DDIMScheduler", FLOW, "flow", "samples variance-preserving schedules, not flow-matching", "FlowMatchEuler"),
        ("DDIMScheduler", EDM, "edm", "samples variance-preserving schedules, not EDM", "EDMEulerScheduler"),
        ("EDMEulerScheduler", VP, "epsilon", "samples EDM schedules, not variance-preserving", "DDIMScheduler"),
        ("FlowMatchEulerDiscreteScheduler", VP, "epsilon", "samples flow-matching schedules", "DDIMScheduler"),
        (
            "FlowMatchEulerDiscreteScheduler",
            FLOW,
            "epsilon",
            "cannot take prediction_type = 'epsilon'",
            "use flow, or for",
        ),
        ("DPMSolverMultistepScheduler", FLOW, "v_prediction", "cannot take prediction_type", "epsilon, flow or sample"),
        ("DPMSolverMultistepScheduler", VP, "flow", "cannot take prediction_type", "epsilon, sample or v_prediction"),
        ("EulerDiscreteScheduler", VP, "sample", "cannot take prediction_type", "or for 'sample' scheduler DDIM"),
        ("EDMEulerScheduler", EDM, "epsilon", "cannot take prediction_type", "use edm or v_prediction"),
        (
            "EDMEulerScheduler",
            EDM,
            "v_prediction",
            "needs noise_schedule.sigma_data = 1, not 0.5",
            "use prediction_type edm",
        ),
        ("DDIMScheduler", ZERO, "epsilon", "says nothing of the image where the signal is zero", "use v_prediction"),
        ("HeunDiscreteScheduler", ZERO, "v_prediction", "rescale_zero_terminal_snr", "use DDIMParallelScheduler"),
        ("NoSuchScheduler", VP, "epsilon", "'NoSuchScheduler' is not known here", "DDPMScheduler"),
        ("DEISMultistepScheduler", FLOW, "flow", "samples variance-preserving schedules", "UniPCMultistepScheduler"),
        ("DDIMScheduler", VP, "noise", "cannot take prediction_type = 'noise'", "use epsilon, sample or v_prediction"),
    ],
)
def test_pairs_that_make_no_sense(
    scheduler: str, schedule: NoiseSchedule, prediction_type: str, problem: str, remedy: str
) -> None:
    with pytest.raises(ValueError) as error:
        build_scheduler(scheduler, schedule, prediction_type)
    message = str(error.value)
    assert problem in message and remedy in message and "\n" not in message


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"timestep_spacin": "trailing"},
            "scheduler.timestep_spacin: DDIMScheduler has no such option; did you mean timestep_sp",
        ),
        ({"beta_end": 0.5}, "scheduler.beta_end = 0.5 contradicts noise_schedule"),
        ({"prediction_type": "sample"}, "scheduler.prediction_type = 'sample' contradicts"),
        ({"trained_betas": [0.1]}, "scheduler.trained_betas = .* contradicts"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_scheduler("DDIMScheduler", VP, "epsilon", **options)


def test_options_that_repeat_the_schedule_pass() -> None:
    scheduler = build_scheduler("DDIMScheduler", VP, "epsilon", beta_end=0.02, timestep_spacing="trailing")
    assert scheduler.config.timestep_spacing == "trailing"


def test_schedulers_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="scheduler = 'ScoreSdeVeScheduler' is not known here"):
        read_scheduler(diffusers.ScoreSdeVeScheduler())
    with pytest.raises(ValueError, match="trained_betas"):
        read_scheduler(diffusers.DDIMScheduler(trained_betas=[0.1, 0.2]))
    with pytest.raises(ValueError, match="invert_sigmas"):  # as Mochi has
        read_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
