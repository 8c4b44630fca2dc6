"""How far a solver schedule is from the exact solution where that is known: its error without a network.

For data from ½ N(-m, s²) + ½ N(m, s²) on the line the ideal network has a closed form (the posterior mean), and the
probability flow ODE, which cannot change the order of points on a line, moves each quantile of its start to the same
quantile of its end. Data sets have directions of many spreads s, some of them with modes that lie apart, so each
distribution stands for some of them. With m = 0 the error is that of a linear equation, and so a number of the table
alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.spacings import End

Array = np.ndarray[Any, np.dtype[np.float64]]

# (m, s) of data in about [-1, 1]: directions without modes from narrow to wide, and with two of them
DISTRIBUTIONS: tuple[tuple[float, float], ...] = (
    *((0.0, spread) for spread in (0.03, 0.1, 0.3, 1.0)),
    *((0.3, 0.1), (0.6, 0.1), (1.0, 0.1), (0.6, 0.3)),
)
_QUANTILES = 12
_SMALLEST = 1e-9
_BISECTIONS = 80


@dataclass(frozen=True)
class KnownSolutions:
    """Exact solutions on one noise schedule, which compiled solver schedules are compared with.

    Attributes:
        noise_schedule: of the tables.
        end: where exact solutions end, as in `spacings.grid`.
        distributions: (m, s) of each distribution, m not negative and s positive.
    """

    noise_schedule: NoiseSchedule
    end: End = "t_min"
    distributions: Sequence[tuple[float, float]] = DISTRIBUTIONS

    @cached_property
    def noise(self) -> Array:
        """Standard normal noise to begin with, [Z]: quantiles, of the upper half only, since all is symmetric."""
        noise: Array = ndtri(0.5 + 0.5 * (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
        return noise

    @cached_property
    def exact(self) -> Array:
        """Where each noise ends, [distributions, Z], by bisection of the distribution function at the end."""
        schedule = self.noise_schedule
        begin = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
        end = (schedule.alpha(schedule.t_min), schedule.sigma(schedule.t_min)) if self.end == "t_min" else (1.0, 0.0)
        wanted = self._probability(math.hypot(*begin) * self.noise[None], *begin)
        low = np.zeros_like(wanted)
        high = low + end[0] * self._modes + 10 * self._deviation(*end)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = self._probability(middle, *end) < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def errors(self, table: SolverTable) -> Array:
        """Root mean squared distance of a table's results to the exact ones, for each distribution, [distributions].

        The table is in the basis "data". The mean image of an analytical first step is zero.
        """
        if table.basis != "data":
            raise ValueError(f"table.basis = {table.basis!r} must be data")
        weights = table.weights.detach().numpy()
        alphas, sigmas = (
            values.tolist()
            for values in (self.noise_schedule.alpha(table.times), self.noise_schedule.sigma(table.times))
        )
        start = np.broadcast_to(table.initial_scale * self.noise, self.exact.shape)
        known = [start]
        for number in range(table.nfe):
            x = np.tensordot(weights[number, : len(known)], np.stack(known), axes=1)
            known.append(self._posterior_mean(x, alphas[number], sigmas[number]))
        result = np.tensordot(weights[-1], np.stack(known), axes=1)
        errors: Array = np.sqrt(np.square(result - self.exact).mean(axis=1))
        return errors

    @property
    def names(self) -> tuple[str, ...]:
        """One for each distribution."""
        return tuple(f"modes {mode:g} spread {spread:g}" for mode, spread in self.distributions)

    def log_errors(self, table: SolverTable) -> Array:
        """Natural logarithms of the errors, [distributions]; what is exact up to rounding counts as 1e-9."""
        logarithms: Array = np.log(np.maximum(self.errors(table), _SMALLEST))
        return logarithms

    @cached_property
    def _modes(self) -> Array:
        return np.array([[mode] for mode, _ in self.distributions])

    @cached_property
    def _spreads(self) -> Array:
        return np.array([[spread] for _, spread in self.distributions])

    def _deviation(self, alpha: float, sigma: float) -> Array:
        """Of one mode of x = α x_0 + σ ε, [distributions, 1]."""
        deviation: Array = np.hypot(alpha * self._spreads, sigma)
        return deviation

    def _probability(self, x: Array, alpha: float, sigma: float) -> Array:
        """P(α x_0 + σ ε < x)."""
        deviation, shift = self._deviation(alpha, sigma), alpha * self._modes
        probability: Array = (ndtr((x - shift) / deviation) + ndtr((x + shift) / deviation)) / 2
        return probability

    def _posterior_mean(self, x: Array, alpha: float, sigma: float) -> Array:
        """E[x_0 | α x_0 + σ ε = x]."""
        variance = self._deviation(alpha, sigma) ** 2
        shared = alpha * self._spreads**2 * x / variance
        mean: Array = shared + self._modes * sigma**2 / variance * np.tanh(alpha * self._modes * x / variance)
        return mean
