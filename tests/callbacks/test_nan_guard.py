"""A loss that is not finite stops the run before any weight changes."""

from pathlib import Path

import pytest
import torch
from oracles.toy_training import ToyModule, differing, quiet, train

from genlight.callbacks.nan_guard import NanGuard
from genlight.errors import UserError
from genlight.trainer.checkpoint_io import load_checkpoint, newest_whole_checkpoint

quiet()


class Diverging(ToyModule):
    def __init__(self, at: int, value: float) -> None:
        super().__init__()
        self.at, self.value = at, value

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        return loss * self.value if self.global_step == self.at else loss


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_step_is_named_and_the_last_good_checkpoint_stays(value: float, tmp_path: Path) -> None:
    module = Diverging(9, value)
    with pytest.raises(UserError) as error:
        train(tmp_path, module=module, callbacks=(NanGuard(),), checkpoint={"every_n_train_steps": 3})
    for part in (f"the loss is {value}", "at step 9 (epoch 1, batch 2)", "step=9.ckpt"):
        assert part in str(error.value)
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is not None and newest.name == "epoch=1-step=9.ckpt" and skipped == []
    saved = load_checkpoint(newest)["current_model_state"]
    assert differing(saved, dict(module.state_dict())) == []


def test_no_checkpoint_yet_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint had been saved yet"):
        train(tmp_path, module=Diverging(0, float("nan")), callbacks=(NanGuard(),))


def test_a_finite_run_is_left_alone(tmp_path: Path) -> None:
    options = {"max_steps": 5, "checkpoint": {"every_n_train_steps": 100}}
    _, guarded = train(tmp_path, callbacks=(NanGuard(),), **options)
    _, bare = train(tmp_path, **options)
    assert differing(guarded, bare) == []
