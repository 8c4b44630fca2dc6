"""One search for several budgets: the known optimum of each is found, and nothing but the history decides."""

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search.toy_search import WordSpace, run_search
from torch import Tensor

from genlight.diffusion.error_curves import ErrorCurve
from genlight.diffusion.model_schedule import ModelSchedule
from genlight.diffusion.noise_schedules import EDMSchedule, VPSchedule
from genlight.predictors.ranking import RankingPredictor
from genlight.search.budgets import BUDGETED, BudgetedSearch, DirectEvolution, WithBudget, within_budget
from genlight.search.evolution import Evolution
from genlight.search.proposing import RANDOM
from genlight.search.records import History, Problem, Record, Trial
from genlight.search.spaces.model_schedule import ModelScheduleSpace

COSTS = {"small": 1.0, "large": 3.0}
BUDGETS = (5.0, 8.0, 12.0)
MAX_EVALUATIONS = 5
SPACE = ModelScheduleSpace(EDMSchedule(), COSTS, max_evaluations=MAX_EVALUATIONS)
QUICK = Evolution(population=20, children=20)


def error(candidate: ModelSchedule) -> float:
    """Like that of a sampler: more steps and higher orders help, the large member does so in the middle only."""
    count, total = candidate.nfe, 1.5 / sum(len(step) ** 1.2 for step in candidate.steps)
    for index, name in enumerate(candidate.members):
        place = (index + 0.5) / count
        total += (0.2 if name == "large" else 0.2 + 0.8 * max(0.0, 0.4 - abs(place - 0.55))) / count
    return total


@cache
def every() -> tuple[ModelSchedule, ...]:
    """All schedules of the space."""
    contents = [step for order in (1, 2, 3) for step in product(COSTS, repeat=order)]

    def longer(steps: tuple[tuple[str, ...], ...], left: int) -> list[ModelSchedule]:
        own = [ModelSchedule("singlestep", steps)] if steps else []
        return own + [s for step in contents if len(step) <= left for s in longer((*steps, step), left - len(step))]

    return tuple(longer((), MAX_EVALUATIONS))


def optimum(budget: float, sign: float) -> float:
    return min(sign * error(each) for each in every() if SPACE.cost(each)["cost"] <= budget)


def best(records: Any, budget: float) -> float:
    return min(record.score for record in records if record.cost["cost"] <= budget)


def budgeted(**options: Any) -> BudgetedSearch:
    settings: dict[str, Any] = {
        "collect": 90, "per_budget": 10, "evolution": QUICK, "generations": 15,
        "predictor": RankingPredictor(members=2, steps=100),
    }  # fmt: skip
    return BudgetedSearch(BUDGETS, **{**settings, **options})


DIRECT = DirectEvolution(BUDGETS, evolution=Evolution(population=15, children=10, anneal_evaluations=120))


def test_the_toy_is_what_it_should_be() -> None:
    """Small enough to be tried, too large for the search to try it all; the optima differ and mix members."""
    assert len(every()) == len({SPACE.key(each) for each in every()}) == 570
    small, middle, large = (optimum(budget, 1.0) for budget in BUDGETS)
    assert small > middle > large
    mixed = min((each for each in every() if SPACE.cost(each)["cost"] <= 8), key=error)
    assert set(mixed.members) == set(COSTS)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["low", "high"])
@pytest.mark.parametrize("name", ["budgeted", "active", "direct"])
def test_the_optimum_of_each_budget_is_found(tmp_path: Path, name: str, sign: float) -> None:
    """Of the mirrored score too, which is the worst of the other: a lost sign would find the wrong end."""
    strategy: Any = {"budgeted": budgeted(), "active": budgeted(collect=60, rounds=2), "direct": DIRECT}[name]
    found = run_search(tmp_path, strategy, SPACE, lambda each: sign * error(each), 120)
    # fewer only where all schedules of a small budget were measured
    assert 100 <= len(found.records) <= 120
    room = 0.05 if name == "direct" else 0.02
    for budget in BUDGETS:
        worst = sorted(sign * error(each) for each in every() if SPACE.cost(each)["cost"] <= budget)
        assert best(found.records, budget) <= worst[0] + room * (worst[-1] - worst[0])
    assert max(record.cost["cost"] for record in found.records) <= BUDGETS[-1]


