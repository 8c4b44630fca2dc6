"""No method at all: one pass of measurement, the number that every method is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer


class Baseline:
    """Measure the module as it is on the report draw."""

    def run(self, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule) -> dict[str, float]:
        """One ``trainer.validate``; returns the metrics it logged, by name."""
        logged = trainer.validate(module, datamodule=datamodule, verbose=False)
        return {name: float(value) for name, value in logged[0].items()}
