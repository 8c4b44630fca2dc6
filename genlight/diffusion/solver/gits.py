"""Times by dynamic programming over a teacher's trajectory: GITS.

Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling" (section 4): on a fine grid of the
teacher, the cost of going from point i to point j is the error of one Euler step from the teacher's own state at i,
measured against the teacher's state at j; the grid of N steps is the path of least total cost. The Euler step is taken
in the view x/α = x_0 + (σ/α) ε, where it is DDIM. No gradients, and no evaluations beyond the teacher's.

The recursion is V_k(i) = min_j cost(i, j) + γ V_{k-1}(j); γ > 1 weighs later errors more. The defaults of the authors'
program are γ = 1.15 and the metric "deviation", which sees nothing in one dimension; here it is the plain error, "l2".
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.levels import Level, levels_of
from genlight.diffusion.solver.sample import Model, sample
from genlight.diffusion.solver.spacings import Times
from genlight.diffusion.solver.teacher import ConditionalModel, TeacherBank

Metric = Literal["l1", "l2", "deviation"]
DISCOUNT = 1.15


def gits_times(
    model: ConditionalModel,
    noise: Tensor,
    teacher: SolverSchedule,
    prediction: Prediction,
    steps: int,
    *,
    metric: Metric = "l2",
    discount: float = DISCOUNT,
    conditions: Mapping[str, Tensor] | None = None,
    batch_rows: int = 256,
    integer_timesteps: bool = False,
) -> Times:
    """N + 1 times for N = `steps`, in the domain "time" of the noise schedule, chosen from those of the teacher.

    For several numbers of steps make the costs once, with `local_errors`, and call `best_path` and `times_at`.
    """
    costs = local_errors(
        model,
        noise,
        teacher,
        prediction,
        metric=metric,
        conditions=conditions,
        batch_rows=batch_rows,
        integer_timesteps=integer_timesteps,
    )
    return times_at(teacher, prediction, best_path(costs, steps, discount))


def times_at(teacher: SolverSchedule, prediction: Prediction, path: tuple[int, ...]) -> Times:
    """The times of some points of the teacher's grid, in the domain "time"; None for the clean image."""
    levels = levels_of(teacher, prediction.schedule)
    return tuple(levels[index].time for index in path)


def best_path(costs: Tensor, steps: int, discount: float = DISCOUNT) -> tuple[int, ...]:
    """The points 0 = p_0 < … < p_N = T with the least Σ_k γ^k cost(p_k, p_{k+1}), for N = `steps`; the first of equals.

    Args:
        costs: [T + 1, T + 1]; only those above the diagonal count.
        discount: γ.

    Raises ValueError for a number of steps that the grid does not have, costs that are not finite, γ not positive.
    """
    last = len(costs) - 1
    if not 1 <= steps <= last:
        raise ValueError(f"steps = {steps}: the teacher's grid has 1 to {last}")
    if not 0 < discount < math.inf:
        raise ValueError(f"discount = {discount!r} must be positive")
    upper = torch.ones_like(costs, dtype=torch.bool).triu(1)
    if costs.shape != (last + 1, last + 1) or not bool(costs[upper].isfinite().all()):
        raise ValueError("costs must be a square of numbers, finite above the diagonal")
    forward = torch.where(upper, costs.double(), math.inf)
    value = torch.full((last + 1,), math.inf, dtype=torch.float64)
    value[last] = 0.0
    following: list[Tensor] = []  # by number of remaining steps: the next point of each
    for _ in range(steps):
        total = forward + discount * value
        following.append(total.argmin(1))
        value = total.amin(1)
    path = [0]
    for choice in reversed(following):
        path.append(int(choice[path[-1]]))
    return tuple(path)


