"""What the network predicts, and how it turns into data, noise or velocity.

Every parametrisation is a linear mix m = a x_0 + b ε of the data and the noise in x_t = α x_0 + σ ε:

| prediction type | m                                      | source                                     |
|-----------------|----------------------------------------|--------------------------------------------|
| "epsilon"       | ε                                      | Ho et al. 2020                             |
| "sample"        | x_0                                    |                                            |
| "v_prediction"  | (α ε - σ x_0) / √(α² + σ²)             | Salimans & Ho 2022, appendix D (α²+σ² = 1) |
| "flow"          | ε - x_0                                | Liu et al. 2023; Esser et al. 2024         |
| "edm"           | (x_0 - c_skip x_t) / c_out, σ/α for σ  | Karras et al. 2022, table 1                |

so that x_0 = (b x_t - σ m) / d and ε = (α m - a x_t) / d with d = α b - σ a. The v of other families than
variance-preserving is taken in their variance-preserving view x_t/√(α² + σ²), as the diffusers schedulers do.

d is positive in size for "v_prediction", "flow" and "edm" wherever α + σ > 0: their conversions are exact at both ends.
"epsilon" says nothing of x_0 where α = 0, nor "sample" of ε where σ = 0: there the result is inf or nan.

α and σ are numbers, per-sample values [B] or anything that broadcasts against x_t [B, ...]; coefficients are formed
in float64, results are at least float32.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule, expand

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def mix(
    prediction_type: str, alpha: float | Tensor, sigma: float | Tensor, sigma_data: float | None = None
) -> tuple[Tensor, Tensor]:
    """(a, b) of m = a x_0 + b ε, float64. `sigma_data` is needed for "edm" only."""
    alpha, sigma = _double(alpha), _double(sigma)
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "sample":
        return torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction_type == "flow":
        return -torch.ones_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        radius = torch.hypot(alpha, sigma)
        return -sigma / radius, alpha / radius
    if prediction_type == "edm":
        if sigma_data is None:
            raise ValueError("prediction_type = 'edm' needs the sigma_data of an EDMSchedule")
        radius = torch.hypot(alpha * sigma_data, sigma)
        return sigma / (sigma_data * radius), -sigma_data * alpha / radius
    raise ValueError(f"prediction_type = {prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}")


def gains(
    prediction_type: str, alpha: float | Tensor, sigma: float | Tensor, sigma_data: float | None = None
) -> tuple[Tensor, Tensor]:
    """(∂x_0/∂m, ∂ε/∂m) at fixed x_t, float64: how an error of the network shows in the data and in the noise."""
    alpha, sigma = _double(alpha), _double(sigma)
    if prediction_type == "epsilon":  # d = α cancels in ∂ε/∂m
        return -sigma / alpha, torch.ones_like(alpha)
    if prediction_type == "sample":
        return torch.ones_like(alpha), -alpha / sigma
    a, b = mix(prediction_type, alpha, sigma, sigma_data)
    determinant = alpha * b - sigma * a
    return -sigma / determinant, alpha / determinant


def target(
    prediction_type: str,
    x0: Tensor,
    eps: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    sigma_data: float | None = None,
) -> Tensor:
    """What the network should say for data `x0` and noise `eps` [B, ...]."""
    a, b = mix(prediction_type, alpha, sigma, sigma_data)
    return expand(a, x0) * x0 + expand(b, x0) * eps


def to_x0(
    prediction_type: str,
    output: Tensor,
    x_t: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    sigma_data: float | None = None,
) -> Tensor:
    """The data that a network output implies, for output and x_t [B, ...]."""
    gain, _ = gains(prediction_type, alpha, sigma, sigma_data)
    if prediction_type == "sample":
        return output.to(expand(gain, output).dtype)
    _, b = mix(prediction_type, alpha, sigma, sigma_data)
    factor = b / _determinant(prediction_type, alpha, sigma, sigma_data)
    return expand(factor, x_t) * x_t + expand(gain, x_t) * output


def to_epsilon(
    prediction_type: str,
    output: Tensor,
    x_t: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    sigma_data: float | None = None,
) -> Tensor:
    """The noise that a network output implies, for output and x_t [B, ...]."""
    _, gain = gains(prediction_type, alpha, sigma, sigma_data)
    if prediction_type == "epsilon":
        return output.to(expand(gain, output).dtype)
    a, _ = mix(prediction_type, alpha, sigma, sigma_data)
    factor = -a / _determinant(prediction_type, alpha, sigma, sigma_data)
    return expand(factor, x_t) * x_t + expand(gain, x_t) * output


def convert(
    prediction_type: str,
    output: Tensor,
    x_t: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    *,
    to: str,
    sigma_data: float | None = None,
) -> Tensor:
    """A network output of one type written as another type.

    Exact wherever `output` determines the result: with x_t it fixes the pair (x_0, ε) except where d = 0.
    """
    if to == prediction_type:
        return output
    c, e = mix(to, alpha, sigma, sigma_data)
    a, b = mix(prediction_type, alpha, sigma, sigma_data)
    determinant = _determinant(prediction_type, alpha, sigma, sigma_data)
    of_x_t = (c * b - e * a) / determinant
    of_output = (e * _double(alpha) - c * _double(sigma)) / determinant
    return expand(of_x_t, x_t) * x_t + expand(of_output, x_t) * output


def to_velocity(
    prediction_type: str,
    output: Tensor,
    x_t: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    sigma_data: float | None = None,
) -> Tensor:
    """The v = (α ε - σ x_0)/√(α² + σ²) that a network output implies."""
    return convert(prediction_type, output, x_t, alpha, sigma, to="v_prediction", sigma_data=sigma_data)


def to_flow(
    prediction_type: str,
    output: Tensor,
    x_t: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    sigma_data: float | None = None,
) -> Tensor:
    """The flow ε - x_0 = dx_t/dt that a network output implies."""
    return convert(prediction_type, output, x_t, alpha, sigma, to="flow", sigma_data=sigma_data)


@dataclass(frozen=True)
class Prediction:
    """A prediction type on a noise schedule: the conversions as functions of time.

    `t` is one time or per-sample times [B] of the schedule; tensors are [B, ...].
    """

    prediction_type: str
    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type = {self.prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}")
        if self.prediction_type == "edm" and self.schedule.sigma_data is None:
            raise ValueError(f"prediction_type = 'edm' needs an EDMSchedule, not {self.schedule!r}")

    def target(self, x0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        """What the network should say."""
        return target(self.prediction_type, x0, eps, *self._at(t))

    def to_x0(self, output: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The data that a network output implies."""
        return to_x0(self.prediction_type, output, x_t, *self._at(t))

    def to_epsilon(self, output: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The noise that a network output implies."""
        return to_epsilon(self.prediction_type, output, x_t, *self._at(t))

    def convert(self, output: Tensor, x_t: Tensor, t: float | Tensor, *, to: str) -> Tensor:
        """A network output written as the prediction type `to`."""
        alpha, sigma, sigma_data = self._at(t)
        return convert(self.prediction_type, output, x_t, alpha, sigma, to=to, sigma_data=sigma_data)

    def gains(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(∂x_0/∂m, ∂ε/∂m) in the shape of t, float64."""
        return gains(self.prediction_type, *self._at(t))

    def _at(self, t: float | Tensor) -> tuple[Tensor, Tensor, float | None]:
        time = torch.as_tensor(t, dtype=torch.float64)
        return self.schedule.alpha(time), self.schedule.sigma(time), self.schedule.sigma_data


def edm_preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of Karras et al. 2022, table 1, float64.

    The denoised image is c_skip x + c_out F(c_in x, c_noise).
    """
    sigma = _double(sigma)
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance.sqrt(), variance.rsqrt(), torch.log(sigma) / 4


def _determinant(
    prediction_type: str, alpha: float | Tensor, sigma: float | Tensor, sigma_data: float | None
) -> Tensor:
    a, b = mix(prediction_type, alpha, sigma, sigma_data)
    return _double(alpha) * b - _double(sigma) * a


def _double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
