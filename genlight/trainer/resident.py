"""Validating the same module many times: on one device, where it stays between two validations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from typing_extensions import override


class ResidentStrategy(SingleDeviceStrategy):
    """One device, where the module stays: Lightning's own strategy moves it to the CPU after each validation."""

    @override
    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


def is_sharded(trainer: Trainer) -> bool:
    """Whether no process holds the whole module."""
    strategy = trainer.strategy
    zero_stage_3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return zero_stage_3 or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def local_trainer(trainer: Trainer) -> Trainer:
    """A silent trainer of this process alone, on its device of `trainer` and in the same precision."""
    return Trainer(
        accelerator=trainer.accelerator,
        devices=1,
        strategy=ResidentStrategy(trainer.strategy.root_device),
        precision=trainer.precision,
        inference_mode=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


@contextmanager
def silenced(trainer: Trainer) -> Iterator[Trainer]:
    """A trainer without callbacks and loggers for as long as the context lasts."""
    kept: Any = (trainer.callbacks, trainer.loggers)  # type: ignore[attr-defined]
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    try:
        yield trainer
    finally:
        trainer.callbacks, trainer.loggers = kept  # type: ignore[attr-defined]
