"""Intervals of PSNR and SSIM over samples."""

import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from genlight.diffusion.distances import distance
from genlight.metrics import paired
from genlight.metrics.paired import image_scores, perceptual_scores, score_intervals
from genlight.reports.intervals import mean_interval


@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (6, 3, 40, 40), (4, 2, 3, 16, 16)])
def test_intervals_hold_the_scores(shape: tuple[int, ...]) -> None:
    """Of images that differ by more from sample to sample; the SSIM of each is torchmetrics' own."""
    generator = torch.Generator().manual_seed(0)
    expected = 2 * torch.rand(shape, generator=generator) - 1
    noise = torch.randn(shape, generator=generator)
    images = expected + 0.02 * noise * torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    scores, ends = image_scores(images, expected), score_intervals(images, expected)
    for name in ("psnr", "ssim"):
        assert ends[f"{name}_low"] < scores[name] < ends[f"{name}_high"]
    # a third of the squared errors to three times of them, at most
    assert ends["psnr_high"] - ends["psnr_low"] < 10
    sigma = 0.5 if shape[-1] < 32 else 1.5
    each = []
    for pair in zip(images, expected, strict=True):
        frames = (sample.reshape(-1, *shape[-3:]) for sample in pair)
        each.append(float(structural_similarity_index_measure(*frames, sigma=sigma, data_range=2)))
    mean, low, high = mean_interval(each)
    assert [scores["ssim"], ends["ssim_low"], ends["ssim_high"]] == pytest.approx([mean, low, min(1, high)], abs=1e-5)


def test_equal_errors_have_no_spread() -> None:
    expected = torch.zeros(3, 1, 8, 8)
    ends = score_intervals(expected + 0.2, expected)
    assert ends["psnr_low"] == pytest.approx(20) == ends["psnr_high"]
    assert score_intervals(expected, expected) == {"psnr_low": 100, "psnr_high": 100, "ssim_low": 1, "ssim_high": 1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_far_from_perfect(bad: float) -> None:
    expected = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    images = expected.clone()
    images[1] = bad
    scores, ends = image_scores(images, expected), score_intervals(images, expected)
    assert 0 <= scores["psnr"] < 10 and -1 <= scores["ssim"] <= 0.5
    assert all(math.isfinite(end) for end in ends.values() if end is not None)


def test_one_sample_has_no_interval() -> None:
    ends = score_intervals(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    assert set(ends) == {"psnr_low", "psnr_high", "ssim_low", "ssim_high"} and set(ends.values()) == {None}


def test_a_perceptual_distance_is_of_all_frames_where_its_weights_are_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared differences stand in for the network."""
    images, cpu = torch.rand(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.device("cpu")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")
    monkeypatch.setattr(paired, "_lpips", paired._lpips.__wrapped__)
    assert perceptual_scores(images, images, cpu) == {}
    monkeypatch.setattr(paired, "_lpips", lambda: distance("l2"))
    found = perceptual_scores(images, images.flip(0), cpu)
    assert found == {"lpips": pytest.approx(float((images - images.flip(0)).square().mean()))}
    assert perceptual_scores(images[:, :, :2], images[:, :, :2], cpu) == {}  # no picture
