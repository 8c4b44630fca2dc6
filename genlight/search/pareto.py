"""The front of quality against cost: which records no other one beats, and the hypervolume that they dominate."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from genlight.search.protocols import Candidate
from genlight.search.records import Record

SCORE = "score"


def pareto_front(points: ArrayLike) -> list[int]:
    """Rows of `points` that no other row dominates, in their order; all objectives are minimised.

    A row dominates another if it is nowhere worse and somewhere better, so equal rows stand or fall together.

    Args:
        points: float [n, objectives], finite.
    """
    values = _finite_points(points)
    front: list[int] = []
    # Sorted by the first objective, then the next: a row can only be dominated by one before it
    for row in np.lexsort(values.T[::-1]):
        candidate = values[row]
        kept = values[front]
        if not np.any(np.all(kept <= candidate, axis=1) & np.any(kept < candidate, axis=1)):
            front.append(int(row))
    return sorted(front)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume of the region that `points` dominate below `reference`, for 1 to 3 minimised objectives.

    Args:
        points: float [n, objectives]; rows that are not below `reference` everywhere add nothing.
        reference: float [objectives], worse than what counts.

    Raises:
        ValueError: another number of objectives, or a value that is not finite.
    """
    values, corner = _finite_points(points), np.asarray(reference, dtype=np.float64)
    if not 1 <= values.shape[1] <= 3:
        raise ValueError(f"hypervolume is for 1 to 3 objectives, got {values.shape[1]}")
    if corner.shape != values.shape[1:] or not np.all(np.isfinite(corner)):
        raise ValueError(f"reference must be {values.shape[1]} finite numbers, got {reference!r}")
    return _volume(values[np.all(values < corner, axis=1)], corner)


def _volume(values: np.ndarray, corner: np.ndarray) -> float:
    """Slices along the last objective, each the volume of one objective less."""
    if not len(values):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - values.min())
    ordered = values[np.argsort(values[:, -1], kind="stable")]
    ends = np.append(ordered[1:, -1], corner[-1])
    total = 0.0
    for count, (begin, end) in enumerate(zip(ordered[:, -1], ends), start=1):
        if end > begin:
            total += (end - begin) * _volume(ordered[:count, :-1], corner[:-1])
    return float(total)


def front_of(
    records: Sequence[Record[Candidate]], objectives: Sequence[str], fidelity: int | None = None
) -> list[Record[Candidate]]:
    """The records that no other one beats in all of `objectives`, sorted by the last of them.

    Args:
        records: failed ones are left out.
        objectives: "score" and names of costs.
        fidelity: only records of this one; the highest that has a score if None. Fidelities are never mixed.

    Raises:
        ValueError: an objective is neither the score nor a cost that all records have.
    """
    scored = [record for record in records if record.score is not None]
    if not scored:
        return []
    level = max(record.fidelity for record in scored) if fidelity is None else fidelity
    scored = [record for record in scored if record.fidelity == level]
    points = [[_value(record, name) for name in objectives] for record in scored]
    front = [scored[row] for row in pareto_front(points)] if points else []
    return sorted(front, key=lambda record: (_value(record, objectives[-1]), record.rank))


def _value(record: Record[Candidate], name: str) -> float:
    if name == SCORE and record.score is not None:
        return record.score
    if name not in record.cost:
        known = ", ".join([SCORE, *sorted(record.cost)])
        raise ValueError(f"objective {name!r} is unknown; record {record.index} has: {known}")
    return record.cost[name]


def _finite_points(points: ArrayLike) -> np.ndarray:
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or not np.all(np.isfinite(values)):
        raise ValueError(f"points must be finite numbers [n, objectives], got shape {values.shape}")
    return values
