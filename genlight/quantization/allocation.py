"""Bits for each layer within a budget: exact by integer programming, and the greedy way of the paper.

The error of a network is taken to be the sum of the errors that its layers make one at a time, so that the least sum
within the limits is a multiple-choice knapsack with one or more limits.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
# losses are rounded to this share of the largest
_LOSS_UNITS = 2**40


def allocate(losses: Array, costs: Mapping[str, Array], limits: Mapping[str, float]) -> tuple[int, ...]:
    """The choice of each layer with the least sum of losses within all limits.

    Args:
        losses: of each layer and choice, finite [layers, choices].
        costs: whole numbers of the same shape, by name.
        limits: of the sum over layers, by the names of `costs`.

    Raises:
        ValueError: values or shapes that do not fit, or a limit below what the cheapest choices cost.
    """
    from ortools.sat.python import cp_model

    losses = _checked(losses, costs, limits)
    excess = losses - losses.min(axis=1, keepdims=True)
    per_loss = _LOSS_UNITS / max(float(excess.max()), 1e-290)
    units = np.rint(excess * per_loss).astype(np.int64)
    model = cp_model.CpModel()
    chosen = [[model.new_bool_var(f"{i}.{j}") for j in range(losses.shape[1])] for i in range(len(losses))]
    for row in chosen:
        model.add_exactly_one(row)
    for name, limit in limits.items():
        total = sum(int(costs[name][i, j]) * row[j] for i, row in enumerate(chosen) for j in range(len(row)))
        model.add(total <= math.floor(limit))
    model.minimize(sum(int(units[i, j]) * row[j] for i, row in enumerate(chosen) for j in range(len(row))))
    solver = cp_model.CpSolver()
    # one worker and one seed: the same answer each time
    solver.parameters.num_workers, solver.parameters.random_seed = 1, 0
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise ValueError(f"no choice of bits keeps all of {', '.join(limits)} together")
    return tuple(next(j for j, value in enumerate(row) if solver.boolean_value(value)) for row in chosen)


def allocate_greedily(losses: Array, costs: Mapping[str, Array], limits: Mapping[str, float]) -> tuple[int, ...]:
    """From the cheapest choices, the layer with the largest loss goes up by one choice, as long as that fits.

    Args and errors as `allocate`; choices are in the order of their costs.
    """
    losses = _checked(losses, costs, limits)
    chosen = [0] * len(losses)
    while True:
        gains = losses[range(len(losses)), chosen] - losses.min(axis=1)
        for layer in np.argsort(-gains, kind="stable").tolist():
            higher = [*chosen[:layer], chosen[layer] + 1, *chosen[layer + 1 :]]
            if gains[layer] > 0 and higher[layer] < losses.shape[1] and _fits(higher, costs, limits):
                chosen = higher
                break
        else:
            return tuple(chosen)


def _checked(losses: Array, costs: Mapping[str, Array], limits: Mapping[str, float]) -> Array:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2 or not losses.size or not np.isfinite(losses).all():
        raise ValueError(f"losses of shape {losses.shape} must be finite numbers [layers, choices]")
    if not limits:
        raise ValueError("limits must name at least one cost")
    for name, limit in limits.items():
        if costs[name].shape != losses.shape:
            raise ValueError(f"costs of {name} have shape {costs[name].shape}, not {losses.shape}")
        least = int(costs[name].min(axis=1).sum())
        if math.floor(limit) < least:
            raise ValueError(f"{name} = {limit:g} is below {least}, the least that the choices come to")
    return losses


def _fits(chosen: Sequence[int], costs: Mapping[str, Array], limits: Mapping[str, float]) -> bool:
    return all(sum(costs[name][i, j] for i, j in enumerate(chosen)) <= limit for name, limit in limits.items())
