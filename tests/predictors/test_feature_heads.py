"""Regressions on features: right on functions they can express, unsure elsewhere, blind to sentinels."""

import math
from typing import Any

import pytest
import torch

from genlight.predictors import feature_heads
from genlight.predictors.feature_heads import HEADS, LowFidelityPredictor, fit_head
from genlight.predictors.losses import kendall_tau
from genlight.predictors.pool import Standardiser, cleaned


def data(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return features, features @ torch.tensor([2.0, -1.0, 0.5, 0.0])


@pytest.mark.parametrize("head", HEADS)
def test_a_linear_function_is_found_signs_included(head: str) -> None:
    features, targets = data()
    mean, deviation = fit_head(head, features[:60], targets[:60]).predict(features[60:])
    assert kendall_tau(mean, targets[60:]) > (0.55 if head == "forest" else 0.9)
    assert deviation.shape == (140,) and bool((deviation >= 0).all())


@pytest.mark.parametrize("head", ["gp", "ridge"])
def test_far_away_it_is_less_sure(head: str) -> None:
    features, targets = data()
    fitted = fit_head(head, features[:60], targets[:60])
    assert fitted.predict(features[60:] * 10)[1].mean() > 1.5 * fitted.predict(features[60:])[1].mean()


def test_a_process_is_fitted_on_so_many_from_the_best_to_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_heads, "_MAX_POINTS", 40)
    monkeypatch.setattr(feature_heads, "_ROWS_AT_ONCE", 30)
    features, targets = data()
    fitted: Any = fit_head("gp", features, targets)
    points = torch.from_numpy(fitted.process._points).float()
    kept = (points[:, None] == features[None]).all(-1).nonzero()[:, 1]
    assert len(kept) == 40
    ranks = targets.argsort().argsort()[kept].sort().values
    assert ranks[0] == 0 and ranks[-1] == 199 and ranks.diff().max() <= 6
    assert kendall_tau(fitted.predict(features)[0], targets) > 0.9


@pytest.mark.parametrize("head", HEADS)
def test_sentinels_are_as_missing_values(head: str) -> None:
    features, targets = data()
    missing, sentinels = features.clone(), features.clone()
    for row, value in enumerate([1e8, -1e8, math.inf, -math.inf] * 3):
        sentinels[row, row % 4], missing[row, row % 4] = value, math.nan
    results = []
    for given in (sentinels, missing):
        clean = cleaned(given)
        fitted = LowFidelityPredictor(Standardiser.of(clean), head).fit(clean[:60], targets[:60], seed=0)
        results.append(fitted.predict(clean))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert bool(results[0][0].isfinite().all())


def test_bad_targets_are_refused() -> None:
    features, targets = data(10)
    with pytest.raises(ValueError, match="two different targets"):
        fit_head("gp", features, torch.ones(10))
    with pytest.raises(ValueError, match="10 candidates have 9 targets"):
        fit_head("ridge", features, targets[:9])
