"""Experts, each for one low-fidelity score, and what fuses them: the network of DELE and of its baselines.

Zhao et al., "Dynamic Ensemble of Low-fidelity Experts: Mitigating NAS 'Cold-Start'", AAAI 2023 (arXiv 2302.00932).
Without low-fidelity scores there is one expert that nothing pretrains, the ordinary ranking predictor; with one score
it is that predictor pretrained on the score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genlight.predictors.gates import GATES
from genlight.predictors.losses import sample_pairs, sampled_hinge
from genlight.predictors.pool import REAL
from genlight.predictors.stacked import Stacked
from genlight.predictors.token_encoders import OneHotMLP, TokenLSTM, TokenTransformer

ENCODERS = ("mlp", "lstm", "transformer", "gates")
GATINGS = ("dynamic", "static")


@dataclass(frozen=True)
class ExpertSettings:
    """Shape and loss of the network.

    Attributes:
        encoder: "mlp", "lstm", "transformer", or "gates" for cells of NAS-Bench-201; one for each expert and the gate.
        width: of the encoder.
        embedding: width of a token's vector, for all encoders but "mlp".
        depth: layers of the encoder; "lstm" has one.
        head: widths of the layers between encoder and score, with ReLU; none: one linear layer.
        dropout: share of the numbers dropped in each of these layers while training.
        gate: "dynamic": weights of the experts for each candidate; "static": one weight for each expert, learned too.
        margin: of the hinge loss.
        pairs_per_candidate: pairs in the loss, at most so many times the candidates of a batch.
    """

    encoder: str = "mlp"
    width: int = 64
    embedding: int = 48
    depth: int = 2
    head: tuple[int, ...] = ()
    dropout: float = 0.0
    gate: str = "dynamic"
    margin: float = 0.1
    pairs_per_candidate: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", tuple(self.head))
        for name, known in (("encoder", ENCODERS), ("gate", GATINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"network.{name} = {getattr(self, name)!r} must be one of {', '.join(known)}")
        for name in ("width", "embedding", "depth", "pairs_per_candidate"):
            if getattr(self, name) < 1:
                raise ValueError(f"network.{name} = {getattr(self, name)} must be at least 1")
        if min(self.head, default=1) < 1 or not 0 <= self.dropout < 1 or not self.margin > 0:
            raise ValueError(
                f"network.head = {list(self.head)} must hold positive widths, dropout = {self.dropout} lie in [0, 1) "
                f"and margin = {self.margin} be positive"
            )


class Fused(NamedTuple):
    """Score of each candidate [N], of each expert [E, N], and the experts' weights [E, N], which add up to 1."""

    score: Tensor
    experts: Tensor
    weights: Tensor


class ExpertEnsemble(nn.Module):
    """E experts and a gate. All draws of initial weights are from torch's global generator, the experts first.

    Args:
        settings: shape and loss.
        vocabulary: number of values of each token.
        experts: E, at least 1.

    Raises:
        ValueError: no expert, no tokens, or tokens that the encoder does not take.
    """

    def __init__(self, settings: ExpertSettings, vocabulary: Sequence[int], experts: int) -> None:
        super().__init__()
        if experts < 1 or not vocabulary or min(vocabulary) < (REAL if settings.encoder == "mlp" else 1):
            raise ValueError(
                f"experts = {experts} and the entries of vocabulary = {list(vocabulary)} must be positive; real "
                "numbers, with the entry 0, are read by the encoder mlp only"
            )
        self.settings, self.vocabulary = settings, tuple(int(size) for size in vocabulary)
        self.num_experts = experts
        self.experts = Stacked([scorer(settings, self.vocabulary, 1) for _ in range(experts)])
        self.gate: nn.Module = self._fresh_gate()

    def _fresh_gate(self) -> nn.Module:
        if self.settings.gate == "static":
            return _StaticGate(self.num_experts)
        return scorer(self.settings, self.vocabulary, self.num_experts)

    def reset_gate(self) -> None:
        """Give the gate new initial weights, in the parameters that it has."""
        self.gate.load_state_dict(self._fresh_gate().to(next(self.parameters()).device).state_dict())

    def expert_scores(self, tokens: Tensor) -> Tensor:
        """Scores of each expert, [E, N], for tokens int64 [N, T]."""
        scores: Tensor = self.experts(tokens).squeeze(-1)
        return scores.float()

    def forward(self, tokens: Tensor) -> Fused:
        scores = self.expert_scores(tokens)
        weights = self.gate(tokens).softmax(dim=-1).T.expand_as(scores)
        return Fused((weights * scores).sum(0), scores, weights)

    def expert_losses(self, tokens: Tensor, low_fidelity: Tensor) -> Tensor:
        """Ranking loss of each expert on its own score, [E]; 0 where a batch has no pair. The gate is not used.

        Args:
            tokens: int64 [N, T].
            low_fidelity: [N, E], NaN where a score is missing.
        """
        return self._loss(self.expert_scores(tokens), low_fidelity.T)

    def fusion_loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Ranking loss of the fused score, a scalar.

        Args:
            tokens: int64 [N, T].
            targets: [N], higher is better, NaN where unknown.
        """
        return self._loss(self(tokens).score.unsqueeze(0), targets.unsqueeze(0)).sum()

    def _loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        pairs = sample_pairs(targets, self.settings.pairs_per_candidate * targets.shape[1])
        return sampled_hinge(scores, pairs, self.settings.margin)


class _StaticGate(nn.Module):
    """The same logits for every candidate: equal ones at first."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(experts))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.unsqueeze(0)


def scorer(settings: ExpertSettings, vocabulary: Sequence[int], outputs: int) -> nn.Sequential:
    """An encoder and its head: tokens int64 [N, T] to [N, outputs]."""
    encoders: dict[str, Any] = {
        "mlp": lambda: OneHotMLP(vocabulary, settings.width, settings.depth),
        "lstm": lambda: TokenLSTM(vocabulary, settings.embedding, settings.width),
        "transformer": lambda: TokenTransformer(vocabulary, settings.embedding, settings.width, settings.depth),
        "gates": lambda: GATES(vocabulary, settings.embedding, settings.width, settings.depth),
    }
    layers: list[nn.Module] = [encoders[settings.encoder]()]
    width = settings.width
    for size in settings.head:
        layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(settings.dropout)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs))
