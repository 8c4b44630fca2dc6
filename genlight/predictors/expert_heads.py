"""From pretrained experts and a few measured candidates to predictions: fusion by the gate, or regression on scores.

All have `fit(candidates, targets, seed)` and `predict(candidates)`, mean and deviation in the order of the targets;
candidates are tokens, int64 [n, T].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genlight.predictors.expert_training import ExpertTraining, finetune
from genlight.predictors.experts import ExpertEnsemble
from genlight.predictors.feature_heads import FittedHead, fit_head
from genlight.predictors.pool import Pool, Standardiser, check_tokens
from genlight.predictors.ranking import checked_targets, single_thread

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class FusionPredictor:
    """Experts fused by a gate and trained on what was measured (DELE).

    With a static gate, a single expert, or one that nothing pretrained, these are its ablations and baselines.

    Attributes:
        networks: pretrained on the pool, or not at all. Several, of other seeds, are fitted each and averaged.
        pool: its candidates set the scale of the predictions.
        training: steps and learning rate.
    """

    networks: tuple[ExpertEnsemble, ...]
    pool: Pool
    training: ExpertTraining

    def fit(self, candidates: Tensor, targets: Sequence[float] | Tensor, seed: int) -> "FittedFusion":
        """Train copies of the networks, each with a new gate and optimizer.

        Raises:
            ValueError: fewer than two different targets, a NaN, or tokens outside the vocabulary.
        """
        check_tokens(candidates, self.pool.vocabulary)
        values = checked_targets(list(candidates), [float(target) for target in targets])
        with single_thread():
            fitted = [
                finetune(network, self.training, candidates, values.float(), seed * 1000 + number)
                for number, network in enumerate(self.networks)
            ]
            return FittedFusion(tuple(fitted), tuple(ScoreScale.of(network, self.pool.tokens) for network in fitted))


@dataclass(frozen=True)
class ScoreScale:
    """What a network's scores are on the pool: ranking leaves each expert its own scale."""

    score: Standardiser
    experts: Standardiser

    @classmethod
    def of(cls, network: ExpertEnsemble, tokens: Tensor) -> "ScoreScale":
        """From the scores of tokens [N, T]."""
        score, experts, _ = all_scores(network, tokens)
        return cls(Standardiser.of(score.unsqueeze(1)), Standardiser.of(experts.T))


@dataclass(frozen=True)
class FittedFusion:
    """Trained networks and the scales of their scores."""

    networks: tuple[ExpertEnsemble, ...]
    scales: tuple[ScoreScale, ...]

    def predict(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [n] for tokens [n, T], in units of the spread over the pool.

        The deviation is that of the mixture: the experts' standardised scores spread with the weights of the gate, and
        the networks' means among each other. One network with one expert is always sure.
        """
        check_tokens(candidates, self.networks[0].vocabulary)
        means, variances = [], []
        with single_thread():
            for network, scale in zip(self.networks, self.scales):
                score, experts, weights = all_scores(network, candidates)
                means.append(scale.score(score.unsqueeze(1)).squeeze(1))
                standardised = scale.experts(experts.T).T
                centre = (weights * standardised).sum(0)
                variances.append((weights * (standardised - centre).square()).sum(0))
        mean = torch.stack(means)
        variance = torch.stack(variances).mean(0) + mean.var(dim=0, correction=0)
        return mean.mean(0), variance.sqrt()


@dataclass(frozen=True)
class ExpertScorePredictor:
    """Regression on the scores of frozen experts, standardised on the pool: weights may be negative, and fitting takes
    milliseconds.

    Attributes:
        network: pretrained on the pool.
        pool: whose candidates set the scale.
        head: "gp", "ridge" or "forest", see `feature_heads.fit_head`.
    """

    network: ExpertEnsemble
    pool: Pool
    head: str = "gp"

    def fit(self, candidates: Tensor, targets: Sequence[float] | Tensor, seed: int = 0) -> "FittedExpertScores":
        """Fit on tokens [n, T] and what was measured, [n].

        Raises:
            ValueError: as `fit_head`, or tokens outside the vocabulary.
        """
        check_tokens(candidates, self.pool.vocabulary)
        scale = ScoreScale.of(self.network, self.pool.tokens).experts
        features = scale(all_scores(self.network, candidates)[1].T)
        return FittedExpertScores(self.network, scale, fit_head(self.head, features, targets, seed))


@dataclass(frozen=True)
class FittedExpertScores:
    """A fitted `ExpertScorePredictor`."""

    network: ExpertEnsemble
    scale: Standardiser
    head: FittedHead

    def predict(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n] for tokens [n, T]."""
        check_tokens(candidates, self.network.vocabulary)
        return self.head.predict(self.scale(all_scores(self.network, candidates)[1].T))


def all_scores(network: ExpertEnsemble, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N], those of the experts [E, N] and the gate's weights [E, N] on the CPU, in evaluation mode.

    Outside autocast, which would round close scores to the same number.
    """
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            parts = [network(rows.to(device)) for rows in torch.split(tokens, _ROWS_AT_ONCE)]
    finally:
        network.train(training)
    score, experts, weights = (torch.cat(part, dim=-1).float().cpu() for part in zip(*parts))
    return score, experts, weights
