"""Bits within a budget: against all choices, one by one."""

import time
from itertools import pairwise, product

import numpy as np
import pytest

from genlight.quantization.allocation import (
    allocate,
    allocate_by_threshold,
    allocate_greedily,
    allocate_randomly,
    allocate_uniformly,
    group_budgets,
    pareto_allocations,
    solve_allocation,
)


@pytest.mark.parametrize("seed", range(6))
def test_the_solver_finds_what_trying_everything_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = np.sort(rng.exponential(size=(7, 3)), axis=1)[:, ::-1]
    weights = rng.integers(1, 1000, size=7)
    costs = {"bits": weights[:, None] * np.array([3, 4, 8]), "bytes": np.sort(rng.integers(1, 50, size=(7, 3)), axis=1)}
    limits = {"bits": 5.0 * weights.sum(), "bytes": float(costs["bytes"].min(1).sum() + 60)}

    def loss(chosen: tuple[int, ...]) -> float:
        return float(sum(losses[i, j] for i, j in enumerate(chosen)))

    def fits(chosen: tuple[int, ...]) -> bool:
        return all(sum(costs[n][i, j] for i, j in enumerate(chosen)) <= limits[n] for n in limits)

    best = min(loss(chosen) for chosen in product(range(3), repeat=7) if fits(chosen))
    exact, greedy = allocate(losses, costs, limits), allocate_greedily(losses, costs, limits)
    assert fits(exact) and loss(exact) == pytest.approx(best, abs=1e-9)
    assert fits(greedy) and loss(greedy) >= best - 1e-9


def test_a_budget_that_a_uniform_plan_fills_allows_it() -> None:
    """To the last bit; one bit less, and not all can have four."""
    weights = np.array([1152 * 1152] * 5 + [7])
    costs = {"bits": weights[:, None] * np.array([4, 8])}
    losses = np.ones((6, 2))
    assert allocate(losses, costs, {"bits": 4 * weights.sum()}) == (0,) * 6
    with pytest.raises(ValueError, match="below"):
        allocate(losses, costs, {"bits": 4 * weights.sum() - 1})
    losses[:, 1] = 0
    assert allocate(losses, costs, {"bits": 8 * weights.sum()}) == (1,) * 6
    assert allocate_greedily(losses, costs, {"bits": 8 * weights.sum()}) == (1,) * 6


def test_the_greedy_way_raises_the_worst_first() -> None:
    losses = np.array([[3.0, 0.0], [5.0, 0.0], [4.0, 0.0]])
    costs = {"bits": np.array([[1.0, 2.0]] * 3)}
    assert allocate_greedily(losses, costs, {"bits": 4}) == (0, 1, 0)
    assert allocate_greedily(losses, costs, {"bits": 5}) == (0, 1, 1)


def test_the_greedy_way_weighs_a_fall_by_its_cost_and_passes_over_a_worse_choice() -> None:
    losses = np.array([[5.0, 6.0, 0.0], [3.0, 3.5, 0.0], [3.0, 3.5, 0.0]])
    costs = {"bits": np.array([[1, 6, 11], [1, 2, 3], [1, 2, 3]])}
    assert allocate_greedily(losses, costs, {"bits": 13}) == (0, 2, 2)
    assert allocate_greedily(losses, costs, {"bits": 17}) == (2, 2, 2)


