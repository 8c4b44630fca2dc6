"""The process is scikit-learn's, given the same parameters; it ranks, and it knows what it does not know."""

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predictors.toy_schedules import schedules
from scipy.stats import norm, rankdata
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from genlight.predictors.gaussian_process import GaussianProcessPredictor
from genlight.predictors.losses import kendall_tau


def flat(candidates: list[Tensor], steps: int = 6) -> np.ndarray:
    return np.stack([np.pad(c.numpy(), ((0, steps - len(c)), (0, 0))).ravel() for c in candidates])


def scikit(length: float, noise: float, variance: float) -> Any:
    kernel = ConstantKernel(variance) * Matern(length, nu=2.5) + WhiteKernel(variance * noise)
    return GaussianProcessRegressor(kernel, optimizer=None, alpha=1e-14)


def test_it_is_the_process_of_scikit_learn() -> None:
    features, errors = schedules(120)
    errors[7] = errors[11] = math.inf
    fitted = GaussianProcessPredictor().fit(features[:80], errors[:80], seed=0)
    scaler = StandardScaler().fit(flat(features[:80]))
    targets = norm.ppf((rankdata(errors[:80]) - 0.5) / 80)
    targets = (targets - targets.mean()) / targets.std()
    oracle = scikit(fitted.length, fitted.noise, fitted.variance).fit(scaler.transform(flat(features[:80])), targets)
    points = scaler.transform(flat(features[80:]))
    mean, deviation = fitted.predict(features[80:])
    expected, covariance = oracle.predict(points, return_cov=True)
    # the oracle adds the noise of a measurement to each variance
    covariance = covariance - fitted.variance * fitted.noise * np.eye(40)
    assert np.allclose(mean.numpy(), expected, atol=1e-7)
    assert np.allclose(fitted.covariance(features[80:]).numpy(), covariance, atol=1e-7)
    assert np.allclose(deviation.numpy() ** 2, np.diag(covariance), atol=1e-7)
    assert fitted.evidence == pytest.approx(oracle.log_marginal_likelihood_value_, abs=1e-6)


def test_its_parameters_are_more_likely_than_others() -> None:
    features, errors = schedules(60)
    fitted = GaussianProcessPredictor().fit(features, errors)
    points = StandardScaler().fit_transform(flat(features))
    targets = norm.ppf((rankdata(errors) - 0.5) / 60)
    targets /= targets.std()
    for length in (0.2, 0.45, 1.0):
        for noise in (1e-3, 3e-2, 0.3):
            for variance in (fitted.variance, 0.5, 1.0, 2.0):
                root = math.sqrt(points.shape[1])
                other = scikit(root * length, noise, variance).fit(points, targets)
                assert fitted.evidence >= other.log_marginal_likelihood_value_ - 1e-6


@pytest.mark.parametrize("count", [100, 500])
def test_it_orders_schedules_that_it_has_not_seen(count: int) -> None:
    features, errors = schedules(count + 100)
    mean, deviation = GaussianProcessPredictor().fit(features[:count], errors[:count], seed=0).predict(features[count:])
    assert kendall_tau(mean, torch.tensor(errors[count:])) > 0.6
    assert mean.shape == deviation.shape == (100,) and bool((deviation >= 0).all())


def test_scores_without_structure_do_not_break_it() -> None:
    features, _ = schedules(450)
    errors = np.random.default_rng(0).random(450).tolist()
    mean, deviation = GaussianProcessPredictor().fit(features[:400], errors[:400]).predict(features[400:])
    assert bool(torch.isfinite(mean).all()) and bool((deviation > 0).all())
    assert float(mean.abs().max()) < 1.5


def test_three_hundred_candidates_take_a_tenth_of_a_second() -> None:
    rng = np.random.default_rng(0)
    features = [torch.from_numpy(rng.normal(size=(5, 23))).float() for _ in range(300)]
    errors = [float(f.square().sum()) for f in features]
    begun = time.process_time()
    GaussianProcessPredictor().fit(features, errors)
    assert time.process_time() - begun < 0.6  # 0.06 on an idle core


