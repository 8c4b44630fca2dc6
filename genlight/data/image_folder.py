"""Any folder of images, with or without class folders."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlight.data.cache import cached_tensors, default_cache_folder, with_progress
from genlight.data.image_datamodule import ImageDataModule, ImageSet
from genlight.data.images import ImageFiles, ImagesInMemory
from genlight.errors import UserError

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_HASH_ALL_BELOW_BYTES = 256 << 20
_HASH_AT_MOST_FILES = 1000


def list_images(root: Path) -> list[str]:
    """Image files below `root`, by suffix, as sorted relative paths with "/"; hidden files and folders are left out.

    Links to folders are followed, but for those that lead back to a folder above them.
    """
    found, root = [], root.resolve()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and not _leads_back(Path(folder, name))
        ]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                found.append(Path(folder, name).relative_to(root).as_posix())
    return sorted(found)


def _leads_back(path: Path) -> bool:
    return path.is_symlink() and any(path.samefile(folder) for folder in path.parents)


def is_held_out(file: str, fraction: float) -> bool:
    """Whether a relative path belongs to the test split: by its hash, so adding files moves no other file."""
    return int.from_bytes(hashlib.sha256(os.fsencode(file)).digest()[:8], "big") < fraction * 2.0**64


class ImageFolderDataModule(ImageDataModule):
    """Images (bmp, gif, jpeg, png, tiff, webp) anywhere below a folder.

    With `num_classes` every image must lie below a class folder, `root/<class>/…/image.png`, and classes are numbered
    in alphabetical order; without it the folders mean nothing. Images are cut to their centre square, resized by a
    bicubic filter and converted to `channels`. Sets that decode to at most `memory_mb` are kept in memory, and as
    safetensors in the cache folder; larger ones are read as needed, where `num_workers` helps.

    Args:
        root: the folder of images; None means the environment variable GENLIGHT_DATA.
        held_out_fraction: share of the images that makes the test split, chosen by a hash of the relative path.
        cache: cache folder; None means GENLIGHT_CACHE or the user's cache folder.
        horizontal_flip: show every training image or its mirror image, by a coin per epoch.
        memory_mb: largest set kept in memory, in MiB.

    Other arguments: see `ImageDataModule`.
    """

    name = "image_folder"

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int | None,
        batch_size: int,
        eval_batch_size: int,
        num_samples: int,
        seed: int,
        num_workers: int = 0,
        noise_shape: Sequence[int] | None = None,
        draw: str = "report",
        evaluation: str = "generation",
        root: str | None = None,
        held_out_fraction: float = 0.1,
        cache: str | None = None,
        horizontal_flip: bool = False,
        memory_mb: int = 2048,
    ) -> None:
        super().__init__(
            image_size,
            channels,
            num_classes,
            batch_size,
            eval_batch_size,
            num_samples,
            seed,
            num_workers,
            noise_shape,
            draw,
            evaluation,
        )
        if not 0 <= held_out_fraction < 1:
            raise ValueError(f"data.held_out_fraction={held_out_fraction} must be in [0, 1)")
        if memory_mb < 0:
            raise ValueError(f"data.memory_mb={memory_mb} must not be negative")
        if evaluation == "classification" and held_out_fraction == 0:
            raise ValueError("data.evaluation=classification needs data.held_out_fraction above 0")
        self.root = root
        self.held_out_fraction = held_out_fraction
        self.cache = cache
        self.mirror = horizontal_flip
        self.memory_mb = memory_mb
        self.splits = ("train", "test") if held_out_fraction > 0 else ("train",)
        self._found: tuple[Path, list[str]] | None = None
        self._content: list[Any] | None = None
        self._pixels: Tensor | None = None

    def images(self, split: str) -> ImageSet:
        if split == "test" and split not in self.splits:
            raise UserError("image_folder has no held-out images: set data.held_out_fraction above 0, as 0.1")
        return super().images(split)

    def load_images(self, split: str) -> ImageSet:
        root, files = self._list()
        labels = self._labels(root, files)
        rows = [row for row, file in enumerate(files)
                if is_held_out(file, self.held_out_fraction) == (split == "test")]  # fmt: skip
        if not rows:
            raise UserError(f"data.held_out_fraction={self.held_out_fraction} leaves no {split} image in {root}")
        labels = None if labels is None else labels[rows]
        every = ImageFiles(root, files, None, self.image_size, self.channels)
        if every.decoded_bytes > self.memory_mb << 20:
            return ImageFiles(root, [files[row] for row in rows], labels, self.image_size, self.channels)
        if self._pixels is None:
            self._pixels = self._decode(every)
        return ImagesInMemory(self._pixels[rows], labels)

    def _decode(self, every: ImageFiles) -> Tensor:
        def build() -> dict[str, Tensor]:
            rows = with_progress(range(len(every)), len(every), f"decoding {every.root.name}")
            return {"pixels": torch.cat([every.decode([row]) for row in rows])}

        folder = default_cache_folder() if self.cache is None else Path(self.cache)
        facts = [self.name, self._files_content(), self.image_size, self.channels]
        return cached_tensors(folder, self.name, facts, build)["pixels"]

    def content(self) -> Any:
        return [self._files_content(), self.held_out_fraction]

    def _files_content(self) -> list[Any]:
        """Name and size of every file, and a SHA-256: of all files, or of 1,000 spread evenly over a large set."""
        if self._content is None:
            root, files = self._list()
            sizes = [(root / file).stat().st_size for file in files]
            large = sum(sizes) > _HASH_ALL_BELOW_BYTES
            step = -(-len(files) // _HASH_AT_MOST_FILES) if large else 1
            digest = hashlib.sha256()
            for file in files[::step]:
                digest.update((root / file).read_bytes())
            self._content = [list(zip(files, sizes, strict=True)), digest.hexdigest()]
        return self._content

    def _list(self) -> tuple[Path, list[str]]:
        if self._found is None:
            name = self.root or os.environ.get("GENLIGHT_DATA")
            layout = "expected a folder of images, or of class folders of images, named by data.root or GENLIGHT_DATA"
            if name is None:
                raise UserError(f"image_folder: {layout} (neither is set)")
            root = Path(name)
            if not root.is_dir():
                raise UserError(f"image_folder: no folder {root}; {layout}")
            files = list_images(root)
            if not files:
                raise UserError(f"image_folder: no images in {root}; {layout} ({', '.join(sorted(SUFFIXES))})")
            self._found = root, files
        return self._found

    def _labels(self, root: Path, files: list[str]) -> Tensor | None:
        if self.num_classes is None:
            return None
        for file in files:
            if "/" not in file:
                raise UserError(f"labels missing: {root / file} lies in no class folder; set data.num_classes=null")
        names = sorted({file.split("/", 1)[0] for file in files})
        if len(names) != self.num_classes:
            raise UserError(f"data.num_classes={self.num_classes}, but {root} has {len(names)} class folders")
        self.class_names = tuple(names)
        number = {name: label for label, name in enumerate(names)}
        return torch.tensor([number[file.split("/", 1)[0]] for file in files])
