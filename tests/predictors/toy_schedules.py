"""Candidates with a known order for predictors to learn."""

import numpy as np
from search.toy_search import ScheduleSpace, schedule_error
from torch import Tensor


def schedules(count: int, seed: int = 0) -> tuple[list[Tensor], list[float]]:
    """Features and errors of toy schedules with 4 to 6 steps."""
    rng = np.random.default_rng(seed)
    candidates = [
        (space, space.sample(rng)) for space in (ScheduleSpace(int(rng.integers(4, 7))) for _ in range(count))
    ]
    return [space.encode(c) for space, c in candidates], [schedule_error(c) for _, c in candidates]
