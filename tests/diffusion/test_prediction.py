"""Conversions between prediction types: inverse to each other, exact at the ends, true of data and noise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.gaussian import two_modes

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import (
    PREDICTION_TYPES,
    Prediction,
    convert,
    gains,
    mix,
    target,
    to_epsilon,
    to_flow,
    to_velocity,
    to_x0,
)

repeatable = settings(deadline=None, derandomize=True, max_examples=80)
types = st.sampled_from(PREDICTION_TYPES)
levels = st.tuples(st.floats(1e-3, 1.0), st.floats(1e-3, 50.0))
SIGMA_DATA = 0.5


def _pair(seed: int = 0, n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, n, 3, 2, 2, generator=generator, dtype=torch.float64)
    return x0, eps


@repeatable
@given(prediction_type=types, level=levels)
def test_the_target_gives_back_data_and_noise(prediction_type: str, level: tuple[float, float]) -> None:
    alpha, sigma = level
    x0, eps = _pair()
    x = alpha * x0 + sigma * eps
    said = target(prediction_type, x0, eps, alpha, sigma, SIGMA_DATA)
    close = {"rtol": 0, "atol": 1e-9 * max(1, sigma / alpha, alpha / sigma)}
    torch.testing.assert_close(to_x0(prediction_type, said, x, alpha, sigma, SIGMA_DATA), x0, **close)
    torch.testing.assert_close(to_epsilon(prediction_type, said, x, alpha, sigma, SIGMA_DATA), eps, **close)
    velocity = (alpha * eps - sigma * x0) / (alpha**2 + sigma**2) ** 0.5
    torch.testing.assert_close(to_velocity(prediction_type, said, x, alpha, sigma, SIGMA_DATA), velocity, **close)
    torch.testing.assert_close(to_flow(prediction_type, said, x, alpha, sigma, SIGMA_DATA), eps - x0, **close)


@repeatable
@given(source=types, other=types, level=levels)
def test_conversions_come_back(source: str, other: str, level: tuple[float, float]) -> None:
    alpha, sigma = level
    said, x = _pair(1)
    there = convert(source, said, x, alpha, sigma, to=other, sigma_data=SIGMA_DATA)
    back = convert(other, there, x, alpha, sigma, to=source, sigma_data=SIGMA_DATA)
    torch.testing.assert_close(back, said, rtol=0, atol=1e-8 * max(1, sigma / alpha, alpha / sigma) ** 2)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow", "edm"])
def test_both_ends_are_exact_where_the_prediction_tells_both(prediction_type: str) -> None:
    x0, eps = _pair(2)
    for alpha, sigma in ((0.0, 1.0), (1.0, 0.0)):
        x = alpha * x0 + sigma * eps
        said = target(prediction_type, x0, eps, alpha, sigma, SIGMA_DATA)
        torch.testing.assert_close(to_x0(prediction_type, said, x, alpha, sigma, SIGMA_DATA), x0, rtol=0, atol=1e-15)
        torch.testing.assert_close(
            to_epsilon(prediction_type, said, x, alpha, sigma, SIGMA_DATA), eps, rtol=0, atol=1e-15
        )


def test_ends_of_epsilon_and_sample() -> None:
    x0, eps = _pair(3)
    assert torch.equal(to_x0("epsilon", eps, x0, 1.0, 0.0), x0)  # no noise: x_t is the image
    assert torch.equal(to_epsilon("sample", x0, eps, 0.0, 1.0), eps)  # no image: x_t is the noise
    assert torch.equal(to_x0("sample", x0, eps, 0.0, 1.0), x0)
    assert torch.equal(to_epsilon("epsilon", eps, x0, 1.0, 0.0), eps)
    assert not to_x0("epsilon", eps, eps, 0.0, 1.0).isfinite().any()  # nothing is said of the other one
    assert not to_epsilon("sample", x0, x0, 1.0, 0.0).isfinite().any()


@repeatable
@given(prediction_type=types, level=levels)
def test_gains_are_derivatives(prediction_type: str, level: tuple[float, float]) -> None:
    alpha, sigma = level
    said, x = _pair(4)
    moved = said + 1.0
    data_gain, noise_gain = gains(prediction_type, alpha, sigma, SIGMA_DATA)
    for function, gain in ((to_x0, data_gain), (to_epsilon, noise_gain)):
        arguments = (x, alpha, sigma, SIGMA_DATA)
        change = function(prediction_type, moved, *arguments) - function(prediction_type, said, *arguments)
        size = max(1.0, alpha / sigma, sigma / alpha)
        torch.testing.assert_close(change, gain.expand_as(change), rtol=0, atol=1e-9 * size**2)
    torch.testing.assert_close(alpha * data_gain, -sigma * noise_gain)  # x_t stays where it is


@repeatable
@given(level=st.floats(1e-3, 80.0), sigma_data=st.floats(0.1, 2.0))
def test_edm_is_table_1_of_karras(level: float, sigma_data: float) -> None:
    x0, eps = _pair(5)
    x = x0 + level * eps
    c_skip = sigma_data**2 / (level**2 + sigma_data**2)
    c_out = level * sigma_data / (level**2 + sigma_data**2) ** 0.5
    expected = (x0 - c_skip * x) / c_out
    torch.testing.assert_close(target("edm", x0, eps, 1.0, level, sigma_data), expected, rtol=1e-7, atol=1e-7)
    # with data of that spread the target has unit variance: (σ² s² / s² + s²) / (σ² + s²) = 1
    a, b = mix("edm", 1.0, level, sigma_data)
    assert float((a * sigma_data) ** 2 + b**2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "schedule", [VPSchedule(), VPSchedule("squaredcos_cap_v2"), EDMSchedule(), FlowSchedule()], ids=repr
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ideal_networks_agree(schedule: NoiseSchedule, prediction_type: str) -> None:
    """What the oracle says in one type converts to what it knows of data and noise."""
    if prediction_type == "edm" and schedule.sigma_data is None:
        with pytest.raises(ValueError, match="prediction_type = 'edm' needs an EDMSchedule, not"):
            Prediction("edm", schedule)
        return
    mixture, prediction = two_modes(), Prediction(prediction_type, schedule)
    for fraction in (0.02, 0.3, 0.8):
        t = schedule.t_of_fraction(fraction)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x = alpha * mixture.sample(20, torch.Generator().manual_seed(0)) + sigma
        said = mixture.output(prediction_type, x, alpha, sigma, SIGMA_DATA)
        torch.testing.assert_close(prediction.to_x0(said, x, t), mixture.x0(x, alpha, sigma), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(
            prediction.to_epsilon(said, x, t), mixture.epsilon(x, alpha, sigma), rtol=1e-7, atol=1e-7
        )
        flow = mixture.output("flow", x, alpha, sigma)
        torch.testing.assert_close(prediction.convert(said, x, t, to="flow"), flow, rtol=1e-7, atol=1e-7)


def test_per_sample_times_and_number_types() -> None:
    prediction, (x0, eps) = Prediction("v_prediction", VPSchedule()), _pair(6)
    t = torch.tensor([0, 1, 10, 100, 500, 999])
    together = prediction.target(x0, eps, t)
    for i in range(len(t)):
        torch.testing.assert_close(together[i], prediction.target(x0[i : i + 1], eps[i : i + 1], t[i].item())[0])
    assert together.dtype == torch.float64
    half = prediction.to_x0(together.bfloat16(), x0.bfloat16(), t)
    assert half.dtype == torch.float32
    assert Prediction("sample", VPSchedule()).to_x0(x0.half(), x0.half(), t).dtype == torch.float32


def test_unknown_types_are_refused() -> None:
    known = "known are epsilon, v_prediction, sample, flow, edm"
    with pytest.raises(ValueError, match=f"prediction_type = 'noise'; {known}"):
        Prediction("noise", VPSchedule())
    with pytest.raises(ValueError, match=f"prediction_type = 'noise'; {known}"):
        mix("noise", 1.0, 1.0)
    with pytest.raises(ValueError, match="'edm' needs the sigma_data of an EDMSchedule"):
        mix("edm", 1.0, 1.0)
