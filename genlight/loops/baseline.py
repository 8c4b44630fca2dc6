"""No method at all: one pass of measurement, the number that every method is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genlight.loops.cost import first_validation, method_cost
from genlight.loops.evaluation import CandidateTrainer
from genlight.loops.result import MethodResult

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from genlight.reports.cost import CostEstimate

# of the samples
_PICTURES = 1


class Baseline:
    """Measure the module as it is on the report draw."""

    def run(self, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule) -> MethodResult:
        """One ``trainer.validate``; its metrics, by name."""
        logged = trainer.validate(module, datamodule=datamodule, verbose=False)
        return MethodResult({name: float(value) for name, value in logged[0].items()})

    def dry_run(self, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule) -> CostEstimate:
        """A few batches, and as many more as there are."""
        first = first_validation(trainer, module, datamodule, dry=True)
        return method_cost(CandidateTrainer(trainer), first, [], [], pictures=_PICTURES)
