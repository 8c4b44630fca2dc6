"""What a search is given beside its problem: a strategy, the candidates to begin with, and a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from genlight.search.engine import Budget
from genlight.search.protocols import SearchSpace, Strategy
from genlight.search.screening import Screening


@dataclass(frozen=True)
class SearchPlan:
    """What `Search` needs beside the problem.

    Attributes:
        strategy: proposes; where the initial candidates are screened, it does that too.
        initial: what is measured first, without duplicates; empty where they are screened.
        budget: the initial candidates, those of them that are measured twice, and the evaluations of the search.
    """

    strategy: Strategy[Any]
    initial: tuple[Any, ...]
    budget: Budget

    def rows(self, fidelity: int) -> tuple[int, int]:
        """Samples that are drawn for the screening, and for all else at `fidelity` samples per candidate."""
        strategy = self.strategy
        if not isinstance(strategy, Screening):
            return 0, self.budget.evaluations * fidelity
        screened = len(strategy.candidates)
        return screened * strategy.fidelity, (self.budget.evaluations - screened) * fidelity


@dataclass(frozen=True)
class PlainPlan:
    """Any strategy by itself, with initial candidates measured as S³ does: what S³ is compared with.

    Attributes:
        strategy: proposes all candidates after the initial ones.
        screening_fidelity, promoted: as in `S3Settings`.
    """

    strategy: Strategy[Any]
    screening_fidelity: int | None = 64
    promoted: int = 60

    def __post_init__(self) -> None:
        if (self.screening_fidelity is not None and self.screening_fidelity < 1) or self.promoted < 1:
            raise ValueError(
                f"strategy.screening_fidelity = {self.screening_fidelity!r} must be 1 or more, or null, and "
                f"strategy.promoted = {self.promoted!r} 1 or more"
            )

    def plan(self, space: SearchSpace[Any], evaluations: int, initial: Sequence[Any] | None = None) -> SearchPlan:
        """The initial candidates, then `evaluations` more; ValueError for fewer than one."""
        if evaluations < 1:
            raise ValueError(f"search.budget = {evaluations!r} must be 1 or more")
        return with_screening(
            self.strategy, without_duplicates(space, initial or ()), evaluations, self.screening_fidelity, self.promoted
        )


def with_predictor(strategy: Any, predictor: Any) -> Any:
    """A copy of a strategy, or of the plan around one, that `predictor` guides.

    Raises:
        ValueError: it is guided by none.
    """
    if hasattr(strategy, "predictor"):
        return replace(strategy, predictor=predictor)
    if hasattr(strategy, "strategy"):
        return replace(strategy, strategy=with_predictor(strategy.strategy, predictor))
    raise ValueError(
        f"search.predictor: no predictor guides {type(strategy).__name__}; choose search=s3, guided or oms, or null"
    )


def without_duplicates(space: SearchSpace[Any], candidates: Sequence[Any]) -> tuple[Any, ...]:
    """Each candidate once."""
    return tuple({space.key(candidate): candidate for candidate in reversed(candidates)}.values())[::-1]


def measured_twice(count: int, fidelity: int | None, promoted: int) -> int:
    """How many of `count` initial candidates are measured at both fidelities; 0 where they are not screened."""
    return promoted if fidelity is not None and promoted < count else 0


def with_screening(
    strategy: Strategy[Any], initial: tuple[Any, ...], evaluations: int, fidelity: int | None, promoted: int
) -> SearchPlan:
    """A plan whose initial candidates are first measured on `fidelity` samples, unless all of them are promoted."""
    twice = measured_twice(len(initial), fidelity, promoted)
    budget = Budget(len(initial) + twice + evaluations)
    if not twice or fidelity is None:
        return SearchPlan(strategy, initial, budget)
    return SearchPlan(Screening(initial, strategy, fidelity, promoted), (), budget)
