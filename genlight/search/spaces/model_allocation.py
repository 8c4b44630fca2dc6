"""Members for the evaluations of a schedule by what is known of their errors: a knapsack, without sampling once.

The result of a solver is a weighted sum of the outputs, result = w_T x_T + Σ_j w_j ε̂_j (the last row of its table in
noise form). If an error of output j only reached the result by its own weight, and not through what later evaluations
see, the squared error of the result would be Σ_j w_j² MSE_{k_j}(λ_j), with k_j the member that makes evaluation j and
MSE_k its validation loss at λ. The least such sum within a budget is a multiple-choice knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from genlight.diffusion.model_schedule import Kind, half_log_snr_range, solver_schedule
from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import PredictionSpace
from genlight.search.records import fits
from genlight.search.spaces.model_rules import BudgetedZoo, Layout, RuleSchedule, cost_of, layouts, within

Array = np.ndarray[Any, np.dtype[np.float64]]
Curve = Callable[[Array], Any]

ALLOCATIONS = 60
# integers of the solver: squared errors and costs are rounded to these shares of the largest
_ERROR_UNITS, _COST_UNITS, _TIE_UNITS = 2**34, 10**9, 2**10


@dataclass(frozen=True)
class Allocation:
    """Members by number for each evaluation, and the sum of their errors; larger errors come later in a list."""

    members: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class AnalyticSchedule(RuleSchedule):
    """A schedule with the squared error that is predicted for its result, the sum over evaluations."""

    predicted_error: float = math.nan


def evaluation_weights(table: SolverTable, noise_schedule: NoiseSchedule) -> tuple[Array, Array]:
    """(w_j, λ_j) of each evaluation, both [E]: how an error of ε̂_j weighs in the result.

    A table of data weighs errors of x̂_0, which are σ/α times those of ε̂; at pure noise, where that is infinite, the
    lowest λ of `half_log_snr_range` stands for the evaluation.
    """
    weights = np.asarray(table.weights[-1, 1:].detach().double().numpy())
    half_log_snrs = np.clip(noise_schedule.half_log_snr(table.times).numpy(), *half_log_snr_range(noise_schedule))
    return (weights if table.basis == "noise" else weights * np.exp(-half_log_snrs)), half_log_snrs


def weighed_basis(noise_schedule: NoiseSchedule) -> PredictionSpace:
    """The form of a table whose weights are looked at: noise, or data where pure noise makes those infinite."""
    return "data" if noise_schedule.alpha(noise_schedule.t_max) == 0 else "noise"


def analytic_allocation(
    zoo: BudgetedZoo,
    errors: Mapping[str, Curve],
    *,
    count: int = ALLOCATIONS,
    best: int = 1,
) -> list[AnalyticSchedule]:
    """The schedules with the least predicted error within the budget, the `best` for each layout.

    Predicted errors of different layouts leave out what their steps do not resolve, so they say which members, not
    which layout: all are returned, by layout, to be measured.

    Args:
        zoo: its budget must be set.
        errors: mean squared error of each member's ε̂ at λ, as in `genlight.diffusion.error_curves`.
        count: schedules at most: equally many of each kind and order, from the fewest to the most evaluations that the
            budget allows, in equal ratios.
        best: for each layout.

    Raises ValueError for a zoo without budget, or members without errors.
    """
    names = list(zoo.costs)
    if missing := [name for name in names if name not in errors]:
        raise ValueError(f"errors: none for {', '.join(missing)}")
    if zoo.budget is None:
        raise ValueError("budget: the allocation needs one")
    if zoo.budget < min(zoo.costs.values()):
        return []
    most = min(zoo.max_evaluations, math.floor(zoo.budget / max(min(zoo.costs.values()), 1e-12) * (1 + 1e-9)))
    found = []
    for layout in _some_layouts(zoo, most, count // best):
        weights, half_log_snrs = _weights_of(layout, names[0], zoo.noise_schedule, zoo.slots)
        table = np.stack([weights**2 * np.asarray(errors[name](half_log_snrs)) for name in names], axis=1)
        costs = np.array([zoo.costs[name] for name in names])
        for place, chosen in enumerate(allocate(table, costs, zoo.budget, switch=zoo.switch, best=best)):
            members = [names[i] for i in chosen.members]
            cost, word = cost_of(zoo, members), f", number {place + 1}" if best > 1 else ""
            schedule = layout.with_members(members)
            found.append(AnalyticSchedule("analytic", layout.name + word, schedule, cost, chosen.error))
    return [each for each in found if within(zoo, each.cost)]


def allocate(errors: Array, costs: Array, budget: float, *, switch: float = 0.0, best: int = 1) -> list[Allocation]:
    """The allocations of members to evaluations with the least sum of errors within a budget, the best first.

    Exact up to rounding of 1e-10 of the largest error and 1e-9 of the budget; among equal errors the cheaper.

    Args:
        errors: [E, M], not negative.
        costs: [M] of one call; `switch` is added for each change of member.
        best: how many; fewer come back where no more fit.

    Raises ValueError for shapes that do not fit or values that are negative or not finite.
    """
    errors, costs = np.asarray(errors, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    if errors.ndim != 2 or costs.shape != (errors.shape[1],):
        raise ValueError(f"errors and costs have shapes {errors.shape} and {costs.shape}, not [E, M] and [M]")
    numbers = (*errors.flat, *costs, budget, switch)
    if not all(math.isfinite(value) and value >= 0 for value in numbers):
        raise ValueError("errors, costs, budget and switch must be finite and not negative")
    found: list[Allocation] = []
    excluded: list[tuple[int, ...]] = []
    while len(found) < best:
        members = _solve(errors, costs, budget, switch, excluded)
        if members is None:
            break
        excluded.append(members)
        found.append(Allocation(members, float(sum(errors[e, m] for e, m in enumerate(members)))))
    return found


def _some_layouts(zoo: BudgetedZoo, most: int, count: int) -> list[Layout]:
    """At most `count` layouts of up to `most` evaluations, as many of each kind and order as of the others."""
    every = list(layouts(zoo, range(1, most + 1)))
    groups: dict[tuple[Kind, int], list[Layout]] = {}
    for layout in every:
        groups.setdefault((layout.kind, layout.order), []).append(layout)
    kept, left = set[Layout](), count
    # the smallest first: what it does not use is for the others
    for place, group in enumerate(sorted(groups.values(), key=len)):
        chosen = _in_equal_ratios(group, left // (len(groups) - place))
        kept.update(chosen)
        left -= len(chosen)
    return [layout for layout in every if layout in kept]


def _in_equal_ratios(group: Sequence[Layout], count: int) -> list[Layout]:
    """At most `count` of layouts with one evaluation more each: the first, the last, and between in equal ratios."""
    if len(group) <= count:
        return list(group)
    first, last = group[0].nfe, group[-1].nfe
    ratios = [math.sqrt(first * last)] if count == 1 else np.geomspace(first, last, count).tolist()
    chosen, nfe = list[Layout](), first - 1
    for wanted in ratios:
        nfe = max(nfe + 1, round(wanted))  # where a ratio is less than one evaluation more
        chosen.append(group[nfe - first])
    return chosen


def _weights_of(layout: Layout, member: str, noise_schedule: NoiseSchedule, slots: int) -> tuple[Array, Array]:
    """Weights and λ of the evaluations, which depend on no member."""
    schedule = solver_schedule(layout.with_members([member] * layout.nfe), noise_schedule, slots)
    table = compile_schedule(schedule, noise_schedule, basis=weighed_basis(noise_schedule))
    return evaluation_weights(table, noise_schedule)


def _solve(
    errors: Array, costs: Array, budget: float, switch: float, excluded: Sequence[tuple[int, ...]]
) -> tuple[int, ...] | None:
    """One member for each evaluation, by integer programming; None where nothing fits."""
    exact = np.round  # costs that fill the budget to the last bit must not fail by rounding up
    for rounded in (exact, np.ceil):
        members = _solve_rounded(errors, costs, budget, switch, excluded, rounded)
        if members is None or fits(_cost(costs, switch, members), budget):
            return members
    return None


def _solve_rounded(
    errors: Array,
    costs: Array,
    budget: float,
    switch: float,
    excluded: Sequence[tuple[int, ...]],
    rounded: Callable[[Any], Any],
) -> tuple[int, ...] | None:
    from ortools.sat.python import cp_model

    size, count = errors.shape
    per_cost = _COST_UNITS / budget if budget > 0 else 0.0
    price = [int(rounded(min(cost * per_cost, 2.0 * _COST_UNITS))) for cost in costs]
    fee = int(rounded(min(switch * per_cost, 2.0 * _COST_UNITS)))
    excess = errors - errors.min(axis=1, keepdims=True)
    # where all errors are equal only the costs decide
    per_error = _ERROR_UNITS / float(excess.max()) if excess.max() > 1e-290 else 0.0
    # the second part decides among equal errors and is smaller than one unit of the first in sum
    ties = [int(_TIE_UNITS * cost / max(float(costs.max()), 1e-300)) for cost in costs]
    weight = (_TIE_UNITS + 1) * size
    model = cp_model.CpModel()
    chosen = [[model.new_bool_var(f"{e}.{m}") for m in range(count)] for e in range(size)]
    for row in chosen:
        model.add_exactly_one(row)
    spent = sum(price[m] * row[m] for row in chosen for m in range(count))
    if fee:
        for e, (before, after) in enumerate(pairwise(chosen)):
            change = model.new_bool_var(f"change {e}")
            for m in range(count):
                model.add_bool_or([after[m].negated(), before[m], change])
            spent += fee * change
    allowed = _COST_UNITS + size if rounded is np.round else _COST_UNITS
    model.add(spent <= allowed)
    for members in excluded:
        model.add_bool_or([chosen[e][m].negated() for e, m in enumerate(members)])
    values = np.rint(excess * per_error).astype(np.int64)
    model.minimize(
        sum((int(values[e, m]) * weight + ties[m]) * chosen[e][m] for e in range(size) for m in range(count))
    )
    solver = cp_model.CpSolver()
    solver.parameters.num_workers, solver.parameters.random_seed = 1, 0
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return tuple(next(m for m in range(count) if solver.boolean_value(row[m])) for row in chosen)


def _cost(costs: Array, switch: float, members: Sequence[int]) -> float:
    changes = sum(left != right for left, right in pairwise(members))
    return float(sum(costs[m] for m in members) + switch * changes)
