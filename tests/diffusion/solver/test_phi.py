"""φ functions and their companions against quadrature, 50-digit arithmetic and the values of the literature."""

import math

import mpmath
import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import leggauss

from genlight.diffusion.solver.phi import bh1, bh2, flow_integrals, phis

POINTS = [s * z for s in (1, -1) for z in (1e-9, 1e-3, 0.1, 0.5, 1.0, 1.999, 2.0, 3.7, 10.0, 25.0)]


def _quadrature(k: int, z: float) -> float:
    """∫₀¹ e^{(1-τ)z} τ^{k-1}/(k-1)! dτ."""
    nodes, weights = leggauss(60)
    tau = (nodes + 1) / 2
    return float(np.sum(weights / 2 * np.exp((1 - tau) * z) * tau ** (k - 1)) / math.factorial(k - 1))


def _exact(k: int, z: float) -> float:
    with mpmath.workdps(80):
        value = mpmath.expm1(z) / z
        for i in range(1, k):
            value = (value - 1 / mpmath.factorial(i)) / z
        return float(value)


@pytest.mark.parametrize("z", POINTS)
def test_phi_is_its_integral(z: float) -> None:
    """Pitfall 5: the recursion alone loses all digits near zero."""
    for k, value in enumerate(phis(5, z), start=1):
        assert value == pytest.approx(_quadrature(k, z), rel=1e-12)
        assert value == pytest.approx(_exact(k, z), rel=2e-14)


def test_phi_at_the_ends() -> None:
    assert phis(4, 0.0) == [1 / math.factorial(k) for k in range(1, 5)]
    assert phis(3, -math.inf) == [0.0, 0.0, 0.0]
    assert phis(2, 1e4)[0] == math.inf
    assert phis(1, -1.9)[0] == pytest.approx(_exact(1, -1.9), rel=1e-15)


def test_published_values() -> None:
    golden = {
        2.0: (3.194528049, 1.097264025, 0.2986320124),
        -2.0: (0.4323323584, 0.2838338208, 0.1080830896),
        0.1: (1.051709181, 0.5170918076, 0.1709180756),
    }
    for z, expected in golden.items():
        assert phis(3, z) == pytest.approx(expected, rel=1e-9)
    for z, first, second in (
        (2.0, 0.45567884, 1.45567884),
        (-2.0, 1.76159416, 0.76159416),
        (-0.1, 1.03360924, 0.98360924),
    ):
        assert (bh1(z), bh2(z)) == pytest.approx((first, second), abs=5e-9)


@pytest.mark.parametrize("r", [-1e4, -30.0, -0.7, -0.5, -0.01, 1e-6, 0.2, 0.5, 0.501, 0.9, 0.999])
def test_flow_integrals(r: float) -> None:
    with mpmath.workdps(40):
        for k, value in enumerate(flow_integrals(4, r), start=1):
            panels = [-(10.0**e) for e in range(0, 5) if 10**e < -r] if r < -1 else []
            exact = mpmath.quad(lambda v, k=k: v**k / (1 - v) ** 2, [0, *panels, r])
            assert value == pytest.approx(float((1 - r) * exact / mpmath.factorial(k)), rel=1e-12)
    assert flow_integrals(3, 1.0) == [1.0, 0.5, 1 / 6]


@pytest.mark.parametrize("z", [-3.0, -1.0, -1e-4, 0.7, 5.0])
def test_derivatives(z: float) -> None:
    """φ_k' = φ_k - k φ_{k+1} through the series and through the recursion."""
    point = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    for k in range(1, 4):
        (slope,) = torch.autograd.grad(phis(4, point)[k - 1], point)
        values = phis(4, z)
        assert slope.item() == pytest.approx(values[k - 1] - k * values[k], rel=1e-10)
