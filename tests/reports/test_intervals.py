"""Intervals against a textbook value, and how often they hold the mean."""

import math

import numpy as np
import pytest

from genlight.reports.intervals import mean_interval


def test_the_interval_is_students() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.3027, deviation 1, n = 3
    assert mean == 2.0 and high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean - low == pytest.approx(high - mean)
    alone = mean_interval([5.0])
    assert alone[0] == 5.0 and math.isnan(alone[1]) and math.isnan(alone[2])
    with pytest.raises(ValueError, match="one or more"):
        mean_interval([])


def test_it_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        _, low, high = mean_interval(rng.normal(size=4).tolist())
        inside += low <= 0 <= high
    assert 930 <= inside <= 970
