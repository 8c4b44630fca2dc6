"""The embedded default: scikit-learn's handwritten digits, real data with nothing to download."""

import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genlight.data.image_datamodule import ImageDataModule
from genlight.data.images import ImagesInMemory
from genlight.data.sampling import generator

_SPLIT_SEED = 1797  # fixed: the split must not move with the seed of a run


def _read_digits() -> NDArray[np.uint8]:
    """uint8 [1797, 65]: 64 pixels from 0 to 16 in rows of 8, then the digit.

    The file is read where scikit-learn keeps it, because importing the package costs a second.
    """
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.exists():
            with gzip.open(file, "rt") as text:
                return np.loadtxt(text, delimiter=",").astype(np.uint8)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits of 8x8 grey pixels, half to train on and half held out by a fixed permutation.

    Pixel values 0 … 16 become [-1, 1]. An `image_size` of 16, 24, … repeats each pixel; 3 channels repeat the grey.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test set).
    """

    name = "digits"
    class_names = tuple("0123456789")
    size_multiple = 8

    def load_images(self, split: str) -> ImagesInMemory:
        rows = torch.from_numpy(_read_digits())
        order = generator(_SPLIT_SEED).permutation(len(rows))
        half = len(rows) // 2
        rows = rows[order[:half] if split == "train" else order[half:]]
        scale = self.image_size // 8
        pixels = rows[:, :64].reshape(-1, 1, 8, 8).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        labels = None if self.num_classes is None else rows[:, 64].long()
        return ImagesInMemory(pixels.repeat(1, self.channels, 1, 1), labels, half_range=8.0)

    def content(self) -> Any:
        return [hashlib.sha256(_read_digits().tobytes()).hexdigest(), _SPLIT_SEED]
