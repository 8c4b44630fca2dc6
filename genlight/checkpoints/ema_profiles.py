"""Averages of weights as linear combinations: what EMA, power-function EMA, SWA and LAWA are over saved checkpoints.

And the reconstruction of one power-function EMA from others (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3: post-hoc EMA).

All weights are float64 arrays, oldest checkpoint first, and sum to one where nothing else is said.
"""

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

Weights = NDArray[numpy.float64]


def power_gamma(sigma_rel: float) -> float:
    """The exponent gamma of the averaging profile t^gamma on [0, 1] whose standard deviation is `sigma_rel`.

    The largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2), s = sigma_rel.

    Raises:
        ValueError: not in (0, 12^-1/2): the profile is no steeper than uniform.
    """
    if not 0.0 < sigma_rel < 12**-0.5:
        raise ValueError(
            f"sigma_rel must lie in (0, {12**-0.5:.4f}), the width of the uniform profile, got {sigma_rel}"
        )
    inverse = sigma_rel**-2
    roots = numpy.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def power_sigma_rel(gamma: float) -> float:
    """Standard deviation of the profile t^gamma on [0, 1]; the inverse of `power_gamma`."""
    return float(((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0))) ** 0.5)


def power_rate(gamma: float, step: int) -> float:
    """Share of the old average that is kept at optimizer step `step` (from 1): (1 - 1/step)^(gamma+1); 0 at step 1.

    Raises:
        ValueError: `step` below 1.
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    return float((1.0 - 1.0 / step) ** (gamma + 1.0))


def online_ema_weights(count: int, rate: float) -> Weights:
    """What an EMA that is updated once per checkpoint is made of: [count + 1], the initial value's share first.

    Per checkpoint i = 1..K it is (1 - rate) rate^(K-i), and rate^K of the initial value. For checkpoints every I steps
    and a rate per step of r, give ``rate=r**I``.
    """
    _check_rate(rate)
    age = numpy.arange(count - 1, -1, -1, dtype=numpy.float64)
    return numpy.concatenate([[rate**count], (1.0 - rate) * rate**age])


def ema_weights(steps: Sequence[int], rate: float) -> Weights:
    """The EMA of `rate` per optimizer step over checkpoints at `steps`, without what lies before them.

    Each checkpoint stands for the steps since the one before it; at a constant interval I this is the normalised
    r^(I(K-i)) (1 - r^I) / (1 - r^(IK)).

    Raises:
        ValueError: the rate is not in [0, 1), or the steps do not ascend from at least 0, or are 0 alone.
    """
    _check_rate(rate)
    edges = _edges(steps)
    mass = rate ** (edges[-1] - edges[1:]) - rate ** (edges[-1] - edges[:-1])
    return numpy.asarray(mass / mass.sum(), dtype=numpy.float64)


def power_weights(steps: Sequence[int], gamma: float) -> Weights:
    """The power-function EMA of exponent `gamma` over checkpoints at `steps`; each stands for the steps since the one
    before it, so that initial weights (step 0) have no weight.

    Raises:
        ValueError: the steps do not ascend from at least 0, or are 0 alone.
    """
    edges = _edges(steps) / float(steps[-1])
    mass = edges[1:] ** (gamma + 1.0) - edges[:-1] ** (gamma + 1.0)
    return numpy.asarray(mass / mass.sum(), dtype=numpy.float64)


def swa_weights(counts: Sequence[int]) -> Weights:
    """The mean of all checkpoints, where member i is itself the mean of `counts[i]` of them."""
    weights = numpy.asarray(counts, dtype=numpy.float64)
    return numpy.asarray(weights / weights.sum(), dtype=numpy.float64)


def lawa_weights(counts: Sequence[int], last: int) -> Weights:
    """The mean of the newest `last` members, by the checkpoints in each (Kaddour 2022, LAWA).

    Raises:
        ValueError: `last` is not between 1 and the number of members.
    """
    if not 1 <= last <= len(counts):
        raise ValueError(f"last must be between 1 and {len(counts)}, the number of members, got {last}")
    weights = numpy.asarray(counts, dtype=numpy.float64).copy()
    weights[: len(counts) - last] = 0.0
    return numpy.asarray(weights / weights.sum(), dtype=numpy.float64)


def profile_products(
    first_ends: Sequence[float],
    first_gammas: Sequence[float],
    second_ends: Sequence[float],
    second_gammas: Sequence[float],
) -> Weights:
    """Inner products [N, M] of the profiles p(t) = (gamma+1) t^gamma / end^(gamma+1) on [0, end], with each other.

    With a <= b the two ends, the product is (g+1)(h+1) / (g+h+1) (a/b)^(gamma of b) / b: a form that no exponent
    overflows (the paper's appendix C.2 has the same integral).
    """
    end_1 = numpy.asarray(first_ends, dtype=numpy.float64)[:, None]
    end_2 = numpy.asarray(second_ends, dtype=numpy.float64)[None, :]
    gamma_1 = numpy.asarray(first_gammas, dtype=numpy.float64)[:, None]
    gamma_2 = numpy.asarray(second_gammas, dtype=numpy.float64)[None, :]
    later = numpy.maximum(end_1, end_2)
    ratio = numpy.minimum(end_1, end_2) / later
    exponent = numpy.where(end_1 < end_2, gamma_2, gamma_1)
    factor = (gamma_1 + 1.0) * (gamma_2 + 1.0) / (gamma_1 + gamma_2 + 1.0)
    return numpy.asarray(factor * ratio**exponent / later, dtype=numpy.float64)


def reconstruct_power_ema(
    ends: Sequence[float], gammas: Sequence[float], gamma: float, end: float | None = None
) -> tuple[Weights, float]:
    """Weights of saved power-function EMAs whose combination is nearest to another one (algorithm 3 of the paper).

    Args:
        ends: optimizer step of each saved average.
        gammas: exponent of each saved average, see `power_gamma`.
        gamma: exponent of the average wanted.
        end: step of the average wanted; the newest one if None.

    Returns:
        weights [N], normalised to sum to one, and the relative L2 error of the profile before that.

    Raises:
        ValueError: no or unequally many averages, or two of them equal.
    """
    if len(ends) != len(gammas) or not len(ends):
        raise ValueError(f"as many ends as gammas are needed, and at least one; got {len(ends)} and {len(gammas)}")
    if len({*zip(ends, gammas)}) != len(ends):
        raise ValueError("two of the saved averages have the same step and exponent: give each once")
    target = [float(ends[-1] if end is None else end)]
    products = profile_products(ends, gammas, ends, gammas)
    toward = profile_products(ends, gammas, target, [gamma])[:, 0]
    weights = numpy.linalg.solve(products, toward)
    norm = profile_products(target, [gamma], target, [gamma])[0, 0]
    squared = norm - 2.0 * weights @ toward + weights @ products @ weights
    return weights / weights.sum(), float(max(squared, 0.0) / norm) ** 0.5


def _check_rate(rate: float) -> None:
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate must be in [0, 1), got {rate}")


def _edges(steps: Sequence[int]) -> Weights:
    """Where the span of each checkpoint begins and ends; the first one is as long as the second."""
    array = numpy.asarray(steps, dtype=numpy.float64)
    if not len(array) or array[0] < 0 or array[-1] < 1 or (numpy.diff(array) <= 0).any():
        raise ValueError(f"steps must ascend from at least 0, and not be 0 alone, got {list(steps)[:5]}")
    first = 2 * array[0] - array[1] if len(array) > 1 else array[0] - 1
    return numpy.concatenate([[max(first, 0.0)], array])
