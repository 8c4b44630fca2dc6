"""The calibration pass: full-precision samplings under the trainer, the inputs of layers observed at every step.

Statistics are saved on the way, and again at the end; a pass that was interrupted goes on after the last batch saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from genlight.errors import UserError, in_config
from genlight.loops.evaluation import CandidateTrainer, drawing, whole_loader
from genlight.memory import Halves
from genlight.quantization.calls import numbered_calls
from genlight.quantization.context import SamplingContext
from genlight.quantization.observers import InputObserver
from genlight.quantization.statistics import (
    BatchPart,
    InputStatistics,
    StatisticsSettings,
    load_statistics,
    save_statistics,
)

SAVE_SECONDS = 60.0
CALIBRATION = "calibration"  # for the person who waits


class _CalibrationStep(LightningModule):
    """Each validation step samples one batch while the network is observed."""

    def __init__(
        self,
        module: Any,
        network: nn.Module,
        contexts: tuple[SamplingContext, ...],
        names: list[str],
        settings: StatisticsSettings,
        path: Path,
        fingerprint: str,
        progress: Callable[[int], None],
        writes: bool,
        rows: int,
    ) -> None:
        super().__init__()
        self.module, self.contexts = module, contexts
        self._network, self._names, self._settings = [network], names, settings
        self.path, self.fingerprint, self._progress, self._writes = path, fingerprint, progress, writes
        self.begin(rows)

    def begin(self, rows: int) -> None:
        """Go on from what is saved, with so many samples at a time."""
        self.rows, self.done, self._before = rows, 0, dict[str, InputStatistics]()
        self._observer: InputObserver | None = None
        self._saved = time.monotonic()
        if self.path.is_file():
            self._before, self.done = load_statistics(self.path, fingerprint=self.fingerprint)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        if batch_idx < self.done:
            return
        network = self._network[0]
        if self._observer is None:  # only now the network is on its device
            device = next(network.parameters()).device
            before = {name: on_device(found, device) for name, found in self._before.items()}
            self._observer = InputObserver(network, self._names, self._settings, statistics=before)
        noise, label = batch["noise"], batch.get("label")
        with self._observer, numbered_calls(network, self.contexts):
            for start in range(0, len(noise), self.rows):
                stop = min(start + self.rows, len(noise))
                self._observer.begin(f"batch {batch_idx}", BatchPart(start, stop, len(noise)))
                self.module.sample_latents(noise[start:stop], None if label is None else label[start:stop])
        self.done = batch_idx + 1
        self._progress(self.done)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what was observed so far, in the process that writes."""
        if self._observer is not None and self._writes:
            save_statistics(self.path, self._observer.statistics, fingerprint=self.fingerprint, batches=self.done)
        self._saved = time.monotonic()


def calibrated_statistics(
    evaluations: CandidateTrainer,
    module: Any,
    datamodule: Any,
    network: nn.Module,
    contexts: tuple[SamplingContext, ...],
    names: list[str],
    settings: StatisticsSettings,
    samples: int,
    path: Path,
    fingerprint: str,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of layers over `samples` of the search draw, on the network's device.

    Every process observes all samples, for sums in another order would round differently; all read the first one's.
    Where memory runs out, a process goes on from what is saved, with half as many samples at a time: what was observed
    of a batch that failed counts nowhere.

    Args:
        evaluations, module, datamodule: of the run.
        network: of the module.
        contexts: the place of each call of the network in a sampling.
        names: layers to observe.
        settings: what is kept.
        samples: how many are made.
        path: where statistics are saved; what is there is gone on from.
        fingerprint: of model, data and settings.

    Raises:
        UserError: the file is of another calibration, or inputs are not finite.
        CorruptFileError: the file is damaged.
        torch.OutOfMemoryError: memory does not suffice for one sample.
    """
    display, size = evaluations.display, int(datamodule.eval_batch_size)
    progress = partial(display.show, CALIBRATION)
    writes = bool(evaluations.trainer.is_global_zero)
    step = _CalibrationStep(module, network, contexts, names, settings, path, fingerprint, progress, writes, size)
    evaluations.agreed(None)  # all have read what is there before it is written anew

    def observe(rows: int) -> None:
        if rows < step.rows:
            step.begin(rows)
        shown = display.phase(CALIBRATION, -(-samples // size), step.done)
        with shown, drawing(datamodule, "search", samples), in_config("method"):
            evaluations.validate(step, dataloaders=whole_loader(datamodule))

    Halves().attempt(observe, size)
    step.save()
    evaluations.agreed(None)
    # read back, so that a fresh calibration and one that was taken from a file are the same
    return read_statistics(path, network, fingerprint, step.done)


def read_statistics(path: Path, network: nn.Module, fingerprint: str, batches: int) -> dict[str, InputStatistics]:
    """Statistics of a finished calibration, on the network's device.

    Raises:
        UserError: there is no such file, it is of another calibration, or of one that did not come to its end.
        CorruptFileError: the file is damaged.
    """
    if not path.is_file():
        raise UserError(f"method.statistics={path}: there is no such file")
    found, done = load_statistics(path, fingerprint=fingerprint)
    if done < batches:
        raise UserError(f"{path} holds {done} of {batches} batches: let that calibration come to its end")
    device = next(network.parameters()).device
    return {name: on_device(entry, device) for name, entry in found.items()}


def on_device(statistics: InputStatistics, device: torch.device) -> InputStatistics:
    """Statistics with their tensors on a device, but for the keys of the sample."""
    moved: dict[str, Any] = {
        key: value.to(device)
        for key, value in vars(statistics).items()
        if isinstance(value, torch.Tensor) and key != "sample_keys"
    }
    return replace(statistics, **moved)
