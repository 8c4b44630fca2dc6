"""Evolution with tournament selection and elitism: parents are the best ever measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genlight.search.proposing import propose
from genlight.search.protocols import Candidate
from genlight.search.random_search import random_candidates
from genlight.search.records import History, Problem, Proposal

MUTATION = "mutation"
CROSSOVER = "crossover"


@dataclass(frozen=True)
class Evolution:
    """(μ + λ) evolution. The first generations are random until `population` candidates have been measured.

    Attributes:
        population: μ, how many of the best are parents.
        children: λ, candidates per generation.
        tournament: a parent is the best of so many drawn from the population.
        crossover_probability: share of children with two parents.
        mutation_probability: share of those that are mutated too; a child of one parent always is.
        edit_sizes: size of the edits at the beginning and at the end of the annealing, each in (0, 1].
        anneal_evaluations: evaluations after which the edits have their last size; geometric in between. It is no part
            of the budget, so that a search can be extended.
    """

    population: int = 40
    children: int = 20
    tournament: int = 2
    crossover_probability: float = 0.3
    mutation_probability: float = 1.0
    edit_sizes: tuple[float, float] = (1.0, 0.1)
    anneal_evaluations: int = 1000

    def __post_init__(self) -> None:
        for name in ("population", "children", "tournament", "anneal_evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.{name} = {getattr(self, name)!r} must be 1 or more")
        for name in ("crossover_probability", "mutation_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"strategy.{name} = {getattr(self, name)!r} must lie in [0, 1]")
        if len(self.edit_sizes) != 2 or not all(0 < size <= 1 for size in self.edit_sizes):
            raise ValueError(f"strategy.edit_sizes = {self.edit_sizes!r} must be two sizes in (0, 1]")
        # A config gives a list; repr is part of the fingerprint
        object.__setattr__(self, "edit_sizes", tuple(float(size) for size in self.edit_sizes))

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """Random candidates until there is a population, then children of it."""
        missing = self.population - len(history)
        if missing > 0:
            return random_candidates(problem, history, missing)
        return self.children_of(problem, history, self.children)

    def children_of(
        self,
        problem: Problem[Candidate],
        history: History[Candidate],
        count: int,
        before: Mapping[str, Proposal[Candidate]] | None = None,
    ) -> list[Proposal[Candidate]]:
        """`count` children of the best in `history`, after the proposals in `before`, which are given by key."""
        # Sorted from best to worst: a smaller position wins the tournament
        parents = [record.candidate for record in history.best(self.population)]
        if not parents:
            return random_candidates(problem, history, count)

        def make(rng: np.random.Generator, index: int) -> tuple[Candidate, str]:
            return self.child(problem, parents, rng, self.edit_size(index))

        return propose(problem, history, count, make, before)

    def child(
        self, problem: Problem[Candidate], parents: Sequence[Candidate], rng: np.random.Generator, size: float
    ) -> tuple[Candidate, str]:
        """One child of `parents`, which are sorted from best to worst, and the name of the operator that made it."""
        first = self.select(len(parents), rng)
        if len(parents) < 2 or rng.random() >= self.crossover_probability:
            return problem.space.mutate(parents[first], rng, size=size), MUTATION
        second = self.select(len(parents) - 1, rng)
        second += second >= first
        child = problem.space.crossover(parents[first], parents[second], rng)
        if rng.random() < self.mutation_probability:
            child = problem.space.mutate(child, rng, size=size)
        return child, CROSSOVER

    def select(self, count: int, rng: np.random.Generator) -> int:
        """Position of the winner of a tournament among `count` candidates sorted from best to worst."""
        return int(rng.integers(count, size=self.tournament).min())

    def edit_size(self, index: int) -> float:
        """Size of the edits of candidate `index`: geometric from the first to the last of `edit_sizes`."""
        first, last = self.edit_sizes
        return float(first * (last / first) ** min(1.0, index / self.anneal_evaluations))
