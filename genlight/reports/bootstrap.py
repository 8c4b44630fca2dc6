"""Intervals of a root-mean-square distance over samples, by the bootstrap."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_DRAWS = 1000
_CONFIDENCE = 0.95


def rms_interval(squared_errors: ArrayLike, seed: int = 0) -> tuple[float, float, float]:
    """The root of the mean of n squared errors, and the ends of its 95 % interval (percentiles of 1,000 resamples).

    Args:
        squared_errors: float [n], one for each sample.
        seed: of the resampling.
    """
    values = np.asarray(squared_errors, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"squared errors must be finite, not negative, [n] with n ≥ 1; got shape {values.shape}")
    # a resample is a vector of counts: one product for all of them
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=_DRAWS)
    means = counts @ values / len(values)
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(np.sqrt(values.mean())), float(np.sqrt(low)), float(np.sqrt(high))
