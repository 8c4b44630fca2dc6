"""Lightning's checkpoints through our own file format; the newest whole one is found; a run killed anywhere ends as one
never killed."""

import copy
import functools
import os
import random
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from oracles.faults import hooked, in_child
from oracles.toy_training import BATCHES, ToyData, ToyModule, differing, quiet, train

from genlight import io
from genlight.errors import UserError
from genlight.io import primitives
from genlight.trainer import sharded_folder
from genlight.trainer.checkpoint_io import (
    AtomicCheckpointIO,
    load_checkpoint,
    newest_whole_checkpoint,
    progress_labels,
)

quiet()
pytestmark = pytest.mark.filterwarnings("ignore")


def write(path: Path, step: int, batches: int = 0) -> Path:
    progress = {"total": {"processed": batches}}
    loops = {"fit_loop": {"epoch_loop.batch_progress": progress, "epoch_progress": progress}}
    checkpoint = {"global_step": step, "state_dict": {"w": torch.full((50,), float(step))}, "loops": loops}
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return path


class WithHyperParameters(ToyModule):
    def __init__(self, hidden: int = 3, folder: Path = Path("x"), options: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class DataWithState(ToyData):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": 5, "rng": numpy.random.default_rng(0).bit_generator.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_all_that_lightning_saves_comes_back(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    original = AtomicCheckpointIO.save_checkpoint

    def save(self, checkpoint, path, storage_options=None) -> None:
        saved.append(copy.deepcopy(checkpoint))
        original(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    callbacks = (EarlyStopping("val/loss"), Timer(), torch_state())
    checkpoint = {
        "every_n_train_steps": None,
        "every_n_epochs": 1,
        "monitor": "val/loss",
        "save_top_k": 2,
        "save_last": True,
    }
    module = WithHyperParameters(options={"a": [1, (2,)]})
    monkeypatch.setattr("oracles.toy_training.ToyData", DataWithState)
    train(tmp_path, module=module, callbacks=callbacks, checkpoint=checkpoint, precision=precision)
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert {
        "callbacks",
        "optimizer_states",
        "lr_schedulers",
        "hyper_parameters",
        "current_model_state",
        "loops",
    } <= set(loaded)
    assert loaded["hyper_parameters"] == {"hidden": 3, "folder": Path("x"), "options": {"a": [1, (2,)]}}
    assert equal(loaded, saved[-1])


def torch_state() -> Any:
    from lightning.pytorch import Callback

    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"rng": torch.get_rng_state(), "best": torch.tensor(float("inf")), "size": torch.Size([2])}

    return Odd()


def equal(first: Any, second: Any) -> bool:
    if isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(second, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in second)
    if isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def test_networks_among_hyper_parameters_are_named(tmp_path: Path) -> None:
    module = WithHyperParameters(options=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"state\['hyper_parameters'\]\['options'\] is a torch\.nn.*Linear"):
        train(tmp_path, module=module, max_steps=1)


@pytest.mark.parametrize("save_last", [True, "link"])
def test_top_k_and_last_leave_the_right_files(save_last: bool | str, tmp_path: Path) -> None:
    checkpoint = {"every_n_train_steps": 3, "monitor": "step", "mode": "max", "save_top_k": 2, "save_last": save_last}
    train(tmp_path, checkpoint=checkpoint, max_steps=10)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0-step=6.ckpt", "epoch=1-step=9.ckpt", "last.ckpt"}
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is not None and load_checkpoint(newest)["global_step"] == 9 and skipped == []


def test_lightnings_own_words_for_checkpoints_work(tmp_path: Path) -> None:
    _, state = train(tmp_path, max_steps=10, checkpoint={"every_n_train_steps": 5, "save_last": True})
    module = ToyModule()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[ModelCheckpoint(dirpath=tmp_path)],
        default_root_dir=tmp_path,
    )
    trainer.validate(module, datamodule=ToyData(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    averaged = {name.removeprefix("ema.module."): tensor for name, tensor in state.items() if "ema.module." in name}
    assert differing(dict(module.state_dict()), averaged) == []
    with pytest.raises(TypeError, match="storage_options"):
        trainer.save_checkpoint(tmp_path / "x.ckpt", storage_options={"anon": True})


def test_newest_is_by_step_never_by_time_or_name(tmp_path: Path) -> None:
    for order, (name, step) in enumerate([("z.ckpt", 900), ("last.ckpt", 1000), ("step=5.ckpt", 5), ("a.ckpt", 90)]):
        path = write(tmp_path / name, step)
        os.utime(path, (10**9 + order * 100,) * 2)
    (tmp_path / "step=99999.txt").write_text("not a checkpoint")
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "last.ckpt", [])
    write(tmp_path / "more.ckpt", 1000, batches=4)
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "more.ckpt", [])


