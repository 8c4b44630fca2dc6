"""Motion between neighbouring frames of videos, by an estimator that needs no weights.

It is the method of Lucas and Kanade (1981) from coarse to fine frames (Bouguet 2000): where a window of the one frame
lies in the next is found by least squares of the brightness, step by step, first on frames that were halved to about 16
pixels and then on finer ones. Where all neighbourhood is of one brightness nothing is known, and the motion is 0 there;
of an edge only the motion across it is. Motion far larger than an eighth of the picture a frame is not found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from genlight.errors import UserError

# side of the box that is applied twice: once, it would let ripples grow from step to step
_BOX = 5
_STEPS = 5  # of least squares at each size; each moves by one pixel of that size at most
_COARSEST, _FINEST = 16, 256  # shorter side of the frames, in pixels
_FLAT = 1e-4  # squared slope of a brightness from 0 to 1, below which there is no structure


@dataclass(frozen=True, eq=False)
class Motion:
    """Motion of some videos.

    Attributes:
        displacement: [B, F - 1, 2, h, w], down and right, in pixels of the video a frame.
        structure: [B, F - 1, h, w], mean squared slope of the brightness around each place: what a motion weighs.
        unexplained: [B], mean change of brightness (0 to 1) from a frame to the next along the motion.
    """

    displacement: Tensor
    structure: Tensor
    unexplained: Tensor

    @property
    def size(self) -> Tensor:
        """Mean length of the displacement [B] where there is structure, in pixels a frame."""
        return _weighted(self.displacement.norm(dim=2), self.structure)


def motion_of(videos: Tensor) -> Motion:
    """Motion in videos [B, F, C, H, W] in [-1, 1]; frames of more than 256 pixels are halved first.

    Raises:
        UserError: no videos of two or more frames.
    """
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise UserError(f"motion needs videos of two or more frames, [B, F, C, H, W], got {list(videos.shape)}")
    count, length = videos.shape[:2]
    grey, scale = (videos.float().mean(dim=2) + 1) / 2, 1
    while min(grey.shape[-2:]) > _FINEST:
        grey, scale = _halved(grey), 2 * scale
    first, second = (part.flatten(0, 1)[:, None] for part in (grey[:, :-1], grey[:, 1:]))  # [B (F - 1), 1, h, w]
    found = _displacement(first, second)
    moved, inside = _moved(second, found)
    residual = ((first - moved).abs() * inside).flatten(1).sum(dim=1) / inside.flatten(1).sum(dim=1).clamp(min=1)
    structure = _around(_slopes(first).square().sum(dim=1, keepdim=True))
    shape = (count, length - 1)
    return Motion(
        scale * found.unflatten(0, shape),
        structure[:, 0].unflatten(0, shape),
        residual.unflatten(0, shape).mean(dim=1),
    )


def motion_error(videos: Tensor, expected: Tensor) -> float:
    """Root mean square of the change of the motion against other videos [B, F, C, H, W], in pixels a frame.

    Places count as far as there is structure in either; each video counts alike.
    """
    errors = []
    for one, other in zip(videos.split(1), expected.split(1), strict=True):
        here, there = motion_of(one), motion_of(other)
        change = (here.displacement - there.displacement).square().sum(dim=2)
        errors.append(_weighted(change, here.structure + there.structure))
    return float(torch.cat(errors).mean().sqrt())


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of each video [B]; 0 where all weights are."""
    return (values * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1).clamp(min=1e-12)


def _displacement(first: Tensor, second: Tensor) -> Tensor:
    """[N, 2, h, w] with second(p + d) ≈ first(p), of frames [N, 1, h, w]."""
    levels = [(first, second)]
    for _ in range(int(math.log2(max(1.0, min(first.shape[-2:]) / _COARSEST)))):
        levels.append((_halved(levels[-1][0]), _halved(levels[-1][1])))
    found = levels[-1][0].new_zeros(len(first), 2, 1, 1)
    for one, other in reversed(levels):
        found = 2 * F.interpolate(found, size=one.shape[-2:], mode="bilinear", align_corners=False)
        slopes = _slopes(one)
        down, right = slopes.split(1, dim=1)
        dd, rr, dr = _covary(down, down) + _FLAT, _covary(right, right) + _FLAT, _covary(down, right)
        for _ in range(_STEPS):
            moved, inside = _moved(other, found)
            d, r = _covary(slopes, (one - moved) * inside).split(1, dim=1)
            step = torch.cat([rr * d - dr * r, dd * r - dr * d], dim=1) / (dd * rr - dr * dr)
            found = _followed(found + step.clamp(-1, 1), inside)
    return found


def _followed(displacement: Tensor, inside: Tensor) -> Tensor:
    """Displacement [N, 2, h, w], where it leads out of the frame the mean of those around that stay `inside`.

    What is not seen would hold against no step, and its neighbours' steps would carry it ever further.
    """
    near = _around(inside)
    around = _around(displacement * inside) / near.clamp(min=1e-6)
    return torch.where((inside > 0) | (near == 0), displacement, around)


def _halved(frames: Tensor) -> Tensor:
    """Means of 2 × 2 pixels of frames [B, C, h, w]."""
    return F.avg_pool2d(frames, 2, ceil_mode=True, count_include_pad=False)


def _around(values: Tensor) -> Tensor:
    """Means over the neighbourhood of each place of [N, C, h, w]."""
    for _ in range(2):
        values = F.avg_pool2d(values, _BOX, stride=1, padding=_BOX // 2, count_include_pad=False)
    return values


def _covary(one: Tensor, other: Tensor) -> Tensor:
    """Covariance over the neighbourhood: brightness that changes all over it is no motion."""
    return _around(one * other) - _around(one) * _around(other)


def _slopes(frames: Tensor) -> Tensor:
    """Change of frames [N, 1, h, w] a pixel, down and right [N, 2, h, w]."""
    wide = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    down = wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]
    right = wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]
    return torch.cat([down, right], dim=1) / 2


def _moved(frames: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """frames(p + d) [N, 1, h, w], and whether p + d lies within the frame, as 0 or 1."""
    height, width = frames.shape[-2:]
    places = [torch.arange(size, device=frames.device, dtype=frames.dtype) for size in (height, width)]
    down, right = places[0][:, None] + displacement[:, 0], places[1] + displacement[:, 1]
    grid = torch.stack([2 * right / max(1, width - 1) - 1, 2 * down / max(1, height - 1) - 1], dim=-1)
    moved = F.grid_sample(frames, grid, padding_mode="border", align_corners=True)
    slack = 0.01  # what rounds to the edge is on it
    inside = (down >= -slack) & (down <= height - 1 + slack) & (right >= -slack) & (right <= width - 1 + slack)
    return moved, inside[:, None].to(frames.dtype)
