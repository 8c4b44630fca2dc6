"""The integrals behind exponential integrators, to float64 accuracy everywhere.

φ_1(z) = (e^z - 1)/z, φ_{k+1}(z) = (φ_k(z) - 1/k!)/z, φ_k(0) = 1/k!; as an integral
φ_k(z) = ∫₀¹ e^{(1-τ)z} τ^{k-1}/(k-1)! dτ (Hochbruck & Ostermann 2010, equation 2.10). The recursion loses all digits as
z → 0, so near zero the highest φ is summed as a series and the others follow downwards, where the recursion gains.

A `Scalar` is a Python number, or a float64 tensor without dimensions when gradients are wanted. Formulas are written
once for both.
"""

import math
from typing import Any

import torch
from torch import Tensor

Scalar = Any

# below this |z| the series is used: its terms then fall from the first on, and the recursion above it loses few digits
_SERIES_RANGE = 2.0
_SERIES_TERMS = 26
_FLOW_SERIES_TERMS = 60


def number(value: Scalar) -> float:
    """The value without its gradient."""
    return value.item() if isinstance(value, Tensor) else float(value)


def expm1(value: Scalar) -> Scalar:
    """e^value - 1; inf instead of an overflow."""
    if isinstance(value, Tensor):
        return torch.expm1(value)
    return math.expm1(value) if value < 709 else math.inf


def log1p(value: Scalar) -> Scalar:
    """ln(1 + value)."""
    return torch.log1p(value) if isinstance(value, Tensor) else math.log1p(value)


def phis(count: int, z: Scalar) -> list[Scalar]:
    """[φ_1(z), …, φ_count(z)]; z = -inf gives zeros, a z beyond float64's e^z gives inf."""
    if math.isinf(number(z)):
        return [0.0 if z < 0 else math.inf] * count
    if abs(number(z)) >= _SERIES_RANGE:
        result = [expm1(z) / z]
        for k in range(1, count):
            result.append((result[-1] - 1 / math.factorial(k)) / z)
        return result
    top = max(count, 2)
    value: Scalar = 0.0
    for m in reversed(range(_SERIES_TERMS)):
        value = value * z + 1 / math.factorial(m + top)
    result = [value]
    for k in reversed(range(1, top)):
        result.append(z * result[-1] + 1 / math.factorial(k))
    return result[::-1][:count]


def flow_integrals(count: int, r: Scalar) -> list[Scalar]:
    """[F_1(r), …, F_count(r)] with F_k(r) = (1 - r)/k! ∫₀^r v^k/(1 - v)² dv, for r in (-inf, 1].

    They take the place of the φ functions where outputs are polynomials in σ/(α + σ) instead of λ; F_k(1) = 1/k!.
    """
    if number(r) == 1:
        return [1 / math.factorial(k) for k in range(1, count + 1)]
    if abs(number(r)) <= 0.5:
        result = []
        for k in range(1, count + 1):
            value: Scalar = 0.0
            for m in reversed(range(_FLOW_SERIES_TERMS)):
                value = value * r + (m + 1) / (k + m + 1)
            result.append((1 - r) * value * r ** (k + 1) / math.factorial(k))
        return result
    # ∫ v^k/(1-v)² = ∫ v^{k-1}/(1-v)² - ∫ v^{k-1}/(1-v), and the last integrals differ by r^k/k
    squared, simple = r / (1 - r), -log1p(-r)
    result = []
    for k in range(1, count + 1):
        squared = squared - simple
        simple = simple - r**k / k
        result.append((1 - r) * squared / math.factorial(k))
    return result


def bh1(z: Scalar) -> Scalar:
    """½z²/(e^z - 1 - z): the B(h) = h of UniPC (Zhao et al. 2023, section 3.3) as a factor of the first derivative."""
    return 0.5 / phis(2, z)[1]


def bh2(z: Scalar) -> Scalar:
    """½z(e^z - 1)/(e^z - 1 - z): B(h) = e^h - 1 of UniPC, and the midpoint form of DPM-Solver++(2M)."""
    first, second = phis(2, z)
    return 0.5 * first / second