@pytest.mark.parametrize("harm", ["cut", "cut-header", "flip", "empty", "pickle", "broken-link", "unreadable"])
def test_a_harmed_newest_is_passed_over_with_the_reason(harm: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "step=1.ckpt", 1), write(tmp_path / "step=2.ckpt", 2)
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 4
    if harm == "pickle":
        torch.save({"a": 1}, bad)
    elif harm in ("broken-link", "unreadable"):
        bad.unlink()
        bad.symlink_to("nowhere" if harm == "broken-link" else "/proc/self/mem")
    else:
        whole = bad.read_bytes()
        bad.write_bytes({"cut": whole[:-9], "cut-header": whole[:30], "flip": bytes(data), "empty": b""}[harm])
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest == good
    assert [path for path, _ in skipped] == [bad] and "\n" not in str(skipped[0][1])


def test_a_link_to_a_harmed_checkpoint_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "step=2.ckpt").write_text("")
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is None and len(skipped) == 1


def test_no_checkpoint_and_no_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path) == (None, [])
    assert newest_whole_checkpoint(tmp_path / "absent") == (None, [])
    (tmp_path / "x.ckpt").write_text("")
    newest, skipped = newest_whole_checkpoint(tmp_path)
    assert newest is None and len(skipped) == 1


def test_a_sharded_folder_of_any_name_is_as_new_as_its_step(tmp_path: Path) -> None:
    for name, step in (("step-000250.ckpt", 250), ("interrupted.ckpt", 430)):
        path = tmp_path / name
        sharded_folder.make_staging(path)
        labels = progress_labels({"global_step": step})
        sharded_folder.write_common(sharded_folder.staging_folder(path), {"w": torch.ones(2)}, {}, labels)
        sharded_folder.commit(path)
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "interrupted.ckpt", [])


def test_folders_count_when_their_manifest_matches(tmp_path: Path) -> None:
    good = write(tmp_path / "step=1.ckpt", 1)
    with io.atomic_folder(tmp_path / "step=2.ckpt") as folder:
        (folder / "shard").write_text("x")
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "step=2.ckpt", [])
    (tmp_path / "step=2.ckpt" / "shard").write_text("y")
    assert newest_whole_checkpoint(tmp_path)[0] == good


