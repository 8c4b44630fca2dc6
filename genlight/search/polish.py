"""Polishing the best of what a search found: CMA-ES on the continuous decisions, with the discrete ones fixed."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from genlight.errors import UserError
from genlight.search.cma import CMAES
from genlight.search.protocols import Candidate, CandidateIn
from genlight.search.records import History, Problem, Proposal, Record

POLISH = "polish"


@runtime_checkable
class Polishable(Protocol[CandidateIn]):
    """A space that can be walked around one of its candidates."""

    def around(self, candidate: CandidateIn) -> Any:
        """A space with a VectorView of the continuous decisions of `candidate`; its keys are those of this space."""
        ...


@dataclass(frozen=True)
class Polish:
    """CMA-ES around each of the best candidates of what was measured before it, one after the other.

    Its records say which one they belong to: their source is polish_1 around the best, polish_2 around the second …

    Attributes:
        starts: how many of the best are polished.
        evaluations: for each of them; fewer where CMA-ES finds nothing new.
        cma: how. The step is small: the start is good already.
    """

    starts: int = 2
    evaluations: int = 100
    cma: CMAES = field(default_factory=lambda: CMAES(sigma=0.1))

    def __post_init__(self) -> None:
        for name in ("starts", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.{name} = {getattr(self, name)!r} must be 1 or more")

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """The next generation around the start at hand; nothing once all have had their evaluations.

        A start with fewer than two continuous decisions is passed over.

        Raises:
            UserError: the space has no `around`.
        """
        space: Any = problem.space
        if not isinstance(space, Polishable):
            raise UserError(f"Polish needs a space with `around`, which {type(space).__name__} does not offer")
        history = history.at(problem.fidelity)
        own = _last_records(history)
        before = list(history)[: len(history) - len(own)]
        starts = History(before).best(self.starts)
        spent = Counter(record.source for record in own)
        # a start whose successor has begun had its turn, though it may have found nothing new early
        current = max((number for number in range(len(starts)) if spent[_source(number)]), default=0)
        for number in range(current, len(starts)):
            source, start = _source(number), starts[number].candidate
            local, left = space.around(start), self.evaluations - spent[_source(number)]
            if left < 1 or len(local.vector_bounds) < 2:
                continue
            others = [*before, *(record for record in own if record.source != source)]
            proposals = self.cma.walk(replace(problem, space=local), history, others, start, source, number + 1)
            if proposals:
                return proposals[:left]
        return []


def _last_records(history: History[Candidate]) -> list[Record[Candidate]]:
    """The records at the end of the history that polishing made; an earlier stage may have polished too."""
    count = 0
    for record in reversed(history.records):
        if not record.source.startswith(f"{POLISH}_"):
            break
        count += 1
    return list(history.records[len(history) - count :])


def _source(number: int) -> str:
    return f"{POLISH}_{number + 1}"
