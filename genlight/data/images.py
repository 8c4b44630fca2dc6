"""Images as batches: decoding of one image, a set kept in memory as uint8, a set read from files as needed."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genlight.data.sampling import Indices
from genlight.errors import UserError


def decode_image(source: bytes | Path, where: str, image_size: int, channels: int) -> NDArray[np.uint8]:
    """One image as uint8 [channels, image_size, image_size].

    The file's orientation tag is applied; the centre square is cut out and resized by a bicubic filter (PIL's, which
    averages when it shrinks). With 1 channel colours become luminance, with 3 grey is repeated; transparency is
    dropped and 16-bit grey keeps its upper 8 bits.

    Args:
        where: name of the image in error messages.

    Raises:
        UserError: the bytes are not a whole image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("L" if channels == 1 else "RGB")
    # What PIL raises for a damaged file depends on its format.
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: not a readable image ({_reason(error)})") from error
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(image_size, image_size, channels)
    return pixels.transpose(2, 0, 1).copy()


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # its own text names a file object in memory
        return "not in a known image format"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _batch(pixels: Tensor, half_range: float, mirrored: Tensor | None, label: Tensor | None) -> dict[str, Tensor]:
    if mirrored is not None and mirrored.any():
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    batch = {"image": pixels.to(torch.float32).div_(half_range).sub_(1)}
    if label is not None:
        batch["label"] = label
    return batch


def _split_mirror(indices: Sequence[int] | Indices, num_samples: int) -> tuple[Tensor, Tensor | None]:
    """Indices below `num_samples`, and which of them asked for the mirror image (index num_samples + i)."""
    index = torch.as_tensor(np.asarray(indices, np.int64))
    mirrored = index >= num_samples
    return index % num_samples, mirrored if bool(mirrored.any()) else None


class ImagesInMemory:
    """Images uint8 [N, C, H, W] with values 0 … 2 * half_range, and labels int64 [N] or None.

    Index `N + i` stands for the mirror image of image `i`.
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None, half_range: float = 127.5) -> None:
        self.pixels = pixels
        self.labels = labels
        self.half_range = half_range

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """image float32 [B, C, H, W] in [-1, 1], label int64 [B] if there are labels."""
        index, mirrored = _split_mirror(indices, len(self))
        label = None if self.labels is None else self.labels[index]
        return _batch(self.pixels.index_select(0, index), self.half_range, mirrored, label)


class ImageFiles:
    """The same from image files, decoded when asked for; `files` are relative to `root`."""

    def __init__(self, root: Path, files: Sequence[str], labels: Tensor | None, image_size: int, channels: int) -> None:
        self.root = root
        self.files = files
        self.labels = labels
        self.image_size = image_size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        index, mirrored = _split_mirror(indices, len(self))
        label = None if self.labels is None else self.labels[index]
        return _batch(self.decode(index.tolist()), 127.5, mirrored, label)

    def decode(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W]."""
        pixels = torch.empty(len(indices), self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        for row, index in enumerate(indices):
            path = self.root / self.files[index]
            pixels[row] = torch.from_numpy(decode_image(path, str(path), self.image_size, self.channels))
        return pixels

    @property
    def decoded_bytes(self) -> int:
        return math.prod((len(self), self.channels, self.image_size, self.image_size))
