"""Image data sets in the Hugging Face parquet layout: from a local folder, or by hub id through `datasets`."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genlight.data.cache import cached_tensors, default_cache_folder, with_progress
from genlight.data.image_datamodule import ImageDataModule
from genlight.data.images import ImagesInMemory, decode_image
from genlight.errors import UserError
from genlight.io import sha256_of

_ROWS_AT_ONCE = 1024


class Row(NamedTuple):
    """One row: its name in messages, the image's bytes (or the path of its file), and its label."""

    where: str
    image: bytes | Path
    label: int | None


class ParquetImageDataModule(ImageDataModule):
    """Images and labels from parquet files `train-*.parquet` and `test-*.parquet`.

    The image column holds structs of `bytes` (an encoded image) and `path` (a file beside the parquet file, used
    where bytes are null); the label column holds integers. Decoded images are kept in memory, and as safetensors in
    the cache folder.

    Args:
        root: local folder of the data; None means the environment variable GENLIGHT_DATA; without either the data
            comes from the hub.
        hub_id: data set on the Hugging Face hub, or None to never download.
        cache: cache folder; None means GENLIGHT_CACHE or the user's cache folder.
        horizontal_flip: show every training image or its mirror image, by a coin per epoch.

    Other arguments: see `ImageDataModule`.
    """

    title: str = "parquet images"
    folders: tuple[str, ...] = (".",)
    image_column: str = "image"
    label_column: str = "label"

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
        hub_id: str | None = None,
        cache: str | None = None,
        horizontal_flip: bool = False,
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
        self.root = root
        self.hub_id = hub_id
        self.cache = cache
        self.mirror = horizontal_flip
        self._content: dict[str, Any] = {}

    def load_images(self, split: str) -> ImagesInMemory:
        facts = [self.name, split, self.split_content(split), self.image_size, self.channels, self.num_classes]
        folder = default_cache_folder() if self.cache is None else Path(self.cache)
        tensors = cached_tensors(folder, f"{self.name}-{split}", facts, lambda: self._decode(split))
        return ImagesInMemory(tensors["pixels"], tensors.get("labels"))

    def _decode(self, split: str) -> dict[str, Tensor]:
        pixels, labels = [], []
        total, rows = self._rows(split)
        for row in with_progress(rows, total, f"decoding {self.name} {split}"):
            pixels.append(torch.from_numpy(decode_image(row.image, row.where, self.image_size, self.channels)))
            if self.num_classes is not None:
                labels.append(self._checked_label(row, self.num_classes))
        if not pixels:
            raise UserError(f"{self.title}: the {split} split has no rows")
        tensors = {"pixels": torch.stack(pixels)}
        if labels:
            tensors["labels"] = torch.tensor(labels)
        return tensors

    def _checked_label(self, row: Row, num_classes: int) -> int:
        if row.label is None or not 0 <= row.label < num_classes:
            raise UserError(f"{row.where}: label {row.label} is not a class from 0 to {num_classes - 1}")
        return row.label

    def content(self) -> Any:
        return {split: self.split_content(split) for split in self.splits}

    def split_content(self, split: str) -> Any:
        """Name, size and SHA-256 of each local file; the SHA-256 of all rows for data from the hub."""
        if split not in self._content:
            folder = self._local_folder()
            if folder is None:
                self._content[split] = _sha256_of_rows(self._hub_rows(split)[1])
            else:
                files = self._files(folder, split)
                self._content[split] = [[file.name, file.stat().st_size, sha256_of(file)] for file in files]
        return self._content[split]

    def _local_folder(self) -> Path | None:
        root = self.root or os.environ.get("GENLIGHT_DATA")
        if root is None and self.hub_id is not None:
            return None
        if root is not None:
            for folder in (Path(root) / name for name in self.folders):
                if any(folder.glob("train-*.parquet")) or any(folder.glob("test-*.parquet")):
                    return folder
        found = "neither is set" if root is None else f"nothing like it in {root}"
        raise UserError(f"{self.title} is missing: expected {self._layout} ({found})")

    @property
    def _layout(self) -> str:
        return (
            f"<folder>/{self.folders[0]}/{{train,test}}-*.parquet with columns {self.image_column} and "
            f"{self.label_column}, <folder> named by data.root or GENLIGHT_DATA"
        )

    def _files(self, folder: Path, split: str) -> list[Path]:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            raise UserError(f"{self.title}: no {split}-*.parquet in {folder}")
        announced = re.search(r"-of-(\d+)\.parquet$", files[0].name)
        if announced and int(announced[1]) != len(files):
            raise UserError(
                f"{self.title}: {folder} has {len(files)} of the {int(announced[1])} files {split}-*.parquet that "
                f"{files[0].name} announces"
            )
        return files

    def _rows(self, split: str) -> tuple[int, Iterator[Row]]:
        """How many rows, and the rows; only the label column may be absent, and only if labels are not used."""
        if (folder := self._local_folder()) is None:
            return self._hub_rows(split)
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        opened = []
        for file in self._files(folder, split):
            try:
                opened.append((file, ParquetFile(file)))
            except (ArrowException, OSError) as error:
                raise UserError(f"{file}: not a readable parquet file ({_first_line(error)})") from error
        total = sum(parquet.metadata.num_rows for _, parquet in opened)
        return total, (row for file, parquet in opened for row in self._file_rows(file, parquet))

    def _file_rows(self, file: Path, parquet: Any) -> Iterator[Row]:
        from pyarrow import ArrowException

        columns = self._columns(parquet.schema_arrow.names, str(file))
        first_row = 0
        try:
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=columns):
                yield from self._batch_rows(batch, str(file), first_row, file.parent)
                first_row += len(batch)
        except (ArrowException, OSError) as error:
            raise UserError(f"{file}: damaged at or after row {first_row} ({_first_line(error)})") from error

    def _hub_rows(self, split: str) -> tuple[int, Iterator[Row]]:
        import datasets

        try:
            dataset = datasets.load_dataset(self.hub_id, split=split)
        # Any of a dozen classes of four libraries, by the kind of failure of network, hub or data set.
        except Exception as error:
            raise UserError(
                f"{self.title}: cannot load {self.hub_id} from the Hugging Face hub ({_first_line(error)}); "
                f"a local copy is expected as {self._layout}"
            ) from error
        where = f"{self.hub_id} {split}"
        columns = self._columns(dataset.column_names, where)
        dataset = dataset.select_columns(columns).cast_column(self.image_column, datasets.Image(decode=False))
        tables = dataset.with_format("arrow").iter(_ROWS_AT_ONCE)
        offsets = range(0, len(dataset), _ROWS_AT_ONCE)
        rows = (row for table, first in zip(tables, offsets, strict=True)
                for row in self._batch_rows(table, where, first, None))  # fmt: skip
        return len(dataset), rows

    def _columns(self, names: Sequence[str], where: str) -> list[str]:
        needed = [self.image_column] + ([] if self.num_classes is None else [self.label_column])
        for column in needed:
            if column not in names:
                raise UserError(f"{where}: no column {column!r}, it has {', '.join(names)}")
        return needed

    def _batch_rows(self, batch: Any, where: str, first_row: int, folder: Path | None) -> Iterator[Row]:
        images = batch.column(self.image_column).to_pylist()
        labels = [None] * len(images) if self.num_classes is None else batch.column(self.label_column).to_pylist()
        for row, (image, label) in enumerate(zip(images, labels, strict=True), start=first_row):
            name = f"{where} row {row}"
            yield Row(name, _image_source(image, name, folder), label)


def _image_source(image: Any, where: str, folder: Path | None) -> bytes | Path:
    if isinstance(image, bytes):
        return image
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, None)
    if isinstance(content, bytes):
        return content
    if folder is not None and path:
        file = Path(folder, path).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise UserError(f"{where}: image path {path!r} leads out of {folder}")
        return file
    raise UserError(f"{where}: no image bytes, found {type(image).__name__}")


def _sha256_of_rows(rows: Iterator[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        image = row.image if isinstance(row.image, bytes) else row.image.read_bytes()
        digest.update(f"{len(image)} {row.label} ".encode() + image)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
