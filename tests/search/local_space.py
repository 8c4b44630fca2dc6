"""The toy schedules with a box around each of them, for polishing."""

from dataclasses import dataclass, replace

import numpy as np
from search.toy_search import Schedule, ScheduleSpace


@dataclass(frozen=True)
class LocalSpace(ScheduleSpace):
    """Its box holds the times, in any order; the choices are those of the candidate it was made around."""

    fixed: tuple[int, ...] | None = None

    def around(self, candidate: Schedule) -> "LocalSpace":
        return replace(self, fixed=candidate.kinds)

    def from_vector(self, vector: np.ndarray) -> Schedule:
        kinds = np.zeros(self.steps, dtype=int) if self.fixed is None else np.array(self.fixed)
        return self._made(np.sort(vector), kinds)
