"""One step of the diffusers schedulers, to 1e-5, from closed forms in α, σ and x̂_0 of our own objects.

Network outputs are random, so that every coefficient counts. With A = σ_t/σ_s and B = α_t - α_s A the first-order step
is A x + B x̂_0 (DDIM, Euler, first-order DPM-Solver++ and UniP alike); the second-order multistep one replaces x̂_0 by
x̂_0 + (x̂_0 - x̂_0,prev)/(2r), r = h_prev/h (Lu et al. 2022b, algorithm 2).
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction, edm_preconditioning
from genlight.diffusion.schedulers import build_scheduler

VP: list[NoiseSchedule] = [
    VPSchedule("linear"),
    VPSchedule("scaled_linear", 0.00085, 0.012),
    VPSchedule("squaredcos_cap_v2"),
]
ZERO_SNR: list[NoiseSchedule] = [
    VPSchedule(s.beta_schedule, s.beta_start, s.beta_end, rescale_zero_terminal_snr=True)
    for s in VP
    if isinstance(s, VPSchedule)
]
EDM: list[NoiseSchedule] = [EDMSchedule(), EDMSchedule(sigma_data=1.0)]
FLOW: list[NoiseSchedule] = [FlowSchedule(), FlowSchedule(shift=3.0)]
VP_CASES = [(s, p) for s in VP for p in ("epsilon", "v_prediction", "sample")]
VP_CASES += [(s, p) for s in ZERO_SNR for p in ("v_prediction", "sample")]
EULER_CASES = [(s, p) for s, p in VP_CASES if p != "sample"]
EDM_CASES = [(EDM[0], "edm"), (EDM[1], "edm"), (EDM[1], "v_prediction")]
FLOW_CASES = [(s, p) for s in FLOW for p in ("flow", "epsilon", "sample")]
CLEAN = (1.0, 0.0)


def _names(value: Any) -> str:
    return value.fingerprint()[:6] if isinstance(value, NoiseSchedule) else str(value)


def _levels(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    return schedule.alpha(t), schedule.sigma(t)


def _step(x: Tensor, x0: Tensor, source: tuple[float, float], to: tuple[float, float]) -> Tensor:
    ratio = to[1] / source[1]
    return ratio * x + (to[0] - source[0] * ratio) * x0


def _half_log_snr(levels: tuple[float, float]) -> Tensor:
    return torch.log(torch.tensor(levels[0], dtype=torch.float64)) - torch.log(
        torch.tensor(levels[1], dtype=torch.float64)
    )


def _second_order(x0: Tensor, x0_before: Tensor, *levels: tuple[float, float]) -> Tensor:
    """x̂_0 extrapolated, for the levels (before, source, to)."""
    before, source, to = (_half_log_snr(level) for level in levels)
    return x0 + (x0 - x0_before) * ((to - source) / (source - before)) / 2


def _outputs(count: int) -> Iterator[Tensor]:
    """What a network might say: random images [2, 3, 4, 4]."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)


