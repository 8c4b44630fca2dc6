"""Pixels are where and what they should be; curves draw what the CSV holds."""

import numpy as np
import pytest
import torch
from PIL import Image

from genlight.reports.figures import comparison_grid, curves, sample_grid


def read(path):
    return np.asarray(Image.open(path))


def contains(picture, colour):
    return (picture == np.array(colour)).all(axis=-1)


def test_every_pixel_becomes_a_sharp_square(tmp_path):
    images = torch.full((1, 1, 2, 2), -1.0)
    images[0, 0, 0, 1] = 1.0
    sample_grid(images, tmp_path / "g.png")
    picture = read(tmp_path / "g.png")
    # 2×2 pixels enlarged 32 times: a quarter of the cell is white and nothing lies between black and white
    assert contains(picture, (255, 255, 255)).sum() == 32 * 32
    assert contains(picture, (0, 0, 0)).sum() == 3 * 32 * 32
    rows, columns = np.nonzero(contains(picture, (255, 255, 255)))
    assert rows.max() < 36 and columns.min() >= 36 and np.ptp(rows) == np.ptp(columns) == 31


def test_images_fill_row_by_row(tmp_path):
    levels = torch.linspace(-1, 1, 6)
    sample_grid(levels[:, None, None, None].expand(6, 3, 64, 64), tmp_path / "g.png", rows=2)
    picture = read(tmp_path / "g.png")
    assert picture.shape == (2 * 68 + 4, 3 * 68 + 4, 3)
    centres = [int(picture[36 + row * 68, 36 + column * 68, 0]) for row in range(2) for column in range(3)]
    assert centres == [round((float(level) + 1) * 127.5) for level in levels]


def test_large_images_keep_their_pixels_and_values_are_clipped(tmp_path):
    images = torch.tensor([-9.0, 9.0, float("nan")])[:, None, None, None].expand(3, 1, 200, 100)
    sample_grid(images, tmp_path / "g.png", rows=1)
    picture = read(tmp_path / "g.png")
    assert picture.shape == (208, 3 * 104 + 4, 3)
    assert [int(picture[100, 54 + 104 * i, 0]) for i in range(3)] == [0, 255, 0]


def test_labels_and_title_need_room(tmp_path):
    images = torch.zeros(4, 1, 8, 8)
    sample_grid(images, tmp_path / "plain.png")
    sample_grid(images, tmp_path / "labels.png", labels=[0, 1, 2, "nine"], title="digits")
    assert read(tmp_path / "labels.png").shape[0] > read(tmp_path / "plain.png").shape[0]
    assert (read(tmp_path / "labels.png") < 100).any() and not (read(tmp_path / "plain.png") < 100).any()


def test_equal_images_give_equal_bytes(tmp_path):
    images = torch.rand(5, 3, 8, 8)
    for name in "ab":
        sample_grid(images, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (1, 2, 8, 8), (3, 8, 8)])
def test_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"a grid needs images \[N, 1 or 3, H, W\], got"):
        sample_grid(torch.zeros(shape), tmp_path / "g.png")
    with pytest.raises(ValueError, match="3 labels for 1 images"):
        sample_grid(torch.zeros(1, 1, 8, 8), tmp_path / "g.png", labels=[1, 2, 3])
    assert not list(tmp_path.iterdir())


def test_comparison_has_both_halves(tmp_path):
    comparison_grid(torch.full((4, 1, 8, 8), -1.0), torch.full((4, 1, 8, 8), 1.0), tmp_path / "c.png", titles=("", ""))
    picture = read(tmp_path / "c.png")
    middle = picture.shape[1] // 2
    assert (
        contains(picture[:, :middle], (0, 0, 0)).sum()
        == contains(picture[:, middle:], (255, 255, 255)).sum()
        == 4 * 4096
    )
    with pytest.raises(ValueError, match="equal shapes"):
        comparison_grid(torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8), tmp_path / "d.png")


def test_curves_of_a_lightning_csv(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="x", version="y")
    for step in range(5):
        logger.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
    logger.log_metrics({"val/fd_digits": 3.0}, 2)
    logger.log_metrics({"val/fd_digits": float("nan"), "once": 1.0}, 3)
    logger.log_metrics({"val/fd_digits": 2.0}, 4)
    logger.save()
    table = tmp_path / "x" / "y" / "metrics.csv"
    assert set(curves(table, tmp_path / "all.png")) == {"train/loss", "val/fd_digits"}
    assert curves(table, tmp_path / "one.png", columns=["train/loss"]) == ["train/loss"]
    assert Image.open(tmp_path / "all.png").width > 1.5 * Image.open(tmp_path / "one.png").width
    with pytest.raises(ValueError, match=r"no columns \['val/fid'\]; it has"):
        curves(table, tmp_path / "no.png", columns=["val/fid"])
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match='no column "step"'):
        curves(table, tmp_path / "no.png")
    table.write_text("epoch,step,loss\n0,0,1.0\n")
    assert curves(table, tmp_path / "no.png") == [] and not (tmp_path / "no.png").exists()
