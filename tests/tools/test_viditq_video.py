"""What ViDiT-Q's proof on videos measures with: videos whose motion is known, and motion that is found."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genlight.metrics.motion import motion_of

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


def test_the_motion_of_a_moving_digit_is_found(program: dict[str, object]) -> None:
    """Of real digits, drawn by the program: a pixel along one axis or both, and no other change of brightness."""
    real = program["Data"]("val", 3)  # type: ignore[operator]
    videos = real.videos(100)[0].transpose(1, 2)
    motion, still = motion_of(videos), motion_of(videos[:, :1].expand_as(videos))
    assert motion.size.mean() == pytest.approx((1 + 2**0.5) / 2, rel=0.1)
    assert float(motion.size.min()) > 0.8 and float(still.size.max()) == 0
    assert float(motion.unexplained.mean()) < 0.1 * float(videos.diff(dim=1).abs().mean() / 2)


def test_shares_of_what_is_less_than_the_seeds_differ_are_left_out(program: dict[str, object]) -> None:
    groups = program["GROUPS"]

    def result(**lost: float) -> dict[str, dict[str, float]]:
        """Each group adds as much to a loss as its place among them."""
        full = dict.fromkeys(program["LOSSES"], 1.0)  # type: ignore[call-overload]
        rows = {
            f"W4A8 {name}": {key: 1.0 + place * lost.get(key, 0.0) for key in full}
            for place, name in enumerate(groups, start=1)  # type: ignore[arg-type, var-annotated]
        }
        return {"full precision": full, **rows}

    table = program["table_of"]([result(motion=1.0, frames=1.0), result(motion=1.2, frames=-0.9)], [4])  # type: ignore[operator]
    shares = [row for row in table if row["rounded"].endswith("share")]
    assert [row["motion"] for row in shares] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert {row[key] for row in shares for key in ("frames", "class")} == {None}


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
