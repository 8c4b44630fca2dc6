"""Motion of videos whose displacement is known, and of those that only change in brightness."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from genlight.errors import UserError
from genlight.metrics.motion import motion_error, motion_of
from genlight.metrics.paired import image_scores


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """Blots of some pixels [height, width] in [-1, 1]."""
    places = torch.arange(-8, 9.0)
    blot = (-places.square() / 12).exp()
    noise = torch.randn(1, 1, height + 16, width + 16, generator=torch.Generator().manual_seed(seed))
    smooth = F.conv2d(F.conv2d(noise, blot[None, None, :, None]), blot[None, None, None])[0, 0]
    return (smooth / (2.5 * smooth.std())).clamp(-1, 1)


def moving(down: int, right: int, size: int = 64, frames: int = 3, seed: int = 0) -> Tensor:
    """A video [1, frames, 3, size, size] of a texture that moves by whole pixels a frame."""
    room = frames * max(abs(down), abs(right), 1)
    wide = texture(size + 2 * room, size + 2 * room, seed)
    cuts = [(room - i * down, room - i * right) for i in range(frames)]
    return torch.stack([wide[y : y + size, x : x + size] for y, x in cuts])[None, :, None].expand(-1, -1, 3, -1, -1)


@settings(max_examples=20, deadline=None)
@given(st.integers(-4, 4), st.integers(-4, 4), st.integers(0, 2**20))
# corners that leave the picture must not be carried further by their neighbours' steps
@example(-1, -1, 189)
@example(-4, 1, 22)
def test_a_displacement_is_found(down: int, right: int, seed: int) -> None:
    video = moving(down, right, seed=seed)
    motion = motion_of(video)
    assert motion.displacement.shape == (1, 2, 2, 64, 64) and motion.structure.shape == (1, 2, 64, 64)
    weights = motion.structure[:, :, None]
    mean = (motion.displacement * weights).sum((0, 1, 3, 4)) / weights.sum()
    torch.testing.assert_close(mean, torch.tensor([float(down), float(right)]), rtol=0.03, atol=0.03)
    assert float(motion.size) == pytest.approx(math.hypot(down, right), rel=0.03, abs=0.03)
    change = float(video.diff(dim=1).abs().mean() / 2)
    assert float(motion.unexplained) <= 0.15 * change + 1e-6


def test_places_move_by_themselves() -> None:
    moved, still = moving(1, 2), moving(0, 0, seed=1)
    video = torch.cat([moved[..., :32], still[..., 32:]], dim=-1)
    found = motion_of(video).displacement.mean(dim=(0, 1))
    torch.testing.assert_close(found[:, 8:56, 8:24].mean(dim=(1, 2)), torch.tensor([1.0, 2.0]), rtol=0.05, atol=0.05)
    torch.testing.assert_close(found[:, 8:56, 40:56].mean(dim=(1, 2)), torch.zeros(2), rtol=0, atol=0.05)


def test_large_frames_are_measured_in_their_own_pixels() -> None:
    assert float(motion_of(moving(-4, 6, size=300)).size) == pytest.approx(math.hypot(4, 6), rel=0.03)


@pytest.mark.parametrize("video", [torch.full((2, 3, 1, 20, 20), 0.3), moving(0, 0)])
def test_what_stands_still_has_no_motion(video: Tensor) -> None:
    motion = motion_of(video)
    assert float(motion.size.max()) < 1e-5 and float(motion.unexplained.max()) < 1e-5


def test_flicker_is_no_motion() -> None:
    """Brightness that goes up and down by a tenth of its range, and noise that is drawn anew for each frame."""
    still = 0.8 * moving(0, 0, frames=4)
    lit = still + torch.tensor([0.1, -0.1, 0.1, -0.1])[:, None, None, None]
    assert float(motion_of(lit).unexplained) == pytest.approx(0.1, rel=0.02) and float(motion_of(lit).size) < 0.05
    noise = 0.1 * torch.randn(still.shape, generator=torch.Generator().manual_seed(3))
    noisy = motion_of(still + noise)
    plain = float((still + noise).mean(dim=2).diff(dim=1).abs().mean() / 2)
    assert 0.7 * plain < float(noisy.unexplained) < plain and float(noisy.size) < 0.5


def test_the_error_is_the_difference_of_motions() -> None:
    one, other = moving(0, 1), moving(2, 1)
    assert motion_error(one, one) == 0
    assert motion_error(one, other) == pytest.approx(2, rel=0.05) == motion_error(other, one)
    # a mean of squares over videos
    assert motion_error(torch.cat([one, one]), torch.cat([one, other])) == pytest.approx(
        motion_error(one, other) / math.sqrt(2)
    )
    # what the picture shows does not matter
    assert motion_error(one, moving(0, 1, seed=5)) < 0.25


def test_small_errors_are_small() -> None:
    """Unlike a search over whole pixels, so that bits can be compared by it."""
    one = moving(1, 1)
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    small, large = (motion_error(one + scale * noise, one) for scale in (0.005, 0.05))
    assert 0 < small < 0.05 and 5 * small < large < 0.5


def test_scores_of_videos_are_means_over_their_frames() -> None:
    generator = torch.Generator().manual_seed(1)
    videos = torch.cat([moving(1, 0), moving(0, 1)])
    others = videos + 0.1 * torch.randn(videos.shape, generator=generator)
    found, frames = image_scores(others, videos), image_scores(others.flatten(0, 1), videos.flatten(0, 1))
    assert found.pop("motion") == motion_error(others, videos)
    assert found == pytest.approx(frames, rel=1e-5)
    assert image_scores(videos, videos) == {"psnr": 100.0, "ssim": 1.0, "motion": 0.0}


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 3, 8, 8)])
def test_what_is_no_video_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="motion needs videos of two or more frames"):
        motion_of(torch.zeros(shape))
