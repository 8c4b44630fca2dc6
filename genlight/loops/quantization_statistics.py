"""The calibration pass: full-precision samplings under the trainer, the inputs of layers observed at every step.

Statistics are saved on the way, and again at the end; a pass that was interrupted goes on after the last batch saved.
Where second moments of all layers do not fit beside the network, there are several passes, each for a part of the
layers, which has a file of its own until all are done.
"""

from __future__ import annotations

import hashlib
import math
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
from genlight.io import remove_path
from genlight.loops.evaluation import CandidateTrainer, drawing, whole_loader
from genlight.memory import Halves, free_memory
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
_ROOM = 0.6  # of the free memory; samplings need the rest
_SAVING_SHARE = 10  # times as long as it takes to save passes before the next one, at least
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
        self._saved, self._pause = time.monotonic(), SAVE_SECONDS
        if self.path.is_file():
            self._before, self.done = load_statistics(self.path, fingerprint=self.fingerprint)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        if batch_idx < self.done:
            return
        network = self._network[0]
        if self._observer is None:  # only now the network is on its device
            device = next(network.parameters()).device
            before = {name: on_device(found, device, ("sample_keys",)) for name, found in self._before.items()}
            self._observer = InputObserver(network, self._names, self._settings, statistics=before)
        noise, label = batch["noise"], batch.get("label")
        with self._observer, numbered_calls(network, self.contexts):
            for start in range(0, len(noise), self.rows):
                stop = min(start + self.rows, len(noise))
                self._observer.begin(f"batch {batch_idx}", BatchPart(start, stop, len(noise)))
                self.module.sample_latents(noise[start:stop], None if label is None else label[start:stop])
        self.done = batch_idx + 1
        self._progress(self.done)
        if time.monotonic() - self._saved > self._pause:
            self.save()

    def save(self) -> None:
        """Write what was observed so far, in the process that writes.

        Raises:
            UserError: a layer was not observed.
        """
        begun = time.monotonic()
        if self._observer is not None:
            _check_observed(self._observer.statistics)
        if self._observer is not None and self._writes:
            save_statistics(self.path, self._observer.statistics, fingerprint=self.fingerprint, batches=self.done)
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, _SAVING_SHARE * (self._saved - begun))

    def end(self) -> None:
        """Save, and let go of what was observed: it may take as much memory as the network."""
        self.save()
        self._observer, self._before = None, {}


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
    """Statistics of the inputs of layers over `samples` of the search draw, as `read_statistics` gives them.

    Every process observes all samples, for sums in another order would round differently; all read the first one's.
    Where memory runs out, a process goes on from what is saved, with half as many samples at a time: what was observed
    of a batch that failed counts nowhere.

    Args:
        evaluations, module, datamodule, network: of the run.
        contexts: the place of each call of the network in a sampling.
        names: layers to observe.
        settings: what is kept.
        samples: how many are made.
        path: where statistics are saved; what is there is gone on from.
        fingerprint: of model, data and settings.

    Raises:
        UserError: the file is of another calibration, inputs are not finite, or a layer was not observed.
        CorruptFileError: the file is damaged.
        torch.OutOfMemoryError: memory does not suffice for one sample.
    """
    display, size = evaluations.display, int(datamodule.eval_batch_size)
    progress, batches = partial(display.show, CALIBRATION), -(-samples // size)
    writes, halves = bool(evaluations.trainer.is_global_zero), Halves()

    def observed(part: list[str], file: Path) -> None:
        step = _CalibrationStep(module, network, contexts, part, settings, file, fingerprint, progress, writes, size)
        evaluations.agreed(None)  # all have read what is there before it is written anew

        def observe(rows: int) -> None:
            if rows < step.rows:
                step.begin(rows)
            shown = display.phase(CALIBRATION, batches, step.done)
            with shown, drawing(datamodule, "search", samples), in_config("method"):
                evaluations.validate(step, dataloaders=whole_loader(datamodule))

        halves.attempt(observe, size)
        step.end()
        evaluations.agreed(None)

    # a file that is there has all layers
    files = evaluations.agreed({path: names} if path.is_file() else _parts(path, network, names, settings))
    for file, part in files.items():
        observed(part, file)
    if writes:
        _join(list(files), path, fingerprint, batches)
    evaluations.agreed(None)
    # read back, so that a fresh calibration and one that was taken from a file are the same
    return read_statistics(path, network, fingerprint, batches)


def _join(files: list[Path], path: Path, fingerprint: str, batches: int) -> None:
    """One file of those of all parts, which are removed; so are those of a run that was killed here."""
    if len(files) > 1:
        found = [load_statistics(file, fingerprint=fingerprint)[0] for file in files]
        save_statistics(path, {k: v for one in found for k, v in one.items()}, fingerprint=fingerprint, batches=batches)
    for file in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        remove_path(file)


def _parts(path: Path, network: nn.Module, names: list[str], settings: StatisticsSettings) -> dict[Path, list[str]]:
    """Layers whose second moments fit together, one at least, in their order, by the file of each part."""
    room, parts, taken = _room(next(network.parameters()).device), list[list[str]](), 0
    for name in names:
        weight: Any = network.get_submodule(name).weight
        needed = 0 if settings.hessian is None else weight[0].numel() ** 2 * settings.hessian.itemsize
        if not parts or taken + needed > room:
            parts.append([])
            taken = 0
        parts[-1].append(name)
        taken += needed
    return {_part_file(path, part): part for part in parts} if len(parts) > 1 else {path: names}


def _room(device: torch.device) -> float:
    """Bytes for second moments on a device, of those that are free; as many as are asked for on a CPU."""
    if device.type != "cuda":
        return math.inf
    free_memory()
    return _ROOM * torch.cuda.mem_get_info(device)[0]


def _part_file(path: Path, part: list[str]) -> Path:
    """Where the statistics of a part of the layers are until all are done."""
    digest = hashlib.sha256("\n".join(part).encode()).hexdigest()[:8]
    return path.with_name(f"{path.stem}-{digest}{path.suffix}")


def read_statistics(path: Path, network: nn.Module, fingerprint: str, batches: int) -> dict[str, InputStatistics]:
    """Statistics of a finished calibration, on the network's device but for the Hessians.

    Those stay in the memory of the host: each is used once for each way to quantize its layers, and all together take
    more than the network.

    Raises:
        UserError: there is no such file, it is of another calibration, or of one that did not come to its end or did
            not observe a layer.
        CorruptFileError: the file is damaged.
    """
    if not path.is_file():
        raise UserError(f"method.statistics={path}: there is no such file")
    found, done = load_statistics(path, fingerprint=fingerprint)
    if done < batches:
        raise UserError(f"{path} holds {done} of {batches} batches: let that calibration come to its end")
    _check_observed(found)
    device = next(network.parameters()).device
    return {name: on_device(entry, device, ("sample_keys", "hessian")) for name, entry in found.items()}


def _check_observed(statistics: Mapping[str, InputStatistics]) -> None:
    """UserError if a layer was not observed in any call: compiled code, for one, does not see hooks added later."""
    missed = next((name for name, entry in statistics.items() if entry.rows == 0), None)
    if missed is not None:
        raise UserError(f"method: the calibration saw no input of {missed!r}: calibrate without torch.compile")


def on_device(statistics: InputStatistics, device: torch.device, apart: tuple[str, ...]) -> InputStatistics:
    """Statistics with their tensors on a device, but for some that stay where they are."""
    moved: dict[str, Any] = {
        key: value.to(device)
        for key, value in vars(statistics).items()
        if isinstance(value, torch.Tensor) and key not in apart
    }
    return replace(statistics, **moved)
