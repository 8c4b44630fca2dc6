"""From decisions to one lower-triangular table of weights, in float64.

Every solver schedule is linear in the noise it starts from and in the network's outputs, so its evaluation points and
its result are fixed combinations of them: the table of the non-stationary solvers (Shaul et al. 2024, "Bespoke
Non-Stationary Solvers"). Sampling adds the table up and knows no solver.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.decisions import PredictionSpace, SolverSchedule
from genlight.diffusion.solver.levels import Level, levels_of
from genlight.diffusion.solver.phi import number
from genlight.diffusion.solver.update import Evaluation, Row, apply, correction, is_tensor, predictor


@dataclass(frozen=True, eq=False)
class SolverTable:
    """A compiled solver schedule with E network evaluations; tensors are float64 on the CPU.

    Attributes:
        weights: [E + 1, E + 1], lower-triangular. Row i < E gives x at evaluation i, the last row the result: column 0
            weighs x_T, column 1 + j the output of evaluation j, written as `basis`.
        mean_weights: [E + 1] weights of the mean image of an analytical first step, zero without one.
        times: [E] times of the evaluations on the noise schedule.
        basis: "data" (x̂_0) or "noise" (ε̂).
        initial_scale: what standard normal noise is multiplied by to give x_T, √(α² + σ²) at the first time.
    """

    weights: Tensor
    mean_weights: Tensor
    times: Tensor
    basis: PredictionSpace
    initial_scale: float

    def __post_init__(self) -> None:
        size = self.weights.shape[0]
        shapes = (tuple(self.weights.shape), tuple(self.mean_weights.shape), tuple(self.times.shape))
        if size < 2 or shapes != ((size, size), (size,), (size - 1,)):
            raise ValueError(
                f"table: weights, mean_weights and times are {shapes}, not [E + 1, E + 1], [E + 1] and [E]"
            )
        if self.basis not in ("data", "noise"):
            raise ValueError(f"table.basis = {self.basis!r}; known are data and noise")
        finite = all(bool(tensor.isfinite().all()) for tensor in (self.weights, self.mean_weights, self.times))
        if not finite or bool(self.weights.detach().triu(1).any()):
            raise ValueError(
                "table.weights must be finite and lower-triangular: a point depends on earlier outputs only"
            )

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return self.weights.shape[0] - 1


def compile_schedule(
    schedule: SolverSchedule,
    noise_schedule: NoiseSchedule,
    *,
    basis: PredictionSpace = "data",
    times: Tensor | None = None,
) -> SolverTable:
    """The table of a solver schedule on a noise schedule.

    Args:
        basis: how the network's outputs are written. "data" is exact from pure noise on and well-conditioned, whatever
            the network predicts; "noise" is the form of the literature and needs α > 0 at every evaluation.
        times: float64 [N + 1] that take the place of `schedule.times`; the table then carries their gradients. Entries
            at infinite ends are ignored.

    Raises ValueError where the schedule has no meaning on this noise schedule, such as order 2 to σ = 0.
    """
    builder = _Builder(schedule.nfe, basis, differentiable=times is not None)
    levels = levels_of(schedule, noise_schedule, times)
    first = builder.evaluate(levels[0], builder.unit(0), known_mean=schedule.afs)
    stored = [first]
    for index, step in enumerate(schedule.steps):
        target = levels[index + 1]
        try:
            row = apply(predictor(step, stored), target)
            if index < len(schedule.steps) - 1:
                new = builder.evaluate(target, row)
                if step.corrector is not None:
                    row = apply(correction(step, step.corrector, stored, new), target)
                    again = step.corrector.kind == "implicit"
                    new = builder.evaluate(target, row) if again else replace(new, state=row)
                stored.append(new)
        except ValueError as error:
            raise ValueError(f"steps[{index}]: {error}") from None
    start = levels[0]
    scale = math.hypot(number(start.alpha), number(start.sigma))
    return builder.table(row, scale)


class _Builder:
    """Gives out the columns of the table, one for each evaluation: x_T, mean image, outputs."""

    def __init__(self, nfe: int, basis: PredictionSpace, differentiable: bool) -> None:
        if basis not in ("data", "noise"):
            raise ValueError(f"basis = {basis!r}; known are data and noise")
        self.nfe, self.basis, self.differentiable = nfe, basis, differentiable
        self.rows: list[Row] = []
        self.times: list[Any] = []

    def unit(self, column: int) -> Row:
        size = self.nfe + 2
        row: Row = torch.zeros(size, dtype=torch.float64) if self.differentiable else np.zeros(size)
        row[column] = 1.0
        return row

    def evaluate(self, level: Level, row: Row, known_mean: str | None = None) -> Evaluation:
        """The outputs at `row`: of the network, or of the analytical first step."""
        if known_mean is not None:
            data = self.unit(1) if known_mean == "mean" else 0.0 * self.unit(1)
            return Evaluation(level, row, data, (row - level.alpha * data) / level.sigma)
        output = self.unit(2 + len(self.rows))
        self.rows.append(row)
        self.times.append(level.time)
        if self.basis == "data":
            return Evaluation(level, row, output, (row - level.alpha * output) / level.sigma)
        data = None if level.alpha == 0 else (row - level.sigma * output) / level.alpha
        return Evaluation(level, row, data, output)

    def table(self, final: Row, initial_scale: float) -> SolverTable:
        rows = [*self.rows, final]
        if self.differentiable:
            full = torch.stack(rows)
            times = torch.stack([t if is_tensor(t) else torch.tensor(t, dtype=torch.float64) for t in self.times])
        else:
            full = torch.from_numpy(np.stack(rows))
            times = torch.tensor(self.times, dtype=torch.float64)
        weights = torch.cat([full[:, :1], full[:, 2:]], dim=1)
        return SolverTable(weights, full[:, 1], times, self.basis, initial_scale)
