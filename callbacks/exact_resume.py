"""What Lightning 2.6 leaves open between a checkpoint and an exactly equal continuation of the run."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from genlight.callbacks.checkpoint_collector import CheckpointCollector
from genlight.callbacks.ema_bank import EMABank
from genlight.trainer.loggers import WholeCSVLogger

_BATCHES = "epoch_loop.batch_progress"
_METRICS = "genlight_metrics"
_VALIDATION_BATCHES = "epoch_loop.val_loop.batch_progress"


class ExactResume(Callback):
    """Make a run that was killed and resumed repeat the batches, validations and weights of one never stopped.

    Six cases need help:

    - A checkpoint between two optimizer steps lacks the gradients accumulated so far. Its weights are those of the last
      step, so its progress is set back to there and the resumed run repeats these batches.
    - A checkpoint at the end of a batch after which a validation is due would resume after that validation, without its
      metrics. It is marked so that the resumed run starts with the validation.
    - A checkpoint at the end of the last batch of an epoch would resume without the hooks of the epoch's end, and count
      epochs wrongly from then on.
    - A checkpoint at the end of an epoch, in a run limited by `max_steps`, would resume inside the finished epoch and
      train one batch too many.
    - A checkpoint of the last step resumes to nothing: the averaged weights would not become the model's, and what
      `CheckpointCollector` and `EMABank` write at the end would be missing.
    - The row of `metrics.csv` of a step is written after the step's checkpoint, and lost where the run dies in between.

    What was logged is kept too, for the report of a run that was killed after its last step.

    Attributes:
        metrics: the last value of each metric at the checkpoint that was resumed from.
    """

    _has_trained = False
    _finishes_epoch = False

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._states: frozenset[str] = frozenset()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is None or trainer.state.fn != TrainerFn.FITTING:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint[_METRICS] = {**self.metrics, **logged}
        progress = loops[_BATCHES]
        current = progress["current"]
        if current["completed"] < current["processed"]:
            _write_row(trainer)
        is_epoch_over = current["processed"] >= trainer.num_training_batches or progress["is_last_batch"]
        ahead = 0 if is_epoch_over else current["processed"] % trainer.accumulate_grad_batches
        if ahead:
            loops[_BATCHES] = _at(progress, -ahead)
        elif current["completed"] == current["processed"] - 1:
            if _is_validation_due(trainer):
                loops[_BATCHES] = _at(progress, 0)
                loops[_VALIDATION_BATCHES] = _validation_begun(loops[_VALIDATION_BATCHES])
            elif is_epoch_over:
                loops[_BATCHES] = _at(progress, 0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.metrics = dict(checkpoint.get(_METRICS, {}))
        self._states = frozenset(checkpoint.get("callbacks", {}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_trained = self._finishes_epoch = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_trained = True
        loop = trainer.fit_loop
        if not loop.restarting:
            return
        epoch: Any = loop.epoch_progress.current
        batches: Any = loop.epoch_loop.batch_progress.current
        if epoch.ready == epoch.started == epoch.processed:
            self._start_next_epoch(trainer)
        elif batches.processed >= trainer.num_training_batches and not _is_validation_due(trainer):
            # All batches are done: with this the epoch loop ends at once, and the hooks of the epoch's end follow.
            loop.epoch_loop.val_loop._has_run = True
            loop.epoch_loop._batches_that_stepped += 1
            self._finishes_epoch = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._finishes_epoch:
            trainer.fit_loop.epoch_loop.restarting = False
            trainer.fit_loop.epoch_loop.reset_restart_stage()
            self._finishes_epoch = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_trained:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.on_train_end(trainer, pl_module)
            elif isinstance(callback, CheckpointCollector | EMABank) and callback.state_key in self._states:
                callback.on_train_start(trainer, pl_module)  # takes up what the checkpoint holds
                callback.on_train_end(trainer, pl_module)

    @staticmethod
    def _start_next_epoch(trainer: Trainer) -> None:
        """What Lightning itself does for runs limited by `max_epochs`."""
        loop = trainer.fit_loop
        loop._restarting = False
        loop.epoch_loop.restarting = False
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
        epoch: Any = loop.epoch_progress.current
        if epoch.completed < epoch.processed:
            loop.epoch_progress.increment_completed()


def last_metrics(trainer: Trainer) -> dict[str, float]:
    """The last value of each metric of a fit; a run that was stopped after its last step logs nothing more, so
    that those of the checkpoint count."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = {name: value for c in callbacks if isinstance(c, ExactResume) for name, value in c.metrics.items()}
    return found | {name: float(value) for name, value in trainer.callback_metrics.items()}


def _write_row(trainer: Trainer) -> None:
    """Into the CSV, before the checkpoint; Lightning logs it once more at the end of the step, everywhere."""
    loggers = trainer.loggers
    trainer.loggers = [logger for logger in loggers if isinstance(logger, WholeCSVLogger)]
    try:
        trainer._logger_connector.update_train_step_metrics()
    finally:
        trainer.loggers = loggers


def _at(progress: dict[str, Any], batches: int) -> dict[str, Any]:
    """Progress as it is when the batch `batches` after the last processed one has completed."""
    scopes = {
        scope: dict.fromkeys(progress[scope], progress[scope]["processed"] + batches) for scope in ("total", "current")
    }
    return {**progress, **scopes, "is_last_batch": progress["is_last_batch"] and batches == 0}


def _validation_begun(progress: dict[str, Any]) -> dict[str, Any]:
    """Progress by which Lightning recognises a validation that was cut short, with no batch of it done."""
    total = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    return {**progress, "total": total, "current": dict.fromkeys(total, 0), "is_last_batch": False}


def _is_validation_due(trainer: Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))
