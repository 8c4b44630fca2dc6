"""Where the times of a solver schedule may be, in λ."""

import math
from dataclasses import dataclass

import numpy as np

Lambdas = np.ndarray[tuple[int], np.dtype[np.float64]]
Generator = np.random.Generator

# room in λ that times have beyond their bounds before an infinite end, so that one may lie at its bound
OPEN_END_ROOM = 1.0


@dataclass(frozen=True)
class TimeRange:
    """Where the times of a schedule may be, in λ; an infinite end is -inf or inf and stays as it is.

    Attributes:
        start, end: lowest λ of the first time and highest λ of the last one.
        start_slack, end_slack: how far the first may rise above `start` and the last fall below `end`.
        low, high: bounds of the inner times.
        min_gap: smallest step in λ; less where so many steps leave no room for it.
    """

    start: float
    end: float
    start_slack: float
    end_slack: float
    low: float
    high: float
    min_gap: float

    def settle(self, lambdas: Lambdas) -> Lambdas:
        """The times sorted, inside their bounds and at least the smallest gap apart."""
        result = np.array(lambdas, dtype=np.float64)
        if math.isfinite(result[0]):
            result[0] = min(max(result[0], self.start), self.start + self.start_slack)
        if math.isfinite(result[-1]):
            result[-1] = min(max(result[-1], self.end - self.end_slack), self.end)
        count = len(result) - 2
        if count < 1:
            return result
        low, high = max(self.low, result[0]), min(self.high, result[-1])
        gap = min(self.min_gap, (high - low) / (2 * (count + 1)))
        # next to a finite end the gap is kept, at a bound before an infinite one it is not needed
        low = low + gap if math.isfinite(result[0]) else low
        high = high - gap if math.isfinite(result[-1]) else high
        inner = np.sort(result[1:-1]).clip(low, high)
        # number by number, so that times that need no change keep their last bit
        for i in range(1, count):
            inner[i] = max(inner[i], inner[i - 1] + gap)
        inner[-1] = min(inner[-1], high)
        for i in reversed(range(count - 1)):
            inner[i] = min(inner[i], inner[i + 1] - gap)
        result[1:-1] = inner
        return result

    def movable_ends(self, lambdas: Lambdas) -> list[int]:
        """The ends that may change, 0 and -1."""
        slack = ((0, self.start_slack), (-1, self.end_slack))
        return [end for end, room in slack if room > 0 and math.isfinite(lambdas[end])]

    def movable(self, lambdas: Lambdas) -> list[int]:
        """Positions of the times that may change."""
        count = len(lambdas)
        return [*range(1, count - 1), *(end % count for end in self.movable_ends(lambdas))]

    def has_room(self) -> bool:
        """Whether the last time is above the first wherever both are."""
        return self.start + self.start_slack < self.end - self.end_slack

    def walled(self, lambdas: Lambdas) -> Lambdas:
        """The times with walls beyond the bounds of the inner times for infinite ends, so that every gap is finite."""
        result = lambdas.copy()
        result[0] = lambdas[0] if math.isfinite(lambdas[0]) else self.low - OPEN_END_ROOM
        result[-1] = lambdas[-1] if math.isfinite(lambdas[-1]) else self.high + OPEN_END_ROOM
        return result

    def draw(self, lambdas: Lambdas, rng: Generator) -> Lambdas:
        """Random times with the ends of `lambdas`; an end that may move lies evenly within its slack."""
        walled = self.walled(lambdas)
        for end in self.movable_ends(lambdas):
            bound, room = (self.end, -self.end_slack) if end else (self.start, self.start_slack)
            walled[end] = bound + room * rng.random()
        gaps = rng.dirichlet(np.full(len(lambdas) - 1, 3.0))
        result = walled[0] + (walled[-1] - walled[0]) * np.concatenate([[0.0], gaps.cumsum()])
        for end in (0, -1):
            result[end] = walled[end] if math.isfinite(lambdas[end]) else lambdas[end]
        return self.settle(result)
