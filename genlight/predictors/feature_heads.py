"""Regression on a few features of each candidate: Gaussian process, ridge, random forest, with one interface.

`fit` takes candidates, targets and a seed; `predict` gives mean and deviation, in the order of the targets, in units of
the spread of their ranks' normal quantiles. Only the order of the targets counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from genlight.predictors.gaussian_process import FittedProcess, normal_quantiles, one_blas_thread
from genlight.predictors.pool import Standardiser
from genlight.predictors.ranking import checked_targets

HEADS = ("gp", "ridge", "forest")
# time of a process grows with the third power of what it is fitted on
_MAX_POINTS, _ROWS_AT_ONCE = 1000, 4096
# longer than for features of schedules: experts agree so much that a nearly linear process is likely
_LENGTHS = (0.3, 0.45, 0.67, 1.0, 1.5, 2.2, 3.3)


class FittedHead(Protocol):
    """A regression that was fitted."""

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n] for standardised features [n, d]."""
        ...


@dataclass(frozen=True)
class LowFidelityPredictor:
    """Regression on the low-fidelity scores themselves, which it needs of every candidate; missing ones count as mean.

    Attributes:
        scale: of the scores, from the pool.
        head: "gp", "ridge" or "forest".
    """

    scale: Standardiser
    head: str = "gp"

    def fit(self, candidates: Tensor, targets: Sequence[float] | Tensor, seed: int = 0) -> "FittedLowFidelity":
        """Fit on scores [n, E] and what was measured, [n].

        Raises:
            ValueError: as `fit_head`.
        """
        return FittedLowFidelity(self.scale, fit_head(self.head, self.scale(candidates), targets, seed))


@dataclass(frozen=True)
class FittedLowFidelity:
    """A fitted `LowFidelityPredictor`."""

    scale: Standardiser
    head: FittedHead

    def predict(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n] for scores [n, E]."""
        return self.head.predict(self.scale(candidates))


def fit_head(head: str, features: Tensor, targets: Sequence[float] | Tensor, seed: int = 0) -> FittedHead:
    """A regression on standardised features [n, d].

    Args:
        head: "gp": Gaussian process, all features on one length scale. Of more than 1,000 candidates it is fitted on so
            many, spread evenly over the order of the targets. "ridge": Bayesian linear regression, its
            regularisation by the evidence. "forest": 300 trees; their spread is the deviation.
        features: without NaN.
        targets: [n].
        seed: of the forest; the others draw nothing.

    Raises:
        ValueError: another head, fewer than two different targets, or a NaN.
    """
    if head not in HEADS:
        raise ValueError(f"head = {head!r} must be one of {', '.join(HEADS)}")
    values = checked_targets(list(features), [float(target) for target in targets])
    quantiles = normal_quantiles(values.numpy())
    points = features.double().cpu().numpy()
    if head == "gp":
        order, count = np.argsort(quantiles, kind="stable"), len(quantiles)
        kept = np.sort(order[np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(int)])
        with one_blas_thread():
            return _Process(FittedProcess(points[kept, None], quantiles[kept], standardise=False, lengths=_LENGTHS))
    if head == "ridge":
        from sklearn.linear_model import BayesianRidge

        return _Ridge(BayesianRidge().fit(points, quantiles))
    from sklearn.ensemble import RandomForestRegressor

    return _Forest(RandomForestRegressor(300, max_features=1 / 3, random_state=seed).fit(points, quantiles))


@dataclass(frozen=True)
class _Process:
    process: FittedProcess

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.process.predict(list(rows.unsqueeze(1))) for rows in torch.split(features.cpu(), _ROWS_AT_ONCE)]
        mean, deviation = (torch.cat(part) for part in zip(*found))
        return mean, deviation


@dataclass(frozen=True)
class _Ridge:
    model: Any

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = self.model.predict(features.double().cpu().numpy(), return_std=True)
        return torch.from_numpy(mean), torch.from_numpy(deviation)


@dataclass(frozen=True)
class _Forest:
    model: Any

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        points = features.float().cpu().numpy()
        trees = torch.from_numpy(np.stack([tree.predict(points) for tree in self.model.estimators_]))
        return trees.mean(dim=0), trees.std(dim=0, correction=0)
