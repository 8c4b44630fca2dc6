"""What can be said of a model schedule before it is sampled with: errors of its members and of its solver.

Two errors reach the result: that of the members, as their validation losses have it and the solver's table weighs it
(`model_allocation`), and that of the steps, as distributions of which the exact solution is known have it
(`genlight.diffusion.solver.truncation`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.truncation import KnownSolutions
from genlight.search.spaces.model_allocation import Curve, evaluation_weights

Array = np.ndarray[Any, np.dtype[np.float64]]
_KEPT = 4096
# below any error that tells schedules apart
_SMALLEST = 1e-12


def added_errors(table: SolverTable, noise_schedule: NoiseSchedule, curves: Iterable[Curve]) -> Array:
    """Squared error that each member would add at each evaluation, [members, E]."""
    weights, half_log_snrs = evaluation_weights(table, noise_schedule)
    return np.array([weights**2 * np.asarray(curve(half_log_snrs)) for curve in curves])


@dataclass(frozen=True)
class ModelIndicators:
    """Logarithms of errors by which model schedules of one zoo can be ranked, lower is better.

    Attributes:
        noise_schedule: of all members.
        curves: mean squared error of each member's ε̂ at λ, in the order of the members; None: not known.
    """

    noise_schedule: NoiseSchedule
    curves: tuple[Curve, ...] | None = None
    _structures: dict[Hashable, tuple[Array, Array]] = field(default_factory=dict, init=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The predicted error of the members, if it is known, and that of the steps for each distribution."""
        return (("members",) if self.curves else ()) + self._known.names

    def __call__(self, structure: Hashable, table: Callable[[], SolverTable], members: Sequence[int]) -> Array:
        """Float64 [names].

        Args:
            structure: what the table depends on; what follows from it is kept, since children share it with parents.
            table: compiled, in the basis "data".
            members: the number of the member that makes each evaluation.
        """
        if structure not in self._structures:
            if len(self._structures) > _KEPT:
                self._structures.clear()
            self._structures[structure] = self._of_structure(table())
        errors, steps = self._structures[structure]
        if not self.curves:
            return steps
        total = float(errors[members, np.arange(len(members))].sum())
        return np.concatenate([[0.5 * np.log(max(total, _SMALLEST))], steps])

    def _of_structure(self, table: SolverTable) -> tuple[Array, Array]:
        """Squared error that each member would add at each evaluation, [members, E]; log errors of the steps."""
        return added_errors(table, self.noise_schedule, self.curves or ()), self._known.log_errors(table)

    @cached_property
    def _known(self) -> KnownSolutions:
        return KnownSolutions(self.noise_schedule)
