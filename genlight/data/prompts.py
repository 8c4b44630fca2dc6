"""Prompts as classes: evaluation noise whose labels are the numbers of prompts in a list."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule
from torch import Tensor, as_tensor
from torch.utils.data import Dataset

from genlight.data.cache import fingerprint_of
from genlight.data.evaluation_noise import EvaluationNoise, check_draw
from genlight.data.loaders import FixedLoader
from genlight.data.sampling import even_batches, generator
from genlight.errors import UserError
from genlight.io import parse_json

EMBEDDED = Path(__file__).with_name("prompts.txt")
# the parts of a list do not depend on the seed of a run: runs with other seeds must not report on searched prompts
_SPLIT_SEED, _SPLIT_KEY = 0, 4
_PARTS = {"search": 0.25, "select": 0.25}  # the rest reports


class PromptsDataModule(LightningDataModule):
    """A list of prompts for text-to-image and text-to-video pipelines; there are no images to train on.

    Validation batches are {"index", "noise", "label"} of `EvaluationNoise`; label[i] is the number of the prompt of
    sample i in `prompts`. The draws "search", "select" and "report" have prompts of their own: a fixed permutation,
    the same for all seeds, gives a quarter of the list to each of the first two and the rest to the report. A list of
    fewer than three prompts is shared by all draws; the noise is disjoint in any case.

    Args:
        path: text file with one prompt a line, or a .csv or .jsonl file; None: an embedded list of 64. Empty lines are
            left out, and prompts that came before.
        column: of the prompts in a .csv or .jsonl file.
        num_prompts: take only the first ones; None: all.
        num_samples: generated samples in one evaluation; they go through the prompts of the draw in turn.
        eval_batch_size: samples in a validation batch of one device.
        seed: of the evaluation noise.
        noise_shape: shape of one sample's noise; None: set by the run, from the module.
        draw: "search", "select" or "report".

    Raises:
        ValueError: a value out of range.
    """

    name = "prompts"
    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | None = None,
        column: str = "prompt",
        num_prompts: int | None = None,
        num_samples: int = 32,
        eval_batch_size: int = 4,
        seed: int = 0,
        noise_shape: Sequence[int] | None = None,
        draw: str = "report",
    ) -> None:
        super().__init__()
        counts = {"num_prompts": num_prompts, "num_samples": num_samples, "eval_batch_size": eval_batch_size}
        for key, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value} must be at least 1")
        if seed < 0:
            raise ValueError(f"data.seed={seed} must not be negative")
        self.path, self.column, self.num_prompts = path, column, num_prompts
        self.num_samples, self.eval_batch_size, self.seed = num_samples, eval_batch_size, seed
        self.noise_shape: tuple[int, ...] | None = None if noise_shape is None else tuple(noise_shape)
        self.draw = check_draw(draw)
        self._prompts: list[str] | None = None

    @property
    def prompts(self) -> list[str]:
        """All prompts, of all draws; labels are numbers in this list.

        Raises:
            UserError: the file is missing or not as described by the config.
        """
        if self._prompts is None:
            self._prompts = read_prompts(self.path or EMBEDDED, self.column)[: self.num_prompts]
        return self._prompts

    @property
    def num_classes(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hexadecimal digits) of the prompts."""
        return fingerprint_of([self.name, self.prompts])

    def draw_labels(self, draw: str) -> list[int]:
        """Numbers of the prompts of a draw, in the order of its samples."""
        return split_prompts(len(self.prompts), draw)

    def val_dataloader(self) -> FixedLoader:
        if self.noise_shape is None:
            raise UserError("data.noise_shape is null: it is taken from the module, which was not asked yet")
        labels = self.draw_labels(self.draw)
        noise = EvaluationNoise(self.num_samples, self.noise_shape, len(labels), self.seed, self.draw)
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        try:
            batches = even_batches(len(noise), self.eval_batch_size, rank, world_size)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        return FixedLoader(_PromptNoise(noise, labels), batches)

    def train_dataloader(self) -> NoReturn:
        """UserError: there is nothing to train on."""
        raise UserError("data=prompts holds no images to train on: use validate, or for fit another data set")

    def reference_loader(self, split: str) -> NoReturn:
        """UserError: there are no real images."""
        raise UserError("data=prompts holds no real images to compare with: use metrics=clip, video or none")

    @property
    def image_shape(self) -> NoReturn:
        """UserError: there are no images."""
        raise UserError("data=prompts holds no images: it is made for module=pipeline")


class _PromptNoise(Dataset[dict[str, Tensor]]):
    """Evaluation noise whose labels are numbers of the whole list."""

    def __init__(self, noise: EvaluationNoise, labels: Sequence[int]) -> None:
        self.noise, self.labels = noise, as_tensor(labels)

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        batch = self.noise.__getitems__(indices)
        return {**batch, "label": self.labels[batch["label"]]}


def split_prompts(count: int, draw: str) -> list[int]:
    """Numbers below `count` that belong to a draw; see `PromptsDataModule`."""
    order = [int(number) for number in generator(_SPLIT_SEED, _SPLIT_KEY).permutation(count)]
    if count < 3:
        return sorted(order)
    start = 0
    for name, share in _PARTS.items():
        stop = start + max(1, int(share * count))
        if name == draw:
            return order[start:stop]
        start = stop
    return order[start:]


def read_prompts(path: str | Path, column: str = "prompt") -> list[str]:
    """The prompts of a text file, or of a column of a .csv or .jsonl file: stripped, none empty, none twice.

    Raises:
        UserError: missing, not UTF-8, without that column, or without prompts.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data.path={path}: there is no such file")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    lines: list[Any]
    if path.suffix == ".csv":
        rows = csv.DictReader(text.splitlines(keepends=True))
        _check_column(path, column, rows.fieldnames or ())
        lines = [row[column] for row in rows]
    elif path.suffix == ".jsonl":
        lines = [_entry(path, number, line, column) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        lines = text.splitlines()
    prompts = [line.strip() for line in lines if isinstance(line, str) and line.strip()]
    if not prompts:
        raise UserError(f"data.path={path} holds no prompts")
    return list(dict.fromkeys(prompts))


def _entry(path: Path, number: int, line: str, column: str) -> Any:
    value = parse_json(line, f"{path}, line {number}")
    if not isinstance(value, dict):
        raise UserError(f"data.path={path}: line {number} is no JSON object")
    _check_column(path, column, list(value))
    return value[column]


def _check_column(path: Path, column: str, known: Sequence[str]) -> None:
    if column not in known:
        raise UserError(f"data.column={column}: {path} has {', '.join(known) or 'no columns'}")
