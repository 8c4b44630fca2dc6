import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from genlight.data.images import ImageFiles, ImagesInMemory, decode_image
from genlight.errors import UserError


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def test_pixels_of_the_right_size_are_kept_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encoded(pixels), "x", 6, 3), pixels.transpose(2, 0, 1))


def test_grey_becomes_colour_by_repeating_and_colour_grey_by_luminance():
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert np.array_equal(decode_image(encoded(grey), "x", 4, 3), np.stack([grey] * 3))
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[..., 1] = 200
    assert abs(int(decode_image(encoded(colour), "x", 4, 1)[0, 0, 0]) - 0.587 * 200) <= 1


def test_transparency_palette_and_16_bits_are_converted():
    rgba = np.full((4, 4, 4), 50, np.uint8)
    assert (decode_image(encoded(rgba), "x", 4, 3) == 50).all()
    palette = io.BytesIO()
    Image.fromarray(np.full((4, 4), 77, np.uint8)).convert("P").save(palette, "GIF")
    assert (decode_image(palette.getvalue(), "x", 4, 1) == 77).all()
    assert (decode_image(encoded(np.full((4, 4), 0x8012, np.uint16)), "x", 4, 1) == 0x80).all()


def test_the_centre_square_is_cut_out():
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 255
    assert (decode_image(encoded(wide), "x", 4, 1) == 255).all()
    assert (decode_image(encoded(wide.T.copy()), "x", 4, 1) == 255).all()


def test_shrinking_averages():
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    small = decode_image(encoded(checks), "x", 8, 1)
    assert abs(small.astype(float) - 127.5).max() < 16


def test_the_orientation_tag_is_applied():
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    decoded = decode_image(encoded(pixels, exif=exif), "x", 4, 1)[0]
    assert (decoded[-1] == 255).all() and (decoded[:-1] == 0).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_named_in_one_line_or_has_lost_no_pixel(kind):
    whole = encoded(np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8), kind)
    expected = decode_image(whole, "photo", 32, 3)
    accepted = 0
    for length in range(0, len(whole), 5):
        try:
            assert np.array_equal(decode_image(whole[:length], "photo row 3", 32, 3), expected)
            accepted += 1
        except UserError as error:
            assert re.fullmatch(r"photo row 3: not a readable image \([^\n]+\)", str(error))
    assert accepted <= 5  # closing marks and checksums, at most 20 bytes


def test_flipped_bytes_never_end_in_another_error():
    whole = encoded(np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] ^= 1 << rng.integers(8)
        try:
            decode_image(bytes(damaged), "x", 16, 3)
        except UserError:
            refused += 1
    assert refused > 250


def test_a_batch_spans_minus_one_to_one_and_mirror_indices_flip():
    pixels = torch.tensor([[[[0, 255]]], [[[51, 102]]]], dtype=torch.uint8)
    images = ImagesInMemory(pixels, torch.tensor([4, 7]))
    batch = images.__getitems__([0, 1, 3, 2])
    expected = torch.tensor([[-1, 1], [-0.6, -0.2], [-0.2, -0.6], [1, -1]]).reshape(4, 1, 1, 2)
    torch.testing.assert_close(batch["image"], expected)
    assert batch["image"].dtype == torch.float32 and batch["label"].tolist() == [4, 7, 7, 4]
    assert "label" not in ImagesInMemory(pixels, None).__getitems__([0])
    assert pixels.flatten().tolist() == [0, 255, 51, 102]


def test_files_and_memory_give_the_same_batches(tmp_path):
    rng = np.random.default_rng(4)
    names = [f"{i}.png" for i in range(5)]
    for name in names:
        (tmp_path / name).write_bytes(encoded(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)))
    files = ImageFiles(tmp_path, names, torch.arange(5), 4, 3)
    memory = ImagesInMemory(files.decode(range(5)), torch.arange(5))
    for indices in ([0, 3], [9, 1, 5]):
        lazy, ready = files.__getitems__(indices), memory.__getitems__(indices)
        assert all(torch.equal(lazy[key], ready[key]) for key in ready)
    assert files.decoded_bytes == memory.pixels.numel()
