"""Rank metrics against scipy, and at their ends."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from genlight.metrics.ranking import RankingScores, precision_at_k, spearman, top_k_regret


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_the_metric_is_scipys_whatever_the_batches(rows: list[tuple[int, int]]) -> None:
    scores, targets = torch.tensor(rows, dtype=torch.float32).T
    metric = RankingScores()
    for part in torch.split(torch.stack([scores, targets]), 7, dim=1):
        metric.update(*part)
    found = metric.compute()
    if len(set(scores.tolist())) > 1 and len(set(targets.tolist())) > 1:
        assert found["kendall_tau"] == pytest.approx(kendalltau(scores, targets).statistic)
        assert found["spearman"] == pytest.approx(spearmanr(scores, targets).statistic)
    else:
        assert found["kendall_tau"] == found["spearman"] == 0.0
    assert set(found) == {"kendall_tau", "spearman"} | ({"p_at_5"} if len(rows) >= 20 else set())


def test_perfect_and_reversed_orders() -> None:
    targets = torch.randperm(200, generator=torch.Generator().manual_seed(0)).float()
    for share in (0.01, 0.05, 0.29, 0.5, 1.0):
        assert precision_at_k(3 * targets + 1, targets, share) == 1.0
        assert precision_at_k(-targets, targets, share) == (1.0 if share == 1.0 else 0.0)
    assert spearman(targets, targets) == pytest.approx(1) and spearman(-targets, targets) == pytest.approx(-1)
    assert top_k_regret(targets, targets, 1) == 0.0 and top_k_regret(-targets, targets, 10) == 190.0


def test_k_is_the_share_rounded_down() -> None:
    targets = torch.arange(100.0)
    scores = torch.where(targets == 99, -1.0, targets)
    assert precision_at_k(scores, targets, 0.29) == pytest.approx(28 / 29)
    assert precision_at_k(scores, targets, 0.019) == 0.0
    for share in (0.009, 1.1):
        with pytest.raises(ValueError, match=f"share = {share}"):
            precision_at_k(scores, targets, share)
    with pytest.raises(ValueError, match="k = 0"):
        top_k_regret(scores, targets, 0)


def test_random_scores_find_their_share_of_the_best() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.random((2, 2000, 100)))
    found = [precision_at_k(values[0, i], values[1, i], 0.1) for i in range(2000)]
    # hypergeometric: mean K/n, variance of the number of hits K (K/n) (1 - K/n) (n - K) / (n - 1)
    deviation = math.sqrt(10 * 0.1 * 0.9 * 90 / 99) / 10 / math.sqrt(2000)
    assert abs(np.mean(found) - 0.1) < 4 * deviation


def test_regret_is_what_the_best_of_the_chosen_misses() -> None:
    targets, scores = torch.tensor([5.0, 9.0, 7.0, 1.0]), torch.tensor([3.0, 0.0, 2.0, 1.0])
    assert [top_k_regret(scores, targets, k) for k in (1, 2, 3, 4)] == [4.0, 2.0, 2.0, 0.0]
