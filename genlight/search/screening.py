"""Many initial candidates, measured on few samples first: only the best of them are worth the full number."""

from dataclasses import asdict, dataclass
from typing import Any

from genlight.search.codec import canonical_key
from genlight.search.halving import PROMOTION
from genlight.search.protocols import Candidate, Strategy
from genlight.search.records import History, Problem, Proposal

SCREENING = "screening"


@dataclass(frozen=True)
class Screening:
    """Measures given candidates at a low fidelity, the best of them at the problem's, and goes on with a strategy.

    Scores of different fidelities are never compared: to the strategy those of the low one are what is `cheaper` in a
    history, which a predictor may learn from.

    Attributes:
        candidates: what is screened.
        strategy: proposes all that follows.
        fidelity: samples per screened candidate, fewer than the problem's.
        promoted: how many of them are measured again.
    """

    candidates: tuple[Any, ...]
    strategy: Strategy[Any]
    fidelity: int = 64
    promoted: int = 60

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if not self.candidates:
            raise ValueError("strategy.candidates must hold one candidate or more to screen")
        for name in ("fidelity", "promoted"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.{name} = {getattr(self, name)!r} must be 1 or more")

    def __repr__(self) -> str:
        """Part of the archive's fingerprint: a digest stands for the candidates."""
        digest = canonical_key([asdict(candidate) for candidate in self.candidates])
        return (
            f"Screening(candidates={len(self.candidates)} {digest}, strategy={self.strategy!r}, "
            f"fidelity={self.fidelity!r}, promoted={self.promoted!r})"
        )

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """First all candidates within the cost limits, then the best of them, then what the strategy proposes.

        Raises:
            ValueError: the problem's fidelity is not higher than that of the screening.
        """
        if problem.fidelity <= self.fidelity:
            raise ValueError(
                f"screening on {self.fidelity} samples needs search.fidelity above that, got {problem.fidelity}; "
                "measure fewer, or all candidates at the full fidelity"
            )
        screened = history.at(self.fidelity)
        if not len(screened):
            allowed = [c for c in self.candidates if problem.within_limits(problem.space.cost(c))]
            if allowed:
                return [Proposal(candidate, self.fidelity, SCREENING) for candidate in allowed]
        elif not any(record.source == PROMOTION and record.fidelity == problem.fidelity for record in history):
            known = history.at(problem.fidelity).keys()
            best = [record for record in screened.best(self.promoted) if record.key not in known]
            if best:
                return [Proposal(record.candidate, problem.fidelity, PROMOTION) for record in best]
        rest = [record for record in history if record.fidelity != self.fidelity]
        cheaper = (*history.cheaper, *screened.records)
        return self.strategy.ask(problem, History(rest, history.next_index, history.generation, cheaper))
