"""The metrics against closed forms and independent numpy, and their independence of batches, order and processes."""

import math
import warnings

import numpy as np
import pytest
import torch
from metrics.metric_samples import TinyFeatures, gaussian_statistics, images, statistics_of
from scipy.linalg import sqrtm

from genlight.metrics.generative import GenerativeMetrics


def numpy_frechet(a, b):
    mean = a.mean(0) - b.mean(0)
    left, right = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return mean @ mean + np.trace(left + right - 2 * np.real(sqrtm(left @ right)))


def ready(metrics, extractor=None, real=None, **options):
    extractor = extractor or TinyFeatures()
    result = GenerativeMetrics(extractor, metrics, **options)
    result.set_reference(statistics_of(images(300, seed=1) if real is None else real, extractor))
    return result


def test_frechet_distance_of_two_gaussians_with_known_moments():
    """Commuting covariances: FD = |μ1 - μ2|² + Σ (s1 - s2)² over the standard deviations (Dowson & Landau 1982)."""
    extractor = TinyFeatures(size=3)
    means, deviations = np.array([[0.0, 1.0, -2.0], [0.5, 1.0, -1.0]]), np.array([[1.0, 2.0, 0.5], [1.5, 0.25, 0.5]])
    metrics = GenerativeMetrics(extractor, ["fd"])
    metrics.set_reference(gaussian_statistics(means[0], deviations[0], extractor))
    # ±√3 s on each axis in turn, 6 points: exactly the moments, up to the divisor n - 1
    points = np.concatenate([sign * math.sqrt(3) * np.diag(deviations[1]) for sign in (1, -1)]) + means[1]
    points = means[1] + (points - means[1]) * math.sqrt(5 / 6)
    metrics.update_features(torch.from_numpy(points), torch.zeros(6, extractor.num_logits))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert metrics.compute()["fd_tiny"] == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_equals_scipy():
    extractor = TinyFeatures()
    real, fake = images(300, seed=1), images(200, seed=2, shift=0.3)
    metrics = ready(["fd"], extractor, real)
    metrics.update(fake)
    expected = numpy_frechet(extractor(real).numpy(), extractor(fake).numpy())
    assert metrics.compute() == {"fd_tiny": pytest.approx(expected, rel=1e-8)}


