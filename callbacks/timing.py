"""Time of single steps, for the estimate before a run and for predicted against real after it."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from genlight.errors import UserError
from genlight.reports.cost import CostEstimate, Phase, PlannedFile, estimate
from genlight.reports.report import size

WARM_UP = 2
MEASURED = 3
# quick steps are measured for so many seconds, but no more than so many
_SECONDS, _MOST = 1.0, 30


class StepTimer(Callback):
    """Times a few steps after warm-up, end to end (data, network, callbacks), and extrapolates to the whole run.

    A fit measures its sanity batch of validation and `MEASURED` optimizer steps; a validation `MEASURED` batches.
    The estimate is printed once, unless `quiet`, and is `estimate` from then on. Where a method says what all of it
    costs, the timer is quiet and stops nothing; `batches` are what it measured.

    Args:
        started: ``time.monotonic()`` at the start of the process, for the time of setting up.
        stop: stop the trainer when enough is measured (a dry run).
        kept_checkpoints: how many the run keeps at once.
        folder: where there must be room; None: the trainer's.

    Raises:
        UserError: what the run will keep does not fit on the disk.
    """

    def __init__(
        self, started: float, stop: bool = False, kept_checkpoints: int = 0, folder: str | None = None
    ) -> None:
        self.started = started
        self.stop = stop
        self.quiet = False
        self.kept_checkpoints = kept_checkpoints
        self.folder = folder
        self.estimate: CostEstimate | None = None
        self._setup_seconds = 0.0
        self._steps: list[float] = []
        self._batches: list[float] = []
        self._last = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps, self._first_step = [], trainer.global_step
        self._mark()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.estimate is not None or trainer.fit_loop._should_accumulate():
            return
        self._steps.append(self._lap(pl_module))
        measured = self._steps[WARM_UP:]
        if len(measured) >= MEASURED and (sum(measured) >= _SECONDS or len(measured) >= self._most_steps(trainer)):
            self._finish(trainer, self._fit_phases(trainer), _planned_files(trainer, pl_module, self.kept_checkpoints))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = [] if trainer.state.fn != TrainerFn.FITTING or not self._batches else self._batches
        self._mark()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.estimate is not None:
            return
        self._batches.append(self._lap(pl_module))
        if trainer.state.fn != TrainerFn.FITTING and len(self._batches) == 1 + MEASURED:
            count = sum(int(n) for n in trainer.num_val_batches)
            self._finish(trainer, [Phase("batch of samples", tuple(self._batches[1:]), count)], [])

    @property
    def batches(self) -> list[float]:
        """Seconds of the first batches of the first validation; the first one warms up."""
        return list(self._batches)

    def _most_steps(self, trainer: Trainer) -> int:
        """So that a short run is estimated before it is over."""
        total = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        return max(MEASURED, min(_MOST, (total - self._first_step) // 4))

    def _mark(self) -> None:
        self._last = time.monotonic()
        self._setup_seconds = self._setup_seconds or self._last - self.started

    def _lap(self, pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.monotonic()
        self._last, elapsed = now, now - self._last
        return elapsed

    def _fit_phases(self, trainer: Trainer) -> list[Phase]:
        total = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        left = max(total - self._first_step, 0)
        phases = [Phase("training step", tuple(self._steps[WARM_UP:]), left)]
        if self._batches:
            rounds = _validations(trainer, left)
            per_round = sum(int(n) for n in trainer.num_val_batches)
            phases.append(Phase("batch of samples", (max(self._batches),), rounds * per_round))
        return phases

    def _finish(self, trainer: Trainer, phases: list[Phase], files: list[PlannedFile]) -> None:
        folder = self.folder or trainer.default_root_dir
        self.estimate = estimate(phases, files, folder, setup_seconds=self._setup_seconds)
        if not self.estimate.fits_on_disk:
            needed, free = size(self.estimate.disk_needed_bytes), size(self.estimate.disk_free_bytes)
            raise UserError(f"the run will keep {needed} in {folder}, where {free} are free: make room, or keep fewer "
                            "checkpoints (callbacks.checkpoint.save_top_k)")  # fmt: skip
        if self.stop and not self.quiet:
            trainer.should_stop = True
            trainer.limit_val_batches = 0
        elif trainer.is_global_zero and not self.quiet:
            print_line(self.estimate.line())


def print_line(text: str) -> None:
    """A line for the person who watches, on standard error like the progress bar."""
    import sys

    sys.stderr.write(text + "\n")


def _validations(trainer: Trainer, steps: int) -> int:
    """How many validations a fit of this many optimizer steps runs."""
    batches = steps * trainer.accumulate_grad_batches
    if trainer.check_val_every_n_epoch is None and trainer.val_check_interval:
        return int(batches // float(trainer.val_check_batch or trainer.val_check_interval))
    per_epoch = max(int(trainer.num_training_batches), 1)
    return batches // (per_epoch * (trainer.check_val_every_n_epoch or 1))


def _planned_files(trainer: Trainer, module: LightningModule, kept: int) -> list[PlannedFile]:
    """Checkpoints that are kept at once, and the artifact; by the size of the tensors in them."""
    weights = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    states = [s for optimizer in trainer.optimizers for s in optimizer.state.values() if isinstance(s, dict)]
    moments = sum(v.numel() * v.element_size() for s in states for v in s.values() if isinstance(v, torch.Tensor))
    averaged = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
    checkpoint = weights * (2 if averaged else 1) + moments
    # one more than is kept: the old one is deleted after the new one is whole
    return [PlannedFile("checkpoint", checkpoint, kept + 1), PlannedFile("artifact", weights)]
