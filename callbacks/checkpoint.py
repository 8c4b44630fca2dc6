"""Checkpoints by optimizer step, the last step included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from genlight.trainer.resident import is_sharded


class StepCheckpoint(ModelCheckpoint):
    """Saves every ``every_n_train_steps`` optimizer steps and after the last one, and keeps the newest ``save_top_k``.

    Lightning's own callback leaves out the end of a training whose length is no multiple of the interval, and puts off
    a step that ends an epoch until the next validation. Both are saved in ``on_train_batch_end``: later, weight
    averaging has put the average in the place of the trained weights.

    Where weights lie in shards, the artifact is made of the newest checkpoint. What ends a training after a validation,
    such as early stopping, comes too late for ``on_train_batch_end``: that step is saved in ``on_train_end``, and a run
    that goes on from there is over.

    Args:
        dirpath: folder of the checkpoints, ``step-000250.ckpt`` and so on.
        every_n_train_steps: the interval, at least 1.
        save_top_k: how many of the newest are kept, -1 for all.
        also_at: further steps that are saved.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, dirpath: str, every_n_train_steps: int = 250, save_top_k: int = 2, also_at: Sequence[int] = ()
    ) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"callbacks.checkpoint.every_n_train_steps={every_n_train_steps} must be at least 1")
        if save_top_k < -1 or save_top_k == 0:
            raise ValueError(f"callbacks.checkpoint.save_top_k={save_top_k} must be at least 1, or -1 to keep all")
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
        )
        self._also_at = frozenset(also_at)
        self._over = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step
        due = step % self._every_n_train_steps == 0 or step in self._also_at or _is_last(trainer)
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self._over

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if is_sharded(trainer) and not self._over and not self._should_skip_saving_checkpoint(trainer):
            self._over = trainer.should_stop
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "over": self._over}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._over = bool(state_dict.get("over", False))


def _is_last(trainer: Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    last_epoch = epochs > 0 and trainer.current_epoch + 1 >= epochs and loop.batch_progress.is_last_batch
    return trainer.should_stop or trainer.global_step == trainer.max_steps or last_epoch
