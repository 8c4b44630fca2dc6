"""Pairwise ranking: the hinge loss that only asks for the right order, and how good an order is."""

from typing import NamedTuple

import torch
from scipy.stats import kendalltau
from torch import Tensor

# up to this many times the wanted pairs, all are listed
_LISTED = 4


class Pairs(NamedTuple):
    """Pairs of candidates for each of E targets: [E, P] each; sign(y_first - y_second), 0 where there is no pair."""

    first: Tensor
    second: Tensor
    signs: Tensor


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
    losses, weights = _hinge(scores.unsqueeze(-1) - scores.unsqueeze(-2), signs, margin)
    return losses.sum() / weights.sum().clamp(min=1.0)


def sampled_hinge(scores: Tensor, pairs: Pairs, margin: float = 1.0) -> Tensor:
    """The mean of `pairwise_hinge` over pairs that were drawn, for each of E targets, float [E]; 0 without a pair.

    Each candidate is scored once, in however many pairs it stands.

    Args:
        scores: float [E, n].
        pairs: of `sample_pairs`.
        margin: as in `pairwise_hinge`.
    """
    difference = scores.gather(1, pairs.first) - scores.gather(1, pairs.second)
    losses, weights = _hinge(difference, pairs.signs.to(scores), margin)
    return losses.sum(1) / weights.sum(1).clamp(min=1.0)


def _hinge(difference: Tensor, signs: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Loss of each pair, and whether it counts."""
    weights = signs.abs()
    return torch.relu(margin - signs * difference) * weights, weights


def sample_pairs(targets: Tensor, limit: int) -> Pairs:
    """At most `limit` different pairs for each of E targets, every pair as likely as any other.

    All pairs are listed where they are few, and those drawn of them that are no ties and have no NaN. Where they are
    many, the candidates whose target is known are put into a ring at random, and each is paired with those that follow
    it: as many pairs for each, without a search for repeated ones; a tie then makes no pair. Draws from torch's global
    generator on the CPU, so that a device gets the pairs of any other.

    Args:
        targets: float [E, n].
        limit: pairs for each target, at least 1.

    Returns:
        indices [E, P] into the n, with P <= limit.
    """
    rows, n = targets.shape
    total = n * (n - 1) // 2
    if total > _LISTED * limit:
        return _ring_pairs(targets, limit)
    keys = torch.rand(rows, total).to(targets.device)
    first, second = (side.expand(rows, total) for side in torch.triu_indices(n, n, offset=1, device=targets.device))
    signs = _signs(targets, first, second)
    kept = keys.masked_fill(signs == 0, -1.0).topk(min(limit, total), dim=1)
    chosen = signs.gather(1, kept.indices).masked_fill(kept.values < 0, 0.0)
    return Pairs(first.gather(1, kept.indices), second.gather(1, kept.indices), chosen)


def _ring_pairs(targets: Tensor, limit: int) -> Pairs:
    """The first `limit` pairs in a ring of the known: all neighbours, then all with one between, and so on."""
    known = ~targets.isnan()
    ring = (torch.rand(targets.shape) + (~known).cpu()).argsort(dim=1).to(targets.device)  # the unknown at its end
    # whole numbers below 2²³ in floating point, exact, since their division is many times as fast
    length = known.sum(1, keepdim=True).clamp(min=1).float()  # [E, 1]
    pair = torch.arange(limit, device=targets.device, dtype=length.dtype)
    around = (pair / length).floor()
    place, distance = pair - around * length, around + 1
    other = place + distance
    other = other - (other / length).floor() * length
    first, second = (ring.gather(1, side.long()) for side in (place, other))
    # half way around, each pair would come twice
    new = (2 * distance < length) | ((2 * distance == length) & (place < distance))
    return Pairs(first, second, _signs(targets, first, second) * new)


def _signs(targets: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Which of two candidates scores higher, 0 for a tie or a NaN, [E, P]."""
    return torch.sign(targets.gather(1, first) - targets.gather(1, second)).nan_to_num(0.0)


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