def test_kernel_distance_equals_numpy_when_a_subset_is_everything():
    """The unbiased estimate of MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, equation 4)."""
    extractor = TinyFeatures()
    real, fake = images(80, seed=1), images(80, seed=2, shift=0.3)
    metrics = ready(["kid"], extractor, real, kid_subsets=3, kid_subset_size=80)
    metrics.update(fake)
    x, y = extractor(real).numpy(), extractor(fake).numpy()

    def kernel(a, b):
        return (a @ b.T / x.shape[1] + 1) ** 3

    off = ~np.eye(80, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    values = metrics.compute()
    assert values["kid_tiny"] == pytest.approx(expected, rel=1e-9)
    assert values["kid_tiny_std"] == pytest.approx(0.0, abs=1e-9)


def test_inception_score_of_one_split_equals_numpy():
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4)."""
    extractor = TinyFeatures()
    fake = images(100, seed=2)
    metrics = ready(["is"], extractor, is_splits=1)
    metrics.update(fake)
    logits = extractor.logits(fake).numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert metrics.compute() == {"is_tiny": pytest.approx(expected, rel=1e-9), "is_tiny_std": 0.0}


def test_memorised_images_are_punished():
    """Copies of the real images have cosine distance 0 to them: the score grows while the Fréchet distance does not."""
    extractor, real = TinyFeatures(), images(60, seed=1)
    both = ready(["fd", "mifd"], extractor, real)
    both.update(torch.cat([real, real[:20]]))
    copies = both.compute()
    both.reset()
    both.update(images(50, seed=3))
    fresh = both.compute()
    assert copies["mifd_tiny"] / copies["fd_tiny"] > 1e6 * fresh["mifd_tiny"] / fresh["fd_tiny"]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_result_does_not_depend_on_the_batch_size(batch_size):
    fake = images(100, seed=2, shift=0.2)
    metrics = ready(["fd", "kid", "is", "mifd"], kid_subsets=5, kid_subset_size=40)
    metrics.update(fake)
    whole = metrics.compute()
    metrics.reset()
    for batch in fake.split(batch_size):
        metrics.update(batch)
    assert metrics.compute() == pytest.approx(whole, rel=1e-6)


def test_with_indices_the_order_of_arrival_does_not_matter():
    fake = images(100, seed=2, shift=0.2)
    metrics = ready(["fd", "kid", "is"], kid_subsets=5, kid_subset_size=40)
    metrics.update(fake, torch.arange(100))
    whole = metrics.compute()
    metrics.reset()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    for part in order.split(30):
        metrics.update(fake[part], part)
    assert metrics.compute() == pytest.approx(whole, rel=1e-9)


def test_reset_forgets_samples_and_keeps_the_reference():
    metrics = ready(["fd", "kid"], kid_subsets=3)
    metrics.update(images(50, seed=4))
    first = metrics.compute()
    metrics.reset()
    metrics.update(images(50, seed=5, shift=1.0))
    assert metrics.compute()["fd_tiny"] > 2 * first["fd_tiny"]
    metrics.reset()
    metrics.update(images(50, seed=4))
    assert metrics.compute() == first


def test_only_inception_features_make_an_fid():
    extractor = TinyFeatures()
    assert ready(["fd", "mifd"], extractor).name_of("fd") == "fd_tiny"
    assert not any("fid" in name for name in ready(["fd", "kid", "is", "mifd"], extractor)._names())
    extractor.is_inception = True
    names = [GenerativeMetrics(extractor).name_of(metric) for metric in ("fd", "kid", "is", "mifd")]
    assert names == ["fid", "kid", "is", "mifid"]


def test_the_global_random_state_is_left_alone():
    metrics = ready(["kid", "is"], kid_subsets=2)
    metrics.update(images(50, seed=4))
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    metrics.compute()
    assert torch.equal(torch.rand(3), expected)


def test_the_extractor_stays_out_of_the_model_that_carries_the_metrics():
    metrics = ready(["fd", "kid", "is"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.add_module("metrics", metrics)
    metrics.update(images(20, seed=2))
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict()) == {"0.weight", "0.bias"}


def test_autocast_and_half_precision_models_do_not_touch_the_score():
    fake = images(40, seed=2)
    metrics = ready(["fd"])
    metrics.update(fake)
    expected = metrics.compute()
    metrics.reset()
    metrics.half()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        metrics.update(fake)
    assert metrics.compute() == expected


def test_a_sample_that_is_not_finite_makes_every_value_nan_and_reset_heals():
    metrics = ready(["fd", "kid", "is"])
    fake = images(20, seed=2)
    fake[3, 0, 0, 0] = math.nan
    metrics.update(fake)
    values = metrics.compute()
    assert set(values) == set(metrics._names()) and all(math.isnan(value) for value in values.values())
    metrics.reset()
    metrics.update(images(20, seed=2))
    assert all(math.isfinite(value) for value in metrics.compute().values())


def test_sample_count_is_known_after_compute():
    metrics = ready(["fd"])
    metrics.update(images(20, seed=2))
    metrics.update(images(5, seed=3))
    metrics.compute()
    assert metrics.num_samples == 25


def test_no_warnings_reach_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = ready(["fd", "kid", "is", "mifd"])
        metrics.update(images(40, seed=2))
        metrics.compute()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metrics": ["fid"]}, r"unknown names \['fid'\].*\"fd\" is reported as \"fid\""),
        ({"metrics": []}, "some of"),
        ({"metrics": ["fd", "fd"]}, "each once"),
        ({"kid_subsets": 0}, "metrics.kid_subsets must be at least 1, got 0"),
        ({"reference_split": "val"}, 'must be "train" or "test"'),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GenerativeMetrics(TinyFeatures(), **options)


def test_misuse_is_named():
    with pytest.raises(RuntimeError, match="set_reference first"):
        GenerativeMetrics(TinyFeatures()).update(images(2))
    with pytest.raises(ValueError, match="made with features"):
        GenerativeMetrics(TinyFeatures(size=5)).set_reference(statistics_of(images(10), TinyFeatures()))
    with pytest.raises(ValueError, match="need a reference with features"):
        GenerativeMetrics(TinyFeatures(), ["kid"]).set_reference(statistics_of(images(10), TinyFeatures(), keep=False))
    metrics = ready(["fd"])
    metrics.update(images(1))
    with pytest.raises(RuntimeError, match="at least two generated images, got 1"):
        metrics.compute()
