"""How far images or videos are from others of the same noise."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from genlight.diffusion.distances import Distance, distance
from genlight.errors import UserError
from genlight.metrics.motion import motion_error
from genlight.reports.bootstrap import rms_interval
from genlight.reports.intervals import mean_interval

# images below this side get a smaller window of SSIM, as the usual one is as wide as they are
_SMALL_IMAGE = 32
# of images in [-1, 1]
_RANGE = 2.0
_MOST_DECIBELS = 100.0
# where torchvision keeps what it has downloaded
_VGG16 = "vgg16-397923af.pth"
INTERVALS = ("psnr_low", "psnr_high", "ssim_low", "ssim_high")


def image_scores(images: Tensor, expected: Tensor) -> dict[str, float]:
    """PSNR in dB, 100 at most, and SSIM of images [N, C, H, W] in [-1, 1] against others of the same noise.

    Of videos [N, F, C, H, W] both are over all frames, and "motion" is the `motion_error`. What is no finite number
    counts as the far end of the range.
    """
    videos = expected.ndim == 5
    images = _finite(images, expected)
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
    images = _finite(images, expected)
    _, small, large = rms_interval((images - expected).double().square().flatten(1).mean(1).numpy())
    _, low, high = mean_interval(_ssim(images, expected))
    return dict(zip(INTERVALS, (_decibels(large), _decibels(small), low, min(1.0, high)), strict=True))


def _finite(images: Tensor, expected: Tensor) -> Tensor:
    return torch.where(images.isfinite(), images, torch.where(expected > 0, -1.0, 1.0).to(images))


def perceptual_scores(images: Tensor, expected: Tensor, device: torch.device) -> dict[str, float]:
    """LPIPS (VGG-16, see `genlight.diffusion.distances`), the mean over images or over all frames, as "lpips".

    Nothing where the weights of VGG-16 are not on this machine: they are not downloaded for it.

    Args:
        images, expected: as for `image_scores`.
        device: to compute it on, one image at a time.
    """
    network = _lpips()
    if network is None or expected.shape[-3] not in (1, 3):
        return {}
    both = _finite(images, expected), expected
    pairs = zip(*(part.reshape(-1, 1, *part.shape[-3:]) for part in both), strict=True)
    with torch.no_grad():
        return {"lpips": fmean(float(network(one.to(device), other.to(device))) for one, other in pairs)}


@cache
def _lpips() -> Distance | None:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _VGG16
    with suppress(UserError):  # no torchvision
        return distance("lpips") if weights.is_file() else None
    return None


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
