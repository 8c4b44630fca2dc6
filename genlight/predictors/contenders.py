"""Every way to predict the candidates of one table from few true scores, by name: DELE, its ablations, its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from genlight.predictors.expert_heads import FittedFusion, FusionPredictor, ScoreScale, all_scores
from genlight.predictors.expert_training import ExpertTraining, pretrain
from genlight.predictors.experts import ExpertEnsemble
from genlight.predictors.feature_heads import fit_head
from genlight.predictors.pool import Pool, Standardiser
from genlight.predictors.predictor_file import FUSION, TrainedExperts
from genlight.predictors.ranking import single_thread

# experts and a gate, trained by gradient on the labels
DELE, STATIC, VANILLA = "dele", "static_gate", "vanilla"
FUSIONS = (DELE, STATIC, VANILLA)
# regressions: on the scores of frozen experts, on the low-fidelity scores themselves, on both, on one-hot categories
EXPERTS, SCORES, BOTH, TOKENS = "expert", "scores", "both", "tokens"
# those that files can hold
SAVABLE = (*FUSIONS, "expert_gp", "expert_ridge", "expert_forest")
NAMES = (*SAVABLE, "scores_gp", "scores_ridge", "scores_forest", "both_gp", "tokens_gp")

# rows int64 [n] of the table to mean and deviation [n] of the predictions
Predict = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Contenders:
    """What they all share: pretrained experts, and a table of N candidates with what is known of each.

    Attributes:
        network: experts pretrained on the pool, on the CPU; of its gate nothing is used.
        pool: what they were pretrained on; it sets all scales.
        tokens: int64 [N, T].
        low_fidelity: float32 [N, E], in the order of the experts; NaN where missing.
        training: of the second step.
    """

    network: ExpertEnsemble
    pool: Pool
    tokens: Tensor
    low_fidelity: Tensor
    training: ExpertTraining

    def fit(self, name: str, rows: Tensor, targets: Tensor, seed: int = 0) -> Predict:
        """The predictor of that name after the true scores of some rows.

        Args:
            name: one of NAMES.
            rows: int64 [n], of the table.
            targets: float [n], higher is better.
            seed: of the gate, the untrained network, the batches, the forest.

        Raises:
            ValueError: another name, fewer than two different targets, or a NaN.
        """
        if name not in NAMES:
            raise ValueError(f"predictor = {name!r} must be one of {', '.join(NAMES)}")
        if name in FUSIONS:
            fitted = self._tuned(name, rows, targets, seed)
            return lambda wanted: fitted.predict(self.tokens[wanted])
        kind, _, head = name.partition("_")
        features = self._features(kind)
        regression = fit_head(head, features[rows], targets, seed)
        return lambda wanted: regression.predict(features[wanted])

    def trained(self, name: str, rows: Tensor, targets: Tensor, seed: int = 0) -> TrainedExperts:
        """The same predictor as files can hold it; of SAVABLE, see `fit`."""
        names, head, network = self.pool.names, name.partition("_")[2], self.network
        if name in FUSIONS:
            names, head = () if name == VANILLA else names, FUSION
            network = self._tuned(name, rows, targets, seed).networks[0]
        with single_thread():
            scale = ScoreScale.of(network, self.pool.tokens)
        return TrainedExperts(network, scale, names, head, self.tokens[rows], targets, self.pool.categories)

    def _tuned(self, name: str, rows: Tensor, targets: Tensor, seed: int) -> FittedFusion:
        return FusionPredictor((self.fused(name, seed),), self.pool, self.training).fit(
            self.tokens[rows], targets, seed
        )

    def begun(self, rows: Tensor, targets: Tensor, seed: int = 0) -> ExpertEnsemble:
        """What DELE's second step on these labels begins with: the pretrained experts and a new gate."""
        untrained = replace(self, training=replace(self.training, finetune_steps=0))
        return untrained._tuned(DELE, rows, targets, seed).networks[0]

    def fused(self, name: str, seed: int = 0) -> ExpertEnsemble:
        """The network that a fusion begins with: the experts with a gate of either kind, or one untrained expert."""
        settings, vocabulary = self.network.settings, self.pool.vocabulary
        if name == VANILLA:
            nothing = Pool(self.pool.tokens, vocabulary, torch.empty(len(self.pool.tokens), 0), ())
            return pretrain(replace(settings, gate="static"), self.training, nothing, seed)
        gate = "dynamic" if name == DELE else "static"
        with torch.random.fork_rng(devices=[]):
            network = ExpertEnsemble(replace(settings, gate=gate), vocabulary, self.network.num_experts)
        network.experts.load_state_dict(self.network.experts.state_dict())
        return network.eval()

    def _features(self, kind: str) -> Tensor:
        """What a regression of that kind is on, float32 [N, features]."""
        if kind == BOTH:
            return torch.cat([self.expert_features, self.score_features], dim=1)
        return {EXPERTS: self.expert_features, SCORES: self.score_features, TOKENS: self.token_features}[kind]

    @cached_property
    def expert_features(self) -> Tensor:
        """Scores of the frozen experts, standardised on the pool, float32 [N, E]."""
        with single_thread():
            scale = Standardiser.of(all_scores(self.network, self.pool.tokens)[1].T)
            return scale(all_scores(self.network, self.tokens)[1].T)

    @cached_property
    def score_features(self) -> Tensor:
        """Low-fidelity scores, standardised on the pool, float32 [N, E]; what is missing counts as the mean."""
        return Standardiser.of(self.pool.low_fidelity)(self.low_fidelity)

    @cached_property
    def token_features(self) -> Tensor:
        """One-hot categories, standardised on the pool, float32 [N, T · largest vocabulary]."""
        encode = partial(one_hot, num_classes=max(self.pool.vocabulary))
        return Standardiser.of(encode(self.pool.tokens).flatten(1).float())(encode(self.tokens).flatten(1).float())