def test_fit_draws_nothing_and_does_not_depend_on_threads() -> None:
    features, errors = schedules(150)
    state = torch.get_rng_state()
    found = []
    for threads, seed in ((1, 0), (2, 1)):
        with threadpool_limits(threads):
            fitted = GaussianProcessPredictor().fit(features, errors, seed)
            found.append((*fitted.predict(features), fitted.covariance(features)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_order_of_the_targets_counts() -> None:
    features, errors = schedules(40)
    plain = GaussianProcessPredictor().fit(features, errors).predict(features)
    bent = GaussianProcessPredictor().fit(features, [math.exp(e) - 7 for e in errors]).predict(features)
    assert torch.equal(plain[0], bent[0]) and torch.equal(plain[1], bent[1])


def test_failed_candidates_are_the_worst() -> None:
    features, errors = schedules(80)
    bad = [float(f[:, 0].mean()) > 0.6 for f in features]
    targets = [math.inf if b else e for b, e in zip(bad, errors)]
    worst = [2 * max(errors) if b else e for b, e in zip(bad, errors)]
    mean, _ = GaussianProcessPredictor().fit(features, targets).predict(features)
    assert torch.equal(mean, GaussianProcessPredictor().fit(features, worst).predict(features)[0])
    assert kendall_tau(mean, torch.tensor([float(b) for b in bad])) > 0.4


def test_what_lies_beyond_max_points_does_not_count() -> None:
    features, errors = schedules(60)
    worst = sorted(range(60), key=lambda n: errors[n])[40:]
    other = [f + 1.0 if n in worst else f for n, f in enumerate(features)]
    predictor = GaussianProcessPredictor(max_points=40)
    first, second = (predictor.fit(given, errors).predict(features) for given in (features, other))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], GaussianProcessPredictor(41).fit(features, errors).predict(features)[0])


def test_it_is_unsure_of_what_it_never_saw() -> None:
    features, errors = schedules(100)
    changing = [f.clone() for f in features]
    for f in changing:
        f[:, 5] = 0.0  # one of the kinds is never chosen
    fitted = GaussianProcessPredictor().fit(changing, errors)
    new = [f.clone() for f in changing[:20]]
    for f in new:
        f[:, 5] = 1.0
    assert bool((fitted.predict(new)[1] > 1.2 * fitted.predict(changing[:20])[1]).all())
    mean, deviation = fitted.predict([f + 1e4 for f in features[:5]])
    assert torch.allclose(mean, torch.zeros(5).double(), atol=1e-6)
    assert torch.allclose(deviation, torch.full((5,), math.sqrt(fitted.variance)).double())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3))
def test_short_candidates_are_padded_and_long_ones_cut(lengths: list[int], more: int) -> None:
    features, errors = schedules(30)
    fitted = GaussianProcessPredictor().fit(features, errors)
    generator = torch.Generator().manual_seed(sum(lengths))
    candidates = [torch.rand(length, features[0].shape[1], generator=generator) for length in lengths]
    padded = [torch.cat([c, torch.zeros(6 - len(c), c.shape[1]), torch.ones(more, c.shape[1])]) for c in candidates]
    alone = torch.cat([fitted.predict([c])[0] for c in candidates])
    assert torch.allclose(fitted.predict(padded)[0], alone, atol=1e-9)


STEP = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("candidates", "targets", "message"),
    [
        ([STEP, STEP], [1.0, 1.0], "two different targets"),
        ([STEP, STEP], [1.0, math.nan], "no NaN"),
        ([STEP, STEP], [1.0], "2 candidates have 1 targets"),
        ([STEP, torch.ones(2, 4)], [1.0, 2.0], r"candidate 1 must be .* \[2, 3\], got \[2, 4\]"),
        ([STEP, STEP * math.inf], [1.0, 2.0], "finite"),
    ],
)
def test_bad_training_data_is_refused(candidates: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianProcessPredictor().fit(candidates, targets)


def test_bad_settings_and_other_features_are_refused() -> None:
    with pytest.raises(ValueError, match="max_points = 1"):
        GaussianProcessPredictor(max_points=1)
    fitted = GaussianProcessPredictor().fit([STEP, 2 * STEP], [1.0, 2.0])
    with pytest.raises(ValueError, match="trained on 3 features per step, got 4"):
        fitted.predict([torch.ones(2, 4)])
