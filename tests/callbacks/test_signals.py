"""A polite signal ends a run in good order, a second one at once; a resumed run notices nothing."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from oracles.faults import hooked, in_child
from oracles.toy_training import ToyData, ToyModule, differing, quiet, train

from genlight import io
from genlight.callbacks.signals import RunInterrupted, SignalGuard
from genlight.leaving import leaving_on_signals, let_requeue
from genlight.trainer.checkpoint_io import load_checkpoint, newest_whole_checkpoint

quiet()
pytestmark = pytest.mark.filterwarnings("ignore")

NO_CHECKPOINTS = {"every_n_train_steps": 1000}
OPTIONS: dict[str, Any] = {"max_steps": 12, "val_check_interval": 4, "accumulate_grad_batches": 2}


class Signalled(ToyModule):
    """Sends itself `number` in the training step or validation step with the given count, `times` over."""

    def __init__(self, number: int, step: int = -1, validation: int = -1, times: int = 1) -> None:
        super().__init__()
        self.number, self.steps, self.validations, self.times = number, step, validation, times

    def send(self) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if self.steps == 0:
            self.send()
        self.steps -= 1
        return super().training_step(batch, index)

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        if self.validations == 0:
            self.send()
        self.validations -= 1
        super().validation_step(batch, index)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, dict[str, torch.Tensor]]:
    return train(tmp_path_factory.mktemp("whole"), callbacks=(SignalGuard(),), checkpoint=NO_CHECKPOINTS, **OPTIONS)


def stopped(folder: Path, module: ToyModule, checkpoint: dict | None = None) -> Callable[[], None]:
    def action() -> None:
        options = OPTIONS | {"num_sanity_val_steps": 0}
        train(folder, module=module, callbacks=(SignalGuard(),), checkpoint=checkpoint or NO_CHECKPOINTS, **options)

    return action


def continues_exactly(folder: Path, newest: Path, where: dict, never_stopped: tuple) -> None:
    """Resumed from there the run does what one that was never stopped does, a validation that was cut short again."""
    events, state = train(folder, resume=newest, callbacks=(SignalGuard(),), checkpoint=NO_CHECKPOINTS, **OPTIONS)
    whole_events, whole_state = never_stopped
    assert differing(state, whole_state) == []
    assert set(events) == set(whole_events[-len(events) :])
    if "validation" in where:
        assert events[0][0] == "validation"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    "where", [{"step": 0}, {"step": 5}, {"step": 6}, {"validation": 0}, {"validation": 4}], ids=str
)
def test_the_first_signal_saves_and_the_run_continues_exactly(
    number: int, code: int, where: dict, tmp_path: Path, never_stopped: tuple
) -> None:
    assert in_child(stopped(tmp_path, Signalled(number, **where))) == code
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is not None and newest.name == "interrupted.ckpt" and skipped == []
    continues_exactly(tmp_path, newest, where, never_stopped)


@pytest.mark.parametrize("where", [{"step": 5}, {"validation": 4}], ids=str)
def test_a_step_that_is_saved_already_is_not_saved_twice(where: dict, tmp_path: Path, never_stopped: tuple) -> None:
    each = {"every_n_train_steps": 1, "save_top_k": -1}
    assert in_child(stopped(tmp_path, Signalled(signal.SIGTERM, **where), each)) == 143
    assert not (tmp_path / "interrupted.ckpt").exists()
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is not None and skipped == []
    continues_exactly(tmp_path, newest, where, never_stopped)


def test_a_step_that_is_saved_elsewhere_is_saved_here_too(tmp_path: Path) -> None:
    def action() -> None:
        guard, each = SignalGuard(str(tmp_path / "here")), {"every_n_train_steps": 1, "save_top_k": -1}
        train(tmp_path, module=Signalled(signal.SIGTERM, step=5), callbacks=(guard,), checkpoint=each, **OPTIONS)

    assert in_child(action) == 143
    assert (tmp_path / "here" / "interrupted.ckpt").exists()


def test_a_validation_between_the_batches_of_a_step_ends_before_the_run(tmp_path: Path) -> None:
    options = OPTIONS | {"val_check_interval": 3}
    guarded = {"callbacks": (SignalGuard(),), "checkpoint": NO_CHECKPOINTS}
    whole_events, whole_state = train(tmp_path / "whole", **guarded, **options)
    module = Signalled(signal.SIGTERM, validation=1)
    assert in_child(lambda: train(tmp_path, module=module, **guarded, **options, num_sanity_val_steps=0)) == 143
    assert load_checkpoint(tmp_path / "interrupted.ckpt")["global_step"] == 2
    events, state = train(tmp_path, resume=tmp_path / "interrupted.ckpt", **guarded, **options)
    assert differing(state, whole_state) == [] and set(events) <= set(whole_events)


def test_the_step_is_finished_before_leaving(tmp_path: Path) -> None:
    assert in_child(stopped(tmp_path, Signalled(signal.SIGTERM, step=6))) == 143
    saved = load_checkpoint(tmp_path / "interrupted.ckpt")
    assert saved["global_step"] == 4  # batch 6 ends the first epoch, and with it the step
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert progress["processed"] == progress["completed"] == 7


@pytest.mark.parametrize("where", [{"step": 5}, {"validation": 2}], ids=str)
def test_the_second_signal_leaves_without_saving(where: dict, tmp_path: Path) -> None:
    module = Signalled(signal.SIGINT, times=2, **where)
    assert in_child(stopped(tmp_path, module, {"every_n_train_steps": 1, "save_top_k": -1})) == 130
    assert not (tmp_path / "interrupted.ckpt").exists()
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is not None and skipped == []


def test_sigusr1_asks_once_however_often_it_comes(tmp_path: Path) -> None:
    assert in_child(stopped(tmp_path, Signalled(signal.SIGUSR1, step=5, times=4))) == 143
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is not None and newest.name == "interrupted.ckpt" and skipped == []


class Session(Callback):
    """Prepares the trainer as a run does."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        let_requeue(trainer)


