"""The solver written step by step on tensors of samples, straight from the update formulas: no tables, no shared code.

φ functions are 50-digit sums, derivatives come from the linear system of their definition, and integrals in σ/(α + σ)
from quadrature. Only the plain decisions are read from genlight.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import torch
from numpy.polynomial.legendre import leggauss

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.decisions import LinearScale, SolverSchedule

Network = Callable[[np.ndarray, float, float, int], np.ndarray]
PURE = math.log(1e-6 / (1 - 1e-6))


def phi(k: int, z: float) -> float:
    """φ_k(z) = Σ_m z^m/(m + k)! in 50 digits."""
    if z == -math.inf:
        return 0.0
    with mpmath.workdps(50):
        value = mpmath.expm1(z) / z if z else mpmath.mpf(1)
        for i in range(1, k):
            value = (value - 1 / mpmath.factorial(i)) / z if z else 1 / mpmath.factorial(i + 1)
        return float(value)


def run(
    schedule: SolverSchedule, noise_schedule: NoiseSchedule, x: np.ndarray, x0_of: Network, mean: float = 0.0
) -> tuple[np.ndarray, int]:
    """(x at the end, number of calls of `x0_of`(x, α, σ, call))."""
    level = _levels(schedule, noise_schedule)
    calls = 0

    def evaluate(x: np.ndarray, i: int) -> dict[str, Any]:
        nonlocal calls
        _, alpha, sigma = level[i]
        data = x0_of(x, alpha, sigma, calls)
        calls += 1
        return {"x": x, "level": level[i], "data": data, "noise": (x - alpha * data) / sigma}

    if schedule.afs:
        constant = np.full_like(x, mean if schedule.afs == "mean" else 0.0)
        _, alpha, sigma = level[0]
        history = [{"x": x, "level": level[0], "data": constant, "noise": (x - alpha * constant) / sigma}]
    else:
        history = [evaluate(x, 0)]
    for i, step in enumerate(schedule.steps):
        source = history[step.source]
        points = [[history[j] for j in group] for group in step.points]
        x = _update(source, level[i + 1], step.prediction, step.variable, points, step.scales, step.weights)
        if i == len(schedule.steps) - 1:
            break
        new = evaluate(x, i + 1)
        if step.corrector:
            old = [[history[j] for j in group] for group in _corrector_groups(step)]
            points = [[*group, new] for group in old]
            x = _update(
                source,
                level[i + 1],
                step.prediction,
                step.variable,
                points,
                step.corrector.scales,
                step.corrector.weights,
            )
            new = evaluate(x, i + 1) if step.corrector.kind == "implicit" else {**new, "x": x}
        history.append(new)
    return x, calls


def _corrector_groups(step: Any) -> list[tuple[int, ...]]:
    everything = tuple(sorted({j for group in step.points for j in group}, reverse=True))
    if step.corrector.points is not None:
        return list(step.corrector.points)
    if step.corrector.weights is not None:
        return [everything]
    groups = list(step.points) if step.weights is None else [step.points[0]] * (step.order - 1) if step.points else []
    return [*groups, everything]


def _levels(schedule: SolverSchedule, noise_schedule: NoiseSchedule) -> list[tuple[float, float, float]]:
    """(λ, α, σ) of each time, all at once: sigmoids of vectors and of numbers differ in the last bit."""
    given = torch.tensor([time for time in schedule.times if time is not None], dtype=torch.float64)
    t = noise_schedule.t_of_half_log_snr(given) if schedule.time_domain == "half_log_snr" else given
    levels = list(
        zip(*(f(t).tolist() for f in (noise_schedule.half_log_snr, noise_schedule.alpha, noise_schedule.sigma)))
    )
    if schedule.times[0] is None:
        levels.insert(0, (-math.inf, 0.0, 1.0))
    return [*levels, (math.inf, 1.0, 0.0)] if schedule.times[-1] is None else levels


def _update(
    source: dict[str, Any],
    target: tuple[float, float, float],
    kind: str,
    variable: str,
    points: list[list[dict[str, Any]]],
    scales: tuple[Any, ...],
    weights: tuple[float, ...] | None,
) -> np.ndarray:
    (lam_s, alpha_s, sigma_s), (lam_t, alpha_t, sigma_t) = source["level"], target
    m, x = source[kind], source["x"]
    if weights is not None:
        m = sum(w * e[kind] for w, e in zip(weights, [source, *(e for group in points for e in group)]))
        points = []
    # order 1 as DDIM: the other output follows from x_s
    if kind == "data":
        result = alpha_t * m + sigma_t * (x - alpha_s * m) / sigma_s
    elif alpha_s == 0:
        result = alpha_t * source["data"] + sigma_t * m
    else:
        result = alpha_t * (x - sigma_s * m) / alpha_s + sigma_t * m
    lam_s, lam_t = max(lam_s, PURE), max(lam_t, PURE)
    h = lam_t - lam_s
    for k, group in enumerate(points, start=1):
        scale = _scale(scales[k - 1], h if kind == "noise" else -h, h) if k <= len(scales) else 1.0
        derivative = _derivative(source, group, kind, variable, k)
        if variable == "sigma":
            result = result + scale * derivative * _sigma_integral(source["level"], target, kind, k)
        elif kind == "noise":
            result = result - sigma_t * h ** (k + 1) * phi(k + 1, h) * scale * derivative
        else:
            result = result + alpha_t * h ** (k + 1) * phi(k + 1, -h) * scale * derivative
    return result


def _derivative(source: dict[str, Any], group: list[dict[str, Any]], kind: str, variable: str, k: int) -> np.ndarray:
    def coordinate(level: tuple[float, float, float]) -> float:
        return max(level[0], PURE) if variable == "half_log_snr" else -level[2] / (level[1] + level[2])

    delta = np.array([coordinate(e["level"]) - coordinate(source["level"]) for e in group])
    size = np.abs(delta).max()
    rows = np.array([(delta / size) ** i / math.factorial(i) for i in range(1, len(group) + 1)])
    wanted = np.zeros(len(group))
    wanted[k - 1] = size**-k
    a = np.linalg.solve(rows, wanted)
    return sum(weight * (e[kind] - source[kind]) for weight, e in zip(a, group))


def _sigma_integral(source: tuple[float, float, float], target: tuple[float, float, float], kind: str, k: int) -> float:
    """∫ (u - u_s)^k/k! against d(α/σ) times σ_t, or d(σ/α) times α_t, u = α/(α + σ)."""
    u_s, u_t = (level[1] / (level[1] + level[2]) for level in (source, target))
    if target[2] == 0:  # all weight of d(α/σ) then lies at the end
        return (1 - u_s) ** k / math.factorial(k)
    nodes, weights = leggauss(60)
    # even panels in λ-like coordinates keep the nearly singular end resolved
    edges = u_s + (u_t - u_s) * (1 - np.geomspace(1, 1e-12, 60))
    edges = np.append(edges, u_t) if kind == "data" else np.flip(u_t - (u_t - u_s) * (1 - np.geomspace(1, 1e-12, 60)))
    if kind == "noise":
        edges = np.concatenate([[u_s], edges[1:], [u_t]])
    total = 0.0
    for a, b in pairwise(edges):
        u = (a + b) / 2 + (b - a) / 2 * nodes
        density = 1 / (1 - u) ** 2 if kind == "data" else -1 / u**2
        total += (b - a) / 2 * np.sum(weights * (u - u_s) ** k / math.factorial(k) * density)
    return float(total * (target[2] if kind == "data" else target[1]))


def _scale(scale: Any, z: float, h: float) -> float:
    if isinstance(scale, LinearScale):
        return 1 + scale.omega * h
    if isinstance(scale, str):
        e = math.expm1(z)
        rest = z**2 * phi(2, z)
        return {
            "bh1": 0.5 * z**2 / rest,
            "bh2": 0.5 * z * e / rest,
            "exp": 1 + 0.5 * e,
            "minus_exp": 1 - 0.5 * e,
        }[scale]
    return float(scale)
