"""Lightning's moving average of the weights, on the device that trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from typing_extensions import override


class EMAWeightAveraging(lightning_callbacks.EMAWeightAveraging):
    """Lightning's callback of this name; without a `device` the average lies where the module is trained.

    Lightning leaves it where the module is when it is set up, which is the CPU: all weights would be copied from the
    GPU after every step.

    Args:
        decay: share of the average that stays at a step.
        update_starting_at_step: optimizer steps before the first update.
        device: where the average lies; None is the device that trains.
        options: as Lightning's.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_starting_at_step: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(device, decay=decay, update_starting_at_step=update_starting_at_step, **options)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = self._device or trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
