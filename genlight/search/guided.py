"""Evolution in stages, guided by a predictor that ranks far more children than can be measured.

S³ (Liu et al. 2024, arXiv 2312.07243, section on multi-stage search): measure, fit the predictor on all that was
measured, let it guide the next stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from genlight.predictors.gaussian_process import GaussianProcessPredictor
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


@runtime_checkable
class JointlyFitted(Fitted, Protocol):
    """A fitted predictor that also says which candidates it is unsure about together."""

    def covariance(self, candidates: Any) -> Tensor:
        """Covariance of the predicted scores, [n, n]."""
        ...


class Predictor(Protocol):
    """Learns to order candidates from their features."""

    def fit(self, candidates: Any, targets: Any, seed: int) -> Fitted:
        """Fit on features [steps, features] of each candidate and its score, infinite for a failed one."""
        ...


@dataclass(frozen=True)
class Described(Generic[Candidate]):
    """A predictor with the description of candidates that it reads."""

    encode: Callable[[Candidate], Tensor]
    predictor: Predictor


@runtime_checkable
class OfProblem(Protocol):
    """A predictor that describes candidates itself, by what can be known of them in one problem."""

    def described(self, problem: Problem[Any], history: History[Any]) -> Described[Any]:
        """A function of its arguments; what costs time may be kept."""
        ...


def described(predictor: Predictor | OfProblem, problem: Problem[Any], history: History[Any]) -> Described[Any]:
    """The predictor on a problem: on the features of the space, unless it has others."""
    if isinstance(predictor, OfProblem):
        return predictor.described(problem, history)
    return Described(problem.space.encode, predictor)


@dataclass(frozen=True)
class PredictorGuided:
    """Each stage measures the best of many children by prediction, and some that were not looked at.

    Records of other fidelities than the problem's are left out.

    Attributes:
        evolution: makes the unguided children; its population is what the guided ones start from too.
        predictor: settings of the predictor, fitted anew in each stage.
        stage_size: candidates measured per stage.
        guided_fraction: share of them that the predictor chose; the rest keeps it honest.
        min_measured: no guidance before so many candidates were measured.
        generations: generations bred on predicted scores in one stage. One screens children of measured parents; more
            let the search drift to where the predictor knows nothing.
        children_per_place: children per such generation for each candidate that the predictor chooses.
        kappa: a child is worth mean - kappa · deviation of its predictions: more explores more.
    """

    evolution: Evolution = field(default_factory=Evolution)
    predictor: Predictor | OfProblem = field(default_factory=GaussianProcessPredictor)
    stage_size: int = 40
    guided_fraction: float = 0.7
    min_measured: int = 40
    generations: int = 1
    children_per_place: int = 10
    kappa: float = 2.0

    def __post_init__(self) -> None:
        for name in ("stage_size", "generations", "children_per_place"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.{name} = {getattr(self, name)!r} must be 1 or more")
        if self.min_measured < 2:
            raise ValueError(f"strategy.min_measured = {self.min_measured!r} must be 2 or more")
        if not 0 <= self.guided_fraction <= 1:
            raise ValueError(f"strategy.guided_fraction = {self.guided_fraction!r} must lie in [0, 1]")
        if not 0 <= self.kappa < float("inf"):
            raise ValueError(f"strategy.kappa = {self.kappa!r} must be finite and not negative")

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """One stage: the guided candidates first, then the unguided ones."""
        history = history.at(problem.fidelity)
        if len(history) < self.min_measured or len({record.rank[0] for record in history}) < 2:
            return self.evolution.ask(problem, history)
        count = round(self.stage_size * self.guided_fraction)
        guided = self._guided(problem, history, count) if count else {}
        return self.evolution.children_of(problem, history, self.stage_size - len(guided), guided)

    def _guided(
        self, problem: Problem[Candidate], history: History[Candidate], count: int
    ) -> dict[str, Proposal[Candidate]]:
        """The best `count` new candidates by predicted score, out of all that were bred, by key."""
        rng = problem.rng(history.next_index, _PURPOSE)
        known = described(self.predictor, problem, history)
        targets = [record.rank[0] for record in history]
        features = [known.encode(record.candidate) for record in history]
        fitted = known.predictor.fit(features, targets, int(rng.integers(2**31)))
        elite = {record.key: record.candidate for record in history.best(self.evolution.population)}
        bred: dict[str, Candidate] = {}
        seen = {key: known.encode(candidate) for key, candidate in elite.items()}
        for _ in range(self.generations):
            parents = self._best_of({**elite, **bred}, seen, fitted, self.evolution.population)
            new = self._breed(problem, parents, history, bred, rng, count)
            bred.update(new)
            seen.update({key: known.encode(candidate) for key, candidate in new.items()})
        keys = sorted(bred)
        chosen = choose(fitted, [seen[key] for key in keys], count, self.kappa) if bred else []
        return {keys[i]: Proposal(bred[keys[i]], problem.fidelity, GUIDED) for i in chosen}

    def _best_of(
        self, candidates: dict[str, Candidate], features: dict[str, Tensor], fitted: Fitted, count: int
    ) -> list[Candidate]:
        """The `count` best candidates by prediction, from best to worst."""
        keys = sorted(candidates)
        mean, deviation = fitted.predict([features[key] for key in keys])
        order = torch.argsort(mean - self.kappa * deviation, stable=True)[:count]
        return [candidates[keys[i]] for i in order.tolist()]

    def _breed(
        self,
        problem: Problem[Candidate],
        parents: Sequence[Candidate],
        history: History[Candidate],
        bred: dict[str, Candidate],
        rng: np.random.Generator,
        places: int,
    ) -> dict[str, Candidate]:
        """Up to `children_per_place` new candidates for each place, within the cost limits, by key."""
        known = history.keys() | bred.keys()
        size = self.evolution.edit_size(history.next_index)
        wanted = self.children_per_place * places
        new: dict[str, Candidate] = {}
        for _ in range(2 * wanted):
            child, _source = self.evolution.child(problem, parents, rng, size)
            key = problem.space.key(child)
            if key not in known and key not in new and problem.within_limits(problem.space.cost(child)):
                new[key] = child
                if len(new) == wanted:
                    break
        return new


def choose(fitted: Fitted, candidates: Sequence[Tensor], count: int, kappa: float) -> list[int]:
    """Positions of the `count` candidates that are worth most: the lowest mean - kappa · deviation first.

    Where the predictor knows their covariance, each choice is believed to come out as predicted before the next is
    made: what resembles it is then sure, and one stage does not measure one idea many times. That leaves all means as
    they are (GP-BUCB; Desautels, Krause and Burdick, JMLR 15, 2014).

    Args:
        fitted: the predictor.
        candidates: float [steps, features] each.
    """
    mean, deviation = fitted.predict(candidates)
    if not isinstance(fitted, JointlyFitted):
        return torch.argsort(mean - kappa * deviation, stable=True)[:count].tolist()
    covariance = fitted.covariance(candidates)
    chosen: list[int] = []
    for _ in range(min(count, len(candidates))):
        worth = mean - kappa * covariance.diagonal().clamp(min=0).sqrt()
        worth[chosen] = torch.inf
        best = int(worth.argmin())
        chosen.append(best)
        row = covariance[best]
        covariance = covariance - torch.outer(row, row) / row[best].clamp(min=1e-12)
    return chosen
