"""How expert maps are searched: experts are chosen first, then merged from the best choices (EEP, algorithm 1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from genlight.search.engine import Budget
from genlight.search.evolution import CROSSOVER, MUTATION, Evolution
from genlight.search.plan import SearchPlan, without_duplicates
from genlight.search.proposing import propose
from genlight.search.protocols import Candidate, Strategy
from genlight.search.random_search import RandomSearch, random_candidates
from genlight.search.records import History, Problem, Proposal, Record
from genlight.search.spaces.expert_maps import ExpertMaps, ExpertMapSpace
from genlight.search.stages import Stage, Stages


@dataclass(frozen=True)
class NearTheBest:
    """Evolution in which every candidate whose score is near the best may be a parent, each with the same chance.

    Attributes:
        margin: how far from the best score a parent may lie.
        crossover_probability: share of children with two parents, which are mutated too.
        crossover_margin, least: two parents lie within this of the best, or are among the best so many.
        children: candidates per generation.
    """

    margin: float = 0.03
    crossover_probability: float = 0.0
    crossover_margin: float = 0.01
    least: int = 6
    children: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.crossover_probability <= 1 or min(self.margin, self.crossover_margin) < 0:
            raise ValueError(f"strategy: crossover_probability must lie in [0, 1] and margins not be negative: {self}")
        if min(self.least, self.children) < 1:
            raise ValueError(f"strategy.least = {self.least!r} and strategy.children = {self.children!r}: 1 or more")

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """The next children; random candidates while nothing has a score."""
        ranked = history.best(len(history))
        if not ranked:
            return random_candidates(problem, history, self.children)
        near = self._within(ranked, self.margin, 1)
        pairs = self._within(ranked, self.crossover_margin, self.least)

        def make(rng: np.random.Generator, index: int) -> tuple[Candidate, str]:
            space = problem.space
            if len(pairs) > 1 and rng.random() < self.crossover_probability:
                first, second = rng.choice(len(pairs), 2, replace=False)
                return space.mutate(space.crossover(pairs[first], pairs[second], rng), rng), CROSSOVER
            return space.mutate(near[int(rng.integers(len(near)))], rng), MUTATION

        return propose(problem, history, self.children, make)

    def _within(self, ranked: Sequence[Record[Candidate]], margin: float, least: int) -> list[Candidate]:
        limit = ranked[0].rank[0] + margin
        return [record.candidate for place, record in enumerate(ranked) if place < least or record.rank[0] <= limit]


@dataclass(frozen=True)
class ExpertPlan:
    """Pruning, then merging.

    Attributes:
        prune_evaluations: how much of the budget goes to pruning; what is left merges. Not counted are the baselines of
            a warm start; random candidates are.
        prune, merge: choose parents in each phase; the second sees what the first measured.
        warm_start: begin with the baselines; False: with random candidates alone, as published.
        random: random candidates measured first.
    """

    prune_evaluations: int = 200
    prune: Strategy[Any] = field(
        default_factory=lambda: Evolution(population=12, children=10, crossover_probability=0.5, edit_sizes=(1.0, 1.0))
    )
    merge: Strategy[Any] = field(
        default_factory=lambda: Evolution(population=8, children=10, crossover_probability=0.3, edit_sizes=(1.0, 1.0))
    )
    warm_start: bool = True
    random: int = 0

    def __post_init__(self) -> None:
        if self.prune_evaluations < 1 or self.random < 0:
            raise ValueError(
                f"strategy.prune_evaluations = {self.prune_evaluations!r} must be 1 or more, and "
                f"strategy.random = {self.random!r} not negative"
            )

    def plan(self, space: ExpertMapSpace, evaluations: int, initial: Sequence[ExpertMaps] | None = None) -> SearchPlan:
        """The plan of `evaluations` measurements beside the initial ones.

        Raises:
            ValueError: there is no evaluation, or more random candidates than pruning has.
        """
        if evaluations < 1:
            raise ValueError(f"search.budget = {evaluations!r} must be 1 or more")
        if self.random >= self.prune_evaluations:
            raise ValueError(
                f"search.strategy.random = {self.random} must be below prune_evaluations = {self.prune_evaluations}"
            )
        first = without_duplicates(space, initial or ()) if self.warm_start else ()
        stages = []
        left = len(first) + self.prune_evaluations
        if self.random:
            stages.append(Stage(RandomSearch(self.random), len(first) + self.random))
            left -= len(first) + self.random
        # stages count the initial candidates too
        stages.append(Stage(self.prune, left))
        stages.append(Stage(self.merge, None, replace(space, phase="merge")))
        return SearchPlan(Stages(tuple(stages)), first, Budget(len(first) + evaluations))