def local_errors(
    model: ConditionalModel,
    noise: Tensor,
    teacher: SolverSchedule,
    prediction: Prediction,
    *,
    metric: Metric = "l2",
    conditions: Mapping[str, Tensor] | None = None,
    batch_rows: int = 256,
    integer_timesteps: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Costs [T + 1, T + 1], float64: entry (i, j > i) is the error of one Euler step from i to j, zero elsewhere.

    Args:
        noise: standard normal [M, ...]; 256 noises in the paper.
        teacher: a multistep schedule without correctors on the fine grid of T steps.
        metric: the mean over the noises of the L1 or L2 norm of the error in x/α, or of "deviation": how much farther
            the Euler step ends from the straight line between the teacher's first and last state than the teacher.
        conditions: further inputs of the model by name, each [M, ...].
        integer_timesteps: as in `sample`; the teacher's times must then be integers.
        progress: called with the number of noises done and of all.

    Raises ValueError for a teacher whose evaluations are not on one trajectory, an unknown metric.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric = {metric!r}; known are {', '.join(get_args(Metric))}")
    if teacher.afs is not None or any(step.source != -1 or step.corrector is not None for step in teacher.steps):
        raise ValueError("teacher: a multistep schedule without correctors and analytical first step is needed")
    table, levels = compile_schedule(teacher, prediction.schedule), levels_of(teacher, prediction.schedule)
    bank = TeacherBank(noise, noise, conditions or {})
    total, done = torch.zeros(len(levels), len(levels), dtype=torch.float64), 0
    for part in bank.chunks(batch_rows):
        trajectory = _trajectory(part.bind(model), part.noise, table, levels, prediction, integer_timesteps)
        total += _summed_errors(trajectory, metric)
        done += len(part)
        if progress is not None:
            progress(done, len(bank))
    return total / len(bank)


@dataclass(frozen=True)
class _Trajectory:
    """The teacher's way in the view x/α, flattened: at T + 1 levels ρ = σ/α, with what Euler's step needs at T.

    A state of pure noise (α = 0) has no x/α: `states` then begins with None.
    """

    levels: list[float]
    states: list[Tensor | None]  # [B, D] each
    data: list[Tensor]
    noise: list[Tensor]

    def at(self, index: int) -> Tensor:
        """A state other than pure noise."""
        state = self.states[index]
        if state is None:
            raise RuntimeError(f"state {index} is pure noise, which has no x/α")
        return state


@torch.no_grad()
def _trajectory(
    model: Model, noise: Tensor, table: SolverTable, levels: list[Level], prediction: Prediction, integers: bool
) -> _Trajectory:
    data: list[Tensor] = []
    outputs: list[Tensor] = []
    states: list[Tensor | None] = []

    def watched(scaled: Tensor, timestep: Tensor) -> Tensor:
        index = len(data)
        time, level = table.times[index], levels[index]
        x, said = scaled / prediction.schedule.input_scale(time).item(), model(scaled, timestep)
        data.append(prediction.to_x0(said.to(x.dtype), x, time).flatten(1).double())
        outputs.append(prediction.to_epsilon(said.to(x.dtype), x, time).flatten(1).double())
        states.append(None if level.alpha == 0 else x.flatten(1).double() / level.alpha)
        return said

    end = sample(watched, noise, table, prediction, integer_timesteps=integers)
    states.append(end.flatten(1).double() / levels[-1].alpha)
    ratios = [math.exp(-level.half_log_snr) if level.alpha > 0 else math.inf for level in levels]
    return _Trajectory(ratios, states, data, outputs)


def _summed_errors(trajectory: _Trajectory, metric: Metric) -> Tensor:
    """The sum over the batch of the error of each step, [T + 1, T + 1]."""
    count = len(trajectory.levels)
    errors = torch.zeros(count, count, dtype=torch.float64)
    for j in range(1, count):
        wanted = trajectory.at(j)
        own = _distance(wanted, trajectory) if metric == "deviation" else wanted
        for i in range(j):
            reached = trajectory.data[i] + trajectory.levels[j] * trajectory.noise[i]
            if metric == "deviation":
                error = _distance(reached, trajectory) - own
            else:
                error = torch.linalg.vector_norm(reached - wanted, ord=int(metric[1]), dim=1)
            errors[i, j] = error.sum().item()
    return errors


def _distance(points: Tensor, trajectory: _Trajectory) -> Tensor:
    """How far points [B, D] are from the line between the ends of their trajectory, [B]."""
    end, start = trajectory.at(-1), trajectory.states[0]
    # in this view pure noise is infinitely far away in the direction of its noise
    chord = trajectory.noise[0] if start is None else start - end
    direction = chord / torch.linalg.vector_norm(chord, dim=1, keepdim=True)
    offset = points - end
    return torch.linalg.vector_norm(offset - (offset * direction).sum(1, keepdim=True) * direction, dim=1)
