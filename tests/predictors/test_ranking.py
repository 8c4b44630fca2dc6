"""The predictor learns an order it has not seen, repeats itself, and does not look at padding."""

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predictors.toy_schedules import schedules

from genlight.predictors.encoders import SequenceRanker, sinusoids
from genlight.predictors.losses import kendall_tau
from genlight.predictors.ranking import RankingPredictor, pad

ENCODERS = ("lstm", "transformer")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_orders_schedules_that_it_has_not_seen(encoder: str) -> None:
    features, errors = schedules(260)
    fitted = RankingPredictor(encoder=encoder, members=2).fit(features[:160], errors[:160], seed=0)
    mean, deviation = fitted.predict(features[160:])
    assert kendall_tau(mean, torch.tensor(errors[160:])) > 0.6
    in_batches = RankingPredictor(encoder=encoder, members=2, batch_size=64).fit(features[:160], errors[:160], seed=0)
    assert kendall_tau(in_batches.predict(features[160:])[0], torch.tensor(errors[160:])) > 0.5
    assert mean.shape == deviation.shape == (100,) and bool((deviation >= 0).all())


@pytest.mark.parametrize("count", [300, 800])
def test_a_fit_takes_about_a_second(count: int) -> None:
    features, errors = schedules(count)
    begun = time.process_time()
    RankingPredictor().fit(features, errors, seed=0)
    assert time.process_time() - begun < 6.0  # about 1.2 on an idle core


@pytest.mark.parametrize("encoder", ENCODERS)
def test_fit_is_a_function_of_data_and_seed(encoder: str) -> None:
    features, errors = schedules(40)
    predictor = RankingPredictor(encoder=encoder, members=2, steps=10)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = predictor.fit(features, errors, seed=1).predict(features)
    torch.manual_seed(99)
    torch.set_num_threads(2)
    second = predictor.fit(features, errors, seed=1).predict(features)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], predictor.fit(features, errors, seed=2).predict(features)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_order_of_the_targets_counts() -> None:
    """With no pair left out, any increasing function of the targets gives the same predictor."""
    features, errors = schedules(40)
    predictor = RankingPredictor(members=1, steps=8, min_difference_quantile=0.0)
    plain = predictor.fit(features, errors, seed=0).predict(features)[0]
    bent = predictor.fit(features, [math.exp(e) - 7 for e in errors], seed=0).predict(features)[0]
    assert torch.equal(plain, bent)


def test_scores_of_the_training_set_are_standardised() -> None:
    features, errors = schedules(60)
    mean, _ = RankingPredictor(members=1, steps=20).fit(features, errors, seed=0).predict(features)
    assert float(mean.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(mean.std(correction=0)) == pytest.approx(1.0, abs=1e-4)


def test_failed_candidates_come_last() -> None:
    features, errors = schedules(80)
    bad = [float(f[:, 0].mean()) > 0.6 for f in features]
    targets = [math.inf if b else e for b, e in zip(bad, errors)]
    mean, _ = RankingPredictor(members=1).fit(features, targets, seed=0).predict(features)
    assert kendall_tau(mean, torch.tensor([float(b) for b in bad])) > 0.4


def test_the_ensemble_is_less_sure_away_from_what_it_saw() -> None:
    features, errors = schedules(120)
    fitted = RankingPredictor(members=4, steps=40).fit(features, errors, seed=0)
    far = [f + 5.0 for f in features]
    assert fitted.predict(far)[1].mean() > 2 * fitted.predict(features)[1].mean()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from(ENCODERS), st.integers(0, 3))
def test_padding_and_company_change_nothing(lengths: list[int], encoder: str, more: int) -> None:
    torch.manual_seed(0)
    network = SequenceRanker(3, encoder, 8, 8, 8).eval()
    candidates = [torch.randn(length, 3) for length in lengths]
    features, mask = pad(candidates)
    features = torch.cat([features, torch.full((len(lengths), more, 3), 9.0)], dim=1)
    mask = torch.cat([mask, torch.zeros(len(lengths), more, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        together = network(features, mask)
        alone = torch.cat([network(*pad([candidate])) for candidate in candidates])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_order_of_steps_matters(encoder: str) -> None:
    torch.manual_seed(0)
    network = SequenceRanker(3, encoder, 8, 8, 8).eval()
    candidate = torch.randn(5, 3)
    with torch.no_grad():
        assert not torch.allclose(network(*pad([candidate])), network(*pad([candidate.flip(0)])), atol=1e-6)


def test_sinusoids_are_the_published_ones() -> None:
    table = sinusoids(7, 6)
    for position in range(7):
        for k in range(3):
            angle = position / 10_000 ** (2 * k / 6)
            assert float(table[position, k]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(table[position, 3 + k]) == pytest.approx(math.cos(angle), abs=1e-5)


STEP = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("candidates", "targets", "message"),
    [
        ([STEP, STEP], [1.0, 1.0], "two different targets"),
        ([STEP, STEP], [1.0, math.nan], "no NaN"),
        ([STEP, STEP], [1.0], "2 candidates have 1 targets"),
        ([STEP, torch.ones(2, 4)], [1.0, 2.0], r"candidate 1 must be .* \[2, 3\], got \[2, 4\]"),
        ([STEP, torch.ones(0, 3)], [1.0, 2.0], "candidate 1"),
        ([STEP, STEP * math.inf], [1.0, 2.0], "finite"),
    ],
)
def test_bad_training_data_is_refused(candidates: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankingPredictor(steps=1, members=1).fit(candidates, targets, seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"members": 0},
        {"encoder": "mlp"},
        {"subset": 0.0},
        {"batch_size": 0},
        {"margin": 0.0},
        {"min_difference_quantile": 1.0},
        {"lr": -1},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RankingPredictor(**settings)


def test_other_features_than_in_training_are_refused() -> None:
    fitted = RankingPredictor(steps=1, members=1).fit([STEP, 2 * STEP], [1.0, 2.0], seed=0)
    with pytest.raises(ValueError, match="trained on 3 features per step, got 4"):
        fitted.predict([torch.ones(2, 4)])
    with pytest.raises(ValueError, match="one candidate or more"):
        fitted.predict([])
