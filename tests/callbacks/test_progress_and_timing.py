"""What the person at the terminal reads: plain lines without one, and an estimate that follows from measured steps."""

import time
from types import SimpleNamespace

import pytest

from genlight.callbacks import timing
from genlight.callbacks.checkpoint import StepCheckpoint
from genlight.callbacks.progress import StepProgress
from genlight.callbacks.timing import StepTimer
from genlight.errors import UserError


def trainer(tmp_path, **changes):
    values = {
        "max_steps": 100,
        "global_step": 0,
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 30,
        "val_check_batch": 30,
        "num_val_batches": [2],
        "num_training_batches": 7,
        "default_root_dir": str(tmp_path),
        "optimizers": [],
        "callbacks": [],
        "is_global_zero": True,
    }
    return SimpleNamespace(**(values | changes))


def test_a_line_says_how_much_is_left(monkeypatch, capsys, tmp_path) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = StepProgress(line_interval=60)
    fake = trainer(tmp_path, global_step=20, callback_metrics={"train/loss": 0.25})
    progress.on_train_start(fake, None)
    now[0] += 59
    fake.global_step = 30
    progress.on_train_batch_end(fake, None, None, None, 0)
    assert capsys.readouterr().err == ""
    now[0] += 1
    fake.global_step = 50
    progress.on_train_batch_end(fake, None, None, None, 0)
    # 30 steps in 60 seconds since the run was resumed at step 20
    assert capsys.readouterr().err == "fit 50/100  loss 0.2500  0.50 per second, about 2 min left\n"


def test_the_estimate_counts_steps_and_validations(monkeypatch, tmp_path) -> None:
    timer = StepTimer(started=0.0)
    timer._steps, timer._batches, timer._setup_seconds = [9.0, 9.0, 2.0, 2.0, 2.0], [5.0], 10.0
    phases = timer._fit_phases(trainer(tmp_path))
    # the first two steps warm up; 100 // 30 validations of 2 batches
    assert [(p.name, p.count, p.total) for p in phases] == [
        ("training step", 100, 200.0),
        ("batch of samples", 6, 30.0),
    ]
    timer._finish(trainer(tmp_path), phases, [])
    assert timer.estimate is not None and timer.estimate.total_seconds == pytest.approx(240.0)
    assert timer.estimate.low_seconds < 240.0 < timer.estimate.high_seconds


def test_a_run_that_does_not_fit_on_the_disk_stops(tmp_path) -> None:
    timer = StepTimer(started=0.0)
    files = [timing.PlannedFile("checkpoint", 10**18, 3)]
    with pytest.raises(UserError, match="make room, or keep fewer checkpoints"):
        timer._finish(trainer(tmp_path), [timing.Phase("training step", (1.0, 1.0, 1.0), 10)], files)


@pytest.mark.parametrize("options", [{"every_n_train_steps": 0}, {"save_top_k": 0}, {"save_top_k": -2}])
def test_checkpoint_settings_out_of_range(options, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"callbacks.checkpoint.{next(iter(options))}="):
        StepCheckpoint(str(tmp_path), **options)
