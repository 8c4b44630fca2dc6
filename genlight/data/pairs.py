"""Pairs of noise and tokens that a teacher makes, to train on; evaluation is that of the teacher's images."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from genlight.data.cache import default_cache_folder, fingerprint_of
from genlight.data.image_datamodule import ImageDataModule
from genlight.data.loaders import FixedLoader, TrainLoader
from genlight.data.sampling import BatchOrder
from genlight.diffusion.flow_codes import Method
from genlight.errors import UserError, in_config
from genlight.modules.dd_pairs import (
    Pairs,
    PairSettings,
    folder_of,
    make_pairs,
    missing_shards,
    pairs_record,
    read_pairs,
)
from genlight.modules.token_folder import TokenTeacher, read_token_teacher
from genlight.nets.autoregressive import check_guidance_range
from genlight.reports.cost import Phase

# shards that a dry run makes; the first one warms up
_TRIED = 3
# pairs for each class below which a warning is due
_FEW = 20


class PairsDataModule(LightningDataModule):
    """Trains on pairs of `genlight.modules.dd_pairs`, made before a fit where they are missing.

    Training batches are {"noise": float32 [B, N, C], "tokens": int64 [B, N], "label": int64 [B]}, with `guidance_range`
    "guidance": float32 [B] too, in the order of every data module. All else, evaluation noise and real images, is asked
    of `images`.

    Args:
        images: what the teacher was trained on.
        teacher: as `genlight.modules.token_folder.read_token_teacher` takes it; read when it is needed.
        num_pairs, shard_size, seed, steps, method, guidance_range: as in `genlight.modules.dd_pairs.PairSettings`.
        batch_size: pairs in a training batch of one device.
        cache: the pairs are kept below it; None is GENLIGHT_CACHE, or the cache folder of the system.

    Attributes:
        dry_run: set to True, a fit makes only a few of the pairs that are missing, in a folder that goes again; they
            stand for all others.
        left: what it will then take to make the others.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        images: ImageDataModule,
        teacher: str,
        num_pairs: int,
        batch_size: int,
        seed: int,
        shard_size: int = 512,
        steps: int = 32,
        method: Method = "2m",
        guidance_range: Sequence[float] | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        with in_config("data"):
            scales = None if guidance_range is None else check_guidance_range(guidance_range)
            self.settings = PairSettings(num_pairs, seed, shard_size, steps, method, scales)
            if num_pairs < (images.num_classes or 1):
                raise ValueError(f"num_pairs = {num_pairs} must be at least {images.num_classes}, one for each class")
        self.images = images
        self.name, self.class_names = f"pairs-{images.name}", images.class_names
        self.image_shape, self.num_classes = images.image_shape, images.num_classes
        self.eval_batch_size = images.eval_batch_size
        self.teacher_source, self.batch_size, self.seed, self.cache = teacher, batch_size, seed, cache
        self.dry_run, self.left = False, tuple[Phase, ...]()
        self._teacher: TokenTeacher | None = None
        self._pairs: Pairs | None = None

    @property
    def num_samples(self) -> int:
        return self.images.num_samples

    @num_samples.setter
    def num_samples(self, number: int) -> None:
        self.images.num_samples = number

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.images.noise_shape

    @noise_shape.setter
    def noise_shape(self, shape: tuple[int, ...]) -> None:
        self.images.noise_shape = shape

    @property
    def draw(self) -> str:
        return self.images.draw

    @draw.setter
    def draw(self, draw: str) -> None:
        self.images.draw = draw

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hexadecimal digits) of the images, as reference statistics want it."""
        return self.images.fingerprint

    @property
    def teacher(self) -> TokenTeacher:
        """The teacher, read if need be.

        Raises:
            UserError: it cannot be read, or is of other images or classes.
        """
        if self._teacher is None:
            teacher = read_token_teacher(self.teacher_source)
            for key, mine, its in (
                ("image_shape", self.image_shape, teacher.image_shape),
                ("num_classes", self.num_classes, teacher.num_classes),
            ):
                if mine != its:
                    raise UserError(f"data.images has {key} {mine}, but data.teacher {self.teacher_source} has {its}")
            self._teacher = teacher
        return self._teacher

    def prepare_data(self) -> None:
        self.images.trainer = self.trainer
        self.images.prepare_data()

    def setup(self, stage: str) -> None:
        """Before a fit, make this process's share of the pairs on its device; Lightning waits for all processes.

        Raises:
            UserError: the device has no memory for a shard.
        """
        self.images.trainer = self.trainer
        count, classes = self.settings.num_pairs, self.num_classes or 1
        if count < _FEW * classes:
            rank_zero_warn(
                f"data.num_pairs = {count} are {count / classes:.3g} for each of {classes} classes, fewer than {_FEW}: "
                "little to learn from, and little to count independent tokens in"
            )
        if stage != "fit":
            return
        teacher = self.teacher
        try:
            self._make(torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"memory on the device does not suffice for the {self.settings.shard_size} pairs of a shard: lower "
                "data.shard_size (shards of another size are made anew)"
            ) from error
        finally:
            # training does without: the student's module has a teacher of its own
            teacher.to("cpu")

    def _make(self, device: torch.device) -> None:
        rank, world_size = self._place()
        if self.dry_run and (missing := missing_shards(self._folder, self.settings)):
            self._make_few(device, -(-len(missing) // world_size))
            return
        make_pairs(self._folder, self.teacher, self.settings, device=device, rank=rank, world_size=world_size)

    def _make_few(self, device: torch.device, shards: int) -> None:
        """Instead of so many shards make a few, and time them."""
        size, teacher = self.settings.shard_size, self.teacher
        few = replace(self.settings, num_pairs=min(self.settings.num_pairs, _TRIED * size))
        seconds: list[float] = []
        with tempfile.TemporaryDirectory(prefix="genlight-") as folder:
            for shard in range(few.num_shards):
                begun = time.monotonic()
                make_pairs(folder, teacher, few, device=device, rank=shard, world_size=few.num_shards)
                seconds.append(time.monotonic() - begun)
            made = read_pairs(folder, teacher, few)
        places = torch.arange(self.settings.num_pairs) % len(made)
        guidance = None if made.guidance is None else made.guidance[places]
        self._pairs = replace(made, tokens=made.tokens[places], guidance=guidance)
        if shards > few.num_shards:
            self.left = (Phase("shard of pairs", tuple(seconds[1:]), shards - few.num_shards),)

    @property
    def pairs(self) -> Pairs:
        """The pairs, read if need be; UserError if they are not all made."""
        if self._pairs is None:
            self._pairs = read_pairs(self._folder, self.teacher, self.settings)
        return self._pairs

    def train_dataloader(self) -> TrainLoader:
        try:
            order = BatchOrder(len(self.pairs), self.batch_size, self.seed, *self._place())
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        return TrainLoader(self.pairs, order, 0, self.trainer)

    def val_dataloader(self) -> FixedLoader:
        self.images.trainer = self.trainer
        return self.images.val_dataloader()

    def reference_loader(self, split: str) -> FixedLoader:
        """Real images, see `ImageDataModule.reference_loader`."""
        return self.images.reference_loader(split)

    @property
    def _folder(self) -> Path:
        cache = default_cache_folder() if self.cache is None else self.cache
        return folder_of(cache, self.teacher, self.settings)

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must share with this one: the pairs."""
        record = {**pairs_record(self.teacher, self.settings), "num_pairs": self.settings.num_pairs}
        return {"fingerprint": fingerprint_of(record)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """UserError if training goes on from a checkpoint of other pairs."""
        if str(state_dict.get("fingerprint")) != self.state_dict()["fingerprint"]:
            raise UserError("the checkpoint was trained on other pairs: resume with the same data.* keys and teacher")