def test_a_threshold_is_the_least_that_fits() -> None:
    errors = np.array([[4.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
    costs = {"bits": np.array([[1, 2, 3]] * 2)}
    found = {limit: allocate_by_threshold(errors, costs, {"bits": limit}) for limit in range(2, 7)}
    assert found == {2: (0, 0), 3: (1, 0), 4: (1, 0), 5: (1, 2), 6: (2, 2)}


def test_a_uniform_choice_is_the_last_that_fits() -> None:
    costs = {"bits": np.array([[2, 4, 8]] * 3), "bytes": np.array([[1, 2, 2], [1, 1, 1], [1, 1, 9]])}
    assert allocate_uniformly(costs, {"bits": 23}) == (1, 1, 1)
    assert allocate_uniformly(costs, {"bits": 24}) == (2, 2, 2)
    assert allocate_uniformly(costs, {"bits": 24, "bytes": 3}) == (0, 0, 0)


def test_a_solver_that_stopped_is_told_apart_from_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    together = {"one": np.array([[0, 1]] * 3), "other": np.array([[1, 0]] * 3)}
    with pytest.raises(ValueError, match="no choice of bits keeps all of one, other together"):
        allocate(np.ones((3, 2)), together, {"one": 1, "other": 1})
    monkeypatch.setattr("genlight.quantization.allocation._MOST_WORK", 0.0)
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 1000, size=(40, 2))
    costs = {"one": weights * np.array([1, 0]), "other": weights[:, ::-1] * np.array([0, 1])}
    limits = {"one": 0.5 * weights[:, 0].sum(), "other": 0.6 * weights[:, 0].sum()}
    with pytest.raises(ValueError, match=r"stopped \(UNKNOWN\) before it found bits that keep one, other"):
        allocate(rng.random((40, 2)), costs, limits)


def test_a_solver_that_stopped_leaves_the_greedy_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    decibels, weights = network(40)
    problem = 10 ** (-decibels / 10), {"bits": weights[:, None] * np.array([2, 4, 8])}, {"bits": 4.0 * weights.sum()}
    best = solve_allocation(*problem)
    monkeypatch.setattr("genlight.quantization.allocation._MOST_WORK", 0.0)
    found = solve_allocation(*problem)
    assert found.chosen == allocate_greedily(*problem)
    assert best.loss < found.loss and found.loss - found.gap <= best.loss


@pytest.mark.parametrize("losses", [np.array([[np.nan, 1.0]]), np.ones(3), np.ones((0, 2))], ids=str)
def test_what_is_no_table_is_refused(losses: np.ndarray) -> None:
    with pytest.raises(ValueError, match="losses"):
        allocate(losses, {"bits": np.ones((1, 2))}, {"bits": 5})
    with pytest.raises(ValueError, match="limits"):
        allocate(np.ones((1, 2)), {}, {})


def network(layers: int = 794) -> tuple[np.ndarray, np.ndarray]:
    """SQNR in dB of weights in 2, 4 and 8 bits, and how many there are, spread as those of SDXL."""
    rng = np.random.default_rng(0)
    decibels = rng.normal(40, 15, size=layers)[:, None] + np.array([-12, 0, 24]) + rng.normal(0, 2, size=(layers, 3))
    return np.maximum.accumulate(decibels, axis=1), np.exp(rng.normal(14.5, 1.2, size=layers)).astype(np.int64)


def test_a_network_of_794_layers_is_solved_at_once() -> None:
    decibels, weights = network()
    costs = {"bits": weights[:, None] * np.array([2, 4, 8])}
    noise = 10 ** (-decibels / 10)
    values = [float(bits * weights.sum()) for bits in (1.5, 3, 4, 5, 6)]
    begun = time.process_time()
    front = pareto_allocations(noise, costs, {"bits": 0.0}, "bits", values)
    assert time.process_time() - begun < 2 * len(front)
    assert [value for value, _ in front] == values[1:]
    assert all(one.gap <= 1e-6 * one.loss for _, one in front)
    assert all(one.loss >= other.loss for (_, one), (_, other) in pairwise(front))


def test_a_sum_of_decibels_raises_the_harmless_layer() -> None:
    """From 60 to 80 dB counts more than from 20 to 39, and changes nothing; noise power takes the worst."""
    decibels, costs = np.array([[60.0, 80.0], [20.0, 39.0]]), {"bits": np.array([[4, 8], [4, 8]])}
    assert allocate(-decibels, costs, {"bits": 12}) == (1, 0)
    assert allocate(10 ** (-decibels / 10), costs, {"bits": 12}) == (0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_random_choice_fits_and_is_never_better(seed: int) -> None:
    decibels, weights = network(40)
    noise, costs = 10 ** (-decibels / 10), {"bits": weights[:, None] * np.array([2, 4, 8])}
    limits = {"bits": 4.0 * weights.sum()}
    found = allocate_randomly(costs, limits, seed)
    best = solve_allocation(noise, costs, limits)
    taken = sum(costs["bits"][i, j] for i, j in enumerate(found))
    assert limits["bits"] - 4 * weights.max() < taken <= limits["bits"]
    assert best.loss <= noise[range(40), found].sum() and found == allocate_randomly(costs, limits, seed)


def test_budgets_of_groups_have_the_asked_average() -> None:
    rng = np.random.default_rng(0)
    for average, ratio, share in rng.uniform([2, 0.4, 0], [8, 1.4, 1], size=(20, 3)):
        first, second = group_budgets(average, ratio, share)
        assert first == pytest.approx(ratio * second)
        assert share * first + (1 - share) * second == pytest.approx(average)
    assert group_budgets(4, 1, 0.6915) == pytest.approx((4, 4))
    with pytest.raises(ValueError, match="ratio = 0"):
        group_budgets(4, 0, 0.5)
