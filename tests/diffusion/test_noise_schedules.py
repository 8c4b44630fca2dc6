"""Noise schedules against their definitions, diffusers' tables and each other's inverses."""

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule

VP = [
    VPSchedule("linear"),
    VPSchedule("scaled_linear", 0.00085, 0.012),
    VPSchedule("squaredcos_cap_v2"),
    VPSchedule("linear", num_train_timesteps=50, beta_start=0.002, beta_end=0.3),
]
ZERO_SNR = [VPSchedule(s.beta_schedule, s.beta_start, s.beta_end, s.num_train_timesteps, True) for s in VP]
OTHERS = [EDMSchedule(), EDMSchedule(0.01, 50.0, 1.0), FlowSchedule(), FlowSchedule(shift=3.0)]
ALL = VP + ZERO_SNR + OTHERS
repeatable = settings(deadline=None, derandomize=True, max_examples=80)

fractions = st.floats(0.0, 1.0)


def _grid(schedule: NoiseSchedule, n: int = 20_001) -> torch.Tensor:
    return schedule.t_of_fraction(torch.linspace(0, 1, n, dtype=torch.float64))


@pytest.mark.parametrize("schedule", VP + ZERO_SNR, ids=repr)
def test_integer_times_are_the_table_of_diffusers(schedule: VPSchedule) -> None:
    scheduler = diffusers.DDIMScheduler(**schedule.scheduler_config())
    t = torch.arange(schedule.num_train_timesteps)
    table = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(schedule.alpha(t) ** 2, table, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - table, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("schedule", VP, ids=repr)
def test_the_float32_table_is_near_the_formula_of_the_paper(schedule: VPSchedule) -> None:
    n = schedule.num_train_timesteps
    if schedule.beta_schedule == "squaredcos_cap_v2":
        signal = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    elif schedule.beta_schedule == "linear":
        betas = np.linspace(schedule.beta_start, schedule.beta_end, n)
    else:
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, n) ** 2
    exact = np.cumprod(1 - betas)
    alpha = schedule.alpha(torch.arange(n)).numpy()
    np.testing.assert_allclose(alpha, exact**0.5, rtol=2e-5)
    np.testing.assert_allclose(schedule.sigma(torch.arange(n)).numpy(), (1 - exact) ** 0.5, rtol=5e-4)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_the_curves_are_monotone_and_related(schedule: NoiseSchedule) -> None:
    t = _grid(schedule)
    alpha, sigma, half = schedule.alpha(t), schedule.sigma(t), schedule.half_log_snr(t)
    assert (half.diff() < 0).all()
    assert (sigma.diff() >= 0).all() and (alpha.diff() <= 0).all()
    torch.testing.assert_close(schedule.log_snr(t), 2 * half)
    inner = (alpha > 0) & (sigma > 0)
    torch.testing.assert_close(torch.log(alpha / sigma)[inner], half[inner], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.noise_level(t)[inner], (sigma / alpha)[inner], rtol=1e-9, atol=0)
    if schedule.family == "vp":
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-14)
    if schedule.family == "flow":
        torch.testing.assert_close(alpha + sigma, torch.ones_like(t), rtol=0, atol=1e-14)


@repeatable
@given(fraction=fractions, index=st.integers(0, len(ALL) - 1))
def test_inverses(fraction: float, index: int) -> None:
    schedule = ALL[index]
    t = schedule.t_of_fraction(fraction)
    assert schedule.t_min <= t <= schedule.t_max
    tolerance = dict(rel=1e-9, abs=1e-9 * (schedule.t_max if schedule.family == "vp" else 0))
    assert schedule.t_of_half_log_snr(schedule.half_log_snr(t)) == pytest.approx(t, **tolerance)
    assert schedule.t_of_log_snr(schedule.log_snr(t)) == pytest.approx(t, **tolerance)
    level = schedule.noise_level(t)
    if math.isfinite(level):
        assert schedule.t_of_noise_level(level) == pytest.approx(t, **tolerance)
    if schedule.family != "vp" or schedule.alpha(t) > 1e-3:
        assert schedule.t_of_sigma(schedule.sigma(t)) == pytest.approx(t, **tolerance)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_both_ends_are_reached_and_named(schedule: NoiseSchedule) -> None:
    for t in (schedule.t_min, schedule.t_max):
        assert schedule.t_of_half_log_snr(schedule.half_log_snr(t)) == pytest.approx(t, rel=1e-12, abs=1e-12)
        assert schedule.t_of_sigma(schedule.sigma(t)) == pytest.approx(t, rel=1e-9, abs=1e-9)
    assert schedule.t_of_fraction(0.0) == pytest.approx(schedule.t_min)
    assert schedule.t_of_fraction(1.0) == pytest.approx(schedule.t_max)


