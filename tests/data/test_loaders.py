"""Resuming in mid-epoch, through Lightning itself."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from genlight.data.image_datamodule import ImageDataModule
from genlight.data.images import ImagesInMemory
from genlight.data.loaders import KeptLoader
from genlight.errors import UserError

SAMPLES = 22  # 5 batches of 4: an odd number, so that accumulation over 2 ends inside an epoch


class Counting(ImageDataModule):
    """One-pixel images whose labels are their indices."""

    name = "counting"

    def load_images(self, split: str) -> ImagesInMemory:
        return ImagesInMemory(torch.zeros(SAMPLES, 1, 1, 1, dtype=torch.uint8), torch.arange(SAMPLES))

    def content(self) -> Any:
        return SAMPLES


def counting(**changes: Any) -> Counting:
    arguments = dict(image_size=1, channels=1, num_classes=SAMPLES, batch_size=4, eval_batch_size=3, num_samples=6)
    return Counting(**{**arguments, "seed": 3, **changes})


class Recorder(LightningModule):
    """One weight pulled to the mean index of a batch; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Any, ...]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch_idx, self.global_step, *batch["label"].tolist()))
        return (self.weight - batch["label"].float().mean()) ** 2

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Save(Callback):
    """A checkpoint at every call of one hook."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder = folder
        self.saved: list[tuple[int, Path]] = []
        setattr(self, hook, self._save)

    def _save(self, trainer: Trainer, module: Recorder, *_: Any) -> None:
        path = self.folder / f"{len(self.saved)}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((len(module.seen), path))


def fit(
    options: dict[str, Any], callback: Callback | None = None, ckpt: Path | None = None, **data: Any
) -> tuple[Recorder, Trainer]:
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    callbacks = [callback] if callback else []
    trainer = Trainer(
        accelerator="cpu",
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **quiet,
        **options,
    )
    module = Recorder()
    trainer.fit(module, datamodule=counting(**data), ckpt_path=ckpt, weights_only=True)
    return module, trainer


HOOKS = ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_validation_end"]
BY_STEPS = {"max_epochs": -1, "max_steps": 13, "check_val_every_n_epoch": None}
RUNS = {
    "epochs": {"max_epochs": 3, "limit_val_batches": 0},
    "epochs, validation at their end": {"max_epochs": 3},
    "epochs, validation inside, accumulation": {
        "max_epochs": 3,
        "val_check_interval": 2,
        "accumulate_grad_batches": 2,
    },
    "epochs cut short": {"max_epochs": 4, "limit_train_batches": 3},
    "steps": {"max_epochs": -1, "max_steps": 13, "limit_val_batches": 0},
    "steps, validation across epochs": {**BY_STEPS, "val_check_interval": 4},
    "steps, validation across epochs, accumulation": {
        **BY_STEPS,
        "max_steps": 7,
        "val_check_interval": 7,
        "accumulate_grad_batches": 2,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_sees_the_rest_of_the_uninterrupted_one(tmp_path, name, hook):
    options = RUNS[name]
    save = Save(tmp_path, hook)
    whole, _ = fit(options, save)
    if hook == "on_validation_end" and options.get("limit_val_batches") == 0:
        assert not save.saved
        return
    assert save.saved
    accumulate = options.get("accumulate_grad_batches", 1)
    for done, path in save.saved:
        resumed, _ = fit(options, ckpt=path)
        assert resumed.seen == whole.seen[done:], f"resumed after {done} batches"
        # Lightning's checkpoints hold no gradients, so one between two batches of an accumulated step loses some.
        batch_idx = whole.seen[done - 1][1]
        if done == 0 or (batch_idx + 1) % accumulate == 0 or batch_idx == 4:
            assert torch.equal(resumed.weight, whole.weight), f"resumed after {done} batches"


@pytest.mark.filterwarnings("ignore")
def test_an_uninterrupted_run_goes_through_the_order_batch_by_batch():
    module, trainer = fit({"max_epochs": 3, "limit_val_batches": 0})
    order = trainer.train_dataloader.batch_sampler
    assert [list(row[3:]) for row in module.seen] == [order.batch(position).tolist() for position in range(15)]
    assert [row[:2] for row in module.seen] == [(epoch, step) for epoch in range(3) for step in range(5)]


@pytest.mark.filterwarnings("ignore")
def test_overfit_batches_repeats_the_same_batches():
    module, _ = fit({"max_epochs": 3, "overfit_batches": 2, "limit_val_batches": 0})
    batches = [row[3:] for row in module.seen]
    assert len(batches) == 6 and batches[:2] == batches[2:4] == batches[4:]


def test_lightning_does_not_warn_that_the_loader_cannot_resume(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save = Save(tmp_path, "on_train_batch_end")
        fit({"max_epochs": 1, "limit_val_batches": 0}, save)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit({"max_epochs": 1, "limit_val_batches": 0}, ckpt=save.saved[1][1])
    assert not [w for w in caught if "resumable" in str(w.message) or "many workers" in str(w.message)]


@pytest.mark.filterwarnings("ignore")
def test_other_data_is_refused_at_resume_and_another_order_is_reported(tmp_path, caplog, monkeypatch):
    save = Save(tmp_path, "on_train_batch_end")
    options = {"max_epochs": 1, "limit_val_batches": 0}
    fit(options, save)
    fit(options, ckpt=save.saved[1][1], batch_size=2)
    assert "resuming with batch_size=2 instead of 4: the order of batches changes" in caplog.text
    monkeypatch.setattr(Counting, "content", lambda self: "other")
    with pytest.raises(
        UserError, match=r"^the checkpoint was trained on other data: fingerprint [0-9a-f]{12}, counting"
    ):
        fit(options, ckpt=save.saved[1][1])


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_with_workers_goes_on_at_the_same_batch(tmp_path):
    save = Save(tmp_path, "on_train_batch_end")
    options = {"max_epochs": 2, "limit_val_batches": 0}
    whole, _ = fit(options, save)
    done, path = save.saved[6]
    resumed, _ = fit(options, ckpt=path, num_workers=1)
    assert resumed.seen == whole.seen[done:]


def test_workers_build_the_same_batches_without_touching_the_global_stream():
    alone, helped = counting(), counting(num_workers=1)
    torch.manual_seed(0)
    batches = [batch["label"].tolist() for batch in helped.train_dataloader()]
    fixed = [batch["label"].tolist() for batch in helped.reference_loader("test")]
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(()))
    assert batches == [batch["label"].tolist() for batch in alone.train_dataloader()]
    assert fixed == [batch["label"].tolist() for batch in alone.reference_loader("test")]


def test_two_ranks_share_the_training_and_held_out_images():
    halves = [counting(batch_size=2, evaluation="classification") for _ in range(2)]
    for rank, half in enumerate(halves):
        half.trainer = SimpleNamespace(global_rank=rank, world_size=2, training=False)
    loaders = [half.train_dataloader() for half in halves]
    assert [len(loader) for loader in loaders] == [5, 5]
    pairs = [torch.cat([a["label"], b["label"]]).tolist() for a, b in zip(*loaders, strict=True)]
    assert pairs == [batch["label"].tolist() for batch in counting().train_dataloader()]
    held_out = [label for half in halves for batch in half.val_dataloader() for label in batch["label"].tolist()]
    assert held_out == list(range(SAMPLES))
    for half in halves:
        reference = [label for batch in half.reference_loader("test") for label in batch["label"].tolist()]
        assert reference == list(range(SAMPLES))


@pytest.mark.parametrize(("limit", "passes_made"), [(2**20, 1), (10, 3)])
def test_kept_batches_are_made_once_if_they_fit(limit: int, passes_made: int) -> None:
    made = []

    class Source:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            made.append(0)
            return iter([{"noise": torch.full((3,), float(number))} for number in range(2)])

    loader = KeptLoader(Source(), limit)
    next(iter(loader))  # given up after one batch: nothing is kept
    made.clear()
    passes = [[batch["noise"].tolist() for batch in loader] for _ in range(3)]
    assert len(loader) == 2 and passes == [[[0.0] * 3, [1.0] * 3]] * 3 and len(made) == passes_made
