"""Search of a space that can be listed: a predictor judges every candidate that is left, the best are measured.

Expected improvement: Jones, Schonlau and Welch, Journal of Global Optimization 13, 1998 (eq. 15). Confidence bound:
Srinivas et al., ICML 2010 (arXiv 0912.3995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from genlight.errors import UserError
from genlight.predictors.gaussian_process import GaussianProcessPredictor
from genlight.search.guided import OfProblem, Predictor, described
from genlight.search.protocols import Candidate
from genlight.search.random_search import random_candidates
from genlight.search.records import History, Problem, Proposal

PREDICTED = "predicted"
ACQUISITIONS = ("ei", "ucb", "mean")
# the generator of what a round shares is independent of those of its candidates
_PURPOSE = 3


@runtime_checkable
class Listed(Protocol):
    """A space that can name all of its candidates."""

    @property
    def candidates(self) -> Sequence[Any]:
        """All of them."""
        ...


@dataclass(frozen=True)
class AcquisitionSearch:
    """Random candidates first, then rounds: fit the predictor on all that was measured, measure what it holds best.

    Attributes:
        predictor: fitted anew in each round.
        acquisition: what is best: "ei", the expected improvement on the best predicted of what was measured; "ucb", the
            mean less `kappa` deviations (scores are minimised); "mean".
        kappa: of "ucb".
        random: random candidates before the first round.
        round_size: candidates of a round.
    """

    predictor: Predictor | OfProblem = field(default_factory=GaussianProcessPredictor)
    acquisition: str = "ei"
    kappa: float = 1.0
    random: int = 20
    round_size: int = 5

    def __post_init__(self) -> None:
        if self.acquisition not in ACQUISITIONS:
            raise ValueError(f"strategy.acquisition = {self.acquisition!r} must be one of {', '.join(ACQUISITIONS)}")
        if self.random < 2 or self.round_size < 1 or not 0 <= self.kappa < float("inf"):
            raise ValueError(
                f"strategy.random = {self.random!r} must be 2 or more, strategy.round_size = {self.round_size!r} 1 or "
                f"more, and strategy.kappa = {self.kappa!r} finite and not negative"
            )

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """The random candidates, or the next round; nothing where all candidates were measured.

        Raises:
            UserError: the space cannot be listed.
        """
        space = problem.space
        if not isinstance(space, Listed):
            raise UserError(f"{type(space).__name__} cannot be listed: search it by evolution (search=guided)")
        history = history.at(problem.fidelity)
        if len(history) < self.random:
            return random_candidates(problem, history, self.random - len(history))
        targets = [record.rank[0] for record in history]
        if len(set(targets)) < 2:
            return random_candidates(problem, history, self.round_size)
        taken = history.keys()
        left = [each for each in space.candidates if space.key(each) not in taken]
        left = [each for each in left if problem.within_limits(space.cost(each))] if problem.cost_limits else left
        if not left:
            return []
        seed = int(problem.rng(history.next_index, _PURPOSE).integers(2**31))
        known = described(self.predictor, problem, history)
        measured = [known.encode(record.candidate) for record in history]
        fitted = known.predictor.fit(measured, targets, seed)
        mean, deviation = fitted.predict([known.encode(each) for each in left])
        worth = self.worth(mean, deviation, float(fitted.predict(measured)[0].min()))
        best = torch.argsort(worth, descending=True, stable=True)[: self.round_size].tolist()
        return [Proposal(left[number], problem.fidelity, PREDICTED) for number in best]

    def worth(self, mean: Tensor, deviation: Tensor, best: float) -> Tensor:
        """What measuring candidates is worth, float [n], higher is better.

        Args:
            mean, deviation: of their predicted scores, which are minimised, [n] each.
            best: lowest predicted mean of what was measured.
        """
        if self.acquisition == "ei":
            return expected_improvement(mean, deviation, best)
        return (self.kappa * deviation if self.acquisition == "ucb" else 0.0) - mean


def expected_improvement(mean: Tensor, deviation: Tensor, best: float) -> Tensor:
    """E[max(0, best - score)] for normally distributed scores, float64 [n]; a deviation of 0 is certainty."""
    mean, deviation = mean.double(), deviation.double()
    gain = best - mean
    safe = deviation.clamp(min=1e-12)
    z = gain / safe
    density = torch.exp(-0.5 * z.square()) / (2 * torch.pi) ** 0.5
    return torch.where(deviation > 0, gain * torch.special.ndtr(z) + safe * density, gain.clamp(min=0))