def test_rounds_measure_the_best_of_each_budget_and_then_end(tmp_path: Path) -> None:
    strategy = budgeted(rounds=2, per_budget=4, collect=50)
    found = run_search(tmp_path, strategy, SPACE, error, 500)
    assert found.stopped == "exhausted" and len(found.records) == 74
    assert {r.source for r in found.records[:50]} == {"random"}
    for first in (50, 62):
        for number, budget in enumerate(BUDGETS):
            part = found.records[first + 4 * number : first + 4 * number + 4]
            assert {record.source for record in part} == {f"{BUDGETED} {budget:g}"}
            assert all(record.cost["cost"] <= budget for record in part)
    # each random one was drawn for a budget in turn, unless that budget had nothing new
    drawn = [record.cost["cost"] <= BUDGETS[number % 3] for number, record in enumerate(found.records[:50])]
    assert sum(drawn) >= 40
    # what was chosen is better than what was drawn
    means = [sum(error(r.candidate) for r in part) / len(part) for part in (found.records[:50], found.records[50:])]
    assert means[1] < means[0]


@pytest.mark.parametrize("name", ["budgeted", "direct"])
def test_asking_is_a_function_of_the_history(tmp_path: Path, name: str) -> None:
    def fresh() -> Any:
        strategy = budgeted(collect=40, rounds=2, per_budget=5) if name == "budgeted" else DIRECT
        return replace(strategy)

    space = replace(SPACE)
    records = run_search(tmp_path, fresh(), space, error, 70).records
    problem, starts = Problem(space), {record.trial.generation: record.index for record in reversed(records)}
    assert len(starts) > 2 or name == "budgeted"
    for start in starts.values():
        part: History[ModelSchedule] = History(records[:start])
        first, second = fresh().ask(problem, part), fresh().ask(Problem(replace(SPACE)), part)
        assert first == second
        assert [p.candidate for p in first][: 70 - start] == [r.candidate for r in records[start : start + len(first)]]


@pytest.mark.parametrize("name", ["budgeted", "direct"])
def test_a_search_in_pieces_writes_the_same_archive(tmp_path: Path, name: str) -> None:
    strategy: Any = budgeted(collect=30, rounds=2, per_budget=4) if name == "budgeted" else DIRECT
    run_search(tmp_path / "whole", strategy, SPACE, error, 54)
    for evaluations in (1, 17, 31, 36, 54):
        run_search(tmp_path / "pieces", strategy, SPACE, error, evaluations)
    whole, pieces = ((tmp_path / part / "history.jsonl").read_bytes() for part in ("whole", "pieces"))
    assert whole == pieces


def test_a_round_may_measure_other_numbers_for_each_budget(tmp_path: Path) -> None:
    records = run_search(tmp_path, budgeted(collect=30, per_budget=(6, 3, 1), generations=3), SPACE, error, 40).records
    sources = [record.source for record in records[30:]]
    assert sources == [f"{BUDGETED} {budget:g}" for budget, count in zip(BUDGETS, (6, 3, 1)) for _ in range(count)]


class Spy(RankingPredictor):
    """Counts its fits, and the candidates of each prediction."""

    fits: list[int]
    predictions: list[int]

    def fit(self, candidates: Any, targets: Any, seed: int) -> Any:
        self.fits.append(len(targets))
        fitted = super().fit(candidates, targets, seed)
        spy = self

        class Counted:
            def predict(self, candidates: Any) -> Any:
                spy.predictions.append(len(candidates))
                return fitted.predict(candidates)

        return Counted()


