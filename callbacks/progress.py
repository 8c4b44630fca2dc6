"""Progress over the whole run with an estimate of what is left: a rich bar, or plain lines without a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ProgressBar

from genlight.reports.progress import ProgressDisplay

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class StepProgress(ProgressBar):
    """One bar for all optimizer steps of a fit, one for each validation, and those of the parts of a method.

    Args:
        line_interval: seconds between two plain lines where standard error is no terminal.
        refresh_per_second: redraws of the bar.
    """

    def __init__(self, line_interval: float = 60.0, refresh_per_second: float = 4.0) -> None:
        super().__init__()
        self.display = ProgressDisplay(line_interval, refresh_per_second)

    def enable(self) -> None:
        self.display.enabled = True

    def disable(self) -> None:
        self.display.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        # every step that is due has a line with its loss: none is needed between two of them
        self.display.start("fit", total, trainer.global_step, beats=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        note = None
        if self.display.due():  # reading the loss waits for the device, so it is read only when it will be shown
            loss = trainer.callback_metrics.get("train/loss")
            note = "" if loss is None else f"loss {float(loss):.4f}"
        self.display.show("fit", trainer.global_step, note)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.display.stop("fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        finite = [int(b) for b in batches if b != float("inf")]
        self.display.start("validate", sum(finite))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self.display.show("validate", batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.display.stop("validate")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        """The display is also a method's, which goes on after a validation."""
        self.display.stop("validate")
        self.display.stop("fit")


def display_of(trainer: Any) -> ProgressDisplay:
    """The display of a run; a silent one where it shows no progress, and in other processes than the first."""
    shown = [each.display for each in getattr(trainer, "callbacks", ()) if isinstance(each, StepProgress)]
    if shown and trainer.is_global_zero:
        return shown[0]
    silent = ProgressDisplay()
    silent.enabled = False
    return silent
