"""Evolution in stages, guided by a predictor that ranks far more children than can be measured.

S³ (Liu et al. 2024, arXiv 2312.07243, section on multi-stage search): measure, fit the predictor on all that was
measured, let it guide the next stage.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from genlight.predictors.ranking import RankingPredictor
from genlight.search.evolution import Evolution
from genlight.search.protocols import Candidate
from genlight.search.records import History, Problem, Proposal

GUIDED = "guided"
# The generator of what a whole stage shares is independent of those of its candidates
_PURPOSE = 1


class Fitted(Protocol):
    """A predictor that was fitted."""

    def predict(self, candidates: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the predicted scores, [n] each; lower is better."""
        ...


class Predictor(Protocol):
    """Learns to order candidates from their features."""

    def fit(self, candidates: Any, targets: Any, seed: int) -> Fitted:
        """Fit on features [steps, features] of each candidate and its score, infinite for a failed one."""
        ...


@dataclass(frozen=True)
class PredictorGuided:
    """Each stage measures the best of many children by prediction, and some that were not looked at.

    Attributes:
        evolution: makes the unguided children; its population is what the guided ones start from too.
        predictor: settings of the predictor, fitted anew in each stage.
        stage_size: candidates measured per stage.
        guided_fraction: share of them that the predictor chose; the rest keeps it honest.
        min_measured: no guidance before so many candidates were measured.
        generations: generations bred on predicted scores in one stage.
        children: children per such generation.
        kappa: a child is worth mean - kappa · deviation of its predictions: more explores more.
    """

    evolution: Evolution = field(default_factory=Evolution)
    predictor: Predictor = field(default_factory=RankingPredictor)
    stage_size: int = 40
    guided_fraction: float = 0.7
    min_measured: int = 40
    generations: int = 6
    children: int = 100
    kappa: float = 0.5

    def __post_init__(self) -> None:
        for name in ("stage_size", "generations", "children"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.{name} = {getattr(self, name)!r} must be 1 or more")
        if self.min_measured < 2:
            raise ValueError(f"strategy.min_measured = {self.min_measured!r} must be 2 or more")
        if not 0 <= self.guided_fraction <= 1:
            raise ValueError(f"strategy.guided_fraction = {self.guided_fraction!r} must lie in [0, 1]")

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """One stage: the guided candidates first, then the unguided ones."""
        if len(history) < self.min_measured or len({record.rank[0] for record in history}) < 2:
            return self.evolution.ask(problem, history)
        count = round(self.stage_size * self.guided_fraction)
        guided = self._guided(problem, history, count) if count else []
        return self.evolution.children_of(problem, history, self.stage_size - len(guided), guided)

    def _guided(
        self, problem: Problem[Candidate], history: History[Candidate], count: int
    ) -> list[Proposal[Candidate]]:
        """The best `count` new candidates by predicted score, out of all that were bred."""
        rng = problem.rng(history.next_index, _PURPOSE)
        space = problem.space
        features = [space.encode(record.candidate) for record in history]
        targets = [record.rank[0] for record in history]
        fitted = self.predictor.fit(features, targets, int(rng.integers(2**31)))
        elite = history.best(self.evolution.population)
        parents = self._ranked(fitted, problem, {record.key: record.candidate for record in elite})
        bred: dict[str, tuple[float, Candidate]] = {}
        size = self.evolution.edit_size(history.next_index)
        for _ in range(self.generations):
            new = self._breed(problem, history, parents, bred, rng, size)
            if not new:
                break
            bred.update(self._ranked(fitted, problem, new))
            everyone = {**parents, **bred}
            best = sorted(everyone, key=lambda key: (everyone[key][0], key))[: self.evolution.population]
            parents = {key: everyone[key] for key in best}
        chosen = sorted(bred, key=lambda key: (bred[key][0], key))[:count]
        return [Proposal(bred[key][1], problem.fidelity, GUIDED) for key in chosen]

    def _breed(
        self,
        problem: Problem[Candidate],
        history: History[Candidate],
        parents: dict[str, tuple[float, Candidate]],
        bred: dict[str, tuple[float, Candidate]],
        rng: np.random.Generator,
        size: float,
    ) -> dict[str, Candidate]:
        """Up to `children` new candidates within the cost limits; `parents` are sorted from best to worst."""
        known = history.keys() | bred.keys()
        pool = [candidate for _, candidate in sorted(parents.values(), key=lambda entry: entry[0])]
        if not pool:
            pool = [problem.space.sample(rng)]
        new: dict[str, Candidate] = {}
        for _ in range(2 * self.children):
            child, _source = self.evolution.child(problem, pool, rng, size)
            key = problem.space.key(child)
            if key not in known and key not in new and problem.within_limits(problem.space.cost(child)):
                new[key] = child
                if len(new) == self.children:
                    break
        return new

    def _ranked(
        self, fitted: Fitted, problem: Problem[Candidate], candidates: dict[str, Candidate]
    ) -> dict[str, tuple[float, Candidate]]:
        """What each candidate is worth by prediction, lower is better."""
        if not candidates:
            return {}
        mean, deviation = fitted.predict([problem.space.encode(candidate) for candidate in candidates.values()])
        worth = (mean - self.kappa * deviation).tolist()
        return {key: (value, candidate) for value, (key, candidate) in zip(worth, candidates.items())}
