"""Several strategies one after the other, each on its own view of the space: times first, then all decisions."""

from dataclasses import dataclass, replace
from typing import Any

from genlight.search.protocols import Candidate, SearchSpace, Strategy
from genlight.search.records import History, Problem, Proposal


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        strategy: proposes in this stage, and sees what all stages before it measured.
        evaluations: length of the stage; None: to the end. Not part of the budget.
        space: draws and varies candidates in this stage, of the same type and keys as the problem's; None: the same.
    """

    strategy: Strategy[Any]
    evaluations: int | None = None
    space: SearchSpace[Any] | None = None

    def __post_init__(self) -> None:
        if self.evaluations is not None and self.evaluations < 1:
            raise ValueError(f"strategy.stages: evaluations = {self.evaluations!r} must be 1 or more, or null")

    def __repr__(self) -> str:
        space = None if self.space is None else self.space.fingerprint()
        return f"Stage(strategy={self.strategy!r}, evaluations={self.evaluations!r}, space={space!r})"


@dataclass(frozen=True)
class Stages:
    """Strategies in turn. A stage that has nothing new to propose ends early."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages or any(stage.evaluations is None for stage in self.stages[:-1]):
            raise ValueError("strategy.stages must hold one stage or more, and all but the last need `evaluations`")

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """What the stage proposes that `history` has reached, cut at its end."""
        begun = 0
        for stage in self.stages:
            left = None if stage.evaluations is None else begun + stage.evaluations - history.next_index
            if left is None or left > 0:
                space = problem.space if stage.space is None else stage.space
                proposals = stage.strategy.ask(replace(problem, space=space), history)
                if proposals:
                    return proposals[:left]
            begun += stage.evaluations or 0
        return []
