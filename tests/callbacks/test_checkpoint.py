"""Which steps are saved: the last one too where weights lie in shards, whatever ends the training."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from oracles.toy_training import quiet, train

from genlight.callbacks import checkpoint
from genlight.callbacks.checkpoint import StepCheckpoint

quiet()


def stopped_early(folder: Path, resume: Path | None = None) -> tuple[list[str], list[str], int]:
    """Ended by the second validation, after step 6; kinds of what happened, the checkpoints, and the last step."""
    stopping = EarlyStopping("val/loss", min_delta=1e9, patience=1)
    events, state = train(
        folder,
        resume=resume,
        callbacks=(stopping, StepCheckpoint(str(folder / "steps"), 4)),
        checkpoint={"every_n_train_steps": 1000},
        averaging=(),
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    saved = sorted(path.name for path in (folder / "steps").iterdir())
    return [event[0] for event in events], saved, int(state["step"])


def test_a_validation_that_ends_the_training_comes_after_its_checkpoint(tmp_path: Path) -> None:
    assert stopped_early(tmp_path)[1:] == (["step-000004.ckpt"], 6)


def test_of_weights_in_shards_the_step_that_a_validation_ends_with_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "is_sharded", lambda trainer: True)
    both = ["step-000004.ckpt", "step-000006.ckpt"]
    assert stopped_early(tmp_path)[1:] == (both, 6)
    # what goes on from there has nothing left to train, and what goes on from before ends at the same step
    assert stopped_early(tmp_path, tmp_path / "steps" / "step-000006.ckpt") == ([], both, 6)
    (tmp_path / "steps" / "step-000006.ckpt").unlink()
    assert stopped_early(tmp_path, tmp_path / "steps" / "step-000004.ckpt")[1:] == (both, 6)
