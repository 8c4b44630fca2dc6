"""How expert maps are varied: kept experts exchanged, matrices disturbed and mixed row by row (EEP, section 4.2)."""

from collections.abc import Sequence

import numpy as np
import torch

from genlight.experts.baselines import best_experts

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Kept = tuple[int, ...]
# rows whose sum is smaller than this are not divided by it
_SMALLEST_SUM = 0.1


def kept_by(scores: Array, count: int, routing_groups: int = 1) -> Kept:
    """The experts with the largest scores [E], as many of each routing group, ascending."""
    return tuple(best_experts(torch.from_numpy(np.ascontiguousarray(scores)), count, routing_groups))


def random_kept(num_experts: int, count: int, routing_groups: int, rng: np.random.Generator) -> Kept:
    """Random distinct experts, ascending, as many of each routing group."""
    return kept_by(rng.random(num_experts), count, routing_groups)


def exchanged(
    kept: Sequence[int], num_experts: int, routing_groups: int, probability: float, rng: np.random.Generator
) -> Kept:
    """Each kept expert gives way, with this probability, to one of its routing group that is not kept."""
    rows, size = list(kept), num_experts // routing_groups
    for place, expert in enumerate(rows):
        if rng.random() < probability:
            first = expert // size * size
            free = [other for other in range(first, first + size) if other not in rows]
            if free:
                rows[place] = int(rng.choice(free))
    return tuple(sorted(rows))


def crossed_kept(
    a: Sequence[int], b: Sequence[int], num_experts: int, routing_groups: int, rng: np.random.Generator
) -> Kept:
    """What both parents keep, filled up at random with what one of them keeps: no expert comes twice."""
    votes = np.zeros(num_experts)
    for parent in (a, b):
        votes[list(parent)] += 1
    return kept_by(votes + rng.random(num_experts), len(a), routing_groups)


def disturbed(matrix: Array, probability: float, sigma: float, rng: np.random.Generator) -> Array:
    """Each entry changes with this probability, by a Gaussian of standard deviation `sigma`; one at least does."""
    chosen = rng.random(matrix.shape) < probability
    if not chosen.any():
        chosen[tuple(int(rng.integers(size)) for size in matrix.shape)] = True
    return np.where(chosen, matrix + sigma * rng.normal(size=matrix.shape), matrix)


def crossed_rows(a: Array, b: Array, first_probability: float, rng: np.random.Generator) -> Array:
    """Each row [E] from the first parent with this probability, else from the second, unless it is there already."""
    child = a.copy()
    for row in np.flatnonzero(rng.random(len(a)) >= first_probability):
        others = np.delete(child, row, axis=0)
        if not (others == b[row]).all(axis=1).any():
            child[row] = b[row]
    return child


def normalised_rows(matrix: Array) -> Array:
    """Rows divided by their sums; rows whose sum is near 0 stay."""
    sums = matrix.sum(axis=-1, keepdims=True)
    return matrix / np.where(np.abs(sums) < _SMALLEST_SUM, 1.0, sums)
