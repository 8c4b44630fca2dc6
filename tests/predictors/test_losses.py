"""The ranking loss against double loops and finite cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from genlight.predictors.losses import difference_quantile, kendall_tau, pairwise_hinge, pairwise_signs

values = st.lists(st.floats(-5, 5), min_size=1, max_size=7)
pairs = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(-5, 5), min_size=n, max_size=n) for _ in range(2)])
)


@given(pairs, st.floats(0.1, 3), st.floats(0, 2))
def test_the_loss_is_the_mean_over_all_pairs(
    pair: tuple[list[float], list[float]], margin: float, least: float
) -> None:
    scores, targets = pair
    losses = []
    for i in range(len(scores)):
        for j in range(i):
            if targets[i] != targets[j] and abs(targets[i] - targets[j]) >= least:
                sign = 1 if targets[i] > targets[j] else -1
                losses.append(max(0.0, margin - sign * (scores[i] - scores[j])))
    expected = sum(losses) / len(losses) if losses else 0.0
    signs = pairwise_signs(torch.tensor(targets, dtype=torch.float64), least)
    loss = pairwise_hinge(torch.tensor(scores, dtype=torch.float64), signs, margin)
    assert float(loss) == pytest.approx(expected, abs=1e-9)


def test_equal_scores_cost_the_margin_and_a_right_order_costs_nothing() -> None:
    signs = pairwise_signs(torch.tensor([1.0, 2.0, 3.0]))
    assert float(pairwise_hinge(torch.zeros(3), signs, 0.1)) == pytest.approx(0.1)
    assert float(pairwise_hinge(torch.tensor([0.0, 1.0, 2.0]), signs, 1.0)) == 0.0
    assert float(pairwise_hinge(torch.tensor([2.0, 1.0, 0.0]), signs, 1.0)) == pytest.approx(1 + 4 / 3)


def test_a_failed_candidate_is_worse_than_all_others_and_ties_with_its_like() -> None:
    signs = pairwise_signs(torch.tensor([math.inf, 1.0, math.inf]), 0.5)
    assert signs.tolist() == [[0, 1, 0], [-1, 0, -1], [0, 1, 0]]


def test_the_gradient_pushes_the_better_one_down() -> None:
    scores = torch.zeros(2, requires_grad=True)
    pairwise_hinge(scores, pairwise_signs(torch.tensor([1.0, 2.0]))).backward()
    assert scores.grad is not None and scores.grad.tolist() == [1.0, -1.0]


def test_batches_of_rankings_are_ranked_apart() -> None:
    targets = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    signs = pairwise_signs(targets)
    assert signs.shape == (3, 5, 5)
    apart = torch.stack([pairwise_hinge(-targets[n], signs[n]) for n in range(3)])
    assert float(pairwise_hinge(-targets, signs)) == pytest.approx(float(apart.mean()), rel=1e-5)


@given(values, st.floats(0, 0.99))
def test_the_quantile_leaves_out_that_share_of_pairs(numbers: list[float], quantile: float) -> None:
    targets = torch.tensor(numbers, dtype=torch.float64)
    threshold = difference_quantile(targets, quantile)
    differences = [abs(a - b) for n, a in enumerate(numbers) for b in numbers[:n]]
    if not differences:
        assert threshold == 0.0
        return
    assert sum(d < threshold for d in differences) <= quantile * len(differences)
    assert threshold in differences
    assert difference_quantile(torch.cat([targets, torch.tensor([math.inf])]), quantile) == threshold


def brute_tau_b(a: Tensor, b: Tensor) -> float:
    top, n_a, n_b = 0, 0, 0
    for i in range(len(a)):
        for j in range(i):
            x, y = float(torch.sign(a[i] - a[j])), float(torch.sign(b[i] - b[j]))
            top, n_a, n_b = top + x * y, n_a + x * x, n_b + y * y
    return top / math.sqrt(n_a * n_b) if n_a and n_b else 0.0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_kendall_is_tau_b(rows: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor([float(row[column]) for row in rows]) for column in (0, 1))
    assert kendall_tau(a, b) == pytest.approx(brute_tau_b(a, b))
