"""Coordinates in which combinations of checkpoints are searched, and groups of layers that have their own.

A basis has M vectors, each a mean of the K members of a trajectory with weights that sum to one. The last is the newest
member alone, and its coefficient is one minus the others: M - 1 numbers are free, and zeros mean the newest member.
Members that are means themselves (bins written during training) weigh as many checkpoints as they hold.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

_SHORTEST, _LONGEST = 1.01, 3.0


class Basis(Protocol):
    """How members are gathered to basis vectors. A frozen dataclass: its `repr` is part of a space's fingerprint."""

    def matrix(self, counts: Sequence[int]) -> Array:
        """Weights float64 [M, K] over members with `counts` checkpoints each, oldest first; rows sum to one.

        The last row is the newest member alone.
        """
        ...


@dataclass(frozen=True)
class Raw:
    """Every member by itself."""

    def matrix(self, counts: Sequence[int]) -> Array:
        """The identity [K, K]."""
        return np.eye(_checked(counts))


@dataclass(frozen=True)
class GeometricBins:
    """Means of consecutive members; the newest bin is one member, and bins grow geometrically with age.

    Attributes:
        size: M, the number of bins; members are taken one by one where there are not more of them.
    """

    size: int = 16

    def __post_init__(self) -> None:
        _check_size(self.size)

    def matrix(self, counts: Sequence[int]) -> Array:
        """Weights [min(size, K), K]."""
        total = _checked(counts)
        sizes = bin_sizes(total, min(self.size, total))
        rows = np.zeros((len(sizes), total))
        end = total
        for row, size in zip(reversed(range(len(sizes))), sizes, strict=True):
            rows[row, end - size : end] = counts[end - size : end]
            end -= size
        rows /= rows.sum(axis=1, keepdims=True)
        return rows


