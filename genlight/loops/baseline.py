"""No method at all: one pass of measurement, the number that every method is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genlight.loops.result import MethodResult

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer


class Baseline:
    """Measure the module as it is on the report draw."""

    def run(self, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule) -> MethodResult:
        """One ``trainer.validate``; its metrics, by name."""
        logged = trainer.validate(module, datamodule=datamodule, verbose=False)
        return MethodResult({name: float(value) for name, value in logged[0].items()})

    def dry_run(self, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule) -> None:
        """A few batches; the timer of the trainer extrapolates."""
        trainer.validate(module, datamodule=datamodule, verbose=False)
