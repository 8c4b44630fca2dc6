"""Successive halving over the number of samples: all candidates on few, the best of them on more.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from genlight.search.protocols import Candidate, Strategy
from genlight.search.records import History, Problem, Proposal, Record

PROMOTION = "promotion"


@dataclass(frozen=True)
class SuccessiveHalving:
    """Promotes the best of each cohort of another strategy to higher fidelities.

    The other strategy proposes a cohort at the lowest fidelity and sees the scores of that fidelity only: scores of
    different fidelities are never compared. The winner of the search is the best at the highest one.

    Attributes:
        strategy: proposes the cohorts.
        fidelities: samples per evaluation, increasing. The problem's own fidelity must be the first.
        promoted: share of the cohort that is measured at each fidelity after the first, decreasing.
    """

    strategy: Strategy[Any]
    fidelities: tuple[int, ...] = (64, 256, 1024)
    promoted: tuple[float, ...] = (1 / 3, 1 / 10)

    def __post_init__(self) -> None:
        levels = tuple(int(level) for level in self.fidelities)
        shares = tuple(float(share) for share in self.promoted)
        object.__setattr__(self, "fidelities", levels)
        object.__setattr__(self, "promoted", shares)
        if not levels or any(high <= low for low, high in pairwise((0, *levels))):
            raise ValueError(f"strategy.fidelities = {levels!r} must increase from 1 or more")
        if len(shares) != len(levels) - 1 or not all(1 >= high >= low > 0 for high, low in pairwise((1.0, *shares))):
            raise ValueError(
                f"strategy.promoted = {shares!r} must be {len(levels) - 1} shares in (0, 1], not increasing, "
                "one for each fidelity after the first"
            )

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """Promotions out of the last cohort while there are any, else the next cohort.

        Raises:
            ValueError: the problem's fidelity is not the first of `fidelities`.
        """
        first = self.fidelities[0]
        if problem.fidelity != first:
            raise ValueError(f"search.fidelity = {problem.fidelity} must be strategy.fidelities[0] = {first}")
        cohort = self._last_cohort(history)
        level = self.fidelities.index(history.records[-1].fidelity) if cohort else 0
        for next_level in range(level + 1, len(self.fidelities) if cohort else 0):
            promotions = self._promotions(cohort, next_level)
            if promotions:
                return promotions
        return self.strategy.ask(problem, history.at(first))

    def _last_cohort(self, history: History[Candidate]) -> list[Record[Candidate]]:
        """All records of the last cohort: the last generation of the first fidelity, and its promotions."""
        first = self.fidelities[0]
        generation = max((r.trial.generation for r in history if r.fidelity == first), default=0)
        return [record for record in history if record.trial.generation >= generation]

    def _promotions(self, cohort: list[Record[Candidate]], level: int) -> list[Proposal[Candidate]]:
        """The best at the fidelity before, as many as this fidelity's share of the whole cohort."""
        size = sum(record.fidelity == self.fidelities[0] for record in cohort)
        before = History([record for record in cohort if record.fidelity == self.fidelities[level - 1]])
        # A whole number of shares must not be rounded up by the last bit
        chosen = before.best(math.ceil(size * self.promoted[level - 1] - 1e-9))
        return [Proposal(record.candidate, self.fidelities[level], PROMOTION) for record in chosen]
