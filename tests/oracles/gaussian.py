"""Diffusions whose every answer is known in closed form: data that is a Gaussian or a mixture of Gaussians.

For data ~ Σ_k w_k N(μ_k, s_k² I) and x_t = α x_0 + σ ε the density of x_t is Σ_k w_k N(α μ_k, (α² s_k² + σ²) I). Score,
posterior mean, noise and velocities follow by differentiation; nothing here uses genlight's own conversions.
Points are float64 tensors [..., D]; α and σ are numbers or tensors that broadcast against [..., 1].
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """Mixture of K isotropic Gaussians in D dimensions: weights [K], means [K, D], stds [K], all float64."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Data [n, D]."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[component] + self.stds[component, None] * noise

    def log_density(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """ln p(x_t) [...]."""
        return torch.logsumexp(self._log_joint(x, *_double(alpha, sigma)), dim=-1)

    def score(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """∇ ln p(x_t) [..., D]."""
        alpha, sigma = _double(alpha, sigma)
        share = torch.softmax(self._log_joint(x, alpha, sigma), dim=-1)
        pull = (alpha[..., None] * self.means - x[..., None, :]) / self._variances(alpha, sigma)[..., None]
        return (share[..., None] * pull).sum(-2)

    def epsilon(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """E[ε | x_t] = -σ score."""
        return -_double(sigma)[0] * self.score(x, alpha, sigma)

    def x0(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """E[x_0 | x_t], by components, so that α = 0 and σ = 0 are no special cases."""
        alpha, sigma = _double(alpha, sigma)
        share = torch.softmax(self._log_joint(x, alpha, sigma), dim=-1)
        gain = (alpha * self.stds**2 / self._variances(alpha, sigma))[..., None]
        means = self.means + gain * (x[..., None, :] - alpha[..., None] * self.means)
        return (share[..., None] * means).sum(-2)

    def output(
        self, prediction_type: str, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, sigma_data: float = 0.5
    ) -> Tensor:
        """What an ideal network of the prediction type says at x_t."""
        x0, eps = self.x0(x, alpha, sigma), self.epsilon(x, alpha, sigma)
        alpha, sigma = _double(alpha, sigma)
        if prediction_type == "edm":
            level, scaled = sigma / alpha, x / alpha
            c_skip = sigma_data**2 / (level**2 + sigma_data**2)
            return (x0 - c_skip * scaled) / (level * sigma_data / (level**2 + sigma_data**2).sqrt())
        velocity = (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt()
        return {"epsilon": eps, "sample": x0, "v_prediction": velocity, "flow": eps - x0}[prediction_type]

    def solve_ode(self, x: Tensor, level_from: float, level_to: float) -> Tensor:
        """The probability-flow ODE d(x/α) = ε d(σ/α) between two noise levels, on x/α; error below 1e-9."""

        def slope(level: float, flat: np.ndarray) -> np.ndarray:
            return self.epsilon(torch.from_numpy(flat.copy()).view_as(x), 1.0, level).numpy().ravel()

        span = (float(level_from), float(level_to))
        solution = solve_ivp(slope, span, x.double().numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-11)
        return torch.from_numpy(solution.y[:, -1].copy()).view_as(x)

    def _variances(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha**2 * self.stds**2 + sigma**2

    def _log_joint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """ln w_k N(x; α μ_k, ·) [..., K]."""
        variances = self._variances(alpha, sigma)
        distance = ((x[..., None, :] - alpha[..., None] * self.means) ** 2).sum(-1)
        log_norm = 0.5 * x.shape[-1] * torch.log(2 * torch.pi * variances)
        return self.weights.log() - distance / (2 * variances) - log_norm


class Gaussian(GaussianMixture):
    """One isotropic Gaussian N(mean, std² I); its probability flow has an exact solution."""

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__(torch.ones(1).double(), mean.double()[None], torch.tensor([std]).double())

    def flow(self, x: Tensor, alpha_from: float, sigma_from: float, alpha_to: float, sigma_to: float) -> Tensor:
        """x at the end of the probability-flow ODE: its standardised value does not change."""
        mean, variance = self.means[0], float(self.stds[0]) ** 2
        std_from = (alpha_from**2 * variance + sigma_from**2) ** 0.5
        std_to = (alpha_to**2 * variance + sigma_to**2) ** 0.5
        return alpha_to * mean + std_to / std_from * (x - alpha_from * mean)


def two_modes() -> GaussianMixture:
    """An uneven mixture of two Gaussians in two dimensions, within [-1.5, 1.5]."""
    return GaussianMixture(
        torch.tensor([0.3, 0.7]).double(),
        torch.tensor([[-0.9, 0.4], [0.6, -0.2]]).double(),
        torch.tensor([0.25, 0.15]).double(),
    )


def _double(*values: float | Tensor) -> tuple[Tensor, ...]:
    """Each as float64 with at least one dimension, to broadcast against [..., D] and [..., K]."""
    tensors = [torch.as_tensor(value, dtype=torch.float64) for value in values]
    return tuple(tensor if tensor.ndim else tensor.view(1) for tensor in tensors)
