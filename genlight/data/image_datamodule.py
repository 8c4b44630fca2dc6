"""What every image data set shares: batches to train on, fixed noise to evaluate with, real images to compare to."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from genlight.data.cache import fingerprint_of
from genlight.data.evaluation_noise import EvaluationNoise, check_draw
from genlight.data.images import ImageFiles, ImagesInMemory
from genlight.data.loaders import FixedLoader, TrainLoader
from genlight.data.sampling import BatchOrder, even_batches
from genlight.data.seeded import SeededDataModule
from genlight.errors import UserError

ImageSet = ImagesInMemory | ImageFiles


def _check_positive(**values: int) -> None:
    for key, value in values.items():
        if value < 1:
            raise ValueError(f"data.{key}={value} must be at least 1")


class ImageDataModule(SeededDataModule):
    """Base of the image data sets; a subclass says how a split is loaded and what identifies its content.

    Training batches are {"image": float32 [B, C, H, W] in [-1, 1], "label": int64 [B]}, without label if
    `num_classes` is None. Validation batches are {"index", "noise", "label"} of `EvaluationNoise`, or, with
    `evaluation="classification"`, the held-out images themselves. Several processes share both without duplicates
    by their rank, so the trainer needs `use_distributed_sampler=False`.

    Args:
        image_size: height and width of an image.
        channels: 1 (grey) or 3 (colour); images of the other kind are converted.
        num_classes: classes of the labels, or None to leave the labels out.
        batch_size: training images in a batch of one device.
        eval_batch_size: samples in a validation or reference batch of one device.
        num_samples: generated samples in one evaluation.
        seed: seed of the training order and of the evaluation noise.
        num_workers: processes that build batches; 0 is fastest for data in memory.
        noise_shape: shape of one sample's noise; None means that of an image.
        draw: which of the disjoint evaluation noises: "search", "select" or "report".
        evaluation: "generation" or "classification".

    Raises:
        ValueError: a value out of range.
    """

    name: str = "images"
    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "test")
    size_multiple: int = 1
    mirror: bool = False

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
    ) -> None:
        super().__init__()
        _check_positive(
            image_size=image_size, batch_size=batch_size, eval_batch_size=eval_batch_size, num_samples=num_samples
        )
        if image_size % self.size_multiple:
            raise ValueError(f"data.image_size={image_size} must be a multiple of {self.size_multiple} for {self.name}")
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels} must be 1 (grey) or 3 (colour)")
        if num_classes is not None:
            _check_positive(num_classes=num_classes)
            if self.class_names and num_classes != len(self.class_names):
                wanted = f"{len(self.class_names)} or null for {self.name}"
                raise ValueError(f"data.num_classes={num_classes} must be {wanted}")
        if min(num_workers, seed) < 0:
            raise ValueError(f"data.num_workers={num_workers} and data.seed={seed} must not be negative")
        if evaluation not in ("generation", "classification"):
            raise ValueError(f'data.evaluation={evaluation!r} must be "generation" or "classification"')
        if evaluation == "classification" and num_classes is None:
            raise ValueError("data.evaluation=classification needs data.num_classes")
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_samples = num_samples
        self.seed = seed
        self.num_workers = num_workers
        self.image_shape = (channels, image_size, image_size)
        self.noise_shape: tuple[int, ...] = self.image_shape if noise_shape is None else tuple(noise_shape)
        _check_positive(**{f"noise_shape[{axis}]": size for axis, size in enumerate(self.noise_shape)})
        self.draw = check_draw(draw)
        self.evaluation = evaluation
        self._images: dict[str, ImageSet] = {}
        self._fingerprint: str | None = None

    def load_images(self, split: str) -> ImageSet:
        """The images of a split, with labels if `num_classes` is set; called once per split."""
        raise NotImplementedError

    def content(self) -> Any:
        """Plain values that change when the data or its split changes, and with nothing else."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hexadecimal digits) of data, split and transform."""
        if self._fingerprint is None:
            facts = [self.name, self.content(), self.image_shape, self.num_classes, self.mirror]
            self._fingerprint = fingerprint_of(facts)
        return self._fingerprint

    def images(self, split: str) -> ImageSet:
        """The images of "train" or "test", loaded at the first call.

        Raises:
            ValueError: another split.
            UserError: the data is missing, damaged or not as described by the config.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}, it has {', '.join(self.splits)}")
        if split not in self._images:
            self._images[split] = self.load_images(split)
        return self._images[split]

    def prepare_data(self) -> None:
        """Decodes the images, on one process of each node; the others then find them in the cache."""
        fitting = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        for split in self.splits:
            if fitting or split == "test":
                self.images(split)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.images("train")

    def train_dataloader(self) -> TrainLoader:
        images = self.images("train")
        rank, world_size = self._place()
        try:
            order = BatchOrder(len(images), self.batch_size, self.seed, rank, world_size, self.mirror)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        return TrainLoader(images, order, self.num_workers, self.trainer)

    def val_dataloader(self) -> FixedLoader:
        if self.evaluation == "classification":
            return self._fixed_loader(self.images("test"), *self._place())
        noise = EvaluationNoise(self.num_samples, self.noise_shape, self.num_classes, self.seed, self.draw)
        return self._fixed_loader(noise, *self._place())

    def reference_loader(self, split: str) -> FixedLoader:
        """All real images of "train" or "test" in fixed order, the same on every process: {"image", "label"}."""
        return self._fixed_loader(self.images(split), 0, 1)

    def _fixed_loader(self, dataset: ImageSet | EvaluationNoise, rank: int, world_size: int) -> FixedLoader:
        try:
            batches = even_batches(len(dataset), self.eval_batch_size, rank, world_size)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        return FixedLoader(dataset, batches, self.num_workers)
