"""How far a denoiser is from the noise that was added, over the whole range of noise: the loss by λ = ln(α/σ)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import expand
from genlight.diffusion.prediction import Prediction

Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class ErrorCurve:
    """Mean squared error of ε̂ at rising λ; between the points its logarithm is linear, beyond them it is constant.

    Raises ValueError for fewer than one point, λ that do not rise, errors that are not positive.
    """

    half_log_snrs: tuple[float, ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.errors or len(self.half_log_snrs) != len(self.errors):
            raise ValueError(f"errors: {len(self.errors)} values at {len(self.half_log_snrs)} half_log_snrs")
        if not all(right > left for left, right in pairwise(self.half_log_snrs)):
            raise ValueError("half_log_snrs must rise")
        if not all(0 < error < float("inf") for error in self.errors):
            raise ValueError("errors must be positive and finite")

    def __call__(self, half_log_snrs: Sequence[float] | Values) -> Values:
        """Errors at any λ, float64 of the same shape."""
        log_errors = np.log(np.asarray(self.errors))
        return np.exp(np.interp(np.asarray(half_log_snrs, dtype=np.float64), self.half_log_snrs, log_errors))


def error_curve(
    model: Callable[..., Tensor],
    images: Tensor,
    prediction: Prediction,
    half_log_snrs: Sequence[float],
    *,
    conditions: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    integer_timesteps: bool = False,
) -> ErrorCurve:
    """The error of a denoiser on images it was not trained on.

    The noise is a function of `seed` and of the place of λ in the list: members of a zoo meet the same.

    Args:
        model: model(input_scale(t) · x_t, model_timestep(t), **conditions), as everywhere; [B, ...] as x_t.
        images: [N, ...], on the device of the model.
        prediction: what the model predicts.
        half_log_snrs: rising λ, within the range of the noise schedule.
        conditions: [N, ...] by name, handed to the model.
        integer_timesteps: look at the nearest integer time of each λ, for networks that look timesteps up.

    Raises ValueError for λ outside the range, no images, or an error that is not finite.
    """
    if not len(images):
        raise ValueError("images: at least one is needed")
    schedule = prediction.schedule
    times = schedule.t_of_half_log_snr(torch.as_tensor(half_log_snrs, dtype=torch.float64))
    times = times.round() if integer_timesteps else times
    errors = []
    for index, time in enumerate(times.tolist()):
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        total = 0.0
        for begin in range(0, len(images), batch_size):
            rows = slice(begin, begin + batch_size)
            given = {name: value[rows] for name, value in (conditions or {}).items()}
            total += _squared_error(model, images[rows], noise[rows], time, prediction, given)
        errors.append(total / images.numel())
    return ErrorCurve(tuple(float(value) for value in half_log_snrs), tuple(errors))


def _squared_error(
    model: Callable[..., Tensor],
    images: Tensor,
    noise: Tensor,
    time: float,
    prediction: Prediction,
    conditions: Mapping[str, Tensor],
) -> float:
    schedule = prediction.schedule
    x = schedule.add_noise(images, noise, time)
    timestep = torch.full((len(x),), schedule.model_timestep(time), dtype=x.dtype, device=x.device)
    with torch.no_grad():
        output = model(expand(schedule.input_scale(time), x) * x, timestep, **conditions)
    error = prediction.to_epsilon(output.to(x.dtype), x, time) - noise
    return float(error.double().square().sum())
