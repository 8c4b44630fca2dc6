"""Intervals of a mean over few repetitions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by Student's t; one value alone has NaN as ends.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values: a mean needs one or more")
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, 0.5 + _CONFIDENCE / 2))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