def test_one_fit_serves_all_budgets_and_one_prediction_a_generation(tmp_path: Path) -> None:
    Spy.fits, Spy.predictions = [], []
    strategy = budgeted(collect=40, per_budget=2, predictor=Spy(members=1, steps=10), generations=7)
    run_search(tmp_path, strategy, SPACE, error, 46)
    assert Spy.fits == [40]
    assert len(Spy.predictions) <= len(BUDGETS) * 8 and max(Spy.predictions) == 20


class KnownErrors:
    """Predicts what the features say of the members' errors, so that evaluations without weight are ties."""

    def fit(self, candidates: Any, targets: Any, seed: int) -> "KnownErrors":
        return self

    def predict(self, candidates: Any) -> tuple[Tensor, Tensor]:
        mean = torch.stack([(2 * each[:, -2].double()).exp().sum().log() for each in candidates])
        return mean, torch.zeros_like(mean)


def test_a_round_measures_different_things() -> None:
    """Not the schedule predicted best with every member in the half-steps, which have no weight in the result."""
    curves = {name: ErrorCurve((-5.0, 5.0), (1e-5, 0.9 - 0.5 * place)) for place, name in enumerate(COSTS)}
    space = ModelScheduleSpace(VPSchedule(), COSTS, max_evaluations=12, curves=curves)
    records = run_records(space, 30)
    strategy = BudgetedSearch((8.0, 20.0), collect=30, evolution=QUICK, generations=15, predictor=KnownErrors())
    proposals = strategy.ask(Problem(space), History(records))
    assert len({space.key(each.candidate) for each in proposals}) == len(proposals) == 20

    def value(candidate: ModelSchedule) -> float:
        return round(float(KnownErrors().predict([space.encode(candidate)])[0]), 3)

    known = {value(record.candidate) for record in records}
    for part in (proposals[:10], proposals[10:]):
        values = [value(each.candidate) for each in part]
        assert len(set(values) - known) >= 5, values
    # where all are alike, as many are measured
    alike = ModelScheduleSpace(VPSchedule(), COSTS, max_evaluations=2, max_order=2, kinds=("singlestep",))
    few = BudgetedSearch((8.0,), collect=1, evolution=QUICK, generations=15, predictor=KnownErrors())
    left = few.ask(Problem(alike), History(run_records(alike, 1)))
    # one evaluation, two in one step (half of them alike), two in two steps
    assert len(left) == 9


def run_records(space: ModelScheduleSpace, count: int) -> list[Record[ModelSchedule]]:
    """Random schedules as if measured."""
    rng, found = np.random.default_rng(0), dict[str, Record[ModelSchedule]]()
    while len(found) < count:
        drawn = space.with_budget(8.0).sample(rng)
        place, key = len(found), space.key(drawn)
        trial = Trial(place, 0, key, drawn, 1, RANDOM, space.cost(drawn), (0, place))
        found.setdefault(key, Record(trial, error(drawn), {}, None))
    return list(found.values())


def test_failures_and_constant_scores_do_not_stop_it(tmp_path: Path) -> None:
    def fails(candidate: ModelSchedule) -> float:
        if candidate.members[0] == "large":
            raise RuntimeError("no")
        return error(candidate)

    found = run_search(tmp_path / "fails", budgeted(collect=40, per_budget=5), SPACE, fails, 55)
    assert found.failed and len(found.records) == 55
    assert not any(record.failure for record in found.records[45:])
    same = run_search(tmp_path / "same", budgeted(collect=20, per_budget=5), SPACE, lambda _: 1.0, 35)
    assert len(same.records) == 35 and same.records[-1].source == f"{BUDGETED} 12"


