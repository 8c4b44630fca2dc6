"""Error curves against the closed form of an ideal denoiser, whatever it is asked to predict."""

import math

import numpy as np
import pytest
import torch
from oracles.gaussian import GaussianMixture

from genlight.diffusion.error_curves import ErrorCurve, error_curve
from genlight.diffusion.noise_schedules import EDMSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction

STD = 0.5
DATA = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 4).double(), torch.tensor([STD]).double())
GRID = (-4.0, -1.0, 0.0, 1.0, 3.0)


def images(count=20_000):
    return DATA.sample(count, torch.Generator().manual_seed(0))


def ideal(prediction, bias=0.0):
    schedule = prediction.schedule

    def model(x, timestep, **_):
        t = timestep[0].item()
        time = math.exp(4 * t) if schedule.family == "edm" else t
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        sigma_data = schedule.sigma_data or 0.5
        x = x / schedule.input_scale(time)
        return DATA.output(prediction.prediction_type, x, alpha, sigma, sigma_data) + bias

    return model


@pytest.mark.parametrize(
    "prediction",
    [Prediction("epsilon", VPSchedule()), Prediction("v_prediction", VPSchedule()), Prediction("edm", EDMSchedule())],
    ids=["epsilon", "v", "edm"],
)
def test_an_ideal_denoiser_has_the_error_of_bayes(prediction):
    # Var(ε | x_t) of Gaussian data: α² s² / (α² s² + σ²)
    curve = error_curve(ideal(prediction), images(), prediction, GRID, batch_size=3000)
    signal = np.exp(2 * np.array(GRID)) * STD**2
    assert np.allclose(curve.errors, signal / (signal + 1), rtol=0.03)


def test_a_bias_adds_its_square_and_members_meet_the_same_noise():
    prediction = Prediction("epsilon", VPSchedule())
    plain = error_curve(ideal(prediction), images(), prediction, GRID)
    again = error_curve(ideal(prediction), images(), prediction, GRID, batch_size=777)
    other = error_curve(ideal(prediction), images(), prediction, GRID, seed=1)
    biased = error_curve(ideal(prediction, 0.3), images(), prediction, GRID)
    assert np.allclose(plain.errors, again.errors, rtol=1e-12) and plain != other
    assert np.allclose(np.subtract(biased.errors, plain.errors), 0.09, atol=0.01)


def test_conditions_follow_their_images_and_integer_times_are_integers():
    prediction, seen = Prediction("epsilon", VPSchedule()), []

    def model(x, timestep, label):
        seen.append((timestep.unique().tolist(), label.tolist()))
        return torch.zeros_like(x)

    data, label = torch.zeros(5, 2), torch.arange(5)
    curve = error_curve(
        model, data, prediction, (-1.0, 1.0), conditions={"label": label}, batch_size=3, integer_timesteps=True
    )
    assert [rows for _, rows in seen] == [[0, 1, 2], [3, 4]] * 2
    assert all(len(times) == 1 and times[0] == round(times[0]) for times, _ in seen)
    assert all(0.2 < error < 3 for error in curve.errors)


def test_curves_interpolate_the_logarithm_and_stay_constant_outside():
    curve = ErrorCurve((-1.0, 1.0), (1.0, 0.01))
    assert np.allclose(curve(np.array([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0])), [1, 1, 0.1, 0.1**1.5, 0.01, 0.01])


@pytest.mark.parametrize("grid, errors", [((), ()), ((0.0,), (1.0, 2.0)), ((1.0, 0.0), (1.0, 1.0)), ((0.0,), (0.0,))])
def test_curves_that_are_none_are_refused(grid, errors):
    with pytest.raises(ValueError):
        ErrorCurve(grid, errors)
    with pytest.raises(ValueError, match="images"):
        error_curve(lambda x, t: x, torch.zeros(0, 2), Prediction("epsilon", VPSchedule()), (0.0,))
