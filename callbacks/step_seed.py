"""Randomness of a training step as a pure function of (seed, batch, rank), so that a resumed run draws what the run
never stopped would have drawn."""

from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def step_seed(seed: int, batch: int, rank: int) -> int:
    """A seed of 64 bits for one training batch on one rank; `batch` counts from 0 across epochs."""
    return int(numpy.random.SeedSequence(seed, spawn_key=(batch, rank)).generate_state(1, numpy.uint64)[0])


class StepSeed(Callback):
    """Seed torch before each training batch. With `ExactResume` beside it, a resumed run is equal bit for bit.

    Args:
        seed: the run's seed, at least 0.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # `processed` is the one counter that is right after every kind of restart: `ready` also counts a batch that an
        # exception cut short.
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        torch.manual_seed(step_seed(self.seed, done, trainer.global_rank))
