"""How well scores order candidates: Kendall's τ-b, Spearman's ρ, and what is found among the best.

Scores and targets are [n]; higher is better in both.
"""

import math

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from genlight.predictors.losses import kendall_tau

SHARES = {"p_at_1": 0.01, "p_at_5": 0.05}


def spearman(scores: Tensor, targets: Tensor) -> float:
    """Spearman's rank correlation, ties by mean rank; 0 where it is undefined (fewer than two values, or all equal)."""
    if min(len(scores.unique()), len(targets.unique())) < 2:
        return 0.0
    return float(spearmanr(scores.cpu().numpy(), targets.cpu().numpy()).statistic)


def precision_at_k(scores: Tensor, targets: Tensor, share: float) -> float:
    """Share of the K best by score that are among the K best by target, with K = ⌊share · n⌋; of ties the first count.

    Raises:
        ValueError: K is 0, or the share lies above 1.
    """
    # a product such as 0.29 · 100 falls short of a whole number by rounding
    k = math.floor(share * len(targets) + 1e-9)
    if not 1 <= k <= len(targets):
        raise ValueError(f"share = {share} of {len(targets)} candidates is {k}; it must be 1 to {len(targets)}")
    return len(set(_best(scores, k)) & set(_best(targets, k))) / k


def top_k_regret(scores: Tensor, targets: Tensor, k: int) -> float:
    """How far the best target among the k best by score stays behind the best of all.

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= len(targets):
        raise ValueError(f"k = {k} must be 1 to {len(targets)}")
    return float(targets.max() - targets[_best(scores, k)].max())


def _best(values: Tensor, k: int) -> list[int]:
    return torch.argsort(values, descending=True, stable=True)[:k].tolist()


def ranking_scores(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """kendall_tau, spearman, p_at_1 and p_at_5 (of the best 1 % and 5 %; without those for which there are too few)."""
    found = {"kendall_tau": kendall_tau(scores, targets), "spearman": spearman(scores, targets)}
    enough = {name: share for name, share in SHARES.items() if share * len(targets) >= 1}
    return found | {name: precision_at_k(scores, targets, share) for name, share in enough.items()}


class RankingScores(Metric):
    """`ranking_scores` over the candidates of a validation, from whatever batches and processes they come."""

    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("scores", "targets"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add the scores and targets [B] of B candidates."""
        self.scores.append(scores.detach().float())
        self.targets.append(targets.detach().float())

    def compute(self) -> dict[str, float]:
        """The values by name."""
        return ranking_scores(dim_zero_cat(self.scores).cpu(), dim_zero_cat(self.targets).cpu())
