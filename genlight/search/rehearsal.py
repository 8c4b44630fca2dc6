"""A search without measurements: what its strategy would propose, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genlight.search.engine import INITIAL, numbered
from genlight.search.plan import SearchPlan
from genlight.search.records import History, Problem, Proposal, Record, Trial


@dataclass(frozen=True)
class Rehearsal:
    """What a search proposes when scores are made up.

    Attributes:
        trials: what was proposed; not all, where that took too long.
        count: measurements of the whole search.
        seconds: of all proposals, as far as is known.
    """

    trials: Sequence[Trial[Any]]
    count: int
    seconds: float

    def some(self, number: int) -> list[Any]:
        """So many candidates, evenly over the whole search."""
        places = [(2 * place + 1) * len(self.trials) // (2 * number) for place in range(number)]
        return [self.trials[place].candidate for place in places if self.trials]

    def mean(self, values: Sequence[float]) -> float:
        """The mean over the whole search of a value of each trial: what was not proposed is like the last half."""
        if not values:
            return 0.0
        rest = self.count - len(values)
        last = values[len(values) // 2 :]
        return float(sum(values) + rest * sum(last) / len(last)) / self.count


def rehearsed(problem: Problem[Any], plan: SearchPlan, most_seconds: float) -> Rehearsal:
    """Ask for all proposals of a search.

    Args:
        problem, plan: of the search.
        most_seconds: about how long this may take; the rest is taken to be like the last generation.
    """
    rng = np.random.default_rng(problem.seed)
    count, spent = plan.budget.evaluations, 0.0
    records: list[Record[Any]] = []
    while len(records) < count:
        begun = time.monotonic()
        history: History[Any] = History(records)
        asked = plan.initial and not records
        proposals = (
            [Proposal(candidate, problem.fidelity, INITIAL) for candidate in plan.initial]
            if asked
            else plan.strategy.ask(problem, history)
        )
        trials = numbered(problem, proposals, history)[: count - len(records)]
        elapsed = time.monotonic() - begun
        spent += elapsed
        if not trials:
            count = len(records)  # the space is exhausted
            break
        records += [Record(trial, float(rng.random()), {}, None) for trial in trials]
        if spent > most_seconds:
            spent += elapsed * (count - len(records)) / len(trials)
            break
    return Rehearsal([record.trial for record in records], count, spent)
