"""Low-fidelity scores of the module that is trained: zero-cost indicators before the first step, early validations."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from genlight import io
from genlight.callbacks.checkpoint_collector import describe_training
from genlight.errors import UserError
from genlight.predictors.zero_cost import NAMES, measure
from genlight.predictors.zero_cost_probe import Probe, seeded

FILE_NAME = "indicators.jsonl"
KIND, VERSION = "genlight.indicators", 1


class ZeroCostIndicators(Callback):
    """Writes ``indicators.jsonl``: one line, the row of this run in a table of low-fidelity scores.

    Fields are `kind`, `version`, `run` and `module` (SHA-256 of what is trained, and how), `seed`, the indicators by
    name, null where one does not exist, and `<monitor>@<epoch>`. The files of several runs make a table, put together.

    The indicators are those of ``module.network`` for the module's own training loss on the first training batch, on a
    copy: training goes on as if nothing had been measured. They are logged as ``zero_cost/<name>``. A resumed run keeps
    the row. Under DDP process 0 measures.

    Args:
        dirpath: folder of the file.
        names: indicators, see :func:`genlight.predictors.zero_cost.measure`; None takes all but latency, which differs
            from run to run.
        seed: of the random numbers in loss and indicators.
        monitor: a logged metric, such as val/accuracy or train/loss.
        epochs: its value at the first validation after so many epochs is noted, for each of these numbers.

    Raises:
        ValueError: a value out of range, naming the config key.
    """

    def __init__(
        self,
        dirpath: str,
        names: Sequence[str] | None = None,
        seed: int = 0,
        monitor: str | None = None,
        epochs: Sequence[int] = (),
    ) -> None:
        key = "callbacks.zero_cost."
        if unknown := [name for name in names or () if name not in NAMES]:
            raise ValueError(f"{key}names: {', '.join(unknown)} must be among {', '.join(NAMES)}")
        if any(epoch < 1 for epoch in epochs):
            raise ValueError(f"{key}epochs={list(epochs)} must be numbers from 1")
        if epochs and monitor is None:
            raise ValueError(f"{key}epochs={list(epochs)} need {key}monitor, the metric that is noted")
        self.path = Path(dirpath) / FILE_NAME
        self.names = tuple(name for name in NAMES if name != "latency") if names is None else tuple(names)
        self.seed, self.monitor, self.epochs = seed, monitor, tuple(epochs)
        self._row: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise UserError("callbacks.zero_cost needs the whole module in each process: use strategy=auto or ddp")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.global_step and self.path.exists():
            self._row = io.read_json(self.path)
            return
        with isolate_rng():
            loader: Any = trainer.train_dataloader
            batch = trainer.strategy.batch_to_device(next(iter(loader)))
            found = measure(probe_of(pl_module, batch, self.seed), self.names, self.seed)
        self._row = {
            "kind": KIND,
            "version": VERSION,
            **describe_training(trainer, pl_module),
            "seed": self.seed,
            **{name: None if math.isnan(value) else value for name, value in found.items()},
        }
        self._write()
        for logger in trainer.loggers:
            finite = {f"zero_cost/{name}": value for name, value in found.items() if not math.isnan(value)}
            logger.log_metrics(finite, step=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        done = trainer.current_epoch + int(last_batch)
        keys = [key for epoch in self.epochs if epoch <= done and (key := f"{self.monitor}@{epoch}") not in self._row]
        if not keys:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"callbacks.zero_cost.monitor={self.monitor} is not logged; logged are: {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        self._row |= dict.fromkeys(keys, value if math.isfinite(value) else None)
        self._write()

    def _write(self) -> None:
        io.atomic_write_text(self.path, json.dumps(self._row, allow_nan=False) + "\n")


def probe_of(module: LightningModule, batch: Any, seed: int) -> Probe:
    """The network of a copy of a module, as the module's training step calls it first, with the loss of that step.

    Copy and batch are in single precision: 16 bits would round the indicators, and neighbours would come to be equal.

    Args:
        module: has its network as `network`.
        batch: of its training data, on its device.
        seed: of the random numbers (noise, timesteps, crops) in the training step of this call.

    Raises:
        UserError: no `network`, a training step that does not call it, or one that gives no loss.
    """
    duplicate = copy.deepcopy(module).float()
    batch = tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v, batch)
    duplicate.__dict__["log"] = lambda *_, **__: None
    if module._trainer is not None:
        duplicate.trainer = module.trainer
    network = getattr(duplicate, "network", None)
    if not isinstance(network, nn.Module):
        raise UserError(f"callbacks.zero_cost: a {type(module).__name__} has no single network to measure")
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def loss() -> Tensor:
        value = duplicate.training_step(batch, 0)
        if not calls or not isinstance(value, Tensor):
            name = type(module).__name__
            raise UserError(f"callbacks.zero_cost: the training step of a {name} calls no network or gives no loss")
        return value

    handle = network.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad(), seeded(seed, duplicate.device):
        loss()
    handle.remove()
    args, kwargs = calls[0]
    label = batch.get("label") if isinstance(batch, Mapping) else None
    return Probe(network, args, loss, kwargs, label)
