"""Averages made of others after the training, against averages of the same width that were tracked through it."""

from pathlib import Path

import pytest
import torch

from genlight import io
from genlight.checkpoints.ema_profiles import power_gamma, power_rate
from genlight.checkpoints.post_hoc import post_hoc_averages
from genlight.checkpoints.writer import TrajectoryWriter

STEPS, SHAPES = 640, {"w": (5,)}


@pytest.fixture
def walk(tmp_path: Path) -> dict[float, torch.Tensor]:
    """A random walk of weights; two of its averages are saved 32 times, all are returned as they end."""
    widths = (0.05, 0.10, 0.08, 0.15)
    writers = {
        width: TrajectoryWriter(tmp_path / f"power-{width:g}", SHAPES, {"gamma": power_gamma(width)}, every_n_steps=20)
        for width in widths[:2]
    }
    weight, averages = torch.zeros(5), {width: torch.zeros(5, dtype=torch.float64) for width in widths}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        weight = weight + torch.randn(5, generator=generator)
        for width, average in averages.items():
            average.lerp_(weight.double(), 1.0 - power_rate(power_gamma(width), step))
        if step % 20 == 0:
            for width, writer in writers.items():
                writer.append(step, {"w": averages[width].float()})
    return averages


def test_they_are_the_averages_that_were_not_saved(walk: dict[float, torch.Tensor], tmp_path: Path) -> None:
    found = post_hoc_averages(tmp_path, SHAPES, tuple(walk))
    assert [average.sigma_rel for average in found] == list(walk)
    for average in found:
        torch.testing.assert_close(average.tensors["w"].double(), walk[average.sigma_rel], rtol=0, atol=0.1)
    assert (walk[0.15] - walk[0.05]).abs().max() > 1


def test_what_they_cannot_reach_is_left_out_and_others_are_refused(walk: dict, tmp_path: Path) -> None:
    assert post_hoc_averages(tmp_path, SHAPES, [0.001]) == []
    assert post_hoc_averages(tmp_path / "none", SHAPES) == []
    with pytest.raises(io.CorruptFileError, match="belongs to another trajectory"):
        post_hoc_averages(tmp_path, {"w": (6,)})
