"""Every strategy on small spaces with known optima, and the parts that make each what it is."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search.toy_search import (
    Counting,
    Schedule,
    ScheduleSpace,
    Word,
    WordSpace,
    rugged,
    run_search,
    schedule_error,
)

from genlight.errors import UserError
from genlight.predictors.ranking import RankingPredictor
from genlight.search.cma import CMAES
from genlight.search.codec import canonical_key
from genlight.search.evolution import Evolution
from genlight.search.guided import GUIDED, PredictorGuided
from genlight.search.halving import PROMOTION, SuccessiveHalving
from genlight.search.random_search import RandomSearch
from genlight.search.records import History, Problem, Record, Trial
from genlight.search.stages import Stage, Stages

TINY = RankingPredictor(members=2, steps=4, width=4, hidden=4, head_width=4)
DISCRETE: dict[str, Any] = {
    "random": RandomSearch(),
    "evolution": Evolution(10, 8),
    "guided": PredictorGuided(Evolution(10, 8), TINY, stage_size=10, min_measured=10, generations=2),
    "gaussian": PredictorGuided(Evolution(10, 8), stage_size=10, min_measured=10),
    "halving": SuccessiveHalving(RandomSearch(9), (1, 2), (1 / 3,)),
    "stages": Stages((Stage(RandomSearch(), 20), Stage(Evolution(10, 8)))),
}


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(list(DISCRETE)))
def test_a_small_space_is_searched_to_its_end(seed: int, name: str, tmp_path_factory: Any) -> None:
    """All words, each once: the winner is the one that brute force finds, though the scores have no structure."""
    objective = Counting(rugged)
    space = WordSpace(length=3)
    result = run_search(tmp_path_factory.mktemp("all"), DISCRETE[name], space, objective, 500, seed=seed)
    assert result.stopped == "exhausted"
    assert {word for word, fidelity in objective.calls if fidelity == 1} == set(space.all())
    assert len(objective.calls) == len(set(objective.calls))
    lowest = [r for r in result.records if r.fidelity == 1]
    assert min(lowest, key=lambda r: r.rank).candidate == min(space.all(), key=rugged)
    assert result.best and result.best.candidate == min(space.all(), key=rugged)


@pytest.mark.parametrize("name", DISCRETE)
def test_no_candidate_beyond_the_cost_limits_is_evaluated(name: str, tmp_path: Path) -> None:
    space = WordSpace()
    result = run_search(tmp_path, DISCRETE[name], space, rugged, 500, cost_limits={"sum": 3})
    allowed = [word for word in space.all() if sum(word.letters) <= 3]
    assert {r.candidate for r in result.records} == set(allowed)
    assert result.best and result.best.candidate == min(allowed, key=rugged)


def best_at(strategy: Any, folder: Path, seeds: range, function: Any = schedule_error, evaluations: int = 80) -> float:
    scores = []
    for seed in seeds:
        result = run_search(folder / str(seed), strategy, ScheduleSpace(), function, evaluations, seed=seed)
        assert result.best is not None and len(result.records) == evaluations
        scores.append(result.best.score)
    return float(np.mean(scores))


def test_guided_beats_unguided_beats_random_at_equal_evaluations(tmp_path: Path) -> None:
    evolution = Evolution(20, 20, anneal_evaluations=100)
    guided = PredictorGuided(evolution, stage_size=20, min_measured=20)
    seeds = range(6)
    means = [
        best_at(strategy, tmp_path / name, seeds, evaluations=120)
        for name, strategy in (("guided", guided), ("evolution", evolution), ("random", RandomSearch()))
    ]
    assert means[0] < 0.8 * means[1] and means[1] < means[2], means


def test_a_stage_holds_its_share_of_guided_candidates(tmp_path: Path) -> None:
    strategy = PredictorGuided(Evolution(10, 8), TINY, stage_size=10, min_measured=10, generations=2)
    records = run_search(tmp_path, strategy, ScheduleSpace(), schedule_error, 40).records
    assert [r.source == GUIDED for r in records] == [False] * 10 + ([True] * 7 + [False] * 3) * 3


def test_guidance_waits_until_there_is_something_to_learn(tmp_path: Path) -> None:
    strategy = PredictorGuided(Evolution(10, 8), TINY, stage_size=10, min_measured=10)
    records = run_search(tmp_path, strategy, ScheduleSpace(), lambda schedule: 1.0, 30).records
    assert not any(r.source == GUIDED for r in records)


def bowl(schedule: Schedule) -> float:
    return float(np.sum((np.array(schedule.times) - [0.1, 0.15, 0.3, 0.5, 0.8, 0.9]) ** 2))


class BoxSpace(ScheduleSpace):
    """Times in any order, so that the bowl is a bowl to CMA-ES."""

    def from_vector(self, vector: np.ndarray) -> Schedule:
        return self._made(vector, np.zeros(self.steps, dtype=int))

    def key(self, candidate: Schedule) -> str:
        return canonical_key(candidate)


def test_cma_es_finds_the_bottom_of_a_bowl(tmp_path: Path) -> None:
    found = run_search(tmp_path / "cma", CMAES(), BoxSpace(), bowl, 300)
    random = run_search(tmp_path / "random", RandomSearch(), BoxSpace(), bowl, 300)
    assert found.best and found.best.score is not None and random.best and random.best.score is not None
    assert found.best.score < 1e-3 < 10e-3 < random.best.score
    start = Schedule((0.1, 0.15, 0.3, 0.5, 0.8, 0.91), (0,) * 6)
    near = run_search(tmp_path / "near", CMAES(sigma=0.01), BoxSpace(), bowl, 40, initial=[start])
    assert near.best and near.best.score is not None and near.best.score <= bowl(start)
    assert np.mean([r.score for r in near.records]) < 0.01


@dataclass(frozen=True)
class CoarseSpace(ScheduleSpace):
    """A box with few candidates in it: CMA-ES meets most of them again and again."""

    steps: int = 2

    def from_vector(self, vector: np.ndarray) -> Schedule:
        return self._made(np.sort(np.round(vector * 3) / 3), np.zeros(2, dtype=int))


def test_cma_es_measures_no_point_twice_and_ends_where_there_are_no_more(tmp_path: Path) -> None:
    objective = Counting(lambda schedule: sum(schedule.times))
    result = run_search(tmp_path, CMAES(), CoarseSpace(), objective, 100)
    assert result.stopped == "exhausted" and len(objective.calls) == len(set(c for c, _ in objective.calls)) <= 10
    assert result.best and result.best.candidate.times == (0.0, 0.0)


def test_cma_es_survives_failures_and_limits(tmp_path: Path) -> None:
    def half(schedule: Schedule) -> float:
        return bowl(schedule) if schedule.times[0] < 0.2 else float("nan")

    result = run_search(tmp_path, CMAES(), ScheduleSpace(), half, 150, initial=[Schedule((0.1,) * 6, (0,) * 6)])
    assert result.failed and result.best and result.best.score < 0.05


def test_cma_es_needs_a_vector_view(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CMAES needs a space with a VectorView, which WordSpace does not offer"):
        run_search(tmp_path, CMAES(), WordSpace(), rugged, 5)


def test_halving_promotes_the_best_of_each_cohort_and_mixes_no_scores(tmp_path: Path) -> None:
    """Few samples are too kind by far, so any mixing of fidelities would show."""

    class Biased(Counting):
        def evaluate(self, candidate: Word, fidelity: int) -> Any:
            evaluation = super().evaluate(candidate, fidelity)
            return type(evaluation)(evaluation.score - 10 / fidelity)

    strategy = SuccessiveHalving(RandomSearch(9), (64, 256, 1024), (1 / 3, 1 / 9))
    result = run_search(tmp_path, strategy, WordSpace(), Biased(rugged), 39, fidelity=64)
    assert [r.fidelity for r in result.records] == ([64] * 9 + [256] * 3 + [1024]) * 3
    winners = []
    for begin in range(0, 39, 13):
        cohort, middle, last = (result.records[begin + a : begin + b] for a, b in ((0, 9), (9, 12), (12, 13)))
        order = sorted((r.candidate for r in cohort), key=rugged)
        assert [r.candidate for r in middle] == order[:3] and last[0].candidate == order[0]
        assert {r.source for r in (*middle, *last)} == {PROMOTION}
        winners.append(last[0])
    assert result.best == min(winners, key=lambda r: r.rank)
    assert result.samples == 3 * (9 * 64 + 3 * 256 + 1024)


def test_a_cohort_that_fails_is_followed_by_the_next(tmp_path: Path) -> None:
    def odd(word: Word) -> float:
        if sum(word.letters) % 2:
            raise RuntimeError
        return 1.0

    strategy = SuccessiveHalving(RandomSearch(1), (1, 2), (1.0,))
    records = run_search(tmp_path, strategy, WordSpace(), odd, 30).records
    for before, after in pairwise(records):
        promoted = before.fidelity == 1 and before.score is not None
        assert after.fidelity == (2 if promoted else 1)


def test_stages_take_turns_on_their_own_spaces(tmp_path: Path) -> None:
    class TimesOnly(ScheduleSpace):
        def sample(self, rng: np.random.Generator) -> Schedule:
            return Schedule(super().sample(rng).times, (0,) * self.steps)

        def mutate(self, candidate: Schedule, rng: np.random.Generator, *, size: float = 1.0) -> Schedule:
            return Schedule(super().mutate(candidate, rng, size=size).times, candidate.kinds)

    strategy = Stages((Stage(Evolution(8, 8), 25, TimesOnly()), Stage(Evolution(8, 8))))
    records = run_search(tmp_path, strategy, ScheduleSpace(), schedule_error, 60).records
    assert all(r.candidate.kinds == (0,) * 6 for r in records[:25])
    assert any(r.candidate.kinds != (0,) * 6 for r in records[25:])
    assert "TimesOnly(steps=6, kinds=4)" in repr(strategy) and "space=None" in repr(strategy)


def test_edits_shrink_and_tournaments_prefer_the_better() -> None:
    evolution = Evolution(edit_sizes=[1.0, 0.01], anneal_evaluations=100, tournament=3)  # type: ignore[arg-type]
    assert evolution.edit_sizes == (1.0, 0.01)
    sizes = [evolution.edit_size(index) for index in (0, 50, 100, 1000)]
    assert sizes == pytest.approx([1.0, 0.1, 0.01, 0.01])
    rng = np.random.default_rng(0)
    drawn = np.bincount([evolution.select(4, rng) for _ in range(4000)], minlength=4) / 4000
    # P(best of three ≥ k) = ((4 - k) / 4)³
    assert drawn == pytest.approx(-np.diff([((4 - k) / 4) ** 3 for k in range(5)]), abs=0.03)


def test_parents_are_the_best_ever_measured() -> None:
    space = WordSpace(length=6, alphabet=4)
    rng = np.random.default_rng(0)
    words = list({space.sample(rng) for _ in range(60)})
    records = [
        Record(Trial(i, i // 20, space.key(w), w, 1, "random", {}, (0, i)), rugged(w), {}, None)
        for i, w in enumerate(words)
    ]
    elite = sorted(words, key=rugged)[:5]
    problem = Problem(space, seed=3)
    for proposal in Evolution(5, 40, crossover_probability=0.0).ask(problem, History(records)):
        distances = [sum(a != b for a, b in zip(w.letters, proposal.candidate.letters)) for w in elite]
        assert min(distances) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomSearch(0), "generation_size = 0"),
        (lambda: Evolution(population=0), "population = 0"),
        (lambda: Evolution(crossover_probability=1.5), r"crossover_probability = 1.5 must lie in \[0, 1\]"),
        (lambda: Evolution(edit_sizes=(0.0, 1.0)), "edit_sizes"),
        (lambda: CMAES(sigma=0.0), "sigma = 0.0"),
        (lambda: CMAES(population_size=2), "population_size = 2"),
        (lambda: PredictorGuided(guided_fraction=2.0), "guided_fraction = 2.0"),
        (lambda: PredictorGuided(min_measured=1), "min_measured = 1"),
        (lambda: PredictorGuided(children_per_place=0), "children_per_place = 0"),
        (lambda: PredictorGuided(kappa=-1.0), "kappa = -1.0"),
        (lambda: SuccessiveHalving(RandomSearch(), (64, 64), (0.5,)), "must increase"),
        (lambda: SuccessiveHalving(RandomSearch(), (1, 2), (0.5, 0.2)), "1 shares"),
        (lambda: SuccessiveHalving(RandomSearch(), (1, 2, 4), (0.2, 0.5)), "not increasing"),
        (lambda: Stages((Stage(RandomSearch()), Stage(RandomSearch()))), "all but the last"),
        (lambda: Stage(RandomSearch(), 0), "evaluations = 0"),
        (lambda: Problem(WordSpace(), seed=-1), "seed = -1"),
        (lambda: Problem(WordSpace(), fidelity=0), "fidelity = 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_halving_needs_its_first_fidelity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"search.fidelity = 1 must be strategy.fidelities\[0\] = 64"):
        run_search(tmp_path, SuccessiveHalving(RandomSearch()), WordSpace(), rugged, 5)
