"""A ranking predictor: an ensemble of small sequence encoders trained on the order of what was measured.

Trained on the CPU, in about a second for any number of candidates; on one machine a function of data and seed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from genlight.predictors.encoders import SequenceRanker
from genlight.predictors.losses import difference_quantile, pairwise_hinge, pairwise_signs


@dataclass(frozen=True)
class RankingPredictor:
    """Settings of the predictor; `fit` gives a fitted one.

    Attributes:
        encoder: "lstm" or "transformer".
        width, hidden, head_width: sizes of step embedding, encoder and head.
        members: size of the ensemble; their spread is the uncertainty.
        margin: of the hinge loss.
        min_difference_quantile: pairs closer than this quantile of all differences are left out.
        steps: gradient steps of each member.
        batch_size: candidates of one step at most, all pairs among them; drawn anew for each step where there are more.
        lr: learning rate of Adam at the first step; falls to 0 along a half cosine.
        weight_decay: of AdamW.
        subset: share of the candidates that a member sees, its own draw for each.
    """

    encoder: str = "lstm"
    width: int = 32
    hidden: int = 32
    head_width: int = 64
    members: int = 3
    margin: float = 1.0
    min_difference_quantile: float = 0.05
    steps: int = 120
    batch_size: int = 256
    lr: float = 2e-2
    weight_decay: float = 1e-4
    subset: float = 0.9

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "head_width", "members", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"predictor.{name} = {getattr(self, name)!r} must be 1 or more")
        if self.encoder not in ("lstm", "transformer"):
            raise ValueError(f"predictor.encoder = {self.encoder!r} must be 'lstm' or 'transformer'")
        if not 0 < self.subset <= 1 or not 0 <= self.min_difference_quantile < 1:
            raise ValueError(
                f"predictor.subset = {self.subset!r} must lie in (0, 1] and "
                f"predictor.min_difference_quantile = {self.min_difference_quantile!r} in [0, 1)"
            )
        if not self.margin > 0 or not self.lr > 0 or not self.weight_decay >= 0:
            raise ValueError(f"predictor.margin and lr must be positive, weight_decay not negative: {self}")

    def fit(self, candidates: Sequence[Tensor], targets: Sequence[float], seed: int) -> "FittedRanking":
        """Train the ensemble.

        Args:
            candidates: float [steps, features] each; the number of steps may differ.
            targets: what was measured, lower is better; infinite for a failed candidate.
            seed: of weights and subsets.

        Raises:
            ValueError: fewer than two different targets, a NaN, or candidates of different or no features.
        """
        values = checked_targets(candidates, targets)
        features, mask = pad(candidates)
        with single_thread():
            members = [self._fit_member(features, mask, values, seed, number) for number in range(self.members)]
        return FittedRanking(members, features, mask)

    def _fit_member(self, features: Tensor, mask: Tensor, targets: Tensor, seed: int, number: int) -> SequenceRanker:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000 + number)
            network = SequenceRanker(features.shape[2], self.encoder, self.width, self.hidden, self.head_width)
            rows = torch.randperm(len(targets))[: max(2, round(self.subset * len(targets)))]
            batches = [torch.randperm(len(rows))[: self.batch_size] for _ in range(self.steps)]
        network.embedding.set_statistics(features, mask)
        chosen = targets[rows]
        signs = pairwise_signs(chosen, difference_quantile(chosen, self.min_difference_quantile)).float()
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)
        train(network, features[rows], mask[rows], signs, optimizer, batches, self.margin)
        return network.eval()


class FittedRanking:
    """A trained ensemble; its members' scores are standardised, because ranking leaves each its own scale.

    Args:
        members: trained networks.
        features, mask: what they were trained on, for the scale.
    """

    def __init__(self, members: Sequence[SequenceRanker], features: Tensor, mask: Tensor) -> None:
        self.members = list(members)
        self._num_features = features.shape[2]
        raw = self._raw(features, mask)
        self._center = raw.mean(dim=1, keepdim=True)
        self._scale = raw.std(dim=1, correction=0, keepdim=True).clamp(min=1e-6)

    def predict(self, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the ensemble, float32 [n] each; lower is better, in units of its spread.

        Raises:
            ValueError: other features than in training.
        """
        features, mask = pad(candidates)
        if features.shape[2] != self._num_features:
            raise ValueError(f"trained on {self._num_features} features per step, got {features.shape[2]}")
        scores = (self._raw(features, mask) - self._center) / self._scale
        return scores.mean(dim=0), scores.std(dim=0, correction=0)

    def _raw(self, features: Tensor, mask: Tensor) -> Tensor:
        with single_thread(), torch.inference_mode():
            return torch.stack([member(features, mask) for member in self.members])


def train(
    network: torch.nn.Module,
    features: Tensor,
    mask: Tensor,
    signs: Tensor,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Tensor],
    margin: float,
) -> None:
    """A step on the pairwise hinge loss for each batch of rows, the learning rate falling to 0 along a half cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    network.train()
    for rows in batches:
        loss = pairwise_hinge(network(features[rows], mask[rows]), signs[rows][:, rows], margin)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()


def checked_targets(candidates: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """The targets as float64 [n].

    Raises:
        ValueError: another number than there are candidates, fewer than two different ones, or a NaN.
    """
    values = torch.tensor(targets, dtype=torch.float64)
    if len(values) != len(candidates):
        raise ValueError(f"{len(candidates)} candidates have {len(values)} targets")
    if torch.isnan(values).any() or len(torch.unique(values)) < 2:
        raise ValueError("a ranking predictor needs two different targets or more, and no NaN")
    return values


def pad(candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences of different lengths as one float32 tensor [n, steps, features] and a mask [n, steps] of what is real.

    Raises:
        ValueError: no candidate, one without steps, not finite, or with other features than the first.
    """
    if not candidates:
        raise ValueError("a ranking predictor needs one candidate or more")
    shape = candidates[0].shape
    for number, candidate in enumerate(candidates):
        if candidate.ndim != 2 or not candidate.numel() or candidate.shape[1] != shape[1]:
            raise ValueError(
                f"candidate {number} must be [steps, features] like the first one, {list(shape)}, "
                f"got {list(candidate.shape)}"
            )
    features = torch.nn.utils.rnn.pad_sequence([candidate.float() for candidate in candidates], batch_first=True)
    if not torch.isfinite(features).all():
        raise ValueError("the features of a candidate must be finite")
    lengths = torch.tensor([len(candidate) for candidate in candidates])
    return features, torch.arange(features.shape[1]) < lengths.unsqueeze(1)


@contextmanager
def single_thread() -> Iterator[None]:
    """Sums in one order, whatever the number of threads of this process: the same ranking on every rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
