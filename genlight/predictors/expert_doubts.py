"""What is doubtful of pretrained experts and their new gate before anything is trained on true scores."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genlight.predictors.expert_heads import all_scores
from genlight.predictors.experts import ExpertEnsemble
from genlight.predictors.losses import kendall_tau

# an expert that orders the labelled candidates by less, in either direction, says nothing of them
_SILENT = 0.1
# of the entropy of equal weights; below, one expert has nearly all the weight
_DECIDED = 0.1


def expert_doubts(network: ExpertEnsemble, names: Sequence[str], tokens: Tensor, targets: Tensor) -> list[str]:
    """Remarks for a person, none where nothing is doubtful.

    Args:
        network: experts that were pretrained, and a gate that nothing has trained.
        names: of the scores that the experts learned; none: nothing pretrained them.
        tokens: [n, T], the labelled candidates.
        targets: float [n], their true scores.
    """
    if not names:
        return []
    _, experts, weights = all_scores(network, tokens)
    return [*_silent(names, experts, targets), *_decided(weights)]


def _silent(names: Sequence[str], experts: Tensor, targets: Tensor) -> list[str]:
    """Of scores [E, n]. Kendall's tau of two independent orders has the variance 2(2n + 5) / 9n(n - 1)."""
    n = len(targets)
    taus = {name: kendall_tau(scores, targets) for name, scores in zip(names, experts, strict=True)}
    silent = ", ".join(f"{name} {tau:.2f}" for name, tau in taus.items() if abs(tau) < _SILENT)
    if not silent:
        return []
    chance = math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))
    return [
        f"experts that say next to nothing of the {n} true scores (Kendall's tau within ±{_SILENT}; chance alone makes "
        f"±{chance:.2f}): {silent}"
    ]


def _decided(weights: Tensor) -> list[str]:
    """Of weights [E, n]."""
    if len(weights) < 2:
        return []
    share = float(torch.special.entr(weights).sum(0).mean()) / math.log(len(weights))
    if share >= _DECIDED:
        return []
    return [
        f"the gate begins with {share:.1%} of the entropy of equal weights: of each candidate one expert alone learns "
        "from the true scores. Numbers among the tokens want a scale near 1"
    ]
