"""S³ as a whole: what it proposes in which stage, and that it beats every hand-made schedule on noise it never saw."""

from pathlib import Path

import pytest
import torch
from diffusion.solver.mixture import network
from oracles.gaussian import GaussianMixture

from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.predictors.ranking import RankingPredictor
from genlight.search.cma import CMAES
from genlight.search.engine import INITIAL, Budget, Search, SearchResult, open_archive
from genlight.search.evaluation import in_one_batch, one_by_one
from genlight.search.guided import GUIDED
from genlight.search.protocols import Strategy
from genlight.search.records import Problem
from genlight.search.spaces.solver_objective import TeacherObjective, make_teacher_bank
from genlight.search.spaces.solver_plan import (
    CORE_SOLVERS,
    PLAIN_SPACINGS,
    S3Settings,
    baselines,
    s3_stages,
)
from genlight.search.spaces.solver_schedule import SolverScheduleSpace

VP = VPSchedule()
PREDICTION = Prediction("epsilon", VP)
NFE, DIMENSIONS = 5, 16
QUICK = RankingPredictor(members=2, steps=30)


def mixture() -> GaussianMixture:
    """Six broad modes in sixteen dimensions: smooth enough that a search bank speaks for other noise."""
    means = torch.randn(6, DIMENSIONS, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 0.5
    return GaussianMixture(torch.full((6,), 1 / 6).double(), means, torch.linspace(0.42, 0.78, 6).double())


def objective(seed: int, count: int) -> TeacherObjective:
    noise = torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = network(PREDICTION, mixture())
    return TeacherObjective(model, PREDICTION, make_teacher_bank(model, PREDICTION, noise), max_rows=8192)


BASELINES = baselines(VP, NFE, solvers=CORE_SOLVERS, spacings=PLAIN_SPACINGS)


def run(folder: Path, space: SolverScheduleSpace, strategy: Strategy, initial, budget: Budget) -> SearchResult:
    bank = objective(0, 128)
    problem = Problem(space, 0, 128)
    archive = open_archive(folder, problem, strategy, initial, fingerprint={"objective": "teacher"})
    evaluate = in_one_batch(bank, one_by_one(bank))
    return Search(problem, strategy, archive, evaluate, initial, workers=32).run(budget)


def test_search_beats_every_baseline_on_held_out_noise(tmp_path: Path) -> None:
    """NFE 5, 200 evaluations; the best baseline is even chosen on the held-out noise."""
    space = SolverScheduleSpace(VP, NFE)
    settings = S3Settings(predictor=QUICK)
    plan = s3_stages(space, 200, [schedule for _, schedule in BASELINES], settings)
    result = run(tmp_path, space, plan.strategy, plan.initial, plan.budget)
    assert result.best is not None and result.failed == 0
    assert len(result.records) == len(BASELINES) + 200 == plan.budget.evaluations
    # times alone in the first half: decisions are those of a baseline
    known = {schedule.steps for schedule in plan.initial}
    half = result.records[len(BASELINES) : len(BASELINES) + 100]
    assert all(record.candidate.steps in known for record in half)
    assert any(record.candidate.steps not in known for record in result.records)
    sources = [record.source for record in result.records]
    assert sources.count(INITIAL) == len(BASELINES) and 100 < sources.count(GUIDED) < 180
    held_out = objective(1, 256)
    best_baseline = min(e.score for e in held_out.evaluate_many([s for _, s in BASELINES], 256))
    assert best_baseline / held_out.evaluate(result.best.candidate, 256).score > 1.05


def test_cma_es_walks_the_times(tmp_path: Path) -> None:
    space = SolverScheduleSpace(VP, NFE, genes=("times",))
    start = space.from_vector(space.to_vector(BASELINES[0][1]))
    result = run(tmp_path, space, CMAES(sigma=0.3), [start], Budget(80))
    assert result.best is not None and result.best.score is not None
    assert result.best.score < 0.9 * (result.records[0].score or 0)


def test_stages_share_the_budget() -> None:
    space = SolverScheduleSpace(VP, NFE)
    initial = [schedule for _, schedule in BASELINES[:10]]
    plan = s3_stages(space, 1000, [*initial, *initial])
    assert plan.initial == tuple(initial) and plan.budget == Budget(1010)
    stages = plan.strategy.stages
    lengths = [stage.evaluations for stage in stages]
    assert lengths[-1] is None and sum(length or 0 for length in lengths) + 40 == pytest.approx(1010, abs=3)
    sizes = [stage.strategy.evolution.edit_sizes[0] for stage in stages]
    kinds = [stage.space.genes == ("times",) for stage in stages]
    assert kinds == sorted(kinds, reverse=True) and kinds.count(True) == 13
    assert sizes[0] == sizes[13] == pytest.approx(0.45) and sizes[12] == sizes[-1] == pytest.approx(0.05)
    assert [stages[i].strategy.evolution.population for i in (0, -1)] == [20, 12]
    for genes in (("times",), ("type", "order")):
        only = s3_stages(SolverScheduleSpace(VP, NFE, genes=genes), 100, initial)
        assert all(stage.space.genes == genes for stage in only.strategy.stages)
    assert len(s3_stages(SolverScheduleSpace(VP, NFE), 3, initial).strategy.stages) == 2


def test_wrong_settings_are_named() -> None:
    space = SolverScheduleSpace(VP, NFE)
    with pytest.raises(ValueError, match=r"s3\.evaluations"):
        s3_stages(space, 0)
    with pytest.raises(ValueError, match=r"s3\.times_share"):
        S3Settings(times_share=2.0)
    with pytest.raises(ValueError, match=r"s3\.stage_size"):
        S3Settings(stage_size=0)
    with pytest.raises(ValueError, match="unknown are"):
        baselines(VP, 5, solvers=("euler",))
