"""Errors where the exact solution is known, against the ODE solved finely and the linear equation by hand."""

import math

import numpy as np
import pytest
import torch
from oracles.gaussian import GaussianMixture

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.truncation import DISTRIBUTIONS, KnownSolutions

VP = VPSchedule()


def test_exact_solutions_are_those_of_the_ode() -> None:
    """The probability flow ODE of each mixture, integrated numerically."""
    known, level = KnownSolutions(VP), VP.noise_level
    begin, end = VP.t_max, VP.t_min
    for row, (mode, spread) in enumerate(DISTRIBUTIONS):
        pair = torch.tensor([[-mode], [mode]], dtype=torch.float64)
        mixture = GaussianMixture(torch.tensor([0.5, 0.5]).double(), pair, torch.tensor([spread] * 2).double())
        start = torch.from_numpy(known.noise)[:, None] * math.hypot(VP.alpha(begin), VP.sigma(begin)) / VP.alpha(begin)
        solved = mixture.solve_ode(start, level(begin), level(end))[:, 0] * VP.alpha(end)
        np.testing.assert_allclose(known.exact[row], solved, atol=2e-3)


@pytest.mark.parametrize("schedule", [VP, EDMSchedule(), FlowSchedule()])
def test_errors_vanish_with_the_steps(schedule) -> None:
    """Of a second-order solver by about four when the steps are halved, over all distributions together."""
    known = KnownSolutions(schedule)

    def error(name: str, steps: int) -> float:
        table = compile_schedule(named_schedule(name, schedule, steps), schedule)
        return float(np.linalg.norm(known.errors(table)))

    assert error("dpmpp_2m", 80) < 0.4 * error("dpmpp_2m", 40) < 0.4 * error("ddim", 40)


def test_a_gaussian_is_a_linear_equation() -> None:
    """The result is a number times the noise, which one recursion on the table gives."""
    table = compile_schedule(named_schedule("unipc_2_bh2", VP, 6), VP)
    spread, alphas, sigmas = 0.3, VP.alpha(table.times).tolist(), VP.sigma(table.times).tolist()
    known = KnownSolutions(VP, distributions=((0.0, spread),))
    outputs = [table.initial_scale]
    for row, alpha, sigma in zip(table.weights.tolist(), alphas, sigmas):
        x = sum(weight * output for weight, output in zip(row, outputs))
        outputs.append(alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x)
    factor = sum(weight * output for weight, output in zip(table.weights[-1].tolist(), outputs))
    begin, end = (math.hypot(VP.alpha(t) * spread, VP.sigma(t)) for t in (VP.t_max, VP.t_min))
    exact = table.initial_scale * end / begin
    expected = abs(factor - exact) * math.sqrt(float(np.square(known.noise).mean()))
    assert known.errors(table)[0] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="basis"):
        known.errors(compile_schedule(named_schedule("ddim", VP, 3), VP, basis="noise"))
