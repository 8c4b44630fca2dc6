"""A run resumed from any checkpoint ends as the run never stopped, bit for bit, and leaves out none of its events."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from oracles.toy_training import Event, ToyData, ToyModule, differing, quiet, train

from genlight.callbacks.exact_resume import last_metrics
from genlight.trainer.checkpoint_io import AtomicCheckpointIO

quiet()
pytestmark = pytest.mark.filterwarnings("ignore")

EVERY_STEP: dict[str, Any] = {"every_n_train_steps": 1}
EPOCH_END: dict[str, Any] = {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True}
VALIDATION_END: dict[str, Any] = {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": False}


def check_all(folder: Path, trace: list[Event], state: dict, options: dict, again: bool) -> int:
    """Resume from each checkpoint in `folder` (and, with `again`, from those that the resumed runs save)."""
    count = 0
    for path in sorted(folder.iterdir()):
        inner = folder.parent / f"{folder.name}+"
        events, resumed = train(inner, resume=path, **options)
        assert differing(resumed, state) == [], path
        due = {event for event in trace[trace.index(("saved", path.name)) + 1 :] if event[0] != "saved"}
        done = {event for event in events if event[0] != "saved"}
        if int(resumed["step"]) > int(path.stem.split("step=")[1].split("-")[0]):
            assert due <= done, path
        count += 1
        if again and inner.exists():
            count += check_all(inner, events, state, options, again=False)
        shutil.rmtree(inner, ignore_errors=True)
    return count


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"checkpoint": EVERY_STEP, "limit_val_batches": 0}, False),
        ({"checkpoint": EVERY_STEP}, False),
        ({"checkpoint": EVERY_STEP, "val_check_interval": 3, "accumulate_grad_batches": 2, "max_steps": 6}, True),
        ({"checkpoint": EVERY_STEP, "accumulate_grad_batches": 3, "max_steps": -1, "max_epochs": 2}, True),
        ({"checkpoint": EPOCH_END}, True),
        ({"checkpoint": EPOCH_END, "limit_val_batches": 0}, True),
        ({"checkpoint": EPOCH_END, "max_steps": -1, "max_epochs": 3}, False),
        ({"checkpoint": VALIDATION_END, "val_check_interval": 3}, False),
        ({"checkpoint": VALIDATION_END, "val_check_interval": 3, "accumulate_grad_batches": 2, "max_steps": 6}, True),
    ],
    ids=[
        "step-no_validation",
        "step",
        "step-accumulate_2-validate_3",
        "step-accumulate_3-epochs",
        "epoch",
        "epoch-no_validation",
        "epoch-epochs",
        "validation",
        "validation-accumulate_2",
    ],
)
def test_every_checkpoint_resumes_to_the_same_end(options: dict, again: bool, tmp_path: Path) -> None:
    trace, state = train(tmp_path / "whole", **options)
    assert check_all(tmp_path / "whole", trace, state, options, again) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{"max_steps": 17}, {"max_steps": -1, "max_epochs": 3}], ids=["steps", "epochs"])
@pytest.mark.parametrize("checkpoint", [EVERY_STEP, EPOCH_END, VALIDATION_END], ids=["step", "epoch", "validation"])
@pytest.mark.parametrize("val_check_interval", [1.0, 3])
@pytest.mark.parametrize("accumulate_grad_batches", [1, 2, 3])
def test_every_checkpoint_of_every_kind(
    limit, checkpoint, val_check_interval, accumulate_grad_batches, tmp_path
) -> None:
    options = {
        "checkpoint": checkpoint,
        "val_check_interval": val_check_interval,
        "accumulate_grad_batches": accumulate_grad_batches,
        **limit,
    }
    trace, state = train(tmp_path / "whole", **options)
    assert check_all(tmp_path / "whole", trace, state, options, again=True) >= 2


def test_a_checkpoint_saved_outside_fit_is_left_alone(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
    )
    module = ToyModule()
    trainer.validate(module, datamodule=ToyData(), verbose=False)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")["state_dict"]["net.0.bias"], module.net[0].bias
    )


def test_a_metric_that_came_out_as_no_number_is_not_forgotten() -> None:
    trainer: Any = SimpleNamespace(callbacks=[], callback_metrics={"val/fd": torch.tensor(math.nan), "val/loss": 1.0})
    found = last_metrics(trainer)
    assert math.isnan(found["val/fd"]) and found["val/loss"] == 1.0
