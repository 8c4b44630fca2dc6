"""The raw weights of a training at many steps, saved beside it, for combining checkpoints afterwards."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from genlight.callbacks.room import float32_bytes, reserve_disk, reserve_memory
from genlight.checkpoints.lora import holds_adapters
from genlight.checkpoints.online_bins import OnlineBins
from genlight.checkpoints.trajectory import StoredType
from genlight.checkpoints.writer import BackgroundWriter, TrajectoryWriter
from genlight.errors import UserError
from genlight.reports.report import size
from genlight.run_folder import RUN_FILE, read_run
from genlight.trainer.consolidate import gather_full_weights

MEMBERS = 150
DECAYED = 1e-2
_FSDP_MARK = "_fsdp_wrapped_module."


@dataclass(frozen=True)
class Schedule:
    """The steps that are saved: every `every`-th one of (first, last], counted back from `last`."""

    first: int
    last: int
    every: int

    @classmethod
    def of(cls, total: int, window: Sequence[float], every: int | None) -> Schedule:
        """From the length of a training; without `every` there are about `MEMBERS` steps."""
        first, last = (round(share * total) for share in window)
        every = every or max(1, round((window[1] - window[0]) * total / MEMBERS))
        return cls(first, last, every)

    def is_due(self, step: int) -> bool:
        return self.first < step <= self.last and (self.last - step) % self.every == 0

    @property
    def steps(self) -> list[int]:
        return [step for step in range(self.first + 1, self.last + 1) if self.is_due(step)]


class CheckpointCollector(Callback):
    """Saves the trained (never the averaged) weights every few optimizer steps as a trajectory.

    Saved is what requires a gradient, each tied weight once, in float32. A member belongs to an optimizer step, so
    accumulating gradients changes nothing. A checkpoint of the trainer waits until all earlier members are on the disk,
    and a resumed run drops later ones: it ends with the files of a run that was never stopped. (Unless later ones had
    pushed out the oldest of `max_members`; that is told.) A run that is resumed with more steps keeps what it has, and
    goes on at the interval of its new length. Under DDP, FSDP and DeepSpeed process 0 writes; where the weights lie in
    shards all processes gather them.

    Args:
        dirpath: folder of the trajectory.
        every_n_steps: optimizer steps between two members; None gives about 150 in the window.
        window: begin and end as shares of the length of the training.
        max_members: files kept at once; the oldest go.
        mode: "files" keeps each member; "bins" keeps `bins` means over spans that grow with age, in memory and in the
            trainer's checkpoints, and writes them at the end. Not for adapters: means of factors are no means of their
            products.
        bins: how many means.
        dtype: "float32", or "bfloat16_difference": at the end of the training all members but the newest are turned
            into 16-bit differences to it. Until then they take their full room.
        parameters: "trainable"; "lora" for adapters (names with "lora_" or "lora."); anything else is a regular
            expression that is searched for in the names of trainable parameters.
        disk_limit: most room that the trajectory may take, in GiB; None asks only for what is free.

    Raises:
        ValueError: a value out of range, naming the config key.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_steps: int | None = None,
        window: Sequence[float] = (0.25, 1.0),
        max_members: int = MEMBERS,
        mode: Literal["files", "bins"] = "files",
        bins: int = 16,
        dtype: StoredType = "float32",
        parameters: str = "trainable",
        disk_limit: float | None = None,
    ) -> None:
        key = "callbacks.collector."
        if len(window) != 2 or not 0.0 <= window[0] < window[1] <= 1.0:
            raise ValueError(f"{key}window={list(window)} must be two shares of the training, 0 <= begin < end <= 1")
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("max_members", max_members, 1),
            ("bins", bins, 2),
        ):
            if value is not None and value < least:
                raise ValueError(f"{key}{name}={value} must be at least {least}")
        if mode not in ("files", "bins"):
            raise ValueError(f"{key}mode={mode} must be files or bins")
        if dtype not in get_args(StoredType):
            raise ValueError(f"{key}dtype={dtype} must be one of {', '.join(get_args(StoredType))}")
        if disk_limit is not None and disk_limit <= 0:
            raise ValueError(f"{key}disk_limit={disk_limit} must be above 0 (GiB), or null for all that is free")
        try:
            re.compile(parameters)
        except re.error as error:
            raise ValueError(f"{key}parameters={parameters} is no regular expression: {error}") from None
        self.dirpath = Path(dirpath)
        self.every_n_steps, self.window, self.max_members = every_n_steps, tuple(window), max_members
        self.mode, self.dtype, self.parameters, self.disk_limit = mode, dtype, parameters, disk_limit
        self.reserved: dict[str, int] = {}
        self._bins = OnlineBins(bins)
        self._names: list[str] = []
        self._schedule = Schedule(0, 0, 1)
        self._writer: TrajectoryWriter | None = None
        self._queue = BackgroundWriter()
        self._last_step = 0
        self._lr: float | None = None
        self._highest_lr = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._schedule = Schedule.of(training_length(trainer, "collector"), self.window, self.every_n_steps)
        self._last_step = trainer.global_step
        if not self._last_step:
            self._highest_lr = 0.0
        if not self._last_step or not trainer.is_global_zero:
            self._bins = OnlineBins(self._bins.max_bins)
        self._names = parameter_names(pl_module, self.parameters)
        shapes = parameter_shapes(trainer, pl_module, self._names)
        self._queue = BackgroundWriter()
        together(trainer, lambda: self._prepare(trainer, pl_module, shapes))

    def _prepare(self, trainer: Trainer, module: LightningModule, shapes: dict[str, tuple[int, ...]]) -> None:
        steps = self._schedule.steps
        if not steps:
            raise UserError(
                f"callbacks.collector.every_n_steps={self._schedule.every} and window={list(self.window)} leave no "
                f"step of {training_length(trainer, 'collector')} to save: give a smaller interval or a wider window"
            )
        if self.mode == "bins" and holds_adapters(self._names):
            raise UserError(
                "callbacks.collector.mode=bins would keep means of the two factors of adapters, which are not those of "
                "their products: use files, adapters are small"
            )
        self._writer = TrajectoryWriter(
            self.dirpath,
            shapes,
            {**describe_training(trainer, module), "mode": self.mode, "parameters": self.parameters},
            every_n_steps=self._schedule.every,
            max_members=self.max_members,
            dtype=self.dtype,
            resume_at=self._last_step,
        )
        self._writer.check()
        self._check_room(trainer, shapes, len({*steps, *self._writer.steps}))
        before = [step for step in steps if step <= self._last_step][-self.max_members :]
        there = self._writer.steps if self.mode == "files" else before[len(before) * (not len(self._bins)) :]
        # before the training was made longer, members may have been nearer to each other
        if lost := [step for step in before if not any(step - self._schedule.every < t <= step for t in there)]:
            rank_zero_warn(
                f"{self.dirpath} lacks {len(lost)} members up to step {self._last_step}, from which the training "
                f"continues (the first is {lost[0]}): the trajectory will have a gap"
            )
        self._warn_of_decay(_known_rates(trainer, steps))

    def _check_room(self, trainer: Trainer, shapes: dict[str, tuple[int, ...]], steps: int) -> None:
        """UserError where the disk, or with mode "bins" the memory, is too small."""
        each, most = float32_bytes(shapes), self._bins.max_bins
        memory = self._bins.most_bytes(each)
        if self.mode == "bins":
            count, way_out = most, "fewer callbacks.collector.bins"
            what = f"the {most} means of callbacks.collector"
            reserve_memory(trainer, self, torch.device("cpu"), memory * (not len(self._bins)), what, f"use {way_out}")
        elif holds_adapters(self._names):
            count, way_out = min(steps, self.max_members), "fewer callbacks.collector.max_members"
        else:
            count = min(steps, self.max_members)
            way_out = f"callbacks.collector.mode=bins ({most} means, {size(memory)} of memory) or fewer max_members"
        # one more than is kept: the oldest goes when the newest is whole
        reserve_disk(trainer, self, "collector", count, count + 1, each, way_out)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # at the end of the batch the schedule has moved on already
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step <= self._last_step:
            return  # gradients are being accumulated
        self._last_step = step
        if not self._schedule.is_due(step):
            return
        self._highest_lr = max(self._highest_lr, self._lr or 0.0)
        tensors, copied = full_weights(trainer, pl_module, self._names)
        together(trainer, lambda: self._take(step, tensors, copied))

    def _take(self, step: int, tensors: dict[str, Tensor], copied: Callable[[], None]) -> None:
        lr, writer = self._lr, self._writer
        if self.mode == "bins":
            copied()
            self._bins.add(step, tensors, lr)
            return
        assert writer is not None
        if self._queue.error is not None:
            raise self._queue.error

        def write() -> None:
            copied()
            writer.append(step, tensors, lr)

        self._queue.put(write)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # a run that resumes from this checkpoint will not come by these steps again
        if trainer.state.fn == TrainerFn.FITTING:
            together(trainer, self._queue.flush)

    def state_dict(self) -> dict[str, Any]:
        bins = self._bins.state_dict() if self.mode == "bins" else None
        return {"highest_lr": self._highest_lr, "bins": bins}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._highest_lr = float(state_dict["highest_lr"])
        if self.mode == "bins" and state_dict["bins"] is not None:
            self._bins.load_state_dict(state_dict["bins"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        together(trainer, self._close)
        if self._lr is not None and trainer.global_step >= self._schedule.last:
            self._warn_of_decay([self._highest_lr, self._lr])

    def _close(self) -> None:
        assert self._writer is not None
        self._queue.flush()
        self._queue.stop()
        if self.mode == "bins" and len(self._bins):
            self._writer.replace_all(self._bins.snapshots())
        # a run that was stopped early may go on
        self._writer.close(finished=self._last_step >= self._schedule.last)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._queue.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._queue.stop()
        self._writer, self.reserved = None, {}

    def _warn_of_decay(self, rates: Sequence[float]) -> None:
        if rates and rates[-1] < DECAYED * max(rates):
            rank_zero_warn(
                f"the learning rate falls from {max(rates):.3g} to {rates[-1]:.3g} where checkpoints are saved: the "
                "last ones will hardly differ, and combining them will gain little. Keep it constant "
                "(module.lr_scheduler=null), or end callbacks.collector.window earlier"
            )


def together(trainer: Trainer, action: Callable[[], object]) -> None:
    """Run `action` on process 0; where it fails, every process raises instead of waiting for ever."""
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            action()
        except Exception as caught:
            error = caught
    if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(error is None, all=True):
        return
    if error is not None:
        raise error
    if trainer.world_size > 1:
        raise UserError("saving weights of the trajectory failed on process 0, see its message")


def training_length(trainer: Trainer, key: str) -> int:
    """Optimizer steps of the whole training; UserError naming ``callbacks.<key>`` if it is not known."""
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise UserError(f"callbacks.{key} needs the length of the training: set trainer.max_steps")
    return int(steps)


def parameter_names(module: nn.Module, parameters: str = "trainable") -> list[str]:
    """Names of the chosen parameters that require a gradient, sorted; a tied one under its first name.

    Raises:
        UserError: there is none.
    """
    pattern = {"trainable": "", "lora": r"lora[_.]"}.get(parameters, parameters)
    trainable = [n.replace(_FSDP_MARK, "") for n, p in module.named_parameters() if p.requires_grad]
    names = sorted(name for name in trainable if re.search(pattern, name))
    if not names:
        first = f"; the first of {len(trainable)} is {trainable[0]!r}" if trainable else ""
        raise UserError(f"callbacks.collector.parameters={parameters} fits no trainable parameter{first}")
    return names


def parameter_shapes(trainer: Trainer, module: LightningModule, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Full shapes by name, also of what lies in shards. Every process must call it; under FSDP only process 0 gets
    them."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError("a trajectory cannot be saved under ModelParallelStrategy: use strategy=fsdp or ddp")
    if isinstance(trainer.strategy, FSDPStrategy):
        state = trainer.strategy.lightning_module_state_dict()
        return {name: tuple(state[name].shape) for name in names} if trainer.is_global_zero else {}
    found = dict(module.named_parameters())
    return {name: tuple(getattr(found[name], "ds_shape", found[name].shape)) for name in names}


def full_weights(
    trainer: Trainer, module: LightningModule, names: Sequence[str]
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Copies of parameters in float32 on the CPU, as they are now. Every process must call it.

    Returns:
        the copies by name (empty but on process 0), and a function that waits until they are filled: from a GPU they
        are copied while the caller goes on.
    """
    keep = trainer.is_global_zero
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        gathered = gather_full_weights(module, keep)
        return {name: gathered[name].float() for name in names} if keep else {}, _nothing
    state: dict[str, Tensor]
    if isinstance(trainer.strategy, FSDPStrategy):
        state = trainer.strategy.lightning_module_state_dict()
    else:
        state = dict(module.named_parameters())
    if not keep:
        return {}, _nothing
    on_gpu = any(state[name].is_cuda for name in names)
    copies = {}
    for name in names:
        value = state[name].detach()
        copies[name] = torch.empty(value.shape, dtype=torch.float32, pin_memory=on_gpu)
        copies[name].copy_(value, non_blocking=on_gpu)
    if not on_gpu:
        return copies, _nothing
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return copies, event.synchronize


def _nothing() -> None:
    pass


def describe_training(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What tells the weights of one training from those of another: the module, and the config of the run if any."""
    description = getattr(module, "description", None)
    what = json.dumps(description(), sort_keys=True, default=str) if callable(description) else type(module).__name__
    folder = Path(trainer.default_root_dir)
    run = str(read_run(folder)["fingerprint"]) if (folder / RUN_FILE).is_file() else ""
    return {"run": run, "module": hashlib.sha256(what.encode()).hexdigest()}


def _known_rates(trainer: Trainer, steps: Sequence[int]) -> list[float]:
    """Learning rates of these steps, where the schedule can tell them beforehand."""
    rates: list[float] = []
    for config in trainer.lr_scheduler_configs[:1]:
        scheduler = config.scheduler
        if type(scheduler) is torch.optim.lr_scheduler.LambdaLR and config.interval == "step":
            # the first step is done at the rate of lambda(0)
            rates = [float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step - 1)) for step in steps]
    return rates
