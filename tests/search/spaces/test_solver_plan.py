"""S³ as a whole: what it proposes in which stage, and that it beats every hand-made schedule on noise it never saw."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import network
from oracles.gaussian import GaussianMixture

from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.spacings import are_integers
from genlight.diffusion.solver.teacher import NetworkSampling
from genlight.predictors.gaussian_process import GaussianProcessPredictor
from genlight.predictors.losses import kendall_tau
from genlight.predictors.ranking import RankingPredictor
from genlight.search.cma import CMAES
from genlight.search.engine import Budget, Search, SearchResult, open_archive
from genlight.search.evaluation import in_one_batch
from genlight.search.evolution import Evolution
from genlight.search.guided import GUIDED
from genlight.search.halving import PROMOTION
from genlight.search.plan import PlainPlan, SearchPlan
from genlight.search.polish import Polish
from genlight.search.protocols import Strategy
from genlight.search.records import Problem
from genlight.search.screening import SCREENING, Screening
from genlight.search.spaces.solver_objective import TeacherObjective, make_teacher_bank
from genlight.search.spaces.solver_plan import (
    CORE_SOLVERS,
    PLAIN_SPACINGS,
    S3Settings,
    baselines,
)
from genlight.search.spaces.solver_schedule import SolverScheduleSpace
from genlight.search.stages import Stage

VP = VPSchedule()
PREDICTION = Prediction("epsilon", VP)
NFE, DIMENSIONS = 5, 16
FIDELITY = 128


def mixture() -> GaussianMixture:
    """Six broad modes in sixteen dimensions: smooth enough that a search bank speaks for other noise."""
    means = torch.randn(6, DIMENSIONS, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 0.5
    return GaussianMixture(torch.full((6,), 1 / 6).double(), means, torch.linspace(0.42, 0.78, 6).double())


def objective(seed: int, count: int) -> TeacherObjective:
    noise = torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = network(PREDICTION, mixture())
    sampling = NetworkSampling(model, PREDICTION)
    return TeacherObjective(sampling, make_teacher_bank(sampling, noise), max_rows=8192)


BASELINES = baselines(VP, NFE, solvers=CORE_SOLVERS, spacings=PLAIN_SPACINGS)


def run(folder: Path, space: SolverScheduleSpace, strategy: Strategy, initial, budget: Budget) -> SearchResult:
    bank = objective(0, FIDELITY)
    problem = Problem(space, 0, FIDELITY)
    archive = open_archive(folder, problem, strategy, initial, fingerprint={"objective": "teacher"})
    evaluate = in_one_batch(bank)
    return Search(problem, strategy, archive, evaluate, initial, workers=32).run(budget)


def test_search_beats_every_baseline_on_held_out_noise(tmp_path: Path) -> None:
    """NFE 5, 200 evaluations; the best baseline is even chosen on the held-out noise."""
    space = SolverScheduleSpace(VP, NFE)
    made = [schedule for _, schedule in BASELINES]
    plan = S3Settings(screening_fidelity=32, promoted=30).plan(space, 200, made)
    result = run(tmp_path, space, plan.strategy, plan.initial, plan.budget)
    assert result.best is not None and result.failed == 0
    assert len(result.records) == len(BASELINES) + 30 + 200 == plan.budget.evaluations
    assert result.samples == sum(plan.rows(FIDELITY))
    # times alone in the first half: decisions are those of a baseline
    known, begun = {schedule.steps for schedule in made}, len(BASELINES) + 30
    assert all(record.candidate.steps in known for record in result.records[begun : begun + 100])
    assert any(record.candidate.steps not in known for record in result.records)
    sources = [record.source for record in result.records]
    assert sources[:begun] == [SCREENING] * len(BASELINES) + [PROMOTION] * 30 and 100 < sources.count(GUIDED) < 180
    assert {record.fidelity for record in result.records[len(BASELINES) :]} == {FIDELITY}
    held_out = objective(1, 256)
    best_baseline = min(e.score for e in held_out.evaluate_many([s for _, s in BASELINES], 256))
    assert best_baseline / held_out.evaluate(result.best.candidate, 256).score > 1.05


def test_predictors_order_schedules_that_were_not_measured() -> None:
    """Children and grandchildren of hand-made schedules, of which some were measured."""
    space, rng, bank = SolverScheduleSpace(VP, NFE), np.random.default_rng(0), objective(0, 32)
    made = [BASELINES[n % len(BASELINES)][1] for n in range(420)]
    for size in (0.4, 0.2):
        made = [space.mutate(schedule, rng, size=size) for schedule in made]
    scores = [evaluation.score for evaluation in bank.evaluate_many(made, 32)]
    features = [space.encode(schedule) for schedule in made]
    for predictor in (GaussianProcessPredictor(), RankingPredictor()):
        mean, _ = predictor.fit(features[:300], scores[:300], 0).predict(features[300:])
        assert kendall_tau(mean, torch.tensor(scores[300:])) > 0.4


def test_cma_es_walks_the_times(tmp_path: Path) -> None:
    space = SolverScheduleSpace(VP, NFE, genes=("times",))
    start = space.from_vector(space.to_vector(BASELINES[0][1]))
    result = run(tmp_path, space, CMAES(sigma=0.3), [start], Budget(80))
    assert result.best is not None and result.best.score is not None
    assert result.best.score < 0.9 * (result.records[0].score or 0)


def stages_of(plan: SearchPlan) -> tuple[Stage, ...]:
    strategy: Any = plan.strategy
    return tuple(strategy.strategy.stages if isinstance(strategy, Screening) else strategy.stages)


def test_stages_share_the_budget() -> None:
    space = SolverScheduleSpace(VP, NFE)
    initial = [schedule for _, schedule in BASELINES[:10]]
    plan = S3Settings().plan(space, 1000, [*initial, *initial])
    assert plan.initial == tuple(initial) and plan.budget == Budget(1010)
    stages: Any = stages_of(plan)
    lengths = [stage.evaluations for stage in stages]
    assert lengths[-1] is None and sum(length or 0 for length in lengths) + 40 == pytest.approx(1010, abs=3)
    sizes = [stage.strategy.evolution.edit_sizes[0] for stage in stages]
    kinds = [stage.space.genes == ("times",) for stage in stages]
    assert kinds == sorted(kinds, reverse=True) and kinds.count(True) == 13
    assert sizes[0] == sizes[13] == pytest.approx(0.45) and sizes[12] == sizes[-1] == pytest.approx(0.05)
    assert [stages[i].strategy.evolution.population for i in (0, -1)] == [20, 12]
    for genes in (("times",), ("type", "order")):
        only = S3Settings().plan(SolverScheduleSpace(VP, NFE, genes=genes), 100, initial)
        assert all(stage.space is not None and stage.space.genes == genes for stage in stages_of(only))  # type: ignore[attr-defined]
    assert len(stages_of(S3Settings().plan(SolverScheduleSpace(VP, NFE), 3, initial))) == 2


@pytest.mark.parametrize("planner", [S3Settings(promoted=4), PlainPlan(Evolution(8, 8), promoted=4)])
def test_initial_candidates_are_screened_if_there_are_many(planner: Any) -> None:
    space = SolverScheduleSpace(VP, NFE)
    initial = tuple(schedule for _, schedule in BASELINES[:10])
    plan = planner.plan(space, 100, [*initial, *initial])
    assert plan.initial == () and plan.budget == Budget(10 + 4 + 100) and plan.rows(256) == (10 * 64, 104 * 256)
    assert isinstance(plan.strategy, Screening)
    assert (plan.strategy.candidates, plan.strategy.fidelity, plan.strategy.promoted) == (initial, 64, 4)
    few = planner.plan(space, 100, initial[:4])
    assert few.initial == initial[:4] and few.budget == Budget(104) and few.rows(256) == (0, 104 * 256)
    assert not isinstance(few.strategy, Screening)
    full = replace(planner, screening_fidelity=None).plan(space, 100, initial)
    assert full.initial == initial and full.budget == Budget(110)
    if isinstance(planner, S3Settings):
        first = [stages_of(p)[0].evaluations for p in (plan, few, full)]
        assert first == [24, 14, 20]
    else:
        assert full.strategy == few.strategy == planner.strategy == plan.strategy.strategy


def test_a_plan_without_initial_candidates_makes_them() -> None:
    space = SolverScheduleSpace(VP, 3)
    made = tuple(schedule for _, schedule in baselines(VP, 3, spacings=PLAIN_SPACINGS))
    assert S3Settings().plan(space, 10).strategy.candidates == made  # type: ignore[attr-defined]
    whole = S3Settings().plan(replace(space, integer_times=True), 10).strategy.candidates  # type: ignore[attr-defined]
    assert len(whole) > 20 and all(are_integers(schedule.times) and schedule.nfe == 3 for schedule in whole)
    plain = PlainPlan(Evolution()).plan(space, 10)
    assert (plain.strategy, plain.initial, plain.budget) == (Evolution(), (), Budget(10))


def test_polishing_has_the_last_evaluations() -> None:
    space = SolverScheduleSpace(VP, NFE)
    initial = [schedule for _, schedule in BASELINES[:10]]
    stages = stages_of(S3Settings(polish=41).plan(space, 141, initial))
    assert stages[-1] == Stage(Polish(2, 21)) and sum(stage.evaluations or 0 for stage in stages) == 110
    assert stages[:-2] == stages_of(S3Settings().plan(space, 100, initial))[:-1]


def test_plain_evolution_is_a_setting() -> None:
    plan = S3Settings(guided_fraction=0.0).plan(SolverScheduleSpace(VP, NFE), 100, [BASELINES[0][1]])
    assert all(isinstance(stage.strategy, Evolution) for stage in stages_of(plan))


def test_wrong_settings_are_named() -> None:
    space = SolverScheduleSpace(VP, NFE)
    with pytest.raises(ValueError, match=r"search\.budget = 0"):
        S3Settings().plan(space, 0, [])
    with pytest.raises(ValueError, match=r"search\.budget = 0"):
        PlainPlan(Evolution()).plan(space, 0, [])
    with pytest.raises(ValueError, match=r"search\.budget = 30 must be above strategy\.polish = 30"):
        S3Settings(polish=30).plan(space, 30, [])
    for options in (
        {"times_share": 2.0},
        {"stage_size": 0},
        {"promoted": 0},
        {"polish": -1},
        {"screening_fidelity": 0},
    ):
        with pytest.raises(ValueError, match=rf"strategy\.{next(iter(options))}"):
            S3Settings(**options)  # type: ignore[arg-type]
    for options in ({"promoted": 0}, {"screening_fidelity": 0}):
        with pytest.raises(ValueError, match=rf"strategy\.{next(iter(options))}"):
            PlainPlan(Evolution(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown are"):
        baselines(VP, 5, solvers=("euler",))
