"""How far images or videos are from others of the same noise."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from genlight.metrics.motion import motion_error

# images below this side get a smaller window of SSIM, as the usual one is as wide as they are
_SMALL_IMAGE = 32


def image_scores(images: Tensor, expected: Tensor) -> dict[str, float]:
    """PSNR in dB, 100 at most, and SSIM of images [N, C, H, W] in [-1, 1] against others of the same noise.

    Of videos [N, F, C, H, W] both are over all frames, and "motion" is the `motion_error`.
    """
    videos = expected.ndim == 5
    if torch.equal(images, expected):
        return {"psnr": 100.0, "ssim": 1.0, **({"motion": 0.0} if videos else {})}
    small = min(expected.shape[-2:]) < _SMALL_IMAGE

    def ssim(images: Tensor, expected: Tensor) -> float:
        found: Any = structural_similarity_index_measure(images, expected, sigma=0.5 if small else 1.5, data_range=2.0)
        return float(found)

    return {
        "psnr": min(100.0, float(peak_signal_noise_ratio(images, expected, data_range=2.0))),
        # video by video: it takes ten times the memory of its images
        "ssim": fmean(map(ssim, images, expected)) if videos else ssim(images, expected),
        **({"motion": motion_error(images, expected)} if videos else {}),
    }
