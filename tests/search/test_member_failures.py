"""A member that raises: the failure is written down as its own, and what is proposed later does without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from search.toy_search import FINGERPRINT

from genlight.diffusion.model_schedule import ModelSchedule
from genlight.diffusion.noise_schedules import EDMSchedule
from genlight.errors import UserError
from genlight.predictors.ranking import RankingPredictor
from genlight.search.budgets import BudgetedSearch, DirectEvolution
from genlight.search.engine import Budget, FailureLimits, Search, SearchFailedError, SearchResult, open_archive
from genlight.search.evaluation import one_by_one
from genlight.search.evolution import Evolution
from genlight.search.member_failures import MEMBER, WithoutFailed, failed_members, naming_members
from genlight.search.protocols import Evaluation, Strategy
from genlight.search.records import PART, Problem
from genlight.search.spaces.model_schedule import ModelScheduleSpace

COSTS = {"small": 1.0, "middle": 2.0, "large": 3.0}
SPACE = ModelScheduleSpace(EDMSchedule(), COSTS, 9.0, max_evaluations=5)
BUDGETS = (3.0, 9.0)


class Members:
    """An objective over members of which one raises; fewer evaluations are better."""

    def __init__(self, broken: str, error: Exception, elsewhere: bool = False) -> None:
        self.broken, self.error, self.elsewhere = broken, error, elsewhere
        self.failed: str | None = None

    def evaluate(self, candidate: ModelSchedule, fidelity: int) -> Evaluation:
        if self.broken in candidate.members:
            self.failed = None if self.elsewhere else self.broken
            raise self.error
        return Evaluation(float(candidate.nfe))


def search(folder: Path, members: Members, strategy: Strategy, count: int = 60, **options) -> SearchResult:
    problem = Problem(SPACE)
    archive = open_archive(folder, problem, strategy, fingerprint=FINGERPRINT)
    evaluate = naming_members(one_by_one(members), members)
    return Search(problem, strategy, archive, evaluate, workers=4, **options).run(Budget(count))


def budgeted(**options) -> BudgetedSearch:
    quick = {"evolution": Evolution(population=10, children=10), "generations": 3}
    return BudgetedSearch(
        BUDGETS, collect=30, per_budget=5, rounds=2, predictor=RankingPredictor(members=1, steps=10), **quick, **options
    )


@pytest.mark.parametrize("name", ["budgeted", "direct"])
@pytest.mark.parametrize("broken", list(COSTS))
def test_later_generations_do_without_the_member(tmp_path: Path, name: str, broken: str) -> None:
    inner = budgeted() if name == "budgeted" else DirectEvolution(BUDGETS, evolution=Evolution(5, 5))
    found = search(tmp_path, Members(broken, torch.OutOfMemoryError("1 GiB")), WithoutFailed(inner, BUDGETS[0]))
    failures = [record for record in found.records if record.failure is not None]
    # all of one generation: the first that has such schedules
    assert failures and len({record.trial.generation for record in failures}) == 1
    assert {(record.failure.kind, record.facts[MEMBER]) for record in failures if record.failure} == {(PART, broken)}
    assert failed_members(found.records) == {broken: "OutOfMemoryError"}
    assert all(broken in record.candidate.members for record in failures)
    assert len(found.records) - len(failures) >= 30


def test_the_same_search_in_pieces_leaves_out_the_same(tmp_path: Path) -> None:
    def run(folder: str, count: int) -> None:
        search(tmp_path / folder, Members("middle", RuntimeError("gone")), WithoutFailed(budgeted(), BUDGETS[0]), count)

    run("whole", 60)
    for count in (3, 20, 31, 44, 60):
        run("pieces", count)
    whole, pieces = ((tmp_path / name / "history.jsonl").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces


def test_a_failure_outside_of_members_is_the_candidates_own(tmp_path: Path) -> None:
    members = Members("large", RuntimeError("full"), elsewhere=True)
    found = search(tmp_path, members, WithoutFailed(budgeted(), BUDGETS[0]))
    kinds = {record.failure.kind for record in found.records if record.failure}
    assert kinds == {"exception"} and failed_members(found.records) == {}


@pytest.mark.parametrize("elsewhere", [True, False])
def test_only_failures_of_candidates_end_a_search(tmp_path: Path, elsewhere: bool) -> None:
    members = Members("small", RuntimeError("gone"), elsewhere)
    limits = FailureLimits(window=10, share=0.1)
    strategy = WithoutFailed(budgeted(), BUDGETS[0])
    if elsewhere:
        with pytest.raises(SearchFailedError):
            search(tmp_path, members, strategy, limits=limits)
    else:
        assert search(tmp_path, members, strategy, limits=limits).best is not None


def test_a_budget_that_the_others_cannot_keep_ends_the_search(tmp_path: Path) -> None:
    strategy = WithoutFailed(
        BudgetedSearch((1.0, 9.0), collect=10, predictor=RankingPredictor(members=1, steps=10)), 1.0
    )
    with pytest.raises(UserError, match=r"cannot go on without the members that failed, small \(RuntimeError: gone\)"):
        search(tmp_path, Members("small", RuntimeError("gone")), strategy)


def test_a_space_without_members_knows_only_the_others() -> None:
    rest = SPACE.without(["middle"])
    assert rest.names == ("small", "large") and rest.budget == SPACE.budget
    with pytest.raises(ValueError, match=r"'middle' is not in space.costs"):
        rest.cost(ModelSchedule("singlestep", (("middle",),)))
    with pytest.raises(ValueError, match=r"space.costs = \{\} must name one member or more"):
        SPACE.without(COSTS)
