"""Pairwise ranking: the hinge loss that only asks for the right order, and how good an order is."""

import torch
from scipy.stats import kendalltau
from torch import Tensor


def pairwise_signs(targets: Tensor, min_difference: float = 0.0) -> Tensor:
    """Which of each pair should score higher: sign(yᵢ - yⱼ), and 0 where the pair is too close to tell.

    Args:
        targets: float [..., n]; infinite is worse (or better) than all finite ones, and as good as itself.
        min_difference: pairs that differ by less are left out.

    Returns:
        float [..., n, n], antisymmetric.
    """
    first, second = targets.unsqueeze(-1), targets.unsqueeze(-2)
    difference = torch.where(first == second, torch.zeros_like(first), first - second)
    return torch.sign(difference) * (difference.abs() >= min_difference)


def pairwise_hinge(scores: Tensor, signs: Tensor, margin: float = 1.0) -> Tensor:
    """Mean over the pairs of max(0, margin - sign(yᵢ - yⱼ)·(sᵢ - sⱼ)); 0 if there is no pair.

    Args:
        scores: float [..., n], predicted; they come to have the order of the targets.
        signs: float [..., n, n] from `pairwise_signs`; pairs with 0 do not count.
        margin: how far apart a pair must be predicted.
    """
    difference = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    weights = signs.abs()
    losses = torch.relu(margin - signs * difference) * weights
    return losses.sum() / weights.sum().clamp(min=1.0)


def difference_quantile(targets: Tensor, quantile: float) -> float:
    """The quantile of |yᵢ - yⱼ| over all pairs of finite targets, float [n]: a threshold that fits any metric."""
    finite = targets[torch.isfinite(targets)]
    if len(finite) < 2:
        return 0.0
    rows, columns = torch.triu_indices(len(finite), len(finite), offset=1)
    differences = torch.sort((finite[rows] - finite[columns]).abs()).values
    return float(differences[min(int(quantile * len(differences)), len(differences) - 1)])


def kendall_tau(predicted: Tensor, targets: Tensor) -> float:
    """Kendall's τ-b between two sequences, float [n]; 0 where it is undefined (fewer than two values, or all equal)."""
    if len(targets) < 2:
        return 0.0
    tau = kendalltau(predicted.detach().cpu().numpy(), targets.detach().cpu().numpy()).statistic
    return float(tau) if tau == tau else 0.0
