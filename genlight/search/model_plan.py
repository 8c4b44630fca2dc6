"""Plans of searches that have several budgets at once: what OMS-DPM is given beside its space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from genlight.predictors.ranking import RankingPredictor
from genlight.search.budgets import BudgetedSearch, DirectEvolution
from genlight.search.engine import Budget
from genlight.search.evolution import Evolution
from genlight.search.guided import OfProblem, Predictor
from genlight.search.plan import SearchPlan, without_duplicates


@dataclass(frozen=True)
class BudgetedPlan:
    """Random schedules, then rounds of a predictor that serves all budgets; the initial ones count as collected.

    Attributes:
        rounds: 1 is OMS-DPM as published, more is its active form.
        per_budget: candidates that a round measures for each budget, or for every one of them in rising order.
        evolution, generations, predictor, kappa: see `BudgetedSearch`.
    """

    rounds: int = 1
    per_budget: int | Sequence[int] = 10
    evolution: Evolution = field(default_factory=lambda: Evolution(population=40, children=40))
    generations: int = 100
    predictor: Predictor | OfProblem = field(default_factory=RankingPredictor)
    kappa: float = 0.0

    def plan_budgets(
        self, space: Any, evaluations: int, initial: Sequence[Any], budgets: Sequence[float]
    ) -> SearchPlan:
        """The plan of `evaluations` measurements beside the initial ones.

        Raises:
            ValueError: nothing is left for random schedules beside the rounds.
        """
        first = without_duplicates(space, initial)
        strategy = BudgetedSearch(
            tuple(budgets),
            rounds=None,  # the budget ends them, and a larger one asks for more
            per_budget=tuple(self.per_budget) if isinstance(self.per_budget, Sequence) else self.per_budget,
            evolution=self.evolution,
            generations=self.generations,
            predictor=self.predictor,
            kappa=self.kappa,
        )
        chosen = self.rounds * sum(strategy.counts)
        if evaluations <= chosen:
            raise ValueError(
                f"search.budget = {evaluations} must be above the strategy's rounds · per_budget · budgets = {chosen}"
            )
        strategy = replace(strategy, collect=len(first) + evaluations - chosen)
        return SearchPlan(strategy, first, Budget(len(first) + evaluations))


@dataclass(frozen=True)
class DirectPlan:
    """Evolution on measured scores, the budgets in turn: no predictor."""

    evolution: Evolution = field(default_factory=lambda: Evolution(population=20, children=10))

    def plan_budgets(
        self, space: Any, evaluations: int, initial: Sequence[Any], budgets: Sequence[float]
    ) -> SearchPlan:
        """The plan of `evaluations` measurements beside the initial ones."""
        first = without_duplicates(space, initial)
        return SearchPlan(
            DirectEvolution(tuple(budgets), evolution=self.evolution), first, Budget(len(first) + evaluations)
        )
