"""Lightning's moving average of the weights, on the device that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from torch import Tensor
from typing_extensions import override


class EMAWeightAveraging(lightning_callbacks.EMAWeightAveraging):
    """Lightning's callback of this name; without a `device` the average lies where the module is trained.

    Lightning leaves it where the module is when it is set up, which is the CPU: all weights would be copied from the
    GPU after every step.

    The first update copies the weights, and whoever looks at the average before that gets the weights too. Lightning's
    is the untrained network until then, and in the end, where a training is shorter.

    Args:
        decay: share of the average that stays at a step.
        update_starting_at_step: optimizer steps before the first update.
        device: where the average lies; None is the device that trains.
        ramp: begin with a smaller share, min(decay, (1 + n) / (10 + n)) after n updates, so that the average of a short
            training forgets how it began. n travels in the checkpoints.
        options: as Lightning's.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_starting_at_step: int | None = None,
        device: str | None = None,
        ramp: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(device, decay=decay, update_starting_at_step=update_starting_at_step, **options)
        if ramp:
            self._kwargs["avg_fn"] = ramped_average(decay)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = self._device or trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    def _follow(self, module: LightningModule) -> None:
        """Make the average the weights, where it was never updated."""
        average = self._average_model
        if average is not None and average.n_averaged == 0:
            average.update_parameters(module)  # the first one copies
            average.n_averaged.zero_()


def ramped_average(decay: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The next average of an average, the weights and the number of updates before, see `EMAWeightAveraging`."""

    def average(kept: Tensor, weights: Tensor, updates: Tensor) -> Tensor:
        share = ((1 + updates) / (10 + updates)).clamp(max=decay)
        return share * kept + (1 - share) * weights

    return average