@pytest.mark.parametrize("url", ["https://a.b/c.ckpt", "s3://bucket/x", "hf://a/b", "http:/a.b/c", "file:///x"])
def test_urls_are_refused(url: str) -> None:
    for action in (load_checkpoint, lambda path: AtomicCheckpointIO().save_checkpoint({}, path)):
        with pytest.raises(UserError, match="is a URL"):
            action(url)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("sentinel",)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_unread(
    legacy: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(
            {"state_dict": Payload()}, "x.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
        )
    with pytest.raises(UserError, match=r"x\.ckpt was written by torch\.save.*pickle") as error:
        load_checkpoint("x.ckpt")
    assert "\n" not in str(error.value)
    assert not Path("sentinel").exists()


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    lengths = set()
    for filler in [0, *range(40, 180)]:
        io.save_state(tmp_path / "x", {"a": "y" * 8 * filler}, kind="checkpoint")
        start = (tmp_path / "x").read_bytes()[:2]
        lengths.add(start)
        assert load_checkpoint(tmp_path / "x") == {"a": "y" * 8 * filler}
    assert {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"} <= lengths


def test_what_is_no_checkpoint_file_is_said(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "absent.ckpt", "there is no checkpoint"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=reason):
            load_checkpoint(path)
    io.save_state(tmp_path / "list", [1], kind="checkpoint")
    with pytest.raises(io.CorruptFileError, match="holds a list"):
        load_checkpoint(tmp_path / "list")


def test_removing_twice_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", 1)
    AtomicCheckpointIO().remove_checkpoint(path)
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not path.exists()


OPTIONS: dict[str, Any] = {
    "checkpoint": {"every_n_train_steps": 2, "save_top_k": 1, "monitor": "step", "mode": "max", "save_last": True},
    "accumulate_grad_batches": 2,
    "val_check_interval": 4,
    "max_steps": 9,
}


def kill_at(moment: int) -> Any:
    """SIGKILL this process at the `moment`-th call that changes the disk; with partly written files as they are."""
    seen = 0

    def hook(name: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


class KillInStep(ToyModule):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.left = batch

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)


def resume_newest(folder: Path, result: Path, moment: int = 0, batch: int = -1) -> None:
    """What a resumed run does: take the newest whole checkpoint, or start anew where there is none."""
    newest, _ = newest_whole_checkpoint(folder)
    module = KillInStep(batch) if batch >= 0 else None
    primitives.CHUNK_BYTES = 1024
    with hooked(kill_at(moment)):
        _, state = train(folder, resume=newest, module=module, **OPTIONS)
    io.save_state(result, state, kind="result")


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(tmp_path_factory.mktemp("whole"), **OPTIONS)[1]


@pytest.mark.parametrize("moment", [3, 32, 33, 99, 120, 200, 269], ids="call {}".format)
def test_a_kill_inside_a_save_changes_nothing(moment: int, tmp_path: Path, never_killed: dict) -> None:
    folder, result = tmp_path / "run", tmp_path / "result"
    assert in_child(lambda: resume_newest(folder, result, moment=moment)) == -signal.SIGKILL
    assert in_child(lambda: resume_newest(folder, result)) == 0
    assert differing(io.load_state(result, kind="result"), never_killed) == []


@pytest.mark.parametrize("batch", [0, 3, BATCHES - 1, BATCHES, 2 * BATCHES + 1], ids="batch {}".format)
def test_a_kill_inside_a_step_changes_nothing(batch: int, tmp_path: Path, never_killed: dict) -> None:
    folder, result = tmp_path / "run", tmp_path / "result"
    assert in_child(lambda: resume_newest(folder, result, batch=batch)) == -signal.SIGKILL
    assert in_child(lambda: resume_newest(folder, result, batch=1)) == -signal.SIGKILL
    assert in_child(lambda: resume_newest(folder, result)) == 0
    assert differing(io.load_state(result, kind="result"), never_killed) == []


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tmp_path: Path, never_killed: dict) -> None:
    rng = random.Random(0)
    for number in range(100):
        folder, result = tmp_path / f"run{number}", tmp_path / f"result{number}"
        moments = [rng.randrange(1, 200) for _ in range(rng.randrange(1, 4))] + [0]
        for moment in moments:
            in_child(functools.partial(resume_newest, folder, result, moment=moment))
        assert differing(io.load_state(result, kind="result"), never_killed) == []


def test_an_altered_newest_checkpoint_costs_one_interval_only(tmp_path: Path, never_killed: dict) -> None:
    folder, result = tmp_path / "run", tmp_path / "result"
    assert in_child(lambda: resume_newest(folder, result, batch=13)) == -signal.SIGKILL
    newest, _ = newest_whole_checkpoint(folder)
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    fallback, skipped = newest_whole_checkpoint(folder)
    assert skipped and skipped[0][0] == newest and fallback != newest
    assert in_child(lambda: resume_newest(folder, result)) == 0
    assert differing(io.load_state(result, kind="result"), never_killed) == []


def test_a_datamodule_without_state_needs_none(tmp_path: Path) -> None:
    assert not isinstance(ToyData.state_dict, property) and ToyData.state_dict is LightningDataModule.state_dict
    train(tmp_path, max_steps=1)
    assert "ToyData" not in load_checkpoint(next(tmp_path.glob("*.ckpt")))
