"""Orders of convergence: the logarithm of the error falls with slope n against the number of steps."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import MIXTURE, network
from oracles.gaussian import Gaussian, two_modes

from genlight.diffusion.noise_schedules import FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule, StepDecision, nearest_points
from genlight.diffusion.solver.presets import preset
from genlight.diffusion.solver.sample import sample

VP, FLOW = VPSchedule(), FlowSchedule()
LOW, HIGH = -3.0, 3.0


def _error(name: str, noise_schedule: NoiseSchedule, steps: int) -> float:
    """RMS error at the end on two modes in the plane, from λ = -3 to 3."""
    mixture, prediction = two_modes(), Prediction("v_prediction", noise_schedule)
    lam = np.linspace(LOW, HIGH, steps + 1)
    times = tuple(noise_schedule.t_of_half_log_snr(value) for value in lam.tolist())
    schedule = preset(name, noise_schedule, times, lower_order_final=False)
    start = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = compile_schedule(schedule, noise_schedule)
    x = sample(network(prediction, mixture), start / table.initial_scale, table, prediction)
    alpha, sigma = (f(times[-1]) for f in (noise_schedule.alpha, noise_schedule.sigma))
    alpha_0 = noise_schedule.alpha(times[0])
    exact = alpha * mixture.solve_ode(start / alpha_0, math.exp(-LOW), math.exp(-HIGH))
    assert sigma > 0
    return float((x - exact).square().mean().sqrt())


def _slope(name: str, noise_schedule: NoiseSchedule, steps: int) -> float:
    return math.log2(_error(name, noise_schedule, steps) / _error(name, noise_schedule, 2 * steps))


@pytest.mark.parametrize(
    "name, steps, slope",
    [
        ("ddim", 160, 1.0),
        ("dpmpp_2m", 160, 2.0),
        ("dpmpp_2m_heun", 160, 2.0),
        ("dpm_2m", 160, 2.0),
        ("dpm_2s", 160, 2.0),
        ("dpmpp_2s", 160, 2.0),
        ("heun", 80, 2.0),
        ("sa_solver_predictor", 160, 2.0),
        ("unipc_1_bh2", 160, 2.0),
        ("deis_tab_2", 160, 2.0),
        ("deis_3", 160, 3.0),
        ("dpm_3s_heun", 96, 3.0),
        ("dpm_3s", 96, 3.0),
        ("unipc_2_bh1", 80, 3.0),
        ("unipc_3_exact", 80, 4.0),
    ],
)
def test_order_of_convergence(name: str, steps: int, slope: float) -> None:
    found = _slope(name, VP, steps)
    assert slope - 0.3 <= found <= slope + 0.8, found


def test_third_order_needs_the_whole_second_derivative() -> None:
    """Pitfall 2: diffusers' third-order multistep, with half of D_2, is of second order."""
    assert _slope("dpmpp_3m_exact", VP, 160) >= 2.7
    assert 1.8 <= _slope("dpmpp_3m", VP, 160) <= 2.4


@pytest.mark.parametrize("name, slope", [("dpmpp_2m", 2.0), ("flow_heun", 2.0), ("unipc_2_bh2", 3.0)])
def test_flow_matching_converges(name: str, slope: float) -> None:
    assert slope - 0.3 <= _slope(name, FLOW, 80) <= slope + 0.8


@pytest.mark.parametrize("variable, least", [("half_log_snr", 0.0), ("sigma", 1.8)])
def test_from_pure_noise_to_clean_only_the_sigma_variable_keeps_its_order(variable: str, least: float) -> None:
    """Pitfall 7: λ of both ends of flow matching is infinite; polynomials in σ know no difference."""
    prediction = Prediction("flow", FLOW)
    start = torch.tensor([[-1.0], [0.1], [1.0]]).double()
    exact = MIXTURE.solve_ode(start * 1e6, 1e6, 1e-9)

    def error(steps: int) -> float:
        decisions = [StepDecision("data", min(2, i + 1), points=nearest_points(min(2, i + 1))) for i in range(steps)]
        decisions = [StepDecision("data", s.order, points=s.points, variable=variable) for s in decisions]
        if variable == "half_log_snr":
            decisions[-1] = StepDecision()
        times = tuple(np.linspace(1.0, 0.0, steps + 1).tolist())
        table = compile_schedule(SolverSchedule(times, tuple(decisions), time_domain="time"), FLOW)
        return float((sample(network(prediction), start, table, prediction) - exact).abs().max())

    errors = [error(steps) for steps in (40, 80, 160)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(math.isfinite(e) for e in errors) and slopes[-1] >= least, (errors, slopes)


def test_one_gaussian_is_followed_to_rounding() -> None:
    """A single Gaussian has an exact flow; order 4 with 400 steps comes within 1e-8 of it."""
    gaussian, prediction = Gaussian(torch.tensor([0.4]), 0.6), Prediction("sample", VP)
    lam = np.linspace(LOW, HIGH, 401).tolist()
    steps = tuple(StepDecision("data", min(4, i + 1), points=nearest_points(min(4, i + 1))) for i in range(400))
    table = compile_schedule(SolverSchedule(tuple(lam), steps), VP)
    x = torch.tensor([[-2.0], [0.3]]).double()
    found = sample(network(prediction, gaussian), x / table.initial_scale, table, prediction)
    ends = [(VP.alpha(t), VP.sigma(t)) for t in (VP.t_of_half_log_snr(LOW), VP.t_of_half_log_snr(HIGH))]
    torch.testing.assert_close(found, gaussian.flow(x, *ends[0], *ends[1]), rtol=0, atol=3e-6)
