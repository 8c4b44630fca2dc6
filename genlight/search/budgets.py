"""One search for several budgets: a predictor learned once serves all of them.

OMS-DPM (Liu et al. 2023, arXiv 2306.08860): measure random candidates, fit a predictor that ranks, then evolve for each
budget on predicted scores alone and measure the best of that. Beside it the same number of measurements by evolution on
measured scores, which has to share them among the budgets.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from genlight.predictors.ranking import RankingPredictor
from genlight.search.evolution import Evolution
from genlight.search.guided import Fitted, OfProblem, Predictor, described
from genlight.search.proposing import RANDOM, propose
from genlight.search.protocols import Candidate, CandidateIn, SearchSpace, Vector
from genlight.search.records import History, Problem, Proposal

BUDGETED = "budgeted"
# the generator of what a round shares is independent of those of its candidates
_PURPOSE = 2
# children made at most for each one wanted
_TRIES = 5
# share of the known effect by which two candidates must differ to be worth two measurements
_TOLD_APART = 0.01


@runtime_checkable
class WithBudget(Protocol[Candidate]):
    """A space that draws and varies candidates within a budget by itself."""

    def with_budget(self, budget: float | None) -> SearchSpace[Candidate]:
        """The same space with another budget."""
        ...


@runtime_checkable
class WithEffect(Protocol[CandidateIn]):
    """A space that knows what a candidate does before it is measured, so that two of one effect can be told."""

    def effect(self, candidate: CandidateIn) -> tuple[Hashable, Vector]:
        """What must be equal in candidates of one effect; and what they add up, float64, not negative.

        Where the first is equal, the second has one length.
        """
        ...


def within_budget(problem: Problem[Candidate], budget: float, cost: str = "cost") -> Problem[Candidate]:
    """The problem with `budget` as a limit on the space's cost `cost`, and, where it knows budgets, with its space so.

    A lower limit that the problem has already stays.
    """
    space = problem.space
    limit = min(budget, problem.cost_limits.get(cost, budget))
    if isinstance(space, WithBudget):
        space = space.with_budget(limit)
    return replace(problem, space=space, cost_limits={**problem.cost_limits, cost: limit})


@dataclass(frozen=True)
class BudgetedSearch:
    """Random candidates first, then rounds: fit the predictor once, evolve for each budget, measure the best of each.

    One round is OMS-DPM as published; more of them learn from what was chosen. The search ends after the last round.
    A round measures different things, where the space can tell (`WithEffect`): a candidate of the same effect as one
    that was measured or chosen has its turn after all others.
    Records of other fidelities than the problem's are left out.

    Attributes:
        budgets: upper limits on the cost, rising.
        cost: which cost of the space they limit.
        collect: candidates measured before the first round, those that a search was given at its start included; each
            random one is drawn for one of the budgets, in turn.
        rounds: rounds of prediction and measurement; None: until the budget of the search is spent.
        per_budget: new candidates that a round measures for each budget, or for every one of them in turn.
        evolution: its population, children, tournament, operators and edit sizes; on predicted scores only.
        generations: of each evolution; the edits have their last size at the end.
        predictor: settings of the predictor, fitted anew in each round on all that was measured.
        kappa: a candidate is worth mean - kappa · deviation of its predictions.
    """

    budgets: tuple[float, ...]
    cost: str = "cost"
    collect: int = 500
    rounds: int | None = 1
    per_budget: int | tuple[int, ...] = 10
    evolution: Evolution = field(default_factory=lambda: Evolution(population=40, children=40))
    generations: int = 200
    predictor: Predictor | OfProblem = field(default_factory=RankingPredictor)
    kappa: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", _checked_budgets(self.budgets))
        for name in ("collect", "rounds", "generations"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"strategy.{name} = {getattr(self, name)!r} must be 1 or more")
        counts = self.counts
        if len(counts) != len(self.budgets) or not all(isinstance(count, int) and count >= 1 for count in counts):
            raise ValueError(
                f"strategy.per_budget = {self.per_budget!r} must be 1 or more, or so many for each of "
                f"{len(self.budgets)} budgets"
            )
        if not 0 <= self.kappa < float("inf"):
            raise ValueError(f"strategy.kappa = {self.kappa!r} must be finite and not negative")

    @property
    def counts(self) -> tuple[int, ...]:
        """New candidates of a round for each budget."""
        each = self.per_budget
        return tuple(each) if isinstance(each, Sequence) else (each,) * len(self.budgets)

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """What is missing of the collection, or the next round; nothing after the last."""
        history = history.at(problem.fidelity)
        done = len({record.trial.generation for record in history if record.source.startswith(BUDGETED)})
        if not done and len(history) < self.collect:
            proposals = self._collection(problem, history, self.collect - len(history))
            if proposals:
                return proposals
        return self._round(problem, history) if self.rounds is None or done < self.rounds else []

    def _collection(
        self, problem: Problem[Candidate], history: History[Candidate], count: int
    ) -> list[Proposal[Candidate]]:
        """Random candidates, each within one of the budgets in turn."""
        problems = [within_budget(problem, budget, self.cost) for budget in self.budgets]

        def make(rng: np.random.Generator, index: int) -> tuple[Candidate, str]:
            return problems[index % len(problems)].space.sample(rng), RANDOM

        return propose(problems[-1], history, count, make)

    def _round(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """The best new candidates by prediction for each budget, as many as `per_budget` says."""
        rng = problem.rng(history.next_index, _PURPOSE)
        scorer = self._scorer(problem, history, int(rng.integers(2**31)))
        taken, proposals = history.keys(), list[Proposal[Candidate]]()
        effects = _Effects.of(problem.space, (record.candidate for record in history))
        for number, (budget, count) in enumerate(zip(self.budgets, self.counts, strict=True)):
            limited = within_budget(problem, budget, self.cost)
            bred = self._evolved(limited, history, scorer, problem.rng(history.next_index, _PURPOSE, number))
            chosen = effects.different([each for each in bred if each.key not in taken], count)
            taken |= {each.key for each in chosen}
            source = f"{BUDGETED} {budget:g}"
            proposals += [Proposal(each.candidate, problem.fidelity, source) for each in chosen]
        return proposals

    def _scorer(self, problem: Problem[Candidate], history: History[Candidate], seed: int) -> "_Scorer[Candidate]":
        """The predictor of a round; none where nothing was measured that it could tell apart."""
        known = described(self.predictor, problem, history)
        targets = [record.rank[0] for record in history]
        if len(set(targets)) < 2:
            return _Scorer(known.encode, None, self.kappa)
        features = [known.encode(record.candidate) for record in history]
        return _Scorer(known.encode, known.predictor.fit(features, targets, seed), self.kappa)

    def _evolved(
        self,
        problem: Problem[Candidate],
        history: History[Candidate],
        scorer: "_Scorer[Candidate]",
        rng: np.random.Generator,
    ) -> list["_Scored[Candidate]"]:
        """All candidates that were bred within the problem's limits, and the first ones, from best to worst."""
        size = self.evolution.population
        first: dict[str, Candidate] = {record.key: record.candidate for record in _within(problem, history).best(size)}
        for _ in range(_TRIES * size):
            if len(first) >= size:
                break
            drawn = problem.space.sample(rng)
            if problem.within_limits(problem.space.cost(drawn)):
                first.setdefault(problem.space.key(drawn), drawn)
        if not first:
            return []
        every = scorer.scored(first)
        population, seen = sorted(every, key=_worth), set(first)
        sizes = np.geomspace(*self.evolution.edit_sizes, self.generations).tolist()
        for edit_size in sizes:
            new = self._children(problem, [each.candidate for each in population], seen, rng, edit_size)
            if not new:
                continue
            seen |= new.keys()
            scored = scorer.scored(new)
            every += scored
            population = sorted([*population, *scored], key=_worth)[:size]
        return sorted(every, key=_worth)

    def _children(
        self,
        problem: Problem[Candidate],
        parents: Sequence[Candidate],
        seen: set[str],
        rng: np.random.Generator,
        edit_size: float,
    ) -> dict[str, Candidate]:
        """Children within the limits that were not seen in this evolution, by key."""
        new: dict[str, Candidate] = {}
        for _ in range(_TRIES * self.evolution.children):
            child, _source = self.evolution.child(problem, parents, rng, edit_size)
            key = problem.space.key(child)
            if key not in seen and key not in new and problem.within_limits(problem.space.cost(child)):
                new[key] = child
                if len(new) == self.evolution.children:
                    break
        return new


