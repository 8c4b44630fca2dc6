"""Training of the small classifier whose features the metrics use where Inception's weights cannot be had."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional

from genlight.io import save_tensors
from genlight.modules.data_check import check_classes, check_images
from genlight.modules.networks import check_state_dict
from genlight.modules.optimization import Optimization
from genlight.nets.classifier import Classifier

FILE_NAME = "classifier.safetensors"


class ClassifierModule(Optimization, LightningModule):
    """Cross-entropy on real images, with label smoothing, random crops and flips.

    Args:
        network: the classifier.
        optimizer, lr_scheduler: partials, as in DiffusionModule.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
        crop_padding: random crops from images padded by this many pixels of -1 (black) on each side; 0 for none.
        horizontal_flip: mirror each training image with probability 1/2; wrong for digits.

    Raises:
        ValueError: an argument is out of range.
        TypeError: the network is not a Classifier.
    """

    def __init__(
        self,
        network: Classifier,
        *,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        label_smoothing: float = 0.1,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, Classifier):
            raise TypeError(
                f"module.network is a {type(network).__name__}; expected genlight.nets.classifier.Classifier"
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"module.label_smoothing must be in [0, 1), got {label_smoothing}")
        if crop_padding < 0:
            raise ValueError(f"module.crop_padding must not be negative, got {crop_padding}")
        self.network = network
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.label_smoothing = label_smoothing
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        config = self.network.config
        return config["channels"], config["image_size"], config["image_size"]

    def check_data(self, datamodule: Any) -> None:
        """UserError naming both config keys and values if the data does not fit the network."""
        check_images(datamodule, self.image_shape, "module.network.channels", "module.network.image_size")
        check_classes(datamodule, self.network.config["num_classes"], "module.network.num_classes")

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> Tensor:
        images = random_crop(batch["image"], self.crop_padding)
        if self.horizontal_flip:
            images = random_flip(images)
        loss = functional.cross_entropy(self.network(images), batch["label"], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> None:
        logits, label = self.network(batch["image"]), batch["label"]
        size = len(label)
        loss = functional.cross_entropy(logits, label)
        accuracy = (logits.argmax(1) == label).float().mean()
        self.log("val/loss", loss, batch_size=size, sync_dist=True)
        self.log("val/accuracy", accuracy, batch_size=size, sync_dist=True, prog_bar=True)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def export(self, folder: str | Path) -> Path:
        """Write ``classifier.safetensors`` with the architecture as JSON in its header; returns the path.

        ``genlight.metrics.features.ClassifierFeatures`` reads it.
        """
        path = Path(folder) / FILE_NAME
        architecture = {"class": "genlight.nets.classifier.Classifier", "config": self.network.config}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        save_tensors(path, tensors, {"architecture": json.dumps(architecture, sort_keys=True)})
        return path

    def save_pretrained(self, folder: str | Path) -> None:
        """The same as :meth:`export`, under the name that every module has."""
        self.export(folder)


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Each image [B, C, H, W] moved by its own offset of at most ``padding`` pixels each way, filled with -1."""
    if padding == 0:
        return images
    batch, _, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4, value=-1.0)
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1)).to(images.device)
    rows = top + torch.arange(height, device=images.device)  # [B, H]
    columns = left + torch.arange(width, device=images.device)  # [B, W]
    index = torch.arange(batch, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def random_flip(images: Tensor) -> Tensor:
    """Each image [B, C, H, W] mirrored left to right with probability 1/2."""
    flip = (torch.rand(len(images)) < 0.5).to(images.device)
    return torch.where(flip[:, None, None, None], images.flip(-1), images)
