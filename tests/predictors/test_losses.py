"""The ranking loss against double loops and finite cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from genlight.predictors.losses import (
    Pairs,
    difference_quantile,
    kendall_tau,
    pairwise_hinge,
    pairwise_signs,
    sample_pairs,
    sampled_hinge,
)

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


def pair_set(pairs: Pairs, row: int) -> list[tuple[int, int]]:
    real = pairs.signs[row] != 0
    return [(min(pair), max(pair)) for pair in zip(pairs.first[row][real].tolist(), pairs.second[row][real].tolist())]


@given(
    st.lists(st.lists(st.integers(0, 3) | st.just(math.nan), min_size=7, max_size=7), min_size=1, max_size=3),
    st.integers(1, 30),
)
def test_sampled_pairs_are_different_and_of_different_known_targets(rows: list[list[float]], limit: int) -> None:
    targets = torch.tensor(rows, dtype=torch.float32)
    pairs = sample_pairs(targets, limit)
    assert pairs.first.shape == pairs.second.shape == pairs.signs.shape
    for row, values in enumerate(rows):
        found = pair_set(pairs, row)
        possible = [(i, j) for j in range(7) for i in range(j) if abs(values[i] - values[j]) > 0]
        assert len(found) == len(set(found)) <= limit and set(found) <= set(possible)
        if 4 * limit >= 21:
            assert len(found) == min(limit, len(possible))
        for i, j, sign in zip(pairs.first[row], pairs.second[row], pairs.signs[row].tolist()):
            assert sign in (0, 1 if values[i] > values[j] else -1)


@pytest.mark.parametrize(("n", "limit"), [(9, 12), (60, 50), (60, 120)])
def test_every_pair_is_drawn_equally_often_whether_listed_or_in_a_ring(n: int, limit: int) -> None:
    torch.manual_seed(0)
    targets = torch.arange(float(n)).expand(2000, n)
    pairs = sample_pairs(targets, limit)
    first, second = torch.minimum(pairs.first, pairs.second), torch.maximum(pairs.first, pairs.second)
    assert torch.equal(pairs.signs, torch.sign(pairs.first - pairs.second)) and first.shape == (2000, limit)
    codes = first * n + second
    assert all(len(set(row)) == limit for row in codes.tolist())
    counts = torch.bincount(codes.flatten(), minlength=n * n).double()
    counts = counts.view(n, n)[tuple(torch.triu_indices(n, n, 1))]
    expected = 2000 * limit / (n * (n - 1) / 2)
    deviation = math.sqrt(expected * (1 - limit / (n * (n - 1) / 2)))
    assert float((counts - expected).abs().max()) < 5 * deviation


@pytest.mark.parametrize("known", [0, 1, 2, 3, 15, 16, 100, 512])
def test_few_known_targets_give_all_pairs_that_they_have(known: int) -> None:
    torch.manual_seed(0)
    targets = torch.full((3, 512), math.nan)
    targets[:2, torch.randperm(512)[:known]] = torch.arange(float(known))
    targets[2] = torch.arange(512.0)  # a target that is known of all beside the others
    pairs = sample_pairs(targets, 2048)
    for row, count in enumerate((known, known, 512)):
        found = pair_set(pairs, row)
        assert len(found) == len(set(found)) == min(2048, count * (count - 1) // 2)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8), st.floats(0.05, 2))
def test_the_sampled_loss_on_all_pairs_is_the_loss_on_all_pairs(scores: list[float], margin: float) -> None:
    s = torch.tensor(scores, dtype=torch.float64)
    y = torch.linspace(0, 1, len(scores), dtype=torch.float64).flip(0).round(decimals=0)
    every = sampled_hinge(s[None], sample_pairs(y[None], 100), margin)
    assert float(every) == pytest.approx(float(pairwise_hinge(s, pairwise_signs(y), margin)), abs=1e-12)


def test_encoding_each_candidate_once_is_encoding_both_sides_of_each_pair() -> None:
    torch.manual_seed(0)
    network, inputs, y = torch.nn.Linear(3, 2), torch.randn(40, 3), torch.randn(2, 40)
    pairs = sample_pairs(y, 160)
    once = sampled_hinge(network(inputs).T, pairs, 0.1)
    for target in range(2):
        one, other = (network(inputs[side[target]])[:, target] for side in (pairs.first, pairs.second))
        naive = torch.relu(
            0.1 - torch.sign(y[target][pairs.first[target]] - y[target][pairs.second[target]]) * (one - other)
        )
        assert float(once[target].detach()) == pytest.approx(float(naive.mean().detach()), rel=1e-5)


def test_without_a_pair_the_sampled_loss_and_its_gradient_are_zero() -> None:
    scores = torch.randn(2, 5, requires_grad=True)
    targets = torch.tensor([[1.0] * 5, [math.nan, 1.0, math.nan, 1.0, math.nan]])
    loss = sampled_hinge(scores, sample_pairs(targets, 10), 0.1)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and scores.grad is not None and not scores.grad.any()
