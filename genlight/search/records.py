"""The plain values of a search: the problem, what is proposed, what was measured, and the history they form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

import numpy as np

from genlight.search.protocols import Candidate, SearchSpace

# a part that the candidate shares with others failed, and is left out of what is proposed from then on
PART = "part"
FAILURE_KINDS = ("exception", "out_of_memory", "not_finite", "timeout", "poison", PART)
# of a limit: eight times a cost may be more than eight of it summed, or less, in the last digit
_SLACK = 1e-9


@dataclass(frozen=True)
class Proposal(Generic[Candidate]):
    """A candidate that a strategy wants measured on `fidelity` samples; `source` says which operator made it."""

    candidate: Candidate
    fidelity: int
    source: str


@dataclass(frozen=True)
class Trial(Generic[Candidate]):
    """A proposal with its place in the archive, ready to be evaluated."""

    index: int
    generation: int
    key: str
    candidate: Candidate
    fidelity: int
    source: str
    cost: Mapping[str, float]
    seeds: tuple[int, int]


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no score: one of FAILURE_KINDS, and one line that does not depend on the run."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What came of one trial: a score, or a failure with the traceback for a person to read."""

    score: float | None
    facts: Mapping[str, float | int | str] = field(default_factory=dict)
    failure: Failure | None = None
    traceback: str = ""


@dataclass(frozen=True)
class Record(Generic[Candidate]):
    """A trial with its outcome: one line of the archive."""

    trial: Trial[Candidate]
    score: float | None
    facts: Mapping[str, float | int | str]
    failure: Failure | None

    @property
    def index(self) -> int:
        return self.trial.index

    @property
    def key(self) -> str:
        return self.trial.key

    @property
    def candidate(self) -> Candidate:
        return self.trial.candidate

    @property
    def fidelity(self) -> int:
        return self.trial.fidelity

    @property
    def source(self) -> str:
        return self.trial.source

    @property
    def cost(self) -> Mapping[str, float]:
        return self.trial.cost

    @property
    def rank(self) -> tuple[float, int]:
        """Sorts from best to worst: failed ones last, equal scores in the order of the archive."""
        return (float("inf") if self.score is None else self.score, self.index)


class History(Generic[Candidate]):
    """Records in the order of the archive, up to the end of a generation.

    Attributes:
        records: what was measured, possibly only the part that concerns one strategy.
        next_index: index of the next candidate of the whole search.
        generation: number of the next generation.
        cheaper: what was measured beside them on fewer samples, for those that can use scores of another fidelity.
    """

    def __init__(
        self,
        records: Sequence[Record[Candidate]] = (),
        next_index: int | None = None,
        generation: int | None = None,
        cheaper: Sequence[Record[Candidate]] = (),
    ) -> None:
        self.records, self.cheaper = tuple(records), tuple(cheaper)
        self.next_index = len(self.records) if next_index is None else next_index
        last = self.records[-1].trial.generation + 1 if self.records else 0
        self.generation = last if generation is None else generation

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record[Candidate]]:
        return iter(self.records)

    def at(self, fidelity: int) -> History[Candidate]:
        """The records of one fidelity, with the same place in the search; those of lower ones are `cheaper`."""
        kept = [record for record in self.records if record.fidelity == fidelity]
        cheaper = [record for record in (*self.cheaper, *self.records) if record.fidelity < fidelity]
        return History(kept, self.next_index, self.generation, cheaper)

    def keeping(self, wanted: Callable[[Record[Candidate]], bool]) -> History[Candidate]:
        """Without the records, and the `cheaper` ones, that are not wanted; with the same place in the search."""
        kept, cheaper = ([each for each in part if wanted(each)] for part in (self.records, self.cheaper))
        return History(kept, self.next_index, self.generation, cheaper)

    def keys(self) -> set[str]:
        """Keys of all candidates in it, failed ones too."""
        return {record.key for record in self.records}

    def best(self, count: int) -> list[Record[Candidate]]:
        """The `count` best scores from best to worst, without failures. Meant for one fidelity (see `at`)."""
        return sorted((record for record in self.records if record.score is not None), key=lambda r: r.rank)[:count]


def fits(cost: float, limit: float) -> bool:
    """Whether a cost is within a limit, but for rounding: 1e-9 of the limit."""
    return cost <= limit + _SLACK * abs(limit)


def best_record(records: Sequence[Record[Candidate]]) -> Record[Candidate] | None:
    """The best score at the highest fidelity that has one; scores of different fidelities are never compared."""
    scored = [record for record in records if record.score is not None]
    if not scored:
        return None
    highest = max(record.fidelity for record in scored)
    return min((record for record in scored if record.fidelity == highest), key=lambda record: record.rank)


@dataclass(frozen=True)
class Problem(Generic[Candidate]):
    """What is searched, without how.

    Attributes:
        space: the candidates.
        seed: seed of the whole search, not negative.
        fidelity: samples per evaluation, for strategies that know one fidelity only.
        cost_limits: upper limits on `space.cost`; a candidate beyond one (`fits`) is never evaluated.
    """

    space: SearchSpace[Candidate]
    seed: int = 0
    fidelity: int = 1
    cost_limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"search.seed = {self.seed!r} must be a whole number, not negative")
        if isinstance(self.fidelity, bool) or not isinstance(self.fidelity, int) or self.fidelity < 1:
            raise ValueError(f"search.fidelity = {self.fidelity!r} must be a whole number of samples, 1 or more")

    def rng(self, index: int, *purpose: int) -> np.random.Generator:
        """The generator of candidate `index`; with `purpose`, an independent one for draws that a generation shares."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index, *purpose)))

    def within_limits(self, cost: Mapping[str, float]) -> bool:
        """Whether a cost keeps all limits.

        Raises:
            ValueError: a limit names a cost that the space does not report.
        """
        for name, limit in self.cost_limits.items():
            if name not in cost:
                known = ", ".join(sorted(cost)) or "none"
                raise ValueError(f"search.cost_limits.{name}: the space reports no such cost; it reports: {known}")
            if not fits(cost[name], limit):
                return False
        return True