def test_seeds_count_and_a_small_space_ends_early(tmp_path: Path) -> None:
    seeds = [ModelSchedule("singlestep", (("small",),) * n) for n in range(1, 4)]
    found = run_search(tmp_path / "seeds", budgeted(collect=10, per_budget=1), SPACE, error, 13, initial=seeds)
    assert [record.source for record in found.records[:4]] == ["initial"] * 3 + ["random"] and len(found.records) == 13
    tiny = replace(SPACE, max_evaluations=1)
    for name, strategy in (("budgeted", budgeted(collect=10)), ("direct", DIRECT)):
        found = run_search(tmp_path / name, strategy, tiny, error, 100)
        assert found.stopped == "exhausted" and len(found.records) == 2


def test_a_space_without_budgets_is_limited_by_its_cost(tmp_path: Path) -> None:
    """Any space that reports the cost will do; candidates beyond it are made again."""
    assert isinstance(SPACE, WithBudget) and not isinstance(WordSpace(), WithBudget)
    strategy = BudgetedSearch(
        (2.0, 4.0),
        "sum",
        collect=12,
        per_budget=3,
        evolution=QUICK,
        generations=3,
        predictor=RankingPredictor(steps=10),
    )
    score = lambda word: float(abs(sum(word.letters) - 4) + word.letters[0])  # noqa: E731
    found = run_search(tmp_path / "words", strategy, WordSpace(), score, 18)
    assert len(found.records) == 18
    assert all(record.cost["sum"] <= (2.0 if record.source == f"{BUDGETED} 2" else 4.0) for record in found.records)
    direct = run_search(tmp_path / "direct", DirectEvolution((2.0, 4.0), "sum", QUICK), WordSpace(), score, 25)
    assert direct.best is not None and direct.best.score == 0 and max(r.cost["sum"] for r in direct.records) == 4
    with pytest.raises(ValueError, match=r"cost_limits\.price"):
        BudgetedSearch((1.0,), "price").ask(Problem(WordSpace()), History())


def test_a_lower_limit_of_the_problem_stays() -> None:
    problem = within_budget(Problem(SPACE, cost_limits={"cost": 5.0, "nfe": 3.0}), 8.0)
    assert problem.cost_limits == {"cost": 5.0, "nfe": 3.0}
    assert isinstance(problem.space, ModelScheduleSpace) and problem.space.budget == 5.0
    assert within_budget(problem, 2.0).cost_limits == {"cost": 2.0, "nfe": 3.0}


def test_other_fidelities_are_left_out(tmp_path: Path) -> None:
    records = run_search(tmp_path, budgeted(collect=40), SPACE, error, 40).records
    low = [Record(replace(r.trial, fidelity=2), -r.score if r.score else None, r.facts, r.failure) for r in records]
    strategy, problem = budgeted(collect=40, generations=3), Problem(SPACE)
    place = {"next_index": 80, "generation": 2}
    assert strategy.ask(problem, History([*low, *records], **place)) == strategy.ask(problem, History(records, **place))
    assert all(p.source == "random" for p in strategy.ask(problem, History(low, **place)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budgets": ()}, "strategy.budgets"),
        ({"budgets": (2.0, 1.0)}, "strategy.budgets"),
        ({"budgets": (0.0,)}, "strategy.budgets"),
        ({"collect": 0}, "strategy.collect"),
        ({"rounds": 0}, "strategy.rounds"),
        ({"per_budget": 0}, "strategy.per_budget"),
        ({"per_budget": (3, 2)}, "strategy.per_budget"),
        ({"per_budget": 2.5}, "strategy.per_budget"),
        ({"generations": 0}, "strategy.generations"),
        ({"kappa": -1.0}, "strategy.kappa"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetedSearch(**{"budgets": (1.0,), **options})
    with pytest.raises(ValueError, match=r"strategy\.budgets"):
        DirectEvolution((3.0, 3.0))


def test_threads_do_not_change_what_is_chosen(tmp_path: Path) -> None:
    records = run_search(tmp_path, budgeted(collect=40), SPACE, error, 40).records
    answers, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            answers.append(budgeted(collect=40, generations=3).ask(Problem(SPACE), History(records)))
    finally:
        torch.set_num_threads(threads)
    assert answers[0] == answers[1]
