"""CMA-ES over spaces that can be walked as a box of real numbers, by the `cmaes` package."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cmaes import CMA

from genlight.errors import UserError
from genlight.search.protocols import Candidate, Vector, VectorView
from genlight.search.records import History, Problem, Proposal, Record

CMA_ES = "cma_es"
# CMA-ES looks at ranks only: a failed candidate is one that is worse than all others
_WORST = 1e30
_LIMIT_TRIES = 100
# Draws are numbered by themselves: a candidate met twice is drawn, but has one place in the archive
_PURPOSE = 2
_IDLE_GENERATIONS = 100


@dataclass(frozen=True)
class CMAES:
    """CMA-ES with restarts at twice the population once it has converged (IPOP).

    It starts at the best of what was measured before it (the initial candidates), else in the middle of a bounded box,
    else at a random candidate. Its state is not stored: it is rebuilt by telling it the history again. Candidates that
    it meets a second time are told with the score they had.

    Attributes:
        sigma: first standard deviation, relative to the width of the box; absolute where the box has no ends.
        population_size: candidates per generation; 4 + ⌊3 ln n⌋ if None.
    """

    sigma: float = 0.2
    population_size: int | None = None
    _cache: "dict[str, _Walk]" = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.sigma < np.inf:
            raise ValueError(f"strategy.sigma = {self.sigma!r} must be positive")
        if self.population_size is not None and self.population_size < 3:
            raise ValueError(f"strategy.population_size = {self.population_size!r} must be 3 or more, or null")

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """The new candidates of the next generation that has any.

        Raises:
            UserError: the space has no view as a vector.
        """
        before = [record for record in history if record.source != CMA_ES]
        best = History(before).best(1)
        return self.walk(problem, history, before, best[0].candidate if best else None, CMA_ES)

    def walk(
        self,
        problem: Problem[Candidate],
        history: History[Candidate],
        before: Sequence[Record[Candidate]],
        start: Candidate | None,
        source: str,
        *purpose: int,
    ) -> list[Proposal[Candidate]]:
        """The new candidates of the next generation that has any, on the walk that began at `start`.

        Args:
            before: the records of `history` that this walk did not propose.
            start: None: the middle of a bounded box, else a random candidate.
            source: of the proposals; names the walk.
            purpose: tells the random numbers of several walks apart.

        Raises:
            UserError: the space has no view as a vector.
        """
        if not isinstance(problem.space, VectorView):
            name = type(problem.space).__name__
            raise UserError(f"CMAES needs a space with a VectorView, which {name} does not offer")
        scores = {record.key: _WORST if record.score is None else record.score for record in history}
        walk = self._cache.get(source)
        if walk is None or not walk.is_prefix_of(problem, start, scores):
            known = {record.key for record in before}
            box = self._box(problem, start)
            walk = _Walk(problem, start, box, self.population_size, known, (_PURPOSE, *purpose))
            self._cache[source] = walk
        while walk.idle < _IDLE_GENERATIONS:
            walk.draw()
            new = walk.unknown(scores)
            if new:
                return [Proposal(candidate, problem.fidelity, source) for candidate in new]
            walk.tell(scores)
        return []

    def _box(self, problem: Problem[Any], begin: Any) -> "_Box":
        space: Any = problem.space
        bounds = np.asarray(space.vector_bounds, dtype=np.float64)
        if bounds.ndim != 2 or bounds.shape[1] != 2 or not np.all(bounds[:, 0] < bounds[:, 1]):
            raise ValueError(f"vector_bounds of {type(space).__name__} must be [n, 2] with lower < upper, got {bounds}")
        if len(bounds) < 2:
            raise UserError(f"CMAES needs 2 or more coordinates; {type(space).__name__} has {len(bounds)}")
        if begin is not None:
            start = space.to_vector(begin)
        elif np.all(np.isfinite(bounds)):
            start = bounds.mean(axis=1)
        else:
            start = space.to_vector(space.sample(problem.rng(0, _PURPOSE, 0)))
        widths = np.where(np.isfinite(bounds).all(axis=1), bounds[:, 1] - bounds[:, 0], 1.0)
        return _Box(bounds, widths, np.asarray(start, dtype=np.float64), self.sigma)


@dataclass(frozen=True)
class _Box:
    """Scaling between the space's coordinates and those of CMA-ES, in which one step size fits all."""

    bounds: np.ndarray
    widths: np.ndarray
    start: np.ndarray
    sigma: float

    def optimizer(self, population_size: int | None) -> CMA:
        bounds = self.bounds / self.widths[:, None]
        mean = np.clip(self.start / self.widths, bounds[:, 0], bounds[:, 1])
        return CMA(mean=mean, sigma=self.sigma, bounds=bounds, seed=0, population_size=population_size)


class _Walk:
    """The optimizer after some generations, with what it was told: enough to see whether a history continues it.

    Attributes:
        idle: generations told in a row that held no candidate it had not met before.
    """

    def __init__(
        self,
        problem: Problem[Any],
        start: Any,
        box: _Box,
        population_size: int | None,
        known: set[str],
        purpose: tuple[int, ...],
    ) -> None:
        self.idle = 0
        self._met = known
        self._problem = problem
        self._start = start
        self._purpose = purpose
        self._box = box
        self._optimizer = box.optimizer(population_size)
        self._draws = 0
        self._drawn: list[tuple[Vector, Any, str | None]] = []
        self._told: dict[str, float] = {}

    def is_prefix_of(self, problem: Problem[Any], start: Any, scores: dict[str, float]) -> bool:
        same = problem == self._problem and start == self._start
        return same and self._told.items() <= scores.items() and self._new_told_first(scores)

    def _new_told_first(self, scores: dict[str, float]) -> bool:
        """What is new in `scores` was drawn and not yet told."""
        drawn = {key for _, _, key in self._drawn}
        return all(key in drawn for key in scores.keys() - self._told.keys())

    def draw(self) -> None:
        """Draw a generation, its n-th member ever from a generator of its own. One that waits to be told is kept."""
        space = self._problem.space
        while len(self._drawn) < self._optimizer.population_size:
            rng = self._problem.rng(self._draws, *self._purpose)
            self._optimizer.reseed_rng(int(rng.integers(2**32)))
            self._draws += 1
            for _ in range(_LIMIT_TRIES):
                vector = self._optimizer.ask()
                candidate = space.from_vector(vector * self._box.widths)  # type: ignore[attr-defined]
                if self._problem.within_limits(space.cost(candidate)):
                    self._drawn.append((vector, candidate, space.key(candidate)))
                    break
            else:
                self._drawn.append((vector, candidate, None))

    def unknown(self, scores: dict[str, float]) -> list[Any]:
        """The drawn candidates that have no score yet, without those beyond the cost limits; none of them twice."""
        new = {key: candidate for _, candidate, key in self._drawn if key is not None and key not in scores}
        return list(new.values())

    def tell(self, scores: dict[str, float]) -> None:
        """Hand the scores of the drawn generation to the optimizer; restart it where it has converged."""
        self._optimizer.tell([(vector, scores.get(key or "", _WORST)) for vector, _, key in self._drawn])
        keys = {key for _, _, key in self._drawn if key is not None}
        self.idle = 0 if keys - self._met else self.idle + 1
        self._met |= keys
        self._drawn = []
        self._told = dict(scores)
        if self._optimizer.should_stop():
            self._optimizer = self._box.optimizer(2 * self._optimizer.population_size)
