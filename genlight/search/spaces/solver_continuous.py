"""The continuous decisions of one solver schedule as a real vector, its discrete ones fixed.

What CMA-ES walks: where the times are, and how much each derivative counts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genlight.diffusion.solver.decisions import Scale, SolverSchedule, StepDecision
from genlight.diffusion.solver.levels import PURE_NOISE_HALF_LOG_SNR
from genlight.search.protocols import Vector
from genlight.search.spaces.solver_genes import Draft, factor, resampled
from genlight.search.spaces.solver_times import Lambdas, TimeRange

if TYPE_CHECKING:
    from genlight.search.spaces.solver_schedule import SolverScheduleSpace

# a factor or weight stays within this, or where the candidate's own is larger, within that
FACTOR_LIMIT = 3.0
# what a gap counts as at least, in λ, so that its logarithm exists
_LEAST_GAP = 1e-6


class Place(NamedTuple):
    """Where a factor or weight stands in a schedule.

    Attributes:
        step: index of the step.
        corrector: of its corrector, not of its predictor.
        weight: an explicit weight, not the factor of a derivative.
        number: which of them, from 0; weight 0 is the source's and follows from the others.
    """

    step: int
    corrector: bool
    weight: bool
    number: int


@dataclass(frozen=True)
class ContinuousGenes:
    """The continuous decisions of `candidate` that are genes of `space`; a `VectorView` around one schedule.

    Coordinates, in this order:

    - with the gene "times": logarithms of the gaps in λ over the last one, less the smallest gap allowed; evaluations
      at one time stay together. Before an infinite end the gaps begin at a wall beyond the bounds of the inner times;
    - with `start_slack` (`end_slack`): how far, in λ, the first time lies above its lowest value (the last below its
      highest), where that end is finite;
    - with the gene "scale": the factor c_k of every derivative of every step and corrector, as a number; where there
      are explicit weights instead, those of the points, while the source's keeps their sum.

    Attributes:
        space: says which genes there are and how far times may go; a candidate that lies beyond keeps its own bounds.
        candidate: its decisions are kept.
    """

    space: "SolverScheduleSpace"
    candidate: SolverSchedule
    _draft: Draft = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_draft", self.space.draft(self.candidate))

    @cached_property
    def start(self) -> Vector:
        """The candidate, float64 [n]."""
        return self._vector(self._draft.lambdas, self._values)

    @property
    def start_tensor(self) -> Tensor:
        """`start` as a tensor."""
        return torch.from_numpy(self.start.copy())

    @property
    def vector_bounds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """No bounds, float64 [n, 2]: ends and factors beyond what is allowed count as the nearest that is."""
        return np.tile([-np.inf, np.inf], (len(self.start), 1))

    def to_vector(self, candidate: SolverSchedule) -> Vector:
        """Another schedule's coordinates, float64 [n].

        Times of another number of steps are interpolated; factors that it lacks are those of this candidate.
        """
        draft = self.space.draft(candidate)
        own = self._draft.lambdas
        same = len(draft.lambdas) == len(own)
        lambdas = draft.lambdas if same else resampled(draft, len(own) - 1, own)
        ends_differ = [math.isfinite(lambdas[i]) != math.isfinite(own[i]) for i in (0, -1)]
        if any(ends_differ):
            lambdas = lambdas.copy()
            lambdas[0], lambdas[-1] = (own[i] if differ else lambdas[i] for i, differ in zip((0, -1), ends_differ))
        values = _factors(draft.steps, draft.lambdas) if same else {}
        return self._vector(lambdas, {place: values.get(place, value) for place, value in self._values.items()})

    def from_vector(self, vector: Vector | Tensor) -> SolverSchedule:
        """The schedule at a point; the same as `schedule`."""
        return self.schedule(vector)

    def schedule(self, vector: Vector | Tensor) -> SolverSchedule:
        """The valid schedule at, or nearest to, a point [n]; that at `start` has the table of the candidate.

        Raises:
            ValueError: another number of coordinates, or numbers that are not finite.
        """
        point = np.asarray(vector, dtype=np.float64)
        if point.shape != self.start.shape or not np.isfinite(point).all():
            raise ValueError(f"vector: {len(self.start)} finite coordinates are needed, not {point}")
        lambdas = self._draft.lambdas.copy()
        logits, shifts, values = np.split(point, [self._gaps, self._gaps + len(self._shifted)])
        for end, shift in zip(self._shifted, shifts.tolist()):
            lambdas[end] = self._range.start + shift if end == 0 else self._range.end - shift
        if "times" in self.space.genes:
            lambdas = self._times(lambdas, logits)
        clipped = {
            place: min(max(value, min(-FACTOR_LIMIT, own)), max(FACTOR_LIMIT, own))
            for (place, own), value in zip(self._values.items(), values.tolist())
        }
        draft = replace(self._draft, lambdas=lambdas, steps=_with_factors(self._draft.steps, clipped))
        return self.space.finished(draft, self.candidate)

    @cached_property
    def _values(self) -> dict[Place, float]:
        return _factors(self._draft.steps, self._draft.lambdas) if "scale" in self.space.genes else {}

    @cached_property
    def _group(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Which of the distinct times each time is, [N + 1]."""
        # the difference of a step without length is exactly zero: both times are one number
        rises = np.diff(self._draft.lambdas) > 0
        return np.concatenate([[0], np.cumsum(rises)])

    @cached_property
    def _firsts(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The first time of each group."""
        return np.unique(self._group, return_index=True)[1]

    @cached_property
    def _gaps(self) -> int:
        """Number of coordinates of gaps."""
        return len(self._firsts) - 2 if "times" in self.space.genes else 0

    @cached_property
    def _shifted(self) -> list[int]:
        """The ends that may move: 0, -1."""
        return self.space.range.movable_ends(self._draft.lambdas) if "times" in self.space.genes else []

    @cached_property
    def _range(self) -> TimeRange:
        """The bounds of the space, widened to hold the candidate; ends that may not move are the candidate's."""
        bounds, lambdas = self.space.range, self._draft.lambdas
        first, last = float(lambdas[0]), float(lambdas[-1])
        start, top, bottom, end = first, first, last, last
        if 0 in self._shifted:
            start, top = min(bounds.start, first), max(bounds.start + bounds.start_slack, first)
        if -1 in self._shifted:
            bottom, end = min(bounds.end - bounds.end_slack, last), max(bounds.end, last)
        finite = lambdas[np.isfinite(lambdas)]
        low, high = min(bounds.low, float(finite.min())), max(bounds.high, float(finite.max()))
        widened = TimeRange(
            start,
            end,
            top - start if 0 in self._shifted else 0.0,
            end - bottom if -1 in self._shifted else 0.0,
            low,
            high,
            bounds.min_gap,
        )
        # half the candidate's own smallest gap, so that its logarithm exists
        smallest = float(np.diff(widened.walled(lambdas[self._firsts])).min())
        return replace(widened, min_gap=min(bounds.min_gap, smallest / 2))

    def _vector(self, lambdas: Lambdas, values: Mapping[Place, float]) -> Vector:
        logits = np.empty(0)
        if self._gaps:
            walled = self._range.walled(lambdas[self._firsts])
            gaps = np.maximum(np.diff(walled) - self._least_gap(walled), _LEAST_GAP)
            logits = np.log(gaps[:-1] / gaps[-1])
        shifts = [
            lambdas[end] - self._range.start if end == 0 else self._range.end - lambdas[end] for end in self._shifted
        ]
        return np.concatenate([logits, shifts, [*values.values()]])

    def _times(self, lambdas: Lambdas, logits: Vector) -> Lambdas:
        """The times with their ends settled and the inner ones at the gaps of a vector."""
        settled = self._range.settle(lambdas[self._firsts])
        walled = self._range.walled(settled)
        weights = np.exp(np.append(logits, 0.0) - max(0.0, float(logits.max(initial=0.0))))
        least = self._least_gap(walled)
        gaps = least + (walled[-1] - walled[0] - len(weights) * least) * weights / weights.sum()
        settled[1:-1] = walled[0] + gaps.cumsum()[:-1]
        result: Lambdas = self._range.settle(settled)[self._group]
        return result

    def _least_gap(self, walled: Lambdas) -> float:
        return min(self._range.min_gap, float(walled[-1] - walled[0]) / (2 * (len(walled) - 1)))


def _factors(steps: list[StepDecision], lambdas: Lambdas) -> dict[Place, float]:
    """Every factor as a number, and every explicit weight but the source's."""
    # from pure noise a table is compiled with a finite λ in its place
    finite = np.maximum(lambdas, PURE_NOISE_HALF_LOG_SNR)
    found: dict[Place, float] = {}
    for i, step in enumerate(steps):
        h = float(finite[i + 1] - finite[i + 1 + step.source])
        parts = [(False, step.weights, step.scales, step.order - 1)]
        if step.corrector is not None:
            corrector = step.corrector
            parts.append((True, corrector.weights, corrector.scales, len(step.corrector_points())))
        for of_corrector, weights, scales, count in parts:
            if weights is not None:
                found |= {Place(i, of_corrector, True, k): weights[k] for k in range(1, len(weights))}
            else:
                given: tuple[Scale, ...] = (*scales, *[1.0] * count)[:count]
                values = (factor(scale, h, step.prediction) for scale in given)
                found |= {Place(i, of_corrector, False, k): value for k, value in enumerate(values)}
    return found


def _with_factors(steps: list[StepDecision], values: Mapping[Place, float]) -> list[StepDecision]:
    """The steps with other factors and weights; weights keep their sum, so that a constant output stays exact."""
    groups: dict[tuple[int, bool, bool], list[float]] = {}
    for place, value in values.items():
        groups.setdefault(place[:3], []).append(value)
    result = list(steps)
    for (i, of_corrector, weight), numbers in groups.items():
        step = result[i]
        old = step.corrector if of_corrector else step
        if old is None:
            continue
        change: dict[str, Any] = {"scales": tuple(numbers)}
        if weight and old.weights is not None:
            change = {"weights": (math.fsum([*old.weights, *(-number for number in numbers)]), *numbers)}
        if of_corrector and step.corrector is not None:
            change = {"corrector": replace(step.corrector, **change)}
        result[i] = replace(step, **change)
    return result
