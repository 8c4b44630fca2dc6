"""The smallest Lightning run in which everything that must survive a kill matters: dropout, noise, EMA, a learning rate
that falls, a fixed order of data."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader, Dataset

from genlight.callbacks.exact_resume import ExactResume
from genlight.callbacks.step_seed import StepSeed
from genlight.trainer.checkpoint_io import AtomicCheckpointIO

BATCHES = 7
Event = tuple[Any, ...]


def quiet() -> None:
    """No messages from Lightning; one thread, so that forked children may compute."""
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


class Rows(Dataset[torch.Tensor]):
    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(index))


class Order:
    """Batches as a function of (epoch, batch), starting inside the first epoch where training was resumed there."""

    def __init__(self, epoch: int, start: int) -> None:
        self.epoch, self.first_epoch, self.start = epoch, epoch, start
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self):
        start = self.start if self.epoch == self.first_epoch else 0
        for batch in range(start, BATCHES):
            yield [self.epoch * 1000 + batch * 4 + row for row in range(4)]


class ToyData(LightningDataModule):
    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        loop = self.trainer.fit_loop
        epoch, start = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.processed
        order = Order(epoch.ready, 0) if start >= BATCHES else Order(epoch.processed, start)
        return DataLoader(Rows(), batch_sampler=order)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(Rows(), batch_sampler=[[0, 1], [2, 3], [4]])


class ToyModule(LightningModule):
    def __init__(self, trace: list[Event] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 6))
        self.trace: list[Event] = [] if trace is None else trace

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.trace.append(("batch", self.current_epoch, index, self.global_step, float(batch.sum())))
        loss = ((self.net(batch + torch.randn_like(batch)) - batch) ** 2).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val/loss", ((self.net(batch) - batch) ** 2).mean())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.trace.append(("validation", self.current_epoch, self.global_step))

    def on_train_epoch_end(self) -> None:
        self.trace.append(("epoch", self.current_epoch, self.global_step))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TracedIO(AtomicCheckpointIO):
    """Notes each save among the events of the run."""

    def __init__(self, trace: list[Event]) -> None:
        self.trace = trace

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.trace.append(("saved", os.path.basename(path)))
        super().save_checkpoint(checkpoint, path, storage_options)


def train(
    folder: Path,
    *,
    resume: Path | None = None,
    checkpoint: dict[str, Any] | None = None,
    callbacks: tuple[Any, ...] = (),
    module: ToyModule | None = None,
    averaging: tuple[WeightAveraging, ...] | None = None,
    limit_val_batches: float = 1.0,
    max_steps: int = 17,
    **options: Any,
) -> tuple[list[Event], dict[str, torch.Tensor]]:
    """Train the toy; return what happened in order, and every tensor that a resumed run must have equal."""
    module = module or ToyModule()
    saver = ModelCheckpoint(dirpath=folder, **({"every_n_train_steps": 1, "save_top_k": -1} | (checkpoint or {})))
    averaging = (EMAWeightAveraging(decay=0.9),) if averaging is None else averaging
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[TracedIO(module.trace)],
        limit_val_batches=limit_val_batches,
        callbacks=[*callbacks, *averaging, StepSeed(3), ExactResume(), saver],
        max_steps=max_steps,
        **options,
    )
    trainer.fit(module, datamodule=ToyData(), ckpt_path=resume)
    return module.trace, final_state(trainer, module, averaging)


def final_state(
    trainer: Trainer, module: LightningModule, averaging: tuple[WeightAveraging, ...]
) -> dict[str, torch.Tensor]:
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for number, entries in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": tensor for name, tensor in entries.items()}
    for ema in averaging:
        assert ema._average_model is not None
        state |= {f"ema.{name}": tensor for name, tensor in ema._average_model.state_dict().items()}
    state["lr"] = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
    state["step"] = torch.tensor(trainer.global_step)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    names = first.keys() | second.keys()
    return sorted(n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n]))
