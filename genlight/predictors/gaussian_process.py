"""A Gaussian process on the features of candidates: fitted in a fraction of a second, unsure of what it never saw.

Rasmussen and Williams, "Gaussian Processes for Machine Learning", MIT Press 2006: regression (algorithm 2.1), the
Matérn kernel (4.17) and the choice of its parameters by the marginal likelihood (2.30).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.spatial.distance import cdist
from scipy.special import ndtri
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits
from torch import Tensor

from genlight.predictors.ranking import checked_targets, pad

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
# Length scales, relative to the root of the number of features, and noise relative to the signal, that are tried. A
# grid keeps clear of the ends, where the likelihood has second maxima that explain all scores as noise
_LENGTHS = (0.2, 0.3, 0.45, 0.67, 1.0)
_NOISES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class GaussianProcessPredictor:
    """Settings of the process; `fit` gives a fitted one.

    Scores are replaced by the normal quantiles of their ranks, features are standardised, and one length scale serves
    them all. No random numbers are drawn.

    Attributes:
        max_points: it is fitted on the best so many candidates; time grows with the third power.
    """

    max_points: int = 400

    def __post_init__(self) -> None:
        if self.max_points < 2:
            raise ValueError(f"predictor.max_points = {self.max_points!r} must be 2 or more")

    def fit(self, candidates: Sequence[Tensor], targets: Sequence[float], seed: int = 0) -> "FittedProcess":
        """Fit on what was measured.

        Args:
            candidates: float [steps, features] each; the shorter ones are padded with zeros.
            targets: what was measured, lower is better; infinite for a failed candidate, which is worse than all.
            seed: not used.

        Raises:
            ValueError: fewer than two different targets, a NaN, or candidates of different or no features.
        """
        values = checked_targets(candidates, targets).numpy()
        scores = normal_quantiles(values)
        best = np.argsort(scores, kind="stable")[: self.max_points]
        with one_blas_thread():
            return FittedProcess(pad(candidates)[0].double().numpy()[best], scores[best])


class FittedProcess:
    """The process given what was measured.

    Args:
        features: float64 [n, steps, features].
        scores: float64 [n], lower is better.
        standardise: by mean and deviation of these features; False: they come standardised.
        lengths: length scales to choose from, relative to the root of the number of features.
    """

    def __init__(
        self, features: Array, scores: Array, standardise: bool = True, lengths: Sequence[float] = _LENGTHS
    ) -> None:
        self._shape = features.shape[1:]
        flat = features.reshape(len(features), -1)
        self._mean, deviation = flat.mean(axis=0), flat.std(axis=0)
        if not standardise:
            self._mean, deviation = np.zeros_like(self._mean), np.ones_like(deviation)
        # a feature that never changed keeps its scale: where it does change, the process is unsure
        self._scale = np.where(deviation > 1e-6, deviation, 1.0)
        self._points = (flat - self._mean) / self._scale
        centred = scores - scores.mean()
        spread = centred.std()
        self._targets = centred / (spread if spread > 0 else 1.0)
        distances = cdist(self._points, self._points)
        root = np.sqrt(flat.shape[1])
        grid = [(root * length, noise) for length, noise in product(lengths, _NOISES)]
        fits = [_evidence(distances, self._targets, length, noise) for length, noise in grid]
        best = max(range(len(grid)), key=lambda number: fits[number][0])
        (self.length, self.noise), (self.evidence, self.variance) = grid[best], fits[best]
        self._factor = cho_factor(matern(distances / self.length) + self.noise * np.eye(len(flat)), lower=True)
        self._weights = cho_solve(self._factor, self._targets)

    def predict(self, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scores without noise, float64 [n] each; lower is better.

        In units of the spread of the ranks' normal quantiles.

        Raises:
            ValueError: other features than in training.
        """
        with one_blas_thread():
            mean, explained = self._conditioned(self._standardised(candidates))
            variance = self.variance * (1 - (explained**2).sum(axis=0)).clip(min=0)
        return torch.from_numpy(mean), torch.from_numpy(np.sqrt(variance))

    def covariance(self, candidates: Sequence[Tensor]) -> Tensor:
        """Covariance of the predicted scores, float64 [n, n]; its diagonal is the square of the deviation."""
        points = self._standardised(candidates)
        with one_blas_thread():
            _, explained = self._conditioned(points)
            prior = matern(cdist(points, points) / self.length)
            return torch.from_numpy(self.variance * (prior - explained.T @ explained))

    def _conditioned(self, points: Array) -> tuple[Array, Array]:
        """Mean [n], and what the measured candidates explain of the prior, [measured, n] whose squares add up."""
        kernel = matern(cdist(points, self._points) / self.length)
        return kernel @ self._weights, solve_triangular(self._factor[0], kernel.T, lower=True)

    def _standardised(self, candidates: Sequence[Tensor]) -> Array:
        """Features like those of training, [n, steps · features]; steps beyond the longest of training are left out."""
        features = pad(candidates)[0].double().numpy()
        steps, width = self._shape
        if features.shape[2] != width:
            raise ValueError(f"trained on {width} features per step, got {features.shape[2]}")
        missing = max(0, steps - features.shape[1])
        fitting = np.pad(features[:, :steps], ((0, 0), (0, missing), (0, 0)))
        standardised: Array = (fitting.reshape(len(features), -1) - self._mean) / self._scale
        return standardised


def normal_quantiles(values: Array) -> Array:
    """The values [n] replaced by the normal quantiles of their ranks: all that is left of them is their order."""
    quantiles: Array = ndtri((rankdata(values) - 0.5) / len(values))
    return quantiles


def matern(distances: Array) -> Array:
    """The Matérn kernel with ν = 5/2 at distances in units of the length scale (Rasmussen and Williams, 4.17)."""
    scaled = np.sqrt(5) * distances
    values: Array = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    return values


def _evidence(distances: Array, targets: Array, length: float, noise: float) -> tuple[float, float]:
    """Log marginal likelihood of c · (kernel + noise) and the c, in closed form, that makes it largest."""
    count = len(targets)
    factor, _ = cho_factor(matern(distances / length) + noise * np.eye(count), lower=True)
    whitened = solve_triangular(factor, targets, lower=True)
    variance = max(float(whitened @ whitened) / count, 1e-12)
    log_determinant = 2 * float(np.log(np.diag(factor)).sum()) + count * np.log(variance)
    return -0.5 * (log_determinant + count * (1 + np.log(2 * np.pi))), variance


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Sums in one order, whatever the number of threads of this process: the same prediction on every rank."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield
