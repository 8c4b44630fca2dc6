"""Solvers that are known by explicit weights of the stored noise: Adams-Bashforth, Runge-Kutta, DEIS with time."""

from itertools import pairwise

import numpy as np
import torch

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.decisions import StepDecision, nearest_points
from genlight.diffusion.solver.spacings import Times

# Adams-Bashforth on even steps, newest first (Liu et al. 2022, "Pseudo Numerical Methods", equation 9 and appendix)
_WEIGHTS: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_STAGES = 4
_PANELS, _NODES = 40, 12


def adams_step(order: int, points: tuple[int, ...] | None = None) -> StepDecision:
    """The first-order step with Adams-Bashforth's mean of the stored noises; `points` other than the nearest."""
    if order == 1:
        return StepDecision("noise")
    chosen = points if points is not None else nearest_points(order)[0]
    return StepDecision("noise", order, points=(chosen,), weights=_WEIGHTS[order])


def runge_kutta_start(times: Times, count: int) -> tuple[Times, list[StepDecision]]:
    """`count` classical Runge-Kutta steps on the noise, then Adams-Bashforth of order 4 on the starts of the steps.

    Each Runge-Kutta step lists its stages as times: start, middle, middle, end (and end, the start of the next).
    """
    stages = [
        StepDecision("noise"),
        StepDecision("noise", 2, source=-2, points=((-1,),), weights=(0.0, 1.0)),
        StepDecision("noise", 2, source=-3, points=((-1,),), weights=(0.0, 1.0)),
        StepDecision("noise", 4, source=-4, points=((-3, -2, -1),), weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    ]
    listed: list[float | None] = [times[0]]
    for start, end in pairwise(times[: count + 1]):
        if start is None or end is None:
            raise ValueError("times: a Runge-Kutta step needs finite times")
        middle = (start + end) / 2
        listed += [middle, middle, end, end]
    listed += times[count + 1 :]
    steps = stages * count
    starts = [_STAGES * index for index in range(count)]  # which evaluations are starts of steps
    for index in range(_STAGES * count, len(listed) - 1):
        starts.append(index)
        steps.append(adams_step(4, tuple(start - index - 1 for start in starts[-2:-5:-1])))
    return tuple(listed), steps


def polynomial_step(noise_schedule: NoiseSchedule, times: list[float]) -> StepDecision:
    """DEIS tAB (Zhang & Chen 2023, equation 15): the noise is a polynomial in time through the stored evaluations.

    Args:
        times: those of the n evaluations that enter, falling, and of the target.

    The weight of evaluation j is the mean of its Lagrange polynomial ℓ_j(t) over σ/α from source to target. By parts,
    ∫ ℓ dρ = [ℓ ρ] - ∫ ρ ℓ' dt with ρ = σ/α, so that no derivative of the noise schedule is needed.
    """
    *nodes, target = times
    source = nodes[-1]
    polynomials = [_lagrange(nodes, j) for j in reversed(range(len(nodes)))]  # newest first
    level_s, level_t = noise_schedule.noise_level(source), noise_schedule.noise_level(target)
    where, weight = _quadrature(source, target)
    level = noise_schedule.noise_level(torch.from_numpy(where)).numpy()
    weights = []
    for polynomial in polynomials:
        ends = polynomial(target) * level_t - polynomial(source) * level_s
        inside = float(np.sum(weight * level * polynomial.deriv()(where)))
        weights.append(float((ends - inside) / (level_t - level_s)))
    order = len(nodes)
    return StepDecision("noise", order, points=(nearest_points(order)[0],), weights=tuple(weights))


def _lagrange(nodes: list[float], j: int) -> np.polynomial.Polynomial:
    """The polynomial that is 1 at node j and 0 at the others; its own domain keeps the coefficients small."""
    others = [node for i, node in enumerate(nodes) if i != j]
    polynomial = np.polynomial.Polynomial.fromroots(others, domain=[min(nodes), max(nodes)])
    return polynomial / polynomial(nodes[j])


def _quadrature(lower: float, upper: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss-Legendre on panels: noise levels have kinks where they are tables."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = np.linspace(lower, upper, _PANELS + 1)
    half = np.diff(edges)[:, None] / 2
    middle = (edges[:-1] + edges[1:])[:, None] / 2
    return (middle + half * nodes).ravel(), (half * weights).ravel()
