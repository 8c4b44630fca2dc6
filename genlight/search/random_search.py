"""Random search: the baseline that every strategy must beat."""

from dataclasses import dataclass

from genlight.search.proposing import RANDOM, propose
from genlight.search.protocols import Candidate
from genlight.search.records import History, Problem, Proposal


@dataclass(frozen=True)
class RandomSearch:
    """Independent random candidates.

    Attributes:
        generation_size: candidates that are proposed at a time.
    """

    generation_size: int = 32

    def __post_init__(self) -> None:
        if self.generation_size < 1:
            raise ValueError(f"strategy.generation_size = {self.generation_size!r} must be 1 or more")

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """The next random candidates."""
        return random_candidates(problem, history, self.generation_size)


def random_candidates(
    problem: Problem[Candidate], history: History[Candidate], count: int
) -> list[Proposal[Candidate]]:
    """`count` new random candidates within the cost limits; fewer where the space has no more."""
    return propose(problem, history, count, lambda rng, index: (problem.space.sample(rng), RANDOM))