@dataclass(frozen=True)
class EMAProfiles:
    """Exponential means of the whole trajectory with horizons from 2 to three times its length, and the newest member.

    Attributes:
        size: M, the number of profiles with the newest member; at most K.
    """

    size: int = 16

    def __post_init__(self) -> None:
        _check_size(self.size)

    def matrix(self, counts: Sequence[int]) -> Array:
        """Weights [min(size, K), K], longest horizon first."""
        total = _checked(counts)
        horizons = np.geomspace(max(_LONGEST * sum(counts), 4.0), 2.0, min(self.size, total) - 1)
        newest = np.zeros(total)
        newest[-1] = 1.0
        return np.stack([*(ema_profile(counts, float(horizon)) for horizon in horizons), newest])


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The way between free coefficients [..., M - 1] and weights over members [..., K], both float64.

    Attributes:
        basis: weights of the basis vectors over members [M, K], as `Basis.matrix` gives them.
        counts: checkpoints of each member [K].
    """

    basis: Array
    counts: Sequence[int]

    @classmethod
    def of(cls, basis: Basis, counts: Sequence[int]) -> "Coordinates":
        """Those of a basis over members with these counts."""
        return cls(basis.matrix(counts), counts)

    @property
    def size(self) -> int:
        """M - 1, the free coefficients."""
        return len(self.basis) - 1

    def to_members(self, coefficients: Array) -> Array:
        """Weights over members; they sum to one, and zeros give exactly the newest member."""
        weights: Array = coefficients @ self.basis[:-1]
        weights[..., -1] += 1.0 - coefficients.sum(axis=-1)
        return weights

    def from_members(self, weights: Array) -> Array:
        """Coefficients of the nearest combination; for bins, the sums over each bin.

        Nearest by least squares in the weights of checkpoints, of which a member's weight is an even share.
        """
        if self._is_raw:
            return np.array(weights[..., :-1], dtype=np.float64)
        target = np.array(weights, dtype=np.float64)
        target[..., -1] -= 1.0
        return (target * self._scale) @ self._inverse

    def holds(self, weights: Array) -> bool:
        """Whether the basis reaches these weights."""
        return bool(np.abs(self.to_members(self.from_members(weights)) - weights).max() <= 1e-9)

    @cached_property
    def _is_raw(self) -> bool:
        return self.basis.shape[0] == self.basis.shape[1] and bool((self.basis == np.eye(len(self.basis))).all())

    @cached_property
    def _inverse(self) -> Array:
        return np.linalg.pinv((self.basis[:-1] - self.basis[-1]) * self._scale)

    @cached_property
    def _scale(self) -> Array:
        return np.array(self.counts, dtype=np.float64) ** -0.5


def ema_profile(counts: Sequence[int], horizon: float) -> Array:
    """Weights [K] of an exponential mean over checkpoints: γ^age with γ = 1 - 1/horizon, normalised.

    Args:
        counts: checkpoints of each member, oldest first.
        horizon: h in checkpoints, above 1.

    Raises:
        ValueError: a horizon of 1 or less, or counts that are not positive.
    """
    _checked(counts)
    if not 1 < horizon < math.inf:
        raise ValueError(f"horizon = {horizon!r} must be a finite number above 1")
    gamma = 1.0 - 1.0 / horizon
    sizes = np.array(counts, dtype=np.float64)
    ages = sizes[::-1].cumsum()[::-1] - sizes
    weights: Array = gamma**ages * (1.0 - gamma**sizes)
    weights /= weights.sum()
    return weights


def profile_horizons(counts: Sequence[int], number: int = 24) -> list[float]:
    """Horizons for `ema_profile`, from 1.01 to three times the checkpoints, even in their logarithm."""
    _checked(counts)
    return [float(h) for h in np.geomspace(_SHORTEST, _LONGEST * sum(counts), number)]


def bin_sizes(total: int, number: int) -> list[int]:
    """Sizes of `number` bins of `total` members, newest bin first: 1, then growing geometrically.

    Raises:
        ValueError: more bins than members, or none.
    """
    if not 1 <= number <= total:
        raise ValueError(f"{number} bins of {total} members: there must be 1 to {total}")
    if number == 1:
        return [total]
    # the largest size alone is no more than all
    low, high = 1.0, total ** (1 / (number - 1))
    for _ in range(200):
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**j for j in range(number)) > total else (ratio, high)
    # rounding the ends and not the sizes keeps their sum; each size stays 1 or more as no step is below 1
    ends = np.floor(np.cumsum(low ** np.arange(number)) + 0.5).astype(int)
    ends[-1] = total
    return sorted(int(size) for size in np.diff(ends, prepend=0))


def group_of_names(names: Sequence[str], groups: Sequence[str]) -> list[int]:
    """The group of each parameter: the first pattern that is found in its name.

    Raises:
        ValueError: no pattern, one that is no regular expression, one that is nobody's first, or a name without any.
    """
    if not groups:
        raise ValueError("groups = () must hold at least one pattern; '.*' puts all parameters together")
    patterns = []
    for group in groups:
        try:
            patterns.append(re.compile(group))
        except re.error as error:
            raise ValueError(f"groups: {group!r} is no regular expression: {error}") from None
    found = []
    for name in names:
        group_index = next((i for i, pattern in enumerate(patterns) if pattern.search(name)), None)
        if group_index is None:
            raise ValueError(f"groups: no pattern matches {name!r}; end the list with '.*'")
        found.append(group_index)
    for i, group in enumerate(groups):
        if i not in found:
            raise ValueError(f"groups: {group!r} is the first match of no parameter; leave it out or move it up")
    return found


def project_to_simplex(coefficients: Array) -> Array:
    """Nearest coefficients [..., M - 1] that with the newest member's are not negative and sum to one.

    Duchi et al. 2008, figure 1, on all M coefficients.
    """
    points = np.concatenate([coefficients, 1.0 - coefficients.sum(axis=-1, keepdims=True)], axis=-1)
    if (points >= 0).all():
        return coefficients
    falling = -np.sort(-points, axis=-1)
    excess = (np.cumsum(falling, axis=-1) - 1.0) / np.arange(1, points.shape[-1] + 1)
    count = (falling > excess).sum(axis=-1, keepdims=True)
    shift = np.take_along_axis(excess, count - 1, axis=-1)
    projected: Array = np.maximum(points - shift, 0.0)
    return projected[..., :-1]


def _checked(counts: Sequence[int]) -> int:
    if len(counts) < 2 or min(counts) < 1:
        raise ValueError(f"a combination needs two or more members of one or more checkpoints, got counts {counts!r}")
    return len(counts)


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"basis.size = {size!r} must be a whole number, 2 or more")
