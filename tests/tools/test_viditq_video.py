"""What ViDiT-Q's proof on videos measures with: videos whose motion is known, and a distance with a closed form."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

PROOFS = Path(__file__).resolve().parents[2] / "tools" / "proofs"
FRAMES, SIZE = 4, 12


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.syspath_prepend(str(PROOFS))
    return runpy.run_path(str(PROOFS / "viditq_video.py"))


def videos_of(program: dict[str, object], digits: Tensor) -> Tensor:
    return program["moving"](digits, torch.Generator().manual_seed(0))  # type: ignore[operator, no-any-return]


def test_a_digit_stays_whole_and_moves_by_one_pixel_a_frame(program: dict[str, object]) -> None:
    digits = 2 * torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 1
    videos = videos_of(program, digits)
    assert videos.shape == (300, 1, FRAMES, SIZE, SIZE)
    seen = set()
    for digit, video in zip(digits[:, 0], videos[:, 0], strict=True):
        windows = video.unfold(1, 8, 1).unfold(2, 8, 1)
        places = [tuple((frame == digit).all(dim=-1).all(dim=-1).nonzero()[0].tolist()) for frame in windows]
        steps = {(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)}
        assert len(steps) == 1
        # what is not the digit is black
        assert all(int((frame > -1).sum()) <= 64 for frame in video)
        seen |= steps
    assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)} - {(0, 0)}


def test_the_centre_of_a_moving_digit_moves_with_it(program: dict[str, object]) -> None:
    videos = videos_of(program, torch.ones(50, 1, 8, 8))
    speed = program["centres"](videos).diff(dim=1)  # type: ignore[operator]
    torch.testing.assert_close(speed, speed.round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(speed[:, :1].expand_as(speed), speed, atol=1e-4, rtol=0)
    assert bool((speed.abs().amax(dim=(1, 2)) > 0.99).all())


def test_the_distance_of_two_gaussians_with_one_basis_has_its_closed_form(program: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator)).Q
    # whitened, so that covariances are what they are made to be
    raw = torch.randn(400, 5, dtype=torch.float64, generator=generator)
    raw = raw - raw.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False).T
    first, second = torch.tensor([[1.0, 2.0, 0.5, 3.0, 1.5], [2.0, 2.0, 1.0, 1.0, 0.1]], dtype=torch.float64)
    shift = torch.tensor([0.3, 0.0, -1.0, 0.2, 0.0], dtype=torch.float64)
    one, other = white * first @ basis.T, white * second @ basis.T + shift
    found = program["frechet"](one, other)  # type: ignore[operator]
    assert found == pytest.approx(float(((first - second) ** 2).sum() + (shift**2).sum()), rel=1e-9)


def test_each_layer_that_mixes_or_feeds_forward_is_in_one_group(program: dict[str, object]) -> None:
    network = program["new_network"]()  # type: ignore[operator]
    groups: dict[str, str] = program["GROUPS"]  # type: ignore[assignment]
    names = {
        group: set(program["layers_of"](network, pattern, 8)[0])  # type: ignore[operator]
        for group, pattern in groups.items()
    }
    # two blocks of each kind: four projections an attention, two feed-forward layers
    assert {group: len(found) for group, found in names.items()} == {
        "cross-attention": 8,
        "spatial": 12,
        "temporal": 12,
    }
    assert len(set.union(*names.values())) == 32
