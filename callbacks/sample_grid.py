"""A picture of the first samples after every validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class SampleGrid(Callback):
    """Writes ``grid_images`` of the module as PNG: step by step in a fit, ``samples.png`` in a validation.

    Args:
        dirpath: folder of the pictures.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = dirpath

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images: Any = getattr(pl_module, "grid_images", None)
        if images is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        from genlight.reports.figures import sample_grid

        fitting = trainer.state.fn == TrainerFn.FITTING
        path = Path(self.dirpath) / (f"samples-step{trainer.global_step:06d}.png" if fitting else "samples.png")
        sample_grid(images, path)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [str(path)], step=trainer.global_step)
