"""Bits for each layer within a budget: exact by integer programming, and rivals that look at less.

The error of a network is taken to be the sum of the errors that its layers make one at a time, so that the least sum
within the limits is a multiple-choice knapsack with one or more limits.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
# losses are rounded to this share of the largest
_LOSS_UNITS = 2**40
# the solver's own measure of work, so that the same program stops at the same place on every machine
_MOST_WORK = 60.0


@dataclass(frozen=True)
class Allocation:
    """An answer of the solver.

    Attributes:
        chosen: the choice of each layer.
        loss: the sum of its losses.
        gap: how far at most the sum may be above the least one; 0 where that is proved.
    """

    chosen: tuple[int, ...]
    loss: float
    gap: float


def allocate(losses: Array, costs: Mapping[str, Array], limits: Mapping[str, float]) -> tuple[int, ...]:
    """The choice of each layer with the least sum of losses within all limits; see `solve_allocation`."""
    return solve_allocation(losses, costs, limits).chosen


def solve_allocation(losses: Array, costs: Mapping[str, Array], limits: Mapping[str, float]) -> Allocation:
    """The choice of each layer with the least sum of losses within all limits, and how sure that is.

    Where the solver stops at its limit of work, the answer is the better of what it has found and the greedy one.

    Args:
        losses: of each layer and choice, finite [layers, choices].
        costs: whole numbers of the same shape, by name.
        limits: of the sum over layers, by the names of `costs`.

    Raises:
        ValueError: values or shapes that do not fit, a limit below what the cheapest choices cost, limits that cannot
            be kept together, or a solver that stopped before it found anything, where the greedy way fits neither.
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
    # the linear relaxation of a knapsack is nearly whole: with it hundreds of layers take a fraction of a second
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = _MOST_WORK
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        raise ValueError(f"no choice of bits keeps all of {', '.join(limits)} together")
    layers, known = range(len(losses)), list[tuple[int, ...]]()
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        known.append(tuple(next(j for j, value in enumerate(row) if solver.boolean_value(value)) for row in chosen))
    if status != cp_model.OPTIMAL and _fits(greedy := allocate_greedily(losses, costs, limits), costs, limits):
        known.append(greedy)
    if not known:
        raise ValueError(
            f"the solver stopped ({solver.status_name(status)}) before it found bits that keep {', '.join(limits)}: "
            "loosen a limit, or give fewer choices"
        )
    found = min(known, key=lambda each: int(units[layers, each].sum()))
    gap = max(0.0, int(units[layers, found].sum()) - max(0.0, solver.best_objective_bound)) / per_loss
    return Allocation(found, float(losses[layers, found].sum()), gap)


def allocate_randomly(costs: Mapping[str, Array], limits: Mapping[str, float], seed: int) -> tuple[int, ...]:
    """From the cheapest choices, layers in a random order go up by one choice, again and again, as long as that fits.

    Raises:
        ValueError: a limit below what the cheapest choices cost.
    """
    shape = next(iter(costs.values())).shape
    _checked(np.zeros(shape), costs, limits)
    rng, chosen, open_layers = np.random.default_rng(seed), [0] * shape[0], list(range(shape[0]))
    while open_layers:
        layer = open_layers[int(rng.integers(len(open_layers)))]
        higher = [*chosen[:layer], chosen[layer] + 1, *chosen[layer + 1 :]]
        if higher[layer] < shape[1] and _fits(higher, costs, limits):
            chosen = higher
        else:
            open_layers.remove(layer)
    return tuple(chosen)


def group_budgets(average: float, ratio: float, share: float) -> tuple[float, float]:
    """Average bits of two groups of layers, the first having `ratio` times those of the second.

    MixDQ (arXiv:2405.17873) makes its candidates so: with R the cost of the first group over that of the second,
    B₂ = B (1 + R) / (k R + 1) and B₁ = k B₂, which together have the average B.

    Args:
        average: B, over both.
        ratio: k, positive.
        share: of the first group in the cost of both, in [0, 1].

    Returns:
        B₁ and B₂.

    Raises:
        ValueError: a ratio that is not positive, or a share outside [0, 1].
    """
    if ratio <= 0 or not 0 <= share <= 1:
        raise ValueError(f"ratio = {ratio} must be positive and share = {share} lie in [0, 1]")
    second = average / (ratio * share + 1 - share)
    return ratio * second, second


def allocate_greedily(losses: Array, costs: Mapping[str, Array], limits: Mapping[str, float]) -> tuple[int, ...]:
    """From the cheapest choices, again and again the change of one layer with the largest fall of loss per cost.

    Every choice of a layer that lowers its loss and still fits is open. Costs count as shares of their limits, and the
    shares add up. Args and errors as `allocate`; the first choice is the cheapest.
    """
    losses = _checked(losses, costs, limits)
    every = np.stack([costs[name] for name in limits]).astype(np.float64)  # [limits, layers, choices]
    most = np.array([math.floor(limit) for limit in limits.values()], dtype=np.float64)[:, None, None]
    layers, chosen = np.arange(len(losses)), np.zeros(len(losses), dtype=np.int64)
    while True:
        taken = every[:, layers, chosen]
        extra = every - taken[:, :, None]
        falls = losses[layers, chosen][:, None] - losses
        fits = (taken.sum(axis=1)[:, None, None] + extra <= most).all(axis=0)
        prices = (extra / np.maximum(most, 1)).sum(axis=0)
        worth = np.where(fits & (falls > 0), falls / np.maximum(prices, 1e-30), 0.0)
        layer, choice = np.unravel_index(int(worth.argmax()), worth.shape)
        if worth[layer, choice] <= 0:
            return tuple(chosen.tolist())
        chosen[layer] = choice


def allocate_by_threshold(errors: Array, costs: Mapping[str, Array], limits: Mapping[str, float]) -> tuple[int, ...]:
    """Each layer has its first choice with an error of t or less, for the least t that fits.

    SDNQ chooses data types so, with a t that is given. A layer without such a choice has that of its least error. Args
    and errors as `allocate`; the first choice is the cheapest.
    """
    errors = _checked(errors, costs, limits)

    def at(threshold: float) -> list[int]:
        low_enough = errors <= np.maximum(threshold, errors.min(axis=1))[:, None]
        return [int(choice) for choice in low_enough.argmax(axis=1)]

    values = np.unique(errors).tolist()
    place = bisect_left(values, True, key=lambda threshold: _fits(at(threshold), costs, limits))
    return tuple(at(values[min(place, len(values) - 1)]))


def allocate_uniformly(costs: Mapping[str, Array], limits: Mapping[str, float]) -> tuple[int, ...]:
    """The same choice for all layers, the last that fits; errors as `allocate`."""
    layers, choices = next(iter(costs.values())).shape
    _checked(np.zeros((layers, choices)), costs, limits)
    last = max((j for j in range(choices) if _fits([j] * layers, costs, limits)), default=0)
    return tuple([last] * layers)


def pareto_allocations(
    losses: Array, costs: Mapping[str, Array], limits: Mapping[str, float], name: str, values: Sequence[float]
) -> list[tuple[float, Allocation]]:
    """The best allocation for each of several values of one limit; values that cannot be kept are left out."""
    found = []
    for value in values:
        try:
            found.append((value, solve_allocation(losses, costs, {**limits, name: value})))
        except ValueError:  # below the least, or not together with the other limits
            continue
    return found


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
