"""Leave in good order when asked to: SIGTERM or SIGUSR1 from a scheduler, Ctrl-C from a person."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from genlight import io
from genlight.leaving import Leave

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
INTERRUPTED_NAME = "interrupted.ckpt"
_FORCED = 3


class RunInterrupted(SystemExit):
    """Raised to leave a run after a signal; `code` is the exit status (143 for SIGTERM, 130 for Ctrl-C)."""


class SignalGuard(Callback):
    """On the first SIGTERM or Ctrl-C, finish the step, save `interrupted.ckpt` and leave; on the second, leave at once;
    on the third, exit hard.

    A step that a checkpoint callback has just saved whole in that folder is not saved again. In a validation inside
    `fit` that follows a whole step the run leaves without waiting for the validation, which a resumed run repeats; one
    between the batches of a step ends first, and so does the step. Handlers are in place while the trainer's loops run,
    instead of Lightning's own (which leave without saving), and are put back afterwards. SIGUSR1, which schedulers send
    ahead of SIGTERM, asks for the same and never counts as a second signal; what handled it before is called too: in a
    SLURM job that is Lightning's, which puts the job back into the queue.

    Args:
        dirpath: folder of `interrupted.ckpt`; by default the folder of the first checkpoint callback, else the
            trainer's root folder.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._signal: signal.Signals | None = None
        self._count = 0
        self._process = 0
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _move_to_the_end(trainer, self)
        self._install()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        if (code := self._requested(trainer)) is not None:
            self._save(trainer)
            raise RunInterrupted(code)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if (code := self._requested(trainer)) is None:
            return
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            if trainer.fit_loop._should_accumulate():
                return  # the step is not whole: it will be saved where it ends
            _leave_validation(trainer, pl_module)
            self._save(trainer)
        raise RunInterrupted(code)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            self._restore()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()
        newer = [
            path
            for callback in trainer.checkpoint_callbacks
            if (path := getattr(callback, "_last_checkpoint_saved", ""))
        ]
        if newer and trainer.is_global_zero:
            io.remove_path(self._path(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    @contextmanager
    def listening(self) -> Iterator["SignalGuard"]:
        """Handlers in place outside the trainer's loops too, as in a search; ask `requested` between pieces of work."""
        self._install()
        try:
            yield self
        finally:
            self._restore()

    def requested(self, trainer: Trainer) -> int | None:
        """The exit code if any process was asked to stop, the same on all of them."""
        return self._requested(trainer)

    def _install(self) -> None:
        if self._previous:
            return
        self._process, self._count, self._signal = os.getpid(), 0, None
        try:
            for number in (*EXIT_CODES, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._on_signal)
        except ValueError:
            # Only the main thread may handle signals; elsewhere the embedding program does.
            self._previous.clear()

    def _restore(self) -> None:
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A loader's worker inherits this handler; its parent tells it when to stop.
            return
        if number == signal.SIGUSR1:
            self._signal = self._signal or signal.SIGTERM
            before = self._previous.get(signal.SIGUSR1)
            if callable(before) and not isinstance(before, Leave):
                before(number, frame)
            return
        self._count += 1
        self._signal = signal.Signals(number)
        if self._count >= _FORCED:
            os._exit(EXIT_CODES[self._signal])
        if self._count > 1:
            raise RunInterrupted(EXIT_CODES[self._signal])

    def _requested(self, trainer: Trainer) -> int | None:
        """The exit code if any rank was asked to stop, the same on all ranks at the same batch."""
        if trainer.world_size > 1:
            numbers = [
                trainer.strategy.reduce_boolean_decision(self._signal == number, all=False) for number in EXIT_CODES
            ]
            asked = [code for is_asked, code in zip(numbers, EXIT_CODES.values(), strict=True) if is_asked]
            return asked[0] if asked else None
        return None if self._signal is None else EXIT_CODES[self._signal]

    def _path(self, trainer: Trainer) -> Path:
        folders = [path for callback in trainer.checkpoint_callbacks if (path := getattr(callback, "dirpath", None))]
        return Path(self.dirpath or (folders[0] if folders else trainer.default_root_dir)) / INTERRUPTED_NAME

    def _save(self, trainer: Trainer) -> None:
        path = self._path(trainer)
        if not _is_saved(trainer, path.parent):
            trainer.save_checkpoint(path)


def _move_to_the_end(trainer: Trainer, guard: Callback) -> None:
    """After every callback that changes state at the end of a batch (weight averaging), and those that save it."""
    others = [callback for callback in trainer.callbacks if callback is not guard]  # type: ignore[attr-defined]
    trainer.callbacks = [*others, guard]  # type: ignore[attr-defined]


def _is_saved(trainer: Trainer, folder: Path) -> bool:
    """Whether a checkpoint callback has saved the whole state of this step in a folder: the same on all ranks."""
    return any(
        isinstance(callback, ModelCheckpoint)
        and not callback.save_weights_only
        and callback._last_global_step_saved == trainer.global_step
        and Path(callback._last_checkpoint_saved).parent.resolve() == folder.resolve()
        for callback in trainer.checkpoint_callbacks
    )


def _leave_validation(trainer: Trainer, pl_module: LightningModule) -> None:
    """Put the training weights back, and mark the validation as begun only, so that a resumed run repeats it whole."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_validation_epoch_end(trainer, pl_module)
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.total.ready = progress.total.started = 1  # type: ignore[attr-defined]
    trainer.training = True