def of_a_run(folder: Path, module: ToyModule) -> Callable[[], None]:
    def action() -> None:
        with leaving_on_signals():
            inside = signal.getsignal(signal.SIGUSR1)
            try:
                train(folder, module=module, callbacks=(SignalGuard(), Session()), checkpoint=NO_CHECKPOINTS, **OPTIONS)
            finally:
                assert signal.getsignal(signal.SIGUSR1) is inside

    return action


def test_in_a_run_the_guard_alone_answers(tmp_path: Path) -> None:
    assert in_child(of_a_run(tmp_path, Signalled(signal.SIGUSR1, step=5))) == 143
    assert (tmp_path / "interrupted.ckpt").exists()


def test_in_a_slurm_job_lightning_still_puts_it_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = tmp_path / "scontrol"
    queue.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    queue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = {"JOB_NAME": "train", "JOB_ID": "12", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NODELIST": "localhost"}
    for name, value in {**job, "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert in_child(of_a_run(tmp_path / "run", Signalled(signal.SIGUSR1, step=5))) == 143
    assert (tmp_path / "asked").read_text() == "requeue 12\n"
    assert (tmp_path / "run" / "interrupted.ckpt").exists()


def test_a_second_signal_inside_the_save_leaves_the_old_state(tmp_path: Path) -> None:
    def action() -> None:
        def hook(name: str, path: Path) -> None:
            if name == "fsync" and path.name == "interrupted.ckpt":
                os.kill(os.getpid(), signal.SIGTERM)

        with hooked(hook):
            stopped(tmp_path, Signalled(signal.SIGTERM, step=5), {"every_n_train_steps": 2, "save_top_k": -1})()

    assert in_child(action) == 143
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is not None and newest.name == "epoch=0-step=2.ckpt" and skipped == []
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []


def test_the_third_signal_ends_even_a_stuck_process(tmp_path: Path) -> None:
    class Stuck(Signalled):
        def send(self) -> None:
            while True:
                try:
                    os.kill(os.getpid(), self.number)
                except RunInterrupted:
                    continue

    assert in_child(stopped(tmp_path, Stuck(signal.SIGTERM, step=1))) == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_handlers_are_put_back(number: int, tmp_path: Path) -> None:
    def ours(*arguments: object) -> None: ...

    before = {one: signal.signal(one, ours) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        train(tmp_path, callbacks=(SignalGuard(),), max_steps=2)
        assert signal.getsignal(number) is ours
        with pytest.raises(RunInterrupted):
            train(tmp_path, module=Signalled(number, step=1), callbacks=(SignalGuard(),), max_steps=9)
        assert signal.getsignal(number) is ours
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_a_finished_run_removes_its_interrupted_checkpoint(tmp_path: Path) -> None:
    often = {"every_n_train_steps": 2, "save_top_k": 1}
    assert in_child(stopped(tmp_path, Signalled(signal.SIGTERM, step=5), often)) == 143
    assert (tmp_path / "interrupted.ckpt").exists()
    train(tmp_path, resume=tmp_path / "interrupted.ckpt", callbacks=(SignalGuard(),), checkpoint=often, **OPTIONS)
    assert not (tmp_path / "interrupted.ckpt").exists()


def validate(module: ToyModule) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[SignalGuard()],
        enable_checkpointing=False,
    )
    trainer.validate(module, datamodule=ToyData(), verbose=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_validate_leaves_after_its_batch(number: int, code: int) -> None:
    assert in_child(lambda: validate(Signalled(number, validation=1))) == code
    before = signal.getsignal(number)
    with pytest.raises(RunInterrupted):
        validate(Signalled(number, validation=1))
    validate(ToyModule())
    assert signal.getsignal(number) is before


def test_sanity_checking_is_left_without_saving(tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        train(tmp_path, module=Signalled(signal.SIGTERM, validation=0), callbacks=(SignalGuard(),))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_process_leaves_signals_to_its_parent(tmp_path: Path) -> None:
    guard = SignalGuard()
    guard._install()
    try:
        assert in_child(lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(4)]) == 0
    finally:
        guard._restore()


def test_other_threads_do_not_touch_handlers() -> None:
    import threading

    before = signal.getsignal(signal.SIGTERM)
    guard = SignalGuard()
    thread = threading.Thread(target=guard._install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before and not guard._previous


def test_the_folder_can_be_given(tmp_path: Path) -> None:
    guard = SignalGuard(str(tmp_path / "elsewhere"))
    with pytest.raises(RunInterrupted):
        train(tmp_path, module=Signalled(signal.SIGTERM, step=1), callbacks=(guard,), checkpoint=NO_CHECKPOINTS)
    assert io.read_labels(tmp_path / "elsewhere" / "interrupted.ckpt")["step"] == "2"
