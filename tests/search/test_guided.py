"""What a stage chooses: the candidates that are worth most, and not one idea many times."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search.toy_search import Schedule, ScheduleSpace, run_search, schedule_error

from genlight.predictors.gaussian_process import GaussianProcessPredictor
from genlight.predictors.ranking import RankingPredictor
from genlight.search.evolution import Evolution
from genlight.search.guided import GUIDED, JointlyFitted, PredictorGuided, choose
from genlight.search.records import History, Problem, Record, Trial


class Known:
    """A predictor that knows mean and covariance of numbered candidates."""

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        self.mean, self.matrix = mean, covariance

    def predict(self, candidates: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [int(candidate) for candidate in candidates]
        return self.mean[rows], self.matrix.diagonal()[rows].sqrt()

    def covariance(self, candidates: Any) -> torch.Tensor:
        rows = [int(candidate) for candidate in candidates]
        return self.matrix[rows][:, rows]


def candidates(count: int) -> list[torch.Tensor]:
    return [torch.tensor(number) for number in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 8), st.sampled_from([0.0, 0.5, 2.0]))
def test_each_choice_is_the_best_given_the_ones_before(seed: int, count: int, kappa: float) -> None:
    """Against the posterior of a joint normal distribution, by the formula."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(count, count))
    mean, covariance = rng.normal(size=count), root @ root.T + 0.1 * np.eye(count)
    chosen = choose(Known(torch.tensor(mean), torch.tensor(covariance)), candidates(count), count, kappa)
    assert sorted(chosen) == list(range(count))
    for number, pick in enumerate(chosen):
        known = chosen[:number]
        gain = np.linalg.solve(covariance[np.ix_(known, known)], covariance[known]) if known else np.zeros((0, count))
        left = np.diag(covariance - covariance[:, known] @ gain).clip(min=0)
        worth = mean - kappa * np.sqrt(left)
        open_ones = [n for n in range(count) if n not in known]
        assert worth[pick] == pytest.approx(min(worth[open_ones]), abs=1e-6)


def test_twins_are_not_measured_together() -> None:
    mean, deviation = torch.tensor([0.0, 0.0, 0.5, 1.0]), torch.eye(4)
    deviation[0, 1] = deviation[1, 0] = 0.999
    assert choose(Known(mean, deviation), candidates(4), 3, 2.0) == [0, 2, 3]
    fitted = Known(mean, deviation)
    without = type("Alone", (), {"predict": fitted.predict})()
    assert not isinstance(without, JointlyFitted)
    assert choose(without, candidates(4), 3, 2.0) == [0, 1, 2]
    assert choose(without, candidates(2), 5, 2.0) == [0, 1]


def records(fidelities: list[int], scores: list[float | None]) -> list[Record[Schedule]]:
    space, rng = ScheduleSpace(), np.random.default_rng(0)
    made = [space.sample(rng) for _ in scores]
    return [
        Record(Trial(i, i // 10, space.key(c), c, f, "random", {}, (0, i)), s, {}, None)
        for i, (c, f, s) in enumerate(zip(made, fidelities, scores))
    ]


def test_the_predictor_sees_one_fidelity_only() -> None:
    """Scores of few samples are of another scale, and of candidates that may be measured again."""
    seen: list[Any] = []

    class Spy(GaussianProcessPredictor):
        def fit(self, candidates: Any, targets: Any, seed: int = 0) -> Any:
            seen.append(list(targets))
            return super().fit(candidates, targets, seed)

    low, high = [float(n) for n in range(100, 130)], [float(n) for n in range(20)]
    mixed = records([1] * 30 + [4] * 20, [*low, *high])
    strategy = PredictorGuided(Evolution(5, 5), Spy(), stage_size=10, min_measured=20)
    problem = Problem(ScheduleSpace(), fidelity=4)
    proposals = strategy.ask(problem, History(mixed))
    assert seen == [high] and [p.fidelity for p in proposals] == [4] * 10
    alone = History(mixed[30:], next_index=50, generation=5)
    assert proposals == strategy.ask(problem, alone)
    fewer = PredictorGuided(Evolution(5, 5), Spy(), stage_size=10, min_measured=21)
    assert not any(p.source == GUIDED for p in fewer.ask(problem, History(mixed)))


def test_more_generations_predict_better_candidates(tmp_path: Path) -> None:
    """Bred on the prediction alone, children of children are predicted better than children."""
    found = run_search(tmp_path, Evolution(10, 10), ScheduleSpace(), schedule_error, 60)
    means = []
    for generations in (1, 5):
        strategy = PredictorGuided(Evolution(10, 10), stage_size=10, generations=generations, kappa=0.0)
        problem = Problem(ScheduleSpace())
        guided = [p for p in strategy.ask(problem, History(found.records)) if p.source == GUIDED]
        features = [ScheduleSpace().encode(r.candidate) for r in found.records]
        fitted = GaussianProcessPredictor().fit(features, [r.rank[0] for r in found.records])
        means.append(float(fitted.predict([ScheduleSpace().encode(p.candidate) for p in guided])[0].mean()))
    assert means[1] < means[0]


def test_the_ranking_ensemble_guides_too(tmp_path: Path) -> None:
    """Better than plain evolution at equal evaluations, mean over seeds."""
    evolution = Evolution(20, 20, anneal_evaluations=100)
    ensemble = RankingPredictor(members=2, steps=60)
    guided = PredictorGuided(evolution, ensemble, stage_size=20, min_measured=20)
    means = []
    for name, strategy in (("guided", guided), ("plain", evolution)):
        results = [
            run_search(tmp_path / f"{name}{seed}", strategy, ScheduleSpace(), schedule_error, 100, seed=seed)
            for seed in range(3)
        ]
        means.append(np.mean([r.best.score for r in results if r.best and r.best.score is not None]))
    assert means[0] < means[1], means
