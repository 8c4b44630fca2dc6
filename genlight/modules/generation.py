"""Validation of generators: sample from the batch's own noise, feed the metrics, keep a few images to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genlight.metrics.text_image import middle_frame
from genlight.modules.halving import InHalves

GRID_IMAGES = 64


class LiveParameters:
    """Mixin for modules whose weights a search may write in place."""

    def live_weights(self) -> dict[str, Tensor]:
        """The parameters that the next forward pass reads, by name; not copies."""
        return dict(self.named_parameters())  # type: ignore[attr-defined]


class GeneratorValidation(InHalves, LiveParameters):
    """Mixin for LightningModules that have ``sample(noise, label)``.

    Attributes:
        metrics: None, or an object with reset, update(images, index), compute() and to(device), set from outside. It is
            no submodule: its feature network reaches neither the checkpoint nor the optimizer. Of videos it is given
            the middle frame, or the whole where it has ``takes_videos``.
        grid_images: the first images of the last validation on this rank, at most 64, on the CPU.
    """

    metrics: Any = None
    grid_images: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "metrics":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def sample_whole(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W], or of a generator of videos the whole videos [B, F, C, H, W], in [-1, 1]."""
        images: Tensor = self.sample(noise, label)  # type: ignore[attr-defined]
        return images

    def on_validation_epoch_start(self) -> None:
        self.grid_images = None
        if self.metrics is not None:
            self.metrics.to(self.device)  # type: ignore[attr-defined]
            self.metrics.reset()

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> None:
        noise, label = batch["noise"], batch.get("label")

        def sample(part: slice) -> Tensor:
            return self.sample_whole(noise[part], None if label is None else label[part])

        samples = torch.cat([found for _, found in self.in_halves(len(noise), sample)])
        images = middle_frame(samples)
        if self.metrics is not None:
            self.metrics.update(samples if getattr(self.metrics, "takes_videos", False) else images, batch.get("index"))
        kept = [] if self.grid_images is None else [self.grid_images]
        self.grid_images = torch.cat([*kept, images.cpu()])[:GRID_IMAGES]

    def on_validation_epoch_end(self) -> None:
        if self.metrics is not None and not self.trainer.sanity_checking:  # type: ignore[attr-defined]
            # computed over all ranks already: equal everywhere
            values = {f"val/{name}": float(value) for name, value in self.metrics.compute().items()}
            self.log_dict(values)  # type: ignore[attr-defined]
