"""One step of the solver as a linear map of what is stored: weights of the start and of every output.

A `Row` is a vector of weights, a numpy array or, with gradients, a tensor; states and outputs are such rows.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genlight.diffusion.solver.decisions import (
    Corrector,
    LinearScale,
    PredictionSpace,
    Scale,
    StepDecision,
    Variable,
)
from genlight.diffusion.solver.levels import Level
from genlight.diffusion.solver.phi import Scalar, bh1, bh2, expm1, flow_integrals, number, phis

Row = Any


@dataclass(frozen=True)
class Evaluation:
    """A stored evaluation: outputs belong to the predicted x, `state` is the x from which later steps start.

    `data` or `noise` is None where the network's output does not determine it.
    """

    level: Level
    state: Row
    data: Row | None
    noise: Row | None

    def output(self, prediction: PredictionSpace) -> Row:
        """The row of m, as noise or data."""
        row = self.data if prediction == "data" else self.noise
        if row is None:
            raise ValueError(
                f"prediction = {prediction!r} at alpha = {number(self.level.alpha):g} is not determined by the "
                "network's output there; compile with basis 'data'"
            )
        return row


@dataclass(frozen=True)
class Rule:
    """A predictor or a corrector with its points resolved to evaluations."""

    prediction: PredictionSpace
    variable: Variable
    source: Evaluation
    points: list[list[Evaluation]]
    scales: tuple[Scale, ...]
    weights: tuple[float, ...] | None


def predictor(step: StepDecision, stored: list[Evaluation]) -> Rule:
    """The first update of a step."""
    points = [[stored[j] for j in points_of] for points_of in step.points]
    return Rule(step.prediction, step.variable, stored[step.source], points, step.scales, step.weights)


def correction(step: StepDecision, corrector: Corrector, stored: list[Evaluation], new: Evaluation) -> Rule:
    """The second update of a step: the new evaluation joins every set of points."""
    sets = step.corrector_points()
    if corrector.weights is not None:
        sets = corrector.points if corrector.points is not None else (step.all_points(),)
    points = [[*(stored[j] for j in points_of), new] for points_of in sets]
    return Rule(step.prediction, step.variable, stored[step.source], points, corrector.scales, corrector.weights)


def apply(rule: Rule, target: Level) -> Row:
    """The row of x at the target level."""
    source, prediction = rule.source, rule.prediction
    result = _first_order(source, prediction, target)
    if rule.weights is not None:
        integral = _zeroth_integral(source.level, prediction, target)
        outputs = [source.output(prediction), *(point.output(prediction) for points in rule.points for point in points)]
        drift = sum(weight * output for weight, output in zip(rule.weights, outputs))
        return result + integral * (drift - outputs[0])
    if not rule.points:
        return result
    integrals = _integrals(source.level, rule, target, len(rule.points))
    own = source.output(prediction)
    for k, points in enumerate(rule.points, start=1):
        offsets = [_offset(rule.variable, source.level, point.level) for point in points]
        factor = _scale(rule.scales[k - 1], rule, target) if k <= len(rule.scales) else 1.0
        for weight, point in zip(derivative_weights(offsets, k), points):
            result = result + (factor * integrals[k - 1] * weight) * (point.output(prediction) - own)
    return result


def derivative_weights(offsets: list[Scalar], k: int) -> list[Scalar]:
    """a_j with Σ_j a_j δ_j^i/i! = [i = k], i = 1 … K: D_k = Σ_j a_j (m_j - m_s) is exact for polynomials of degree K.

    In closed form from the Lagrange basis: k! times the coefficient of δ^k in (δ/δ_j) Π_{i≠j} (δ - δ_i)/(δ_j - δ_i).
    """
    count = len(offsets)
    weights: list[Scalar] = []
    for j, offset in enumerate(offsets):
        others = [other for i, other in enumerate(offsets) if i != j]
        symmetric: list[Scalar] = [1.0] + [0.0] * (count - 1)  # elementary symmetric polynomials of the others
        denominator = offset
        for seen, other in enumerate(others, start=1):
            for degree in range(seen, 0, -1):
                symmetric[degree] = symmetric[degree] + other * symmetric[degree - 1]
            denominator = denominator * (offset - other)
        sign = -1 if (count - k) % 2 else 1
        weights.append(sign * math.factorial(k) * symmetric[count - k] / denominator)
    return weights


def _first_order(source: Evaluation, prediction: PredictionSpace, target: Level) -> Row:
    """The step of order 1: DDIM from `source.state` with the output of the predicted x."""
    level = source.level
    if prediction == "data":
        return (target.sigma / level.sigma) * source.state + _zeroth_integral(level, "data", target) * source.output(
            "data"
        )
    if level.alpha == 0:
        # α_t/α_s and the integral are infinite, their sum is not; the first state of all is never a corrected one
        return target.alpha * source.output("data") + target.sigma * source.output("noise")
    integral = _zeroth_integral(level, "noise", target)
    return (target.alpha / level.alpha) * source.state + integral * source.output("noise")


def _zeroth_integral(source: Level, prediction: PredictionSpace, target: Level) -> Scalar:
    """α_t h φ_1(-h) for data, -σ_t h φ_1(h) for noise, with their limits at the infinite ends."""
    h = target.half_log_snr - source.half_log_snr
    if prediction == "data":
        return -target.alpha * expm1(-h)
    if source.alpha == 0:
        raise ValueError("prediction = 'noise' above order 1 has no value in a step from pure noise; use 'data'")
    return -source.sigma * target.alpha / source.alpha if target.sigma == 0 else -target.sigma * expm1(h)


def _integrals(source: Level, rule: Rule, target: Level, count: int) -> list[Scalar]:
    """The factors of D_1 … D_count: ∫ (u - u_s)^k/k! of the variable u against d(α/σ) or d(σ/α), times σ_t or α_t."""
    if rule.prediction == "noise" and source.alpha == 0:
        raise ValueError("prediction = 'noise' above order 1 has no value in a step from pure noise; use 'data'")
    if rule.variable == "sigma":
        length = source.noise_share if rule.prediction == "data" else -source.signal_share
        moved = source.noise_share - target.noise_share
        size = target.alpha + target.sigma
        integrals = flow_integrals(count, 1.0 if target.sigma == 0 and length > 0 else moved / length)
        return [size * length**k * integral for k, integral in enumerate(integrals, start=1)]
    h = target.finite_half_log_snr - source.finite_half_log_snr
    if rule.prediction == "data":
        return [target.alpha * h ** (k + 1) * phi for k, phi in enumerate(phis(count + 1, -h)[1:], start=1)]
    return [-target.sigma * h ** (k + 1) * phi for k, phi in enumerate(phis(count + 1, h)[1:], start=1)]


def _offset(variable: Variable, source: Level, point: Level) -> Scalar:
    if variable == "sigma":
        return source.noise_share - point.noise_share
    return point.finite_half_log_snr - source.finite_half_log_snr


def _scale(scale: Scale, rule: Rule, target: Level) -> Scalar:
    """c as a number; z = h for noise and -h for data, except for the linear scale."""
    if isinstance(scale, float):
        return scale
    h = target.finite_half_log_snr - rule.source.level.finite_half_log_snr
    if isinstance(scale, LinearScale):
        return 1 + scale.omega * h
    z = h if rule.prediction == "noise" else -h
    if scale == "bh1":
        return bh1(z)
    if scale == "bh2":
        return bh2(z)
    return 1 + 0.5 * expm1(z) if scale == "exp" else 1 - 0.5 * expm1(z)


def is_tensor(value: Scalar) -> bool:
    """Whether gradients are wanted."""
    return isinstance(value, Tensor)
