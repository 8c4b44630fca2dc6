"""The one-dimensional mixture of the golden values, and random solver schedules."""

import numpy as np
import torch
from oracles.gaussian import GaussianMixture
from torch import Tensor

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import (
    Corrector,
    LinearScale,
    SolverSchedule,
    StepDecision,
    nearest_points,
)
from genlight.diffusion.solver.sample import sample

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=torch.float64),
    torch.tensor([[-1.5], [1.0]], dtype=torch.float64),
    torch.tensor([0.35, 0.2], dtype=torch.float64),
)


def network(prediction: Prediction, mixture: GaussianMixture = MIXTURE):
    """The ideal network on [rows, D] for schedules whose time can be read from the model timestep."""
    schedule = prediction.schedule

    def model(scaled: Tensor, timestep: Tensor) -> Tensor:
        timestep = timestep.double()[:, None]
        time = {"vp": timestep, "edm": torch.exp(4 * timestep), "flow": timestep / 1000}[schedule.family]
        time = time.clamp(schedule.t_min, schedule.t_max)
        x = scaled.double() / schedule.input_scale(time)
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        return mixture.output(prediction.prediction_type, x, alpha, sigma, schedule.sigma_data or 0.5)

    return model


def solve(schedule: SolverSchedule, prediction: Prediction, x: Tensor, basis: str = "data", **options) -> Tensor:
    """From the state x [rows, 1] (not from unit noise) to the end, in float64."""
    table = compile_schedule(schedule, prediction.schedule, basis=basis)
    return sample(network(prediction), x / table.initial_scale, table, prediction, **options)


def random_step(rng: np.random.Generator, stored: int, last: bool, noise: bool = True) -> StepDecision:
    """Any decision that the history allows, for times that differ."""
    prediction = str(rng.choice(["noise", "data"])) if noise else "data"
    source = -1 if rng.random() < 0.7 else -int(rng.integers(1, stored + 1))
    others = [-j for j in range(1, stored + 1) if -j != source]
    order = int(rng.integers(1, min(4, len(others) + 1) + 1))
    corrector = None
    if rng.random() < 0.15 and order > 1:
        weights = tuple(rng.normal(size=order).tolist())
        if not last and rng.random() < 0.5:
            corrector = Corrector(_kind(rng), weights=tuple(rng.normal(size=order + 1).tolist()))
        return StepDecision(
            prediction, order, source, nearest_points(order, source, stored)[:1], weights=weights, corrector=corrector
        )
    points = tuple(
        tuple(rng.choice(others, size=int(rng.integers(k, len(others[:5]) + 1)), replace=False).tolist())
        if rng.random() < 0.4 and k <= len(others[:5])
        else nearest_points(order, source, stored)[0]
        for k in range(1, order)
    )
    variable = "sigma" if rng.random() < 0.2 else "half_log_snr"
    scales = _scales(rng, order - 1, variable)
    if not last and rng.random() < 0.5:
        corrector = Corrector(_kind(rng), scales=_scales(rng, order, variable))
    return StepDecision(prediction, order, source, points, variable, scales, None, corrector)


def random_schedule(rng: np.random.Generator, steps: int, low: float, high: float, **options) -> SolverSchedule:
    """Random decisions on random λ from low to high."""
    while True:
        inner = np.sort(rng.uniform(low, high, size=steps - 1))
        times = np.concatenate([[low], inner, [high]])
        if np.diff(times).min() > 0.2:
            break
    decisions = tuple(random_step(rng, i + 1, i == steps - 1) for i in range(steps))
    return SolverSchedule(tuple(times.tolist()), decisions, **options)


def _kind(rng: np.random.Generator):
    return "implicit" if rng.random() < 0.3 else "pseudo"


def _scales(rng: np.random.Generator, count: int, variable: str):
    if variable == "sigma":
        return tuple(rng.uniform(0.5, 1.5, size=count).tolist())
    choices = ["bh1", "bh2", "exp", "minus_exp", 1.0, LinearScale(float(rng.normal(scale=0.1)))]
    return tuple(choices[int(rng.integers(len(choices)))] for _ in range(count))
