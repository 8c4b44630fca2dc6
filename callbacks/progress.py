"""Progress over the whole run with an estimate of what is left: a rich bar, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ProgressBar

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class StepProgress(ProgressBar):
    """One bar for all optimizer steps of a fit, and one for each validation.

    Args:
        line_interval: seconds between two plain lines where standard error is no terminal.
        refresh_per_second: redraws of the bar.
    """

    def __init__(self, line_interval: float = 60.0, refresh_per_second: float = 4.0) -> None:
        super().__init__()
        self.line_interval = line_interval
        self.refresh_per_second = refresh_per_second
        self._enabled = True
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._shown = time.monotonic()

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        self._start("fit", total, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due():  # reading the loss waits for the device, so it is read only when it will be shown
            loss = trainer.callback_metrics.get("train/loss")
            self._show("fit", trainer.global_step, f"loss {float(loss):.4f}" if loss is not None else "")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop("fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        finite = [int(b) for b in batches if b != float("inf")]
        self._start("validate", sum(finite), 0)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._due():
            self._show("validate", batch_idx + 1, "")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop("validate")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for name in list(self._tasks):
            self._stop(name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name in list(self._tasks):
            self._stop(name)

    def _start(self, name: str, total: int, done: int) -> None:
        self._started[name] = (time.monotonic(), done)
        self._tasks[name] = total
        if self._enabled and sys.stderr.isatty():
            self._bar = self._bar or self._new_bar()
            self._tasks[name] = self._bar.add_task(name, total=total or None, completed=done, note="")

    def _due(self) -> bool:
        interval = 1 / self.refresh_per_second if self._bar is not None else self.line_interval
        return self._enabled and time.monotonic() - self._shown >= interval

    def _show(self, name: str, done: int, note: str) -> None:
        self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._tasks[name], completed=done, note=note)
        else:
            sys.stderr.write(self._line(name, done, note) + "\n")

    def _line(self, name: str, done: int, note: str) -> str:
        start, first = self._started[name]
        total, rate = self._tasks[name], (done - first) / max(time.monotonic() - start, 1e-9)
        left = f", about {_duration((total - done) / rate)} left" if rate > 0 and total >= done else ""
        return f"{name} {done}/{total}  {note}  {rate:.2f} per second{left}"

    def _stop(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if self._bar is not None and task is not None:
            self._bar.remove_task(task)
            if not self._tasks:
                self._bar.stop()
                self._bar = None

    def _new_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", Remaining())
        note = TextColumn("{task.fields[note]}")
        bar = Progress(*columns, note, console=Console(stderr=True), refresh_per_second=self.refresh_per_second)
        bar.start()
        return bar


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
