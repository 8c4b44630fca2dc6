"""Bits within a budget: against all choices, one by one."""

from itertools import product

import numpy as np
import pytest

from genlight.quantization.allocation import allocate, allocate_greedily


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


@pytest.mark.parametrize("losses", [np.array([[np.nan, 1.0]]), np.ones(3), np.ones((0, 2))], ids=str)
def test_what_is_no_table_is_refused(losses: np.ndarray) -> None:
    with pytest.raises(ValueError, match="losses"):
        allocate(losses, {"bits": np.ones((1, 2))}, {"bits": 5})
    with pytest.raises(ValueError, match="limits"):
        allocate(np.ones((1, 2)), {}, {})
