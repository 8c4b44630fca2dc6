"""Moving averages of the weights at many rates at once, and what is needed to reconstruct further ones afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from genlight.callbacks.checkpoint_collector import (
    describe_training,
    parameter_names,
    together,
    training_length,
)
from genlight.callbacks.room import float32_bytes, reserve_disk, reserve_memory
from genlight.checkpoints.ema_profiles import power_gamma, power_rate
from genlight.checkpoints.trajectory import Average, save_average
from genlight.checkpoints.writer import BackgroundWriter, TrajectoryWriter
from genlight.errors import UserError
from genlight.reports.report import size
from genlight.trainer.resident import is_sharded

# 1 - 10^-1 … 1 - 10^-4: time constants of 10 to 10,000 steps, evenly spaced
RATES = tuple(1.0 - 10.0 ** -(1.0 + number / 3.0) for number in range(10))


class EMABank(Callback):
    """Tracks exponential and power-function averages after every optimizer step, on the device of the weights.

    The averages begin with the weights at the start of the training. At the end those of `rates` are written to
    ``<dirpath>/rate-….safetensors``. The power-function averages (Karras et al. 2024, section 3.1) are saved
    `power_snapshots` times, as trajectories ``<dirpath>/power-<sigma_rel>``, from which
    `genlight.checkpoints.ema_profiles.reconstruct_power_ema` makes averages of other lengths. All averages travel in
    the trainer's checkpoints, which grow by as many float32 copies of the weights.

    Args:
        dirpath: folder of the averages.
        rates: share of the old average kept at each step; by default ten from 0.9 to 0.9999.
        sigma_rels: widths of the power-function averages, relative to the length of the training.
        power_snapshots: how often those are saved; fewer make reconstructions less exact.
        parameters: as in `CheckpointCollector`.
        disk_limit: most room that the snapshots may take, in GiB; None asks only for what is free.

    Raises:
        ValueError: a value out of range, naming the config key.
    """

    def __init__(
        self,
        dirpath: str,
        rates: Sequence[float] | None = None,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        power_snapshots: int = 32,
        parameters: str = "trainable",
        disk_limit: float | None = None,
    ) -> None:
        rates = RATES if rates is None else tuple(rates)
        if not all(0.0 <= rate < 1.0 for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"callbacks.ema_bank.rates={list(rates)} must be different numbers in [0, 1)")
        if len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"callbacks.ema_bank.sigma_rels={list(sigma_rels)} must be different numbers")
        if power_snapshots < 1:
            raise ValueError(f"callbacks.ema_bank.power_snapshots={power_snapshots} must be at least 1")
        try:
            self.gammas = {float(sigma_rel): power_gamma(sigma_rel) for sigma_rel in sigma_rels}
        except ValueError as error:
            raise ValueError(f"callbacks.ema_bank.sigma_rels: {error}") from None
        self.dirpath = Path(dirpath)
        self.rates, self.power_snapshots = rates, power_snapshots
        self.parameters, self.disk_limit = parameters, disk_limit
        self.reserved: dict[str, int] = {}
        self._names: list[str] = []
        self._averages: dict[str, list[Tensor]] = {}
        self._writers: dict[float, TrajectoryWriter] = {}
        self._queue = BackgroundWriter()
        self._total, self._every, self._last_step = 0, 1, 0
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_shards(trainer)
        self._total = training_length(trainer, "ema_bank")
        self._every = max(1, round(self._total / self.power_snapshots))
        self._names = parameter_names(pl_module, self.parameters)
        self._last_step = trainer.global_step
        self._queue = BackgroundWriter()
        together(trainer, lambda: self._prepare(trainer, pl_module))
        self._saved = None

    def _refuse_shards(self, trainer: Trainer) -> None:
        in_16_bits = isinstance(trainer.strategy, DeepSpeedStrategy) and "16" in str(trainer.precision)
        if is_sharded(trainer) or in_16_bits:
            does = "rounds to 16 bits" if in_16_bits and not is_sharded(trainer) else "has sharded"
            raise UserError(
                f"EMABank cannot average weights that {type(trainer.strategy).__name__} {does}: leave it out "
                "(callbacks.ema_bank=null) or use strategy=ddp"
            )

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Only process 0 tracks: the weights are the same on all of them."""
        weights = self._weights(module)
        shapes = {name: tuple(weight.shape) for name, weight in zip(self._names, weights)}
        origin = {**describe_training(trainer, module), "parameters": self.parameters}
        for sigma_rel, gamma in self.gammas.items():
            self._writers[sigma_rel] = TrajectoryWriter(
                self.dirpath / f"power-{sigma_rel:g}",
                shapes,
                {**origin, "average": "power", "sigma_rel": sigma_rel, "gamma": gamma},
                every_n_steps=self._every,
                max_members=self._total,
                resume_at=self._last_step,
            )
            self._writers[sigma_rel].check()
        count = len(self.gammas) * (self._total // self._every) + len(self.rates)
        each, device = float32_bytes(shapes), weights[0].device
        way_out = f"fewer power_snapshots ({self.power_snapshots} now; each takes {size(each)} a width)"
        reserve_disk(trainer, self, "ema_bank", count, count, each, way_out)
        way_out = f"fewer than {len(self.rates)} callbacks.ema_bank.rates, or callbacks.ema_bank=null"
        reserve_memory(trainer, self, device, len(self._keys()) * each, "the averages of EMABank", way_out)
        self._averages = {key: [w.float().clone() for w in weights] for key in self._keys()}
        self.reserved.pop(str(device), None)  # they are there now
        if self._saved is not None:
            self._restore(self._saved)
        elif self._last_step:
            rank_zero_warn(
                f"the checkpoint holds no averages of EMABank: they begin at step {self._last_step}, and "
                "reconstructions from them will not be exact"
            )

    def _keys(self) -> list[str]:
        return [f"rate-{rate!r}" for rate in self.rates] + [f"power-{sigma_rel!r}" for sigma_rel in self.gammas]

    def _weights(self, module: LightningModule) -> list[Tensor]:
        found = dict(module.named_parameters())
        return [found[name].detach() for name in self._names]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step <= self._last_step:
            return  # gradients are being accumulated
        self._last_step = step
        if trainer.is_global_zero:
            self._update(step, self._weights(pl_module))
        if self.gammas and (self._total - step) % self._every == 0:
            together(trainer, lambda: self._save_power(step))

    def _update(self, step: int, weights: list[Tensor]) -> None:
        weights = [weight.float() for weight in weights]
        kept = list(self.rates) + [power_rate(gamma, step) for gamma in self.gammas.values()]
        for rate, averages in zip(kept, self._averages.values(), strict=True):
            torch._foreach_lerp_(averages, weights, 1.0 - rate)

    def _save_power(self, step: int) -> None:
        if self._queue.error is not None:
            raise self._queue.error
        for sigma_rel, writer in self._writers.items():
            tensors = self._on_cpu(f"power-{sigma_rel!r}")
            self._queue.put(lambda writer=writer, tensors=tensors: writer.append(step, tensors))  # type: ignore[misc]

    def _on_cpu(self, key: str) -> dict[str, Tensor]:
        return {name: value.to("cpu", copy=True) for name, value in zip(self._names, self._averages[key], strict=True)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            together(trainer, self._queue.flush)

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self._names), "averages": {key: list(value) for key, value in self._averages.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict)

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["names"] != self._names or list(saved["averages"]) != list(self._averages):
            raise UserError(
                f"the checkpoint holds the averages {list(saved['averages'])} of {len(saved['names'])} parameters, "
                f"callbacks.ema_bank asks for {list(self._averages)} of {len(self._names)}: keep the run's settings"
            )
        for key, values in saved["averages"].items():
            for mine, value in zip(self._averages[key], values, strict=True):
                mine.copy_(value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        together(trainer, self._close)

    def _close(self) -> None:
        self._queue.flush()
        self._queue.stop()
        for writer in self._writers.values():
            writer.close()
        for rate in self.rates:
            tensors = self._on_cpu(f"rate-{rate!r}")
            save_average(self.dirpath / f"rate-{rate:.6f}.safetensors", Average(rate, self._last_step, tensors))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._queue.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._queue.stop()
        self._averages, self._writers, self.reserved = {}, {}, {}