@pytest.mark.parametrize("schedule", ZERO_SNR, ids=repr)
def test_zero_terminal_snr_ends_in_pure_noise(schedule: VPSchedule) -> None:
    assert schedule.alpha(schedule.t_max) == 0.0 and schedule.sigma(schedule.t_max) == 1.0
    assert schedule.half_log_snr(schedule.t_max) == -math.inf
    assert schedule.t_of_half_log_snr(-math.inf) == schedule.t_max
    # continuous at the last knot but one, and α/σ linear beyond it
    knot = schedule.t_max - 1
    assert schedule.half_log_snr(knot + 1e-9) == pytest.approx(schedule.half_log_snr(knot), abs=1e-6)
    assert 1 / schedule.noise_level(knot + 0.5) == pytest.approx(0.5 / schedule.noise_level(knot), rel=1e-12)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_out_of_range_names_value_and_range(schedule: NoiseSchedule) -> None:
    beyond = schedule.t_max * 1.01 + 0.01
    with pytest.raises(ValueError, match=rf"t = {beyond:g} is outside \[{schedule.t_min:g}, {schedule.t_max:g}\]"):
        schedule.alpha(torch.tensor([schedule.t_min, beyond]))
    with pytest.raises(ValueError, match="t = nan is outside"):
        schedule.sigma(float("nan"))
    with pytest.raises(ValueError, match=r"fraction = 1.5 is outside \[0, 1\]"):
        schedule.t_of_fraction(1.5)
    with pytest.raises(ValueError, match=r"sigma = -0.5 is outside"):
        schedule.t_of_sigma(-0.5)
    if schedule.family != "flow":
        with pytest.raises(ValueError, match=r"noise_level = 1e-05 is outside .* the range of"):
            schedule.t_of_noise_level(1e-5)
        with pytest.raises(ValueError, match="log_snr = 50 is outside"):
            schedule.t_of_log_snr(50.0)


def test_rounding_at_a_bound_is_forgiven() -> None:
    schedule = EDMSchedule()
    assert schedule.sigma(np.nextafter(np.float32(80), np.float32(100)).item()) == 80.0
    assert schedule.sigma(torch.tensor(0.002, dtype=torch.float32)) >= schedule.t_min


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_shapes_types_and_integers(schedule: NoiseSchedule) -> None:
    t = _grid(schedule, 12)
    for method in ("alpha", "sigma", "half_log_snr", "log_snr", "noise_level", "model_timestep", "input_scale"):
        function = getattr(schedule, method)
        values = function(t)
        assert values.dtype == torch.float64 and values.shape == t.shape
        assert torch.equal(function(t.view(2, 3, 2)), values.view(2, 3, 2))
        assert function(t[5]).shape == ()
        assert isinstance(function(t[5].item()), float) and function(t[5].item()) == values[5].item()
        assert function(torch.empty(0)).shape == (0,)
    assert torch.equal(schedule.alpha(torch.tensor([1])), schedule.alpha(torch.tensor([1.0])))
    assert schedule.alpha(1) == schedule.alpha(1.0)


