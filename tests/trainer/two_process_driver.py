"""Runs one training under several strategies on two CPU processes, and writes what came out for the tests to judge.

`run`, in each of both processes, trains `TOTAL_STEPS` steps with a checkpoint at `RESUME_STEP`, trains again from that
checkpoint, and measures the last checkpoint; its folder then holds the checkpoints, `whole.safetensors`,
`resumed.safetensors` (the final weights of both) and `results.json`.

Suffixes of a strategy: `+ema` averages the weights, `+bf16` trains in mixed precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

WORLD_SIZE = 2
TOTAL_STEPS = 4
RESUME_STEP = 2
EMA_DECAY = 0.5


@dataclasses.dataclass
class Task:
    """A module with fixed initial weights; the global batch of each step; the global batches of validation."""

    module: L.LightningModule
    batch: Callable[[int], dict[str, Tensor]]
    validation: list[dict[str, Tensor]]


class TinyModule(L.LightningModule):
    """A regression with a frozen parameter, a buffer and a shared weight: what a gathering can get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 10)
        self.third = nn.Linear(10, 10)
        self.third.weight = self.second.weight
        self.last = nn.Linear(10, 3)
        self.last.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))))
        return self.last(hidden) * self.scale

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self(batch["x"].to(self.last.weight.dtype)) - batch["y"]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = (self(batch["x"].to(self.last.weight.dtype)) - batch["y"]).square().mean()
        self.log("val/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["x"]))

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def tiny_task() -> Task:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TinyModule()

    def batch(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(8, 6, generator=generator)
        return {"x": x, "y": torch.sin(2 * x[:, :3]) + 0.1}

    return Task(module, batch, [batch(-1), batch(-2)])


class GlobalBatches(L.LightningDataModule):
    """This process's rows of each global batch, from the trainer's step on."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def _share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[self.trainer.global_rank :: self.trainer.world_size] for name, value in batch.items()}

    def train_dataloader(self) -> Any:
        steps = range(self.trainer.global_step, TOTAL_STEPS)
        return DataLoader([self._share(self.task.batch(step)) for step in steps], batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader([self._share(batch) for batch in self.task.validation], batch_size=None)


def make_strategy(name: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    from genlight.trainer.strategies import DeepSpeedCPUStrategy

    base = name.split("+")[0]
    if base == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if base == "fsdp":
        return fsdp_on_cpu()
    if base.startswith("zero"):
        return DeepSpeedCPUStrategy(stage=int(base[4:]), logging_batch_size_per_gpu=1)
    raise ValueError(f"unknown strategy {name!r}")


def fsdp_on_cpu() -> Any:
    """The project's FSDP strategy on CPU processes: without its demand for a GPU, and with state dicts that own their
    memory.

    (Moving a full state dict "to the CPU" copies nothing there, and torch then frees the memory under it.)
    """
    from lightning.pytorch.strategies import FSDPStrategy
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, OptimStateKeyType, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    from genlight.trainer.strategies import FullStateFSDPStrategy

    class CPUFSDPStrategy(FullStateFSDPStrategy):
        def __init__(self) -> None:
            FSDPStrategy.__init__(self, state_dict_type="full", process_group_backend="gloo")

        def setup_environment(self) -> None:
            FSDPStrategy.setup_environment(self)

        def _setup_model(self, model: nn.Module) -> nn.Module:
            return FSDP(model, device_id=torch.device("cpu"), **self.kwargs)

        def _full_state(self) -> Any:
            configs = FullStateDictConfig(rank0_only=False), FullOptimStateDictConfig(offload_to_cpu=False)
            return FSDP.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, *configs)

        def lightning_module_state_dict(self) -> dict[str, Any]:
            with self._full_state():
                return self.model.state_dict()

        def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
            with self._full_state():
                state = FSDP.optim_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer))
                return FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)

    return CPUFSDPStrategy()


def make_trainer(name: str, folder: Path, task: Task, strategy: Any = None, devices: int = WORLD_SIZE) -> L.Trainer:
    from genlight.trainer.checkpoint_io import AtomicCheckpointIO

    callbacks: list[Any] = [
        ModelCheckpoint(
            dirpath=folder / "checkpoints",
            filename="{step}",
            every_n_train_steps=RESUME_STEP,
            save_top_k=-1,
            monitor=None,
        )
    ]
    if name.endswith("+ema"):
        callbacks.append(EMAWeightAveraging(decay=EMA_DECAY))
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy or make_strategy(name),
        precision="bf16-mixed" if name.endswith("+bf16") else "32-true",
        max_steps=TOTAL_STEPS,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def checkpoint_at(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step={step}.ckpt"


def run(name: str, folder: Path) -> None:
    """One strategy: train, train again from the middle, measure."""
    from genlight.io import atomic_write_json, save_tensors

    results: dict[str, Any] = {}
    for part in ("whole", "resumed"):
        task = tiny_task()
        trainer = make_trainer(name, folder if part == "whole" else folder / part, task)
        start = checkpoint_at(folder, RESUME_STEP) if part == "resumed" else None
        trainer.fit(task.module, GlobalBatches(task), ckpt_path=start, weights_only=True)
        weights = final_weights(trainer, task.module)
        if trainer.is_global_zero:
            save_tensors(folder / f"{part}.safetensors", weights)
            results[part] = {
                "global_step": trainer.global_step,
                "lr": trainer.lr_scheduler_configs[0].scheduler.get_last_lr(),
            }
        if part == "whole" and name == "zero2":
            results["failed_save"] = save_with_one_failing_process(trainer, folder / "checkpoints" / "failed.ckpt")
    task = tiny_task()
    trainer = make_trainer(name, folder / "validated", task)
    trainer.limit_val_batches = 1.0
    metrics = trainer.validate(
        task.module, GlobalBatches(task), ckpt_path=checkpoint_at(folder, TOTAL_STEPS), weights_only=True, verbose=False
    )
    if trainer.is_global_zero:
        results["validated"] = metrics[0]
        atomic_write_json(folder / "results.json", results)


def final_weights(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
    """The module's weights at the end of `fit`, however they are spread."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    from genlight.trainer.consolidate import gather_full_weights

    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return gather_full_weights(module, keep=trainer.is_global_zero)
    return {key: value.clone() for key, value in trainer.strategy.lightning_module_state_dict().items()}


def save_with_one_failing_process(trainer: L.Trainer, path: Path) -> dict[str, Any]:
    """The disk of the second process is full: all processes must learn it, and nothing may stand at `path`."""
    import genlight.trainer.deepspeed_engine as engine

    original = engine.save_state

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if trainer.global_rank == 1:
        engine.save_state = full_disk
    try:
        trainer.save_checkpoint(path)
        error = "none"
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        engine.save_state = original
    return {"error": error, "exists": path.exists()}
