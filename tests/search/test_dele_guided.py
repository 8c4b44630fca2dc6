"""DELE as the predictor of a search: pure, resumable, only where there are indicators, and worth its name on toys."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from search.test_budgets import BUDGETS, SPACE, budgeted, error
from search.toy_search import Counting, Schedule, ScheduleSpace, run_search, schedule_error

from genlight.diffusion.error_curves import ErrorCurve
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.errors import UserError
from genlight.loops.search import SearchSettings
from genlight.predictors.expert_training import ExpertTraining
from genlight.predictors.experts import ExpertSettings
from genlight.predictors.losses import kendall_tau
from genlight.search.dele import FEW_SAMPLES, DelePredictor, pool_of
from genlight.search.evolution import Evolution
from genlight.search.guided import GUIDED, PredictorGuided, described
from genlight.search.plan import PlainPlan
from genlight.search.records import History, Problem
from genlight.search.screening import Screening
from genlight.search.spaces.model_schedule import ModelScheduleSpace
from genlight.search.spaces.solver_plan import S3Settings
from genlight.search.spaces.solver_schedule import SolverScheduleSpace

SMALL = {"pool": 120, "network": ExpertSettings(width=16), "training": ExpertTraining(40, 30, 64)}
EVOLUTION = Evolution(20, 20, anneal_evaluations=100)


@dataclass(frozen=True)
class Indicated(ScheduleSpace):
    """The toy schedules with the errors of their times and of their choices alone, and one that says nothing."""

    @property
    def indicator_names(self) -> tuple[str, ...]:
        return "times", "kinds", "constant"

    def indicators(self, candidate: Schedule) -> Any:
        even = Schedule(candidate.times, (2, 3, 2, 3, 2, 3))
        best = Schedule(tuple(float(n * (n + 1) * (2 * n + 1) / 840) for n in range(1, 7)), candidate.kinds)
        return np.array([schedule_error(even), schedule_error(best), 1.0])


def dele(**options: Any) -> DelePredictor:
    return DelePredictor(**{**SMALL, **options})


def guided(**options: Any) -> PredictorGuided:
    return PredictorGuided(EVOLUTION, dele(**options), stage_size=20, min_measured=20)


@pytest.mark.parametrize("head", ["gp", "fusion"])
def test_asking_is_a_function_of_problem_and_history(tmp_path: Path, head: str) -> None:
    """A fresh copy, one whose experts are kept, other threads and another random state: the same proposals."""
    records = run_search(tmp_path, EVOLUTION, Indicated(), schedule_error, 60).records
    problem, history, strategy = Problem(Indicated()), History(records), guided(head=head)
    first = strategy.ask(problem, history)
    assert sum(p.source == GUIDED for p in first) == 14
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        torch.manual_seed(5)
        assert strategy.ask(problem, history) == first == guided(head=head).ask(problem, history)
    finally:
        torch.set_num_threads(threads)
    assert guided(head=head).ask(Problem(Indicated(), 1), history) != first


def test_experts_are_pretrained_once(tmp_path: Path) -> None:
    records = run_search(tmp_path, EVOLUTION, Indicated(), schedule_error, 80).records
    predictor, problem = dele(), Problem(Indicated())
    early, late = (predictor.described(problem, History(records[:count])) for count in (40, 80))
    assert early.predictor == late.predictor and len(predictor._kept) == 1
    predictor.described(Problem(Indicated(), 1), History(records))
    assert len(predictor._kept) == 2


def test_a_resumed_search_has_the_same_archive(tmp_path: Path) -> None:
    """Stopped in the middle of a guided stage, and continued by a new strategy."""
    whole = run_search(tmp_path / "whole", guided(), Indicated(), schedule_error, 70)
    run_search(tmp_path / "parts", guided(), Indicated(), schedule_error, 47)
    counting = Counting(schedule_error)
    again = run_search(tmp_path / "parts", guided(), Indicated(), counting, 70)
    assert len(counting.calls) == 23 and again.records == whole.records
    files = [(tmp_path / name / "history.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_space_without_indicators_is_named() -> None:
    with pytest.raises(UserError, match=r"search\.predictor=dele needs .* which ScheduleSpace does not have"):
        described(dele(), Problem(ScheduleSpace()), History())


def test_the_key_replaces_the_predictor_of_any_guided_strategy() -> None:
    for planner in (S3Settings(), PlainPlan(PredictorGuided())):
        changed: Any = SearchSettings(planner, predictor="dele").strategy
        assert isinstance(getattr(changed, "strategy", changed).predictor, DelePredictor)
        assert SearchSettings(planner).strategy is planner
    with pytest.raises(ValueError, match=r"search\.predictor: no predictor guides Evolution"):
        SearchSettings(PlainPlan(Evolution()), predictor="dele")
    with pytest.raises(ValueError, match=r"search\.predictor = 'best'"):
        SearchSettings(S3Settings(), predictor="best")  # type: ignore[arg-type]


def test_the_pool_holds_founders_and_nothing_twice() -> None:
    space, rng = Indicated(), np.random.default_rng(0)
    founders = [space.sample(rng) for _ in range(5)]
    pool = pool_of(Problem(space), founders, 100)
    assert pool[:5] == founders and len({space.key(each) for each in pool}) == 100
    assert pool == pool_of(Problem(space), founders, 100)
    assert len(pool_of(Problem(space), [], 50)) == 50


def test_what_was_screened_on_few_samples_has_an_expert(tmp_path: Path) -> None:
    """Of candidates that were not promoted too; the pool has them all, and predictions are others."""
    space, rng = Indicated(), np.random.default_rng(2)
    made = [space.sample(rng) for _ in range(30)]
    strategy = Screening(tuple(made), guided(), fidelity=4, promoted=25)
    records = run_search(tmp_path, strategy, space, schedule_error, 60, fidelity=16).records
    seen: list[History[Any]] = []

    class Asked:
        def ask(self, problem: Any, history: History[Any]) -> list[Any]:
            seen.append(history.at(problem.fidelity))
            return []

    problem = Problem(space, fidelity=16)
    Screening(tuple(made), Asked(), fidelity=4, promoted=25).ask(problem, History(records))
    history = seen[0]
    assert len(history.cheaper) == 30 and {record.fidelity for record in history.cheaper} == {4}
    predictor = dele()
    known, plain = (predictor.described(problem, each) for each in (history, History(history.records)))
    experts: Any = known.predictor.known  # type: ignore[attr-defined]
    assert experts.pool.names == ("times", "kinds", FEW_SAMPLES) and experts.columns == (0, 1)
    column = experts.pool.low_fidelity[:, 2]
    scores = sorted(record.score for record in history.cheaper)
    torch.testing.assert_close(column[~column.isnan()].sort().values, torch.tensor(scores))
    targets = [record.rank[0] for record in history]
    means = [
        each.predictor.fit([each.encode(r.candidate) for r in history], targets, 0).predict([each.encode(made[0])])[0]
        for each in (known, plain)
    ]
    assert not torch.equal(*means)


@pytest.mark.parametrize("head", ["gp", "fusion"])
def test_few_scores_order_many_candidates(head: str) -> None:
    """Twelve scores and the indicators: Kendall's τ above 0.25 on 200 others, and lower is better."""
    space, rng = Indicated(), np.random.default_rng(1)
    made = [space.sample(rng) for _ in range(212)]
    known = described(dele(head=head), Problem(space), History())
    features, scores = [known.encode(each) for each in made], [schedule_error(each) for each in made]
    mean, deviation = known.predictor.fit(features[:12], scores[:12], 0).predict(features[12:])
    assert kendall_tau(mean, torch.tensor(scores[12:])) > 0.25 and bool((deviation >= 0).all())


