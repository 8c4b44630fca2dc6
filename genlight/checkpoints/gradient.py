"""Coefficients by gradient descent, for networks whose score can be differentiated, and a Fréchet distance that can be.

dF/dα_i = ⟨dF/dθ, θ_i - θ_newest⟩: one backward pass through the network and one dot product per basis vector.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genlight.checkpoints.bases import Array
from genlight.checkpoints.mixing import WeightMixer, as_rows

LossAndGradients = Callable[[int], tuple[float, Mapping[str, Tensor]]]
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, eq=False)
class Descent:
    """Where a descent ended.

    Attributes:
        coefficients: float64 [G, M - 1]; the weights are mixed with them.
        losses: the loss of each step, before its update. Shorter than asked for where a loss was not finite: the
            coefficients are then the last ones with a finite loss.
    """

    coefficients: Array
    losses: tuple[float, ...]


def descend(
    mixer: WeightMixer,
    loss_and_gradients: LossAndGradients,
    steps: int = 100,
    lr: float = 0.02,
    *,
    start: Array | None = None,
    penalty: float = 0.0,
    project: Callable[[Array], Array] | None = None,
) -> Descent:
    """Adam (Kingma & Ba 2015) on the coefficients of `mixer`.

    Args:
        mixer: holds the live weights; they are written before each call.
        loss_and_gradients: of the step's number, the loss at the live weights and dF/dθ by name. It may draw fresh
            noise in each step.
        steps: number of updates.
        lr: step size.
        start: first coefficients [G, M - 1] or [M - 1]; zeros, the newest member, if None.
        penalty: weight of ½‖α‖² in what is minimised.
        project: applied after each update, such as `project_to_simplex`.

    Raises:
        ValueError: `steps` below 1, `lr` not positive, a negative `penalty`, or a `start` of another shape.
    """
    if steps < 1 or not 0 < lr < math.inf or not penalty >= 0:
        raise ValueError(
            f"steps = {steps!r} must be 1 or more, lr = {lr!r} positive and penalty = {penalty!r} not negative"
        )
    size = mixer.coordinates.size
    alpha = as_rows(np.zeros(size) if start is None else start, mixer.num_groups, size)
    kept, losses = alpha, []
    mean, square = np.zeros_like(alpha), np.zeros_like(alpha)
    for step in range(steps):
        mixer.mix(alpha)
        try:
            loss, gradients = loss_and_gradients(step)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # features that are not finite
            break
        slope = mixer.gradient(gradients) + penalty * alpha
        if not (math.isfinite(loss) and np.isfinite(slope).all()):
            break
        losses.append(loss)
        kept = alpha
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * slope
        square = _BETAS[1] * square + (1 - _BETAS[1]) * slope**2
        root = np.sqrt(square / (1 - _BETAS[1] ** (step + 1))) + _EPSILON
        alpha = alpha - lr * mean / (1 - _BETAS[0] ** (step + 1)) / root
        alpha = alpha if project is None else project(alpha)
    else:
        kept = alpha
    mixer.mix(kept)
    return Descent(kept, tuple(losses))


class FrechetTarget:
    """Real features as a Gaussian, and the Fréchet distance of generated features to it, which can be differentiated.

    d² = ‖m - m_r‖² + tr S + tr S_r - 2 tr (S_r^½ S S_r^½)^½ (Heusel et al. 2017, eq. 6), where `ridge` is added to the
    diagonals of both S and S_r: without it the slope of the root is infinite in directions without variance.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, ridge: float = 1e-3) -> None:
        """
        Args:
            mean: m_r [D].
            covariance: S_r [D, D].
            ridge: not negative; with 0 the distance is exact, and its gradient needs a covariance of full rank.

        Raises:
            ValueError: shapes that do not fit, a negative ridge, or numbers that are not finite.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mean {list(mean.shape)} and covariance {list(covariance.shape)} must be [D] and [D, D]")
        if not ridge >= 0:
            raise ValueError(f"ridge = {ridge!r} must not be negative")
        if not bool(mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite")
        self.ridge = ridge
        self.mean = mean.detach().double()
        self._eye = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        values, vectors = torch.linalg.eigh(covariance.detach().double() + ridge * self._eye)
        values = values.clamp(min=0)
        self.trace = values.sum()
        self.root = vectors @ torch.diag(values.sqrt()) @ vectors.T

    @classmethod
    def of(cls, features: Tensor, ridge: float = 1e-3) -> "FrechetTarget":
        """The Gaussian with mean and covariance of features [N, D], N of 2 or more."""
        return cls(features.double().mean(dim=0), torch.cov(features.double().T).view(*[features.shape[1]] * 2), ridge)

    def distance(self, features: Tensor) -> Tensor:
        """d² of features [N, D], a float64 scalar with gradient.

        Raises:
            ValueError: fewer than two features, or of another size.
        """
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features {list(features.shape)} must be [N, {len(self.mean)}] with N of 2 or more")
        mean = features.double().mean(dim=0)
        centred = features.double() - mean
        covariance = centred.T @ centred / (len(features) - 1) + self.ridge * self._eye
        product = self.root @ covariance @ self.root
        cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        distance: Tensor = (mean - self.mean).square().sum() + covariance.trace() + self.trace - 2 * cross
        return distance