@dataclass(frozen=True)
class DirectEvolution:
    """Evolution on measured scores, each generation for one of the budgets in turn.

    What was measured within a budget, for whatever budget, is its history; its first generations are random until its
    population has been measured. There is no end but that of the search's budget of evaluations.

    Attributes:
        budgets: upper limits on the cost, rising.
        cost: which cost of the space they limit.
        evolution: of each budget.
    """

    budgets: tuple[float, ...]
    cost: str = "cost"
    evolution: Evolution = field(default_factory=lambda: Evolution(population=20, children=10))

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", _checked_budgets(self.budgets))

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """The next generation of the budget whose turn it is, or of the next one that has new candidates."""
        history = history.at(problem.fidelity)
        for turn in range(len(self.budgets)):
            limited = within_budget(problem, self.budgets[(history.generation + turn) % len(self.budgets)], self.cost)
            proposals = self.evolution.ask(limited, _within(limited, history))
            if proposals:
                return proposals
        return []


@dataclass(frozen=True)
class _Scored(Generic[Candidate]):
    """A candidate with its predicted worth, lower is better."""

    worth: float
    key: str
    candidate: Candidate


def _worth(scored: _Scored[Candidate]) -> tuple[float, str]:
    return scored.worth, scored.key


@dataclass(frozen=True)
class _Scorer(Generic[Candidate]):
    """Predicts many candidates in one call."""

    encode: Callable[[Candidate], Tensor]
    fitted: Fitted | None
    kappa: float

    def scored(self, candidates: dict[str, Candidate]) -> list[_Scored[Candidate]]:
        """Candidates, by key, with their worth; 0 for all where there is no predictor."""
        if self.fitted is None:
            worths = [0.0] * len(candidates)
        else:
            mean, deviation = self.fitted.predict([self.encode(each) for each in candidates.values()])
            worths = (mean - self.kappa * deviation).tolist()
        return [_Scored(worth, key, each) for worth, (key, each) in zip(worths, candidates.items(), strict=True)]