def test_failed_candidates_are_worse_than_all(tmp_path: Path) -> None:
    def fails(candidate: Schedule) -> float:
        if candidate.kinds[0] == 0:
            raise RuntimeError("no")
        return schedule_error(candidate)

    found = run_search(tmp_path, guided(), Indicated(), fails, 60)
    share = [np.mean([r.score is None for r in part]) for part in (found.records[:20], found.records[20:])]
    assert share[1] < share[0]


CURVES = {"small": ErrorCurve((-4.0, 4.0), (0.2, 0.6)), "large": ErrorCurve((-4.0, 4.0), (0.1, 0.3))}


def test_indicators_of_model_schedules() -> None:
    """The error of members is that of the allocation; costs are logarithms; a larger member promises less error."""
    space = ModelScheduleSpace(VPSchedule(), {"small": 1.0, "large": 3.0}, curves=CURVES)
    rng = np.random.default_rng(0)
    for _ in range(20):
        candidate = space.sample(rng)
        values = dict(zip(space.indicator_names, space.indicators(candidate), strict=True))
        cost = space.cost(candidate)
        assert values["cost"] == pytest.approx(-np.log(cost["cost"])) and values["nfe"] == -np.log(cost["nfe"])
        named = {"small": "large", "large": "large"}
        steps = tuple(tuple(named[name] for name in step) for step in candidate.steps)
        dear = dict(zip(space.indicator_names, space.indicators(type(candidate)(candidate.kind, steps))))
        assert dear["members"] <= values["members"]
        # the same steps are as wrong, whoever makes them
        assert dear["modes 0 spread 0.3"] == values["modes 0 spread 0.3"]
    plain = ModelScheduleSpace(VPSchedule(), {"small": 1.0, "large": 3.0})
    assert space.indicator_names == ("members", *plain.indicator_names) and plain.fingerprint() != space.fingerprint()


def test_budgets_are_searched_with_it_too(tmp_path: Path) -> None:
    strategy = budgeted(collect=40, per_budget=4, generations=4, predictor=dele(pool=60))
    found = run_search(tmp_path, strategy, SPACE, error, 40 + 4 * len(BUDGETS))
    assert len(found.records) == 40 + 4 * len(BUDGETS)


def test_indicators_of_solver_schedules_go_with_the_error() -> None:
    """On the mixture in sixteen dimensions, over hand-made schedules; the best one has Kendall's τ of 0.79."""
    from search.spaces.test_solver_plan import BASELINES, NFE, VP, objective

    space = SolverScheduleSpace(VP, NFE)
    made = [schedule for _, schedule in BASELINES]
    scores = [e.score for e in objective(0, 64).evaluate_many(made, 64)]
    indicators = np.stack([space.indicators(each) for each in made])
    taus = [kendalltau(column, scores).statistic for column in indicators.T]
    assert len(taus) == len(space.indicator_names) and max(taus) > 0.7


@pytest.mark.parametrize(
    "options, message",
    [({"pool": 5}, "pool"), ({"founders": 0}, "founders"), ({"head": "x"}, "head"),
     ({"network": ExpertSettings("lstm")}, "encoder")],
)  # fmt: skip
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dele(**options)
