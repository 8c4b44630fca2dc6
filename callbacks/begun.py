"""The moment from which a run counts, and the one that it replaces does not."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class Begun(Callback):
    """Calls `begin` before the first training step, or after the first validation of a measurement.

    Args:
        begin: may be called more than once.

    Attributes:
        says_itself: the method may refuse what it is told after that validation, and then calls `has_begun`.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin
        self.says_itself = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING and not self.says_itself:
            self.begin()


def has_begun(trainer: Trainer) -> None:
    """Say that the work of a method begins."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Begun):
            callback.begin()