@dataclass(frozen=True)
class _Effects(Generic[Candidate]):
    """Effects of what was measured and chosen, by what must be equal in them; `space` is None if it knows none."""

    space: WithEffect[Candidate] | None
    known: dict[Hashable, list[Vector]] = field(default_factory=dict)

    @classmethod
    def of(cls, space: SearchSpace[Candidate], candidates: Iterable[Candidate]) -> "_Effects[Candidate]":
        """Those of some candidates."""
        result = cls(space if isinstance(space, WithEffect) else None)
        for candidate in candidates:
            result.add(candidate)
        return result

    def add(self, candidate: Candidate) -> bool:
        """Add the effect of a candidate. Whether it can be told from all others."""
        if self.space is None:
            return True
        form, parts = self.space.effect(candidate)
        others = self.known.setdefault(form, [])
        alike = any(abs(parts - each).sum() <= _TOLD_APART * min(parts.sum(), each.sum()) for each in others)
        others.append(parts)
        return not alike

    def different(self, candidates: Sequence[_Scored[Candidate]], count: int) -> list[_Scored[Candidate]]:
        """The first `count` of other effects than those known and one another's; where too few, the first of the rest.

        Their effects are known from then on.
        """
        found: list[_Scored[Candidate]] = []
        rest: list[_Scored[Candidate]] = []
        for each in candidates:
            if len(found) == count:
                break
            (found if self.add(each.candidate) else rest).append(each)
        return [*found, *rest[: count - len(found)]]


def _within(problem: Problem[Candidate], history: History[Candidate]) -> History[Candidate]:
    """What was measured that keeps the problem's limits."""
    return history.keeping(lambda record: problem.within_limits(record.cost))


def _checked_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    # a config gives a list; repr is part of the fingerprint
    result = tuple(float(budget) for budget in budgets)
    if not result or result[0] <= 0 or list(result) != sorted(set(result)):
        raise ValueError(f"strategy.budgets = {budgets!r} must be one positive number or more, rising")
    return result
