"""How far images or videos are from others of the same noise."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from genlight.metrics.motion import motion_error
from genlight.reports.bootstrap import rms_interval
from genlight.reports.intervals import mean_interval

# images below this side get a smaller window of SSIM, as the usual one is as wide as they are
_SMALL_IMAGE = 32
# of images in [-1, 1]
_RANGE = 2.0
_MOST_DECIBELS = 100.0
INTERVALS = ("psnr_low", "psnr_high", "ssim_low", "ssim_high")


def image_scores(images: Tensor, expected: Tensor) -> dict[str, float]:
    """PSNR in dB, 100 at most, and SSIM of images [N, C, H, W] in [-1, 1] against others of the same noise.

    Of videos [N, F, C, H, W] both are over all frames, and "motion" is the `motion_error`.
    """
    videos = expected.ndim == 5
    if torch.equal(images, expected):
        return {"psnr": _MOST_DECIBELS, "ssim": 1.0, **({"motion": 0.0} if videos else {})}
    return {
        "psnr": min(_MOST_DECIBELS, float(peak_signal_noise_ratio(images, expected, data_range=_RANGE))),
        "ssim": fmean(_ssim(images, expected)),
        **({"motion": motion_error(images, expected)} if videos else {}),
    }


def score_intervals(images: Tensor, expected: Tensor) -> dict[str, float | None]:
    """Ends of the 95 % intervals of PSNR (bootstrap) and SSIM (Student's t) over samples; None for one sample alone."""
    if len(images) < 2:
        return dict.fromkeys(INTERVALS)
    _, small, large = rms_interval((images - expected).double().square().flatten(1).mean(1).numpy())
    _, low, high = mean_interval(_ssim(images, expected))
    return dict(zip(INTERVALS, (_decibels(large), _decibels(small), low, min(1.0, high)), strict=True))


def _ssim(images: Tensor, expected: Tensor) -> list[float]:
    """Of each image, or of each video over all frames."""
    if expected.ndim == 5:
        # video by video: it takes ten times the memory of its images
        return [fmean(_ssim(*pair)) for pair in zip(images, expected, strict=True)]
    sigma = 0.5 if min(expected.shape[-2:]) < _SMALL_IMAGE else 1.5
    found: Any = structural_similarity_index_measure(images, expected, sigma=sigma, reduction="none", data_range=_RANGE)
    return found.flatten().tolist()  # type: ignore[no-any-return]


def _decibels(rms: float) -> float:
    return min(_MOST_DECIBELS, 20 * math.log10(_RANGE / rms)) if rms else _MOST_DECIBELS