def test_what_networks_are_given() -> None:
    t = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    edm = EDMSchedule(sigma_data=0.3)
    scheduler = diffusers.EDMEulerScheduler(**edm.scheduler_config())
    torch.testing.assert_close(edm.model_timestep(t), scheduler.precondition_noise(t))
    torch.testing.assert_close(edm.input_scale(t) * t, scheduler.precondition_inputs(t, t))
    assert edm.init_noise_sigma == scheduler.init_noise_sigma
    assert FlowSchedule(shift=3.0).model_timestep(0.25) == 250.0
    assert VPSchedule().model_timestep(torch.tensor([3, 999])).tolist() == [3.0, 999.0]
    assert VPSchedule().input_scale(5) == 1.0


@repeatable
@given(fraction=fractions, shift=st.floats(0.1, 10.0))
def test_the_flow_shift_moves_times_only(fraction: float, shift: float) -> None:
    plain, shifted = FlowSchedule(), FlowSchedule(shift=shift)
    t = shifted.t_of_fraction(fraction)
    assert t == pytest.approx(shift * fraction / (1 + (shift - 1) * fraction), rel=1e-12)
    assert shifted.sigma(t) == plain.sigma(t) == t
    # a shift adds -2 ln(shift) to the log-SNR
    if 0 < fraction < 1 and 0 < t < 1 - 1e-9:
        assert shifted.log_snr(t) == pytest.approx(plain.log_snr(fraction) - 2 * math.log(shift), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("schedule", [*VP, *OTHERS], ids=repr)
def test_add_noise(schedule: NoiseSchedule) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 5, 5, generator=generator)
    t = schedule.t_of_fraction(torch.rand(4, generator=generator))
    x = schedule.add_noise(x0, eps, t)
    assert x.dtype == torch.float32
    for i in range(4):
        torch.testing.assert_close(x[i], schedule.alpha(t[i]).float() * x0[i] + schedule.sigma(t[i]).float() * eps[i])
    assert schedule.add_noise(x0.bfloat16(), eps.bfloat16(), t).dtype == torch.float32
    torch.testing.assert_close(schedule.add_noise(x0, eps, t[0].item())[0], x[0])


def test_fingerprints_tell_schedules_apart() -> None:
    assert len({schedule.fingerprint() for schedule in ALL}) == len(ALL)
    assert VPSchedule().fingerprint() == VPSchedule("linear", 1e-4, 0.02).fingerprint()


def test_gradients_flow_to_times() -> None:
    for schedule in (VPSchedule(), EDMSchedule(), FlowSchedule()):
        t = schedule.t_of_fraction(torch.tensor([0.2, 0.7], dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(schedule.half_log_snr, (t,))
        assert torch.autograd.gradcheck(
            schedule.t_of_half_log_snr, (schedule.half_log_snr(t).detach().requires_grad_(),)
        )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VPSchedule("sigmoid"), "beta_schedule = 'sigmoid'; known are linear, scaled_linear"),
        (lambda: VPSchedule(num_train_timesteps=1), "num_train_timesteps = 1; at least 2"),
        (
            lambda: VPSchedule(beta_start=0.1, beta_end=0.01),
            "0 < beta_start <= beta_end < 1 is needed, not 0.1 and 0.01",
        ),
        (lambda: VPSchedule(beta_start=1e-12, beta_end=1e-12), "does not fall at every step"),
        (lambda: EDMSchedule(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max is needed, not 2.0 and 1.0"),
        (lambda: EDMSchedule(sigma_data=0.0), "sigma_data = 0.0 must be positive"),
        (lambda: FlowSchedule(shift=-1.0), "shift = -1.0 must be positive"),
        (lambda: FlowSchedule(num_train_timesteps=0), "num_train_timesteps = 0 must be positive"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_the_device_makes_no_difference(schedule: NoiseSchedule) -> None:
    t = _grid(schedule, 1001)
    for method in ("alpha", "sigma", "half_log_snr", "model_timestep", "input_scale"):
        on_gpu = getattr(schedule, method)(t.cuda())
        assert on_gpu.device.type == "cuda"
        torch.testing.assert_close(on_gpu.cpu(), getattr(schedule, method)(t), rtol=1e-12, atol=1e-12)
    back = schedule.t_of_half_log_snr(schedule.half_log_snr(t.cuda()))
    torch.testing.assert_close(back.cpu(), t, rtol=1e-9, atol=1e-9)