def _start() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _close(found: Tensor, expected: Tensor, scale: float = 1.0, tolerance: float = 1e-5) -> None:
    """Equal to 1e-5 of the size of the terms that were added."""
    size = max(1.0, expected.abs().max().item(), scale)
    torch.testing.assert_close(found.double() / size, expected.double() / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("schedule, prediction_type", VP_CASES, ids=_names)
def test_ddim(schedule: NoiseSchedule, prediction_type: str, spacing: str) -> None:
    scheduler = build_scheduler("DDIMScheduler", schedule, prediction_type, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    prediction, x = Prediction(prediction_type, schedule), _start()
    for timestep, output in zip(scheduler.timesteps, _outputs(10)):
        t = timestep.item()
        result = scheduler.step(output, timestep, x)
        x0 = prediction.to_x0(output, x, t)
        _close(result.pred_original_sample, x0)
        # as α x̂_0 + σ ε̂, which has no division by σ and holds where the source is pure noise
        alpha, sigma = _levels(schedule, t - 100) if t >= 100 else CLEAN
        expected = alpha * x0 + sigma * prediction.to_epsilon(output, x, t)
        _close(result.prev_sample, expected, scale=alpha * x0.abs().max().item())
        x = torch.tanh(result.prev_sample)


def _walk(
    scheduler: Any, schedule: NoiseSchedule, prediction_type: str, steps: int, times: list[float]
) -> Iterator[tuple]:
    """(x, x̂_0, level, next level, what the scheduler gives) of each step, on x_t with x kept at order one."""
    prediction = Prediction(prediction_type, schedule)
    levels = [*(_levels(schedule, t) for t in times), CLEAN]
    x = schedule.init_noise_sigma * _start()
    for index, output in enumerate(_outputs(steps)):
        x0 = prediction.to_x0(output, x, times[index])
        result = scheduler.step(output, scheduler.timesteps[index], x).prev_sample
        yield x, x0, levels[index], levels[index + 1], result
        x = result.double()


def _times(scheduler: Any, schedule: NoiseSchedule) -> list[float]:
    if schedule.family == "vp":
        return scheduler.timesteps.double().tolist()
    if schedule.family == "edm":
        return scheduler.sigmas[:-1].double().clamp(schedule.t_min, schedule.t_max).tolist()
    return scheduler.sigmas[:-1].double().clamp(max=1 - 1e-6).tolist()


DPM = "DPMSolverMultistepScheduler"
UNIP: dict[str, Any] = {"disable_corrector": list(range(20))}
MULTISTEP = (
    [(DPM, s, p, {}) for s, p in VP_CASES + FLOW_CASES]
    + [("UniPCMultistepScheduler", s, p, UNIP) for s, p in VP_CASES + FLOW_CASES]
    + [("EDMDPMSolverMultistepScheduler", s, p, {}) for s, p in EDM_CASES]
)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name, schedule, prediction_type, options", MULTISTEP, ids=_names)
def test_dpm_solver_and_unip(
    name: str, schedule: NoiseSchedule, prediction_type: str, options: dict[str, Any], order: int
) -> None:
    options = {**options, "solver_order": order, "lower_order_final": True}
    if schedule in ZERO_SNR or schedule is VP[2]:
        options["timestep_spacing"] = "leading"  # their first level is replaced in diffusers, or beyond float32
    scheduler = build_scheduler(name, schedule, prediction_type, **options)
    steps = 12
    scheduler.set_timesteps(steps)
    before: tuple[Tensor, tuple[float, float]] | None = None
    times = _times(scheduler, schedule)
    for index, (x, x0, source, to, result) in enumerate(_walk(scheduler, schedule, prediction_type, steps, times)):
        drift = x0
        if order == 2 and before is not None and index < steps - 1:
            drift = _second_order(x0, before[0], before[1], source, to)
        _close(result, _step(x, drift, source, to), scale=x.abs().max().item() + drift.abs().max().item())
        before = (x0, source)


@pytest.mark.parametrize("schedule", ZERO_SNR, ids=_names)
def test_dpm_solver_starts_zero_terminal_snr_a_little_below_pure_noise(schedule: NoiseSchedule) -> None:
    """diffusers puts α(t_max) = 2^-12 in place of 0: its first step differs by no more than that."""
    scheduler = build_scheduler(DPM, schedule, "v_prediction")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == schedule.t_max
    times = _times(scheduler, schedule)
    x, x0, source, to, result = next(_walk(scheduler, schedule, "v_prediction", 1, times))
    difference = (result - _step(x, x0, source, to)).abs().max()
    assert 1e-5 < difference < 2**-12 * 5


@pytest.mark.parametrize("schedule, prediction_type", EULER_CASES, ids=_names)
def test_euler(schedule: NoiseSchedule, prediction_type: str) -> None:
    """Euler works on x/α; its step is the same first-order step there."""
    scheduler = build_scheduler("EulerDiscreteScheduler", schedule, prediction_type, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    prediction, times = Prediction(prediction_type, schedule), _times(scheduler, schedule)
    levels = [*(_levels(schedule, t) for t in times), CLEAN]
    scaled = 5 * _start()
    for index, output in enumerate(_outputs(10)):
        timestep, (alpha, sigma), to = scheduler.timesteps[index], levels[index], levels[index + 1]
        _close(scheduler.scale_model_input(scaled, timestep), alpha * scaled)
        x0 = prediction.to_x0(output, alpha * scaled, times[index])
        result = scheduler.step(output, timestep, scaled).prev_sample
        expected = _step(scaled, x0, (1.0, sigma / alpha), (1.0, to[1] / to[0]))
        _close(result, expected, scale=scaled.abs().max().item() + x0.abs().max().item())
        scaled = result.double()


@pytest.mark.parametrize("schedule, prediction_type", [c for c in EULER_CASES if c[0] not in ZERO_SNR], ids=_names)
def test_heun(schedule: NoiseSchedule, prediction_type: str) -> None:
    """Two stages on x/α: Euler to the next level, then the mean of both slopes (Karras et al. 2022, algorithm 1)."""
    scheduler = build_scheduler("HeunDiscreteScheduler", schedule, prediction_type, timestep_spacing="leading")
    scheduler.set_timesteps(5)
    prediction, outputs = Prediction(prediction_type, schedule), _outputs(10)
    times = [
        scheduler.timesteps[0].item(),
        *scheduler.timesteps[1::2].double().tolist(),
    ]  # each but the first is twice there
    scaled = 5 * _start()
    for index in range(4):
        level, below = schedule.noise_level(times[index]), schedule.noise_level(times[index + 1])
        first, second = next(outputs), next(outputs)
        x0 = prediction.to_x0(first, schedule.alpha(times[index]) * scaled, times[index])
        slope = (scaled - x0) / level
        euler = scaled + (below - level) * slope
        size = scaled.abs().max().item() + x0.abs().max().item()
        middle = scheduler.step(first, scheduler.timesteps[2 * index], scaled).prev_sample
        _close(middle, euler, scale=size)
        x0 = prediction.to_x0(second, schedule.alpha(times[index + 1]) * euler, times[index + 1])
        expected = scaled + (below - level) * (slope + (euler - x0) / below) / 2
        result = scheduler.step(second, scheduler.timesteps[2 * index + 1], middle).prev_sample
        _close(result, expected, scale=size + x0.abs().max().item())
        scaled = result.double()


@pytest.mark.parametrize("schedule, prediction_type", [(s, p) for s, p in VP_CASES], ids=_names)
def test_ddpm(schedule: NoiseSchedule, prediction_type: str) -> None:
    """Mean and variance of q(x_s | x_t, x̂_0) for neighbouring times (Ho et al. 2020, equation 7)."""
    scheduler = build_scheduler("DDPMScheduler", schedule, prediction_type, clip_sample=False)
    prediction, x = Prediction(prediction_type, schedule), _start()
    for t, output in zip((999, 998, 500, 3, 1), _outputs(5)):
        (alpha, sigma), (alpha_to, sigma_to) = _levels(schedule, t), _levels(schedule, t - 1)
        ratio = alpha / alpha_to
        variance = sigma**2 - ratio**2 * sigma_to**2
        x0 = prediction.to_x0(output, x, t)
        mean = (ratio * sigma_to**2 * x + alpha_to * variance * x0) / sigma**2
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        expected = mean + (variance**0.5 * sigma_to / sigma) * noise
        result = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(t))
        _close(result.pred_original_sample, x0)
        # diffusers forms 1 - α_t²/α_s² in float32: half of its digits are lost where neighbours are near
        _close(result.prev_sample, expected, scale=(alpha_to * x0).abs().max().item(), tolerance=1e-4)


@pytest.mark.parametrize(
    "name, schedule, prediction_type",
    [("EDMEulerScheduler", *case) for case in EDM_CASES]
    + [("EulerDiscreteScheduler", EDM[1], "v_prediction")]
    + [("FlowMatchEulerDiscreteScheduler", s, "flow") for s in FLOW],
    ids=_names,
)
def test_edm_and_flow_euler(name: str, schedule: NoiseSchedule, prediction_type: str) -> None:
    scheduler = build_scheduler(name, schedule, prediction_type)
    scheduler.set_timesteps(12)
    times = scheduler.sigmas[:-1].double().clamp(schedule.t_min, schedule.t_max).tolist()
    told = torch.tensor([schedule.model_timestep(t) for t in times])
    torch.testing.assert_close(scheduler.timesteps.double(), told.double(), rtol=1e-6, atol=1e-6)
    walk = _walk(scheduler, schedule, prediction_type, 12, times)
    for index, (x, x0, source, to, result) in enumerate(walk):
        if schedule.family == "edm":
            expected = x + (to[1] - source[1]) * (x - x0) / source[1]
            fresh = copy.deepcopy(scheduler)
            fresh._step_index = index
            _close(fresh.scale_model_input(x, scheduler.timesteps[index]), schedule.input_scale(times[index]) * x)
        else:
            expected = _step(x, x0, source, to)
        _close(result, expected, scale=x.abs().max().item() + x0.abs().max().item())


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_starts_where_the_schedule_says(name: str) -> None:
    schedule = EDMSchedule(sigma_max=30.0)
    assert build_scheduler(name, schedule, "edm").init_noise_sigma == schedule.init_noise_sigma


def test_edm_preconditioning_is_the_one_of_diffusers() -> None:
    schedule = EDMSchedule(sigma_data=0.7)
    scheduler = build_scheduler("EDMEulerScheduler", schedule, "edm")
    x, output = _outputs(2)
    for sigma in (0.002, 0.5, 80.0):
        level = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out, c_in, c_noise = edm_preconditioning(level, 0.7)
        _close(scheduler.precondition_inputs(x, level), c_in * x)
        _close(scheduler.precondition_outputs(x, output, level), c_skip * x + c_out * output)
        _close(Prediction("edm", schedule).to_x0(output, x, sigma), c_skip * x + c_out * output)
        assert c_noise == schedule.model_timestep(sigma) == scheduler.precondition_noise(level)


@pytest.mark.parametrize("schedule", VP, ids=_names)
def test_velocity_is_the_one_of_diffusers(schedule: NoiseSchedule) -> None:
    scheduler = build_scheduler("DDPMScheduler", schedule, "v_prediction")
    x0, eps = _outputs(2)
    t = torch.tensor([3, 800])
    _close(Prediction("v_prediction", schedule).target(x0, eps, t), scheduler.get_velocity(x0, eps, t))


def test_flow_timesteps_of_multistep_solvers_are_cut_to_integers() -> None:
    """A fact to know when training: these solvers ask the network for a timestep up to 1 below 1000 σ."""
    scheduler = build_scheduler(DPM, FLOW[1], "flow")
    scheduler.set_timesteps(12)
    gap = 1000 * scheduler.sigmas[:-1].double() - scheduler.timesteps
    assert not scheduler.timesteps.is_floating_point() and gap.min() >= 0 and 0.5 < gap.max() < 1
