"""Averages as linear combinations, against their recurrences, closed forms and the figures of the paper's algorithm."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genlight.checkpoints import ema_profiles as profiles

rates = st.floats(0.0, 0.999)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97220), (0.10, 6.93720), (0.20, 1.82621), (0.25, 0.71982)])
def test_gamma_of_the_paper(sigma_rel: float, gamma: float) -> None:
    assert profiles.power_gamma(sigma_rel) == pytest.approx(gamma, abs=5e-6)


@given(st.floats(0.01, 0.28))
def test_width_and_exponent_are_inverse(sigma_rel: float) -> None:
    assert profiles.power_sigma_rel(profiles.power_gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289, float("nan")])
def test_a_width_without_profile_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="sigma_rel must lie in"):
        profiles.power_gamma(sigma_rel)


@given(st.integers(1, 60), st.integers(1, 50), st.floats(0.5, 0.9999), st.integers(0, 1000))
def test_online_ema_at_snapshots_is_its_weights(count: int, interval: int, rate: float, seed: int) -> None:
    values = numpy.random.default_rng(seed).standard_normal(count + 1)
    average = values[0]
    for value in values[1:]:
        average = rate**interval * average + (1.0 - rate**interval) * value
    weights = profiles.online_ema_weights(count, rate**interval)
    assert weights @ values == pytest.approx(average, abs=1e-12)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


@given(st.integers(1, 60), st.integers(1, 50), st.floats(0.5, 0.9999))
def test_ema_over_even_steps_is_the_normalised_geometric_row(count: int, interval: int, rate: float) -> None:
    steps = [interval * number for number in range(1, count + 1)]
    age = numpy.arange(count - 1, -1, -1)
    expected = rate ** (interval * age) * (1 - rate**interval) / (1 - rate ** (interval * count))
    assert profiles.ema_weights(steps, rate) == pytest.approx(expected, abs=1e-12)


def test_ema_over_bins_is_the_sum_over_what_they_hold() -> None:
    fine = profiles.ema_weights(range(1, 13), 0.8)
    coarse = profiles.ema_weights([4, 8, 10, 11, 12], 0.8)
    sums = [fine[:4].sum(), fine[4:8].sum(), fine[8:10].sum(), fine[10], fine[11]]
    assert coarse == pytest.approx(sums, abs=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 0.72, 6.9372, 17.0])
def test_power_ema_recurrence_is_its_weights(gamma: float) -> None:
    values = numpy.random.default_rng(0).standard_normal(200)
    average = 0.0
    for step, value in enumerate(values, start=1):
        rate = profiles.power_rate(gamma, step)
        average = rate * average + (1.0 - rate) * value
    assert profiles.power_weights(range(1, 201), gamma) @ values == pytest.approx(average, abs=1e-12)


def test_power_ema_of_exponent_zero_is_swa() -> None:
    assert profiles.power_weights(range(1, 41), 0.0) == pytest.approx(profiles.swa_weights([1] * 40), abs=1e-14)
    assert profiles.power_rate(3.0, 1) == 0.0


def test_lawa_counts_checkpoints_not_bins() -> None:
    assert profiles.lawa_weights([8, 4, 2, 1, 1], 3).tolist() == [0, 0, 0.5, 0.25, 0.25]
    assert profiles.lawa_weights([1, 1, 1], 3) == pytest.approx(profiles.swa_weights([1, 1, 1]))
    for last in (0, 4):
        with pytest.raises(ValueError, match="last must be between 1 and 3"):
            profiles.lawa_weights([1, 1, 1], last)


@given(st.floats(0.1, 50), st.floats(0.1, 50), st.floats(1, 1e6), st.floats(1, 1e6))
def test_products_of_profiles_are_the_integral(g: float, h: float, a: float, b: float) -> None:
    """Gauss-Legendre on u in [0, 1] with t = min(a, b) u^4, against the closed form."""
    nodes, weights = numpy.polynomial.legendre.leggauss(200)
    u = (nodes + 1) / 2
    low = min(a, b)
    log_t = numpy.log(low) + 4 * numpy.log(u)
    log_p = numpy.log(g + 1) + g * log_t - (g + 1) * numpy.log(a)
    log_q = numpy.log(h + 1) + h * log_t - (h + 1) * numpy.log(b)
    integral = (weights / 2 * numpy.exp(log_p + log_q + numpy.log(4 * low) + 3 * numpy.log(u))).sum()
    value = profiles.profile_products([a], [g], [b], [h])[0, 0]
    assert value == pytest.approx(integral, rel=1e-6, abs=1e-300)
    assert value == pytest.approx(profiles.profile_products([b], [h], [a], [g])[0, 0], rel=1e-12)


@pytest.mark.parametrize(("sigma_rel", "error"), [(0.06, 2.2e-4), (0.15, 5.8e-4), (0.20, 1.7e-3)])
def test_reconstruction_from_64_snapshots_of_two_widths(sigma_rel: float, error: float) -> None:
    ends = [step for step in range(125, 8001, 125) for _ in range(2)]
    gammas = [profiles.power_gamma(0.05), profiles.power_gamma(0.10)] * 64
    gamma = profiles.power_gamma(sigma_rel)
    weights, found = profiles.reconstruct_power_ema(ends, gammas, gamma)
    assert found == pytest.approx(error, rel=0.05)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_saved_average_reproduces_itself() -> None:
    ends = [step for step in range(125, 8001, 125) for _ in range(2)]
    gammas = [profiles.power_gamma(0.05), profiles.power_gamma(0.10)] * 64
    weights, error = profiles.reconstruct_power_ema(ends, gammas, gammas[-1])
    expected = numpy.zeros(128)
    expected[-1] = 1.0
    # what rounding leaves of a solution: profiles of neighbours are alike
    rounding = numpy.linalg.cond(profiles.profile_products(ends, gammas, ends, gammas)) * numpy.finfo(float).eps
    assert rounding < 1e-9 and weights == pytest.approx(expected, abs=rounding) and error < 1e-6


def test_wrong_input_is_named() -> None:
    for call, message in (
        (lambda: profiles.reconstruct_power_ema([1.0], [], 1.0), "as many ends as gammas"),
        (lambda: profiles.reconstruct_power_ema([2.0, 2.0], [1.0, 1.0], 1.0), "same step and exponent"),
        (lambda: profiles.ema_weights([2, 1], 0.9), "steps must ascend"),
        (lambda: profiles.power_weights([-1, 1], 2.0), "steps must ascend from at least 0"),
        (lambda: profiles.power_weights([0], 2.0), "steps must ascend from at least 0, and not be 0 alone"),
        (lambda: profiles.ema_weights([1, 2], 1.0), r"rate must be in \[0, 1\)"),
        (lambda: profiles.power_rate(1.0, 0), "step must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
