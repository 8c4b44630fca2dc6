"""The collected weights are the trained ones, one member an optimizer step, whatever happens to the run."""

import errno
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import genlight
from lightning.pytorch import Callback, LightningModule, Trainer
from oracles.faults import EXIT_CODE, die_at, fail_at, hooked, in_child
from oracles.ranks import in_ranks
from oracles.toy_training import ToyModule, quiet, train
from torch import nn
from torch.utils.data import DataLoader
from trainer import two_process_driver as driver

from genlight import io
from genlight.callbacks import checkpoint_collector, room
from genlight.callbacks.checkpoint_collector import CheckpointCollector, Schedule
from genlight.callbacks.ema_bank import EMABank
from genlight.checkpoints.trajectory import Trajectory, read_averages
from genlight.errors import UserError
from genlight.trainer.checkpoint_io import load_checkpoint, newest_whole_checkpoint
from genlight.trainer.consolidate import consolidated_state_dict

quiet()


def collector(folder: Path, **options: Any) -> CheckpointCollector:
    return CheckpointCollector(str(folder), **({"every_n_steps": 2, "window": (0.2, 1.0)} | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Linear(LightningModule):
    """A loss that is linear in the weights: under SGD with rate 1, n steps move them by n times the gradient."""

    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.lr = lr

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return (self.w * torch.tensor([1.0, 0.5, -2.0])).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def fit(module: LightningModule, callbacks: list[Any], folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **({"max_steps": 10} | options),
    )
    trainer.fit(module, DataLoader(torch.zeros(4, 1)))
    return trainer


@pytest.mark.parametrize("accumulated", [1, 4])
def test_member_n_is_the_weights_after_n_steps_exactly(accumulated: int, tmp_path: Path) -> None:
    fit(Linear(), [collector(tmp_path / "t")], tmp_path, accumulate_grad_batches=accumulated)
    found = Trajectory.open(tmp_path / "t")
    assert found.steps == [4, 6, 8, 10]
    assert [member.lr for member in found.members] == [1.0] * 4
    for number, step in enumerate(found.steps):
        expected = torch.tensor([1.0, 2.0, 3.0]) - step * torch.tensor([1.0, 0.5, -2.0])
        assert torch.equal(found.read(number, "w"), expected)


def test_saved_are_the_raw_weights_beside_an_average_and_validations(tmp_path: Path) -> None:
    train(tmp_path / "run", callbacks=(collector(tmp_path / "t"),), val_check_interval=3)
    found = Trajectory.open(tmp_path / "t")
    assert found.steps == list(range(5, 18, 2))
    for number, step in enumerate(found.steps):
        (path,) = (tmp_path / "run").glob(f"*step={step}.ckpt")
        checkpoint = load_checkpoint(path)
        for name in found.names:
            assert torch.equal(found.read(number, name), checkpoint["current_model_state"][name])
            assert not torch.equal(found.read(number, name), checkpoint["state_dict"][name])


class WithTeacher(ToyModule):
    """A frozen layer, a tied weight, a buffer, and a teacher that is no part of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
        self.net[2].weight = self.net[1].weight
        self.net[0].requires_grad_(False)
        self.register_buffer("scale", torch.ones(2))
        self.__dict__["teacher"] = nn.Linear(6, 6)


def test_frozen_tied_buffers_and_teacher(tmp_path: Path) -> None:
    module = WithTeacher()
    teacher = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    train(tmp_path / "run", callbacks=(collector(tmp_path / "t"),), module=module)
    assert Trajectory.open(tmp_path / "t").names == ("net.1.bias", "net.1.weight", "net.2.bias")
    assert all(torch.equal(value, teacher[name]) for name, value in module.teacher.state_dict().items())
    train(tmp_path / "run2", callbacks=(collector(tmp_path / "some", parameters="bias$"),), module=WithTeacher())
    assert Trajectory.open(tmp_path / "some").names == ("net.1.bias", "net.2.bias")
    with pytest.raises(
        UserError, match=r"parameters=lora fits no trainable parameter; the first of 4 is 'net\.0\.weight'"
    ):
        fit(ToyModule(), [collector(tmp_path / "none", parameters="lora")], tmp_path)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_members": 3}, {"dtype": "bfloat16_difference"}, {"mode": "bins", "bins": 3}],
    ids=["files", "ring", "difference", "bins"],
)
def test_a_resumed_run_ends_with_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    accumulate = {"accumulate_grad_batches": 2, "max_steps": 12}
    train(tmp_path / "run", callbacks=(collector(tmp_path / "whole", **options),), **accumulate)

    # killed after step 11, with a checkpoint of step 8: later members are there and must go
    def killed() -> None:
        callback = collector(tmp_path / "t", **options)
        original = callback.on_train_batch_end

        def batch_end(trainer: Trainer, *arguments: Any) -> None:
            original(trainer, *arguments)
            if trainer.global_step == 11:
                os._exit(EXIT_CODE)

        callback.on_train_batch_end = batch_end  # type: ignore[method-assign]
        train(tmp_path / "killed", callbacks=(callback,), checkpoint={"every_n_train_steps": 4}, **accumulate)

    assert in_child(killed) == EXIT_CODE
    newest, _ = newest_whole_checkpoint(tmp_path / "killed")
    assert newest is not None and "step=8" in newest.name
    train(tmp_path / "killed", resume=newest, callbacks=(collector(tmp_path / "t", **options),), **accumulate)
    assert contents(tmp_path / "whole") == contents(tmp_path / "t")


class Stop(Callback):
    """Ends the training after a step, as a limit of time does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16_difference"}, {"mode": "bins", "bins": 3}], ids=["files", "difference", "bins"]
)
def test_a_run_stopped_in_the_window_is_whole_and_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "run", callbacks=(collector(tmp_path / "whole", **options),))
    train(tmp_path / "stopped", callbacks=(collector(tmp_path / "t", **options), Stop(10)))
    early = Trajectory.open(tmp_path / "t")
    assert early.members[0].first_step == 5 and early.steps[-1] == 9
    newest, _ = newest_whole_checkpoint(tmp_path / "stopped")
    assert newest is not None and "step=10" in newest.name
    train(tmp_path / "stopped", resume=newest, callbacks=(collector(tmp_path / "t", **options),))
    assert contents(tmp_path / "whole") == contents(tmp_path / "t")


@pytest.mark.parametrize("options", [{"dtype": "bfloat16_difference"}, {"mode": "bins", "bins": 3}])
def test_a_run_that_died_after_its_last_step_ends_when_it_is_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "run", callbacks=(collector(tmp_path / "whole", **options),), max_steps=12)

    def killed() -> None:
        callback = collector(tmp_path / "t", **options)
        callback.on_train_end = lambda *_: os._exit(EXIT_CODE)  # type: ignore[method-assign]
        train(tmp_path / "killed", callbacks=(callback,), max_steps=12)

    assert in_child(killed) == EXIT_CODE
    newest, _ = newest_whole_checkpoint(tmp_path / "killed")
    assert newest is not None and "step=12" in newest.name
    assert contents(tmp_path / "whole") != contents(tmp_path / "t")
    train(tmp_path / "killed", resume=newest, callbacks=(collector(tmp_path / "t", **options),), max_steps=12)
    assert contents(tmp_path / "whole") == contents(tmp_path / "t")


def test_every_member_before_a_checkpoint_is_on_the_disk(tmp_path: Path) -> None:
    """Killed at any of the calls that write: what the newest checkpoint follows is there."""
    calls: list[str] = []
    with hooked(lambda name, path: calls.append(path.parent.name)):
        train(tmp_path / "run", callbacks=(collector(tmp_path / "whole"),))
    whole = contents(tmp_path / "whole")
    # three of the calls that write members, and one that writes a checkpoint
    places = [number for number, folder in enumerate(calls, start=1) if folder == "whole"]
    for number in (places[20], places[45], places[-1], places[60] + 30):
        folder = tmp_path / str(number)

        def killed(folder: Path = folder, number: int = number) -> None:
            with hooked(die_at(number)):
                train(folder / "run", callbacks=(collector(folder / "t"),))

        assert in_child(killed) == EXIT_CODE
        newest, _ = newest_whole_checkpoint(folder / "run")
        assert newest is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*gap.*")
            train(folder / "run", resume=newest, callbacks=(collector(folder / "t"),))
        assert contents(folder / "t") == whole


def test_bins_are_the_means_of_the_files(tmp_path: Path) -> None:
    train(tmp_path / "a", callbacks=(collector(tmp_path / "files", every_n_steps=1),))
    train(tmp_path / "b", callbacks=(collector(tmp_path / "bins", every_n_steps=1, mode="bins", bins=5),))
    files, bins = Trajectory.open(tmp_path / "files"), Trajectory.open(tmp_path / "bins")
    assert len(bins.members) == 5 and sum(m.count for m in bins.members) == len(files.members) == 14
    for number, member in enumerate(bins.members):
        inside = [i for i, step in enumerate(files.steps) if member.first_step <= step <= member.last_step]
        assert len(inside) == member.count
        for name in bins.names:
            mean = torch.stack([files.read(i, name).double() for i in inside]).mean(0)
            assert torch.equal(bins.read(number, name), mean.float())


def test_the_default_interval_gives_150_members_up_to_the_last_step() -> None:
    schedule = Schedule.of(8000, (0.25, 1.0), None)
    assert schedule.every == 40 and schedule.steps == list(range(2040, 8001, 40)) and len(schedule.steps) == 150
    assert Schedule.of(10, (0.25, 1.0), None).steps == list(range(3, 11))
    assert Schedule.of(1000, (0.5, 0.9), 150).steps == [600, 750, 900]


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Linear()
    with pytest.raises(UserError, match=r"disk_limit=1e-09 allows .*mode=bins \(16 means"):
        fit(module, [collector(tmp_path / "t", disk_limit=1e-9)], tmp_path)
    monkeypatch.setattr(room, "free_bytes", lambda folder: 30)
    with pytest.raises(UserError, match=r"will keep 4 times 12 B.* where 30 B are free: use callbacks.collector.mode"):
        fit(module, [collector(tmp_path / "t")], tmp_path)
    monkeypatch.setattr(room, "free_memory", lambda device: 90)
    with pytest.raises(UserError, match=r"the 4 means of .* take 96 B of memory on cpu, where 90 B are free: use"):
        fit(module, [collector(tmp_path / "t", mode="bins", bins=4)], tmp_path)
    assert torch.equal(module.w, torch.tensor([1.0, 2.0, 3.0])) and not (tmp_path / "t").exists()


def test_what_all_callbacks_take_together_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two would fit by itself."""
    monkeypatch.setattr(room, "free_bytes", lambda folder: 150)
    monkeypatch.setattr(room, "free_memory", lambda device: 120)

    def bank(name: str) -> EMABank:
        return EMABank(str(tmp_path / name), rates=(0.5,), sigma_rels=(0.1,), power_snapshots=10)

    fit(Linear(), [collector(tmp_path / "one")], tmp_path)
    fit(Linear(), [bank("two")], tmp_path)
    with pytest.raises(UserError, match=r"ema_bank .* 11 times 12 B, .* 150 B are free and other .* take 60 B of them"):
        fit(Linear(), [collector(tmp_path / "t"), bank("e")], tmp_path)
    monkeypatch.setattr(room, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"EMABank take 24 B of memory on cpu, where 120 B are .* take 120 B of them"):
        fit(Linear(), [collector(tmp_path / "t", mode="bins", bins=5), bank("e")], tmp_path)


def test_means_of_the_factors_of_adapters_are_refused(tmp_path: Path) -> None:
    module = Linear()
    module.lora_A, module.lora_B = nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)
    with pytest.raises(UserError, match="mode=bins would keep means of the two factors of adapters"):
        fit(module, [collector(tmp_path / "t", mode="bins")], tmp_path)
    # no product of two that change
    fit(module, [collector(tmp_path / "t", mode="bins", bins=2, parameters="lora_B")], tmp_path)
    assert len(Trajectory.open(tmp_path / "t").members) == 2


def test_only_the_process_that_writes_keeps_means(tmp_path: Path) -> None:
    saved = collector(tmp_path, mode="bins")
    saved._bins.add(4, {"w": torch.zeros(3)})
    strategy = SimpleNamespace(reduce_boolean_decision=lambda done, all: True)
    for first in (True, False):
        other = collector(tmp_path, mode="bins")
        other.load_state_dict(saved.state_dict())
        trainer: Any = SimpleNamespace(
            global_step=4, is_global_zero=first, world_size=2, estimated_stepping_batches=10, strategy=strategy,
            callbacks=[], default_root_dir=tmp_path, lr_scheduler_configs=[],
        )  # fmt: skip
        other.on_train_start(trainer, Linear())
        assert len(other._bins) == first


def test_a_full_disk_while_training_is_told_in_one_line(tmp_path: Path) -> None:
    with hooked(fail_at(60, errno.ENOSPC)), pytest.raises(io.DiskFullError, match="disk full while writing"):
        fit(Linear(), [collector(tmp_path / "t")], tmp_path, max_steps=100)
    assert Trajectory.open(tmp_path / "t").steps[0] == 22


def test_the_trajectory_of_another_run_is_not_touched(tmp_path: Path) -> None:
    fit(Linear(), [collector(tmp_path / "t")], tmp_path)
    before = contents(tmp_path / "t")
    with pytest.raises(UserError, match="holds the trajectory of another training: origin every_n_steps is 2 there"):
        fit(Linear(), [collector(tmp_path / "t", every_n_steps=1)], tmp_path)
    assert contents(tmp_path / "t") == before


class Decaying(Linear):
    def __init__(self, final: float, known: bool) -> None:
        super().__init__()
        self.final, self.known = final, known

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 1.0)
        if self.known:
            schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.final ** (step / 9))
        else:
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.final ** (1 / 9))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("known", [True, False])
def test_a_rate_that_has_decayed_is_told(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, bool]] = []
    module = Decaying(1e-4, known)
    monkeypatch.setattr(
        checkpoint_collector, "rank_zero_warn", lambda text: told.append((text, torch.equal(module.w, Linear().w)))
    )
    fit(module, [collector(tmp_path / "t", window=(0.0, 1.0))], tmp_path)
    assert [before_training for _, before_training in told] == ([True, False] if known else [False])
    assert "falls from 0.359 to 0.0001 where checkpoints are saved" in told[0][0]
    told.clear()
    fit(Decaying(0.1, known), [collector(tmp_path / "u", window=(0.0, 1.0))], tmp_path)
    assert told == []


def test_lost_members_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(checkpoint_collector, "rank_zero_warn", told.append)
    train(tmp_path / "run", callbacks=(collector(tmp_path / "t"),))
    (newest,) = (tmp_path / "run").glob("*step=9.ckpt")
    train(tmp_path / "run", resume=newest, callbacks=(collector(tmp_path / "new"),))
    assert len(told) == 1 and "lacks 3 members up to step 9" in told[0] and "the first is 5" in told[0]


def test_the_command_collects_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    words = ["fit", "callbacks=collector", "trainer.limit_val_batches=0", "callbacks.sample_grid=null", "run.name=a"]
    assert genlight(tmp_path, *words) == 0
    folder = tmp_path / "a" / "fit"
    found = Trajectory.open(folder / "trajectory")
    assert found.steps == [3, 4, 5, 6] and all(name.startswith("network.") for name in found.names)
    assert len(read_averages(folder / "trajectory" / "ema", found.shapes)) == 10
    whole = contents(folder / "trajectory")
    io.remove_path(folder / "checkpoints" / "step-000006.ckpt")
    assert genlight(tmp_path, *words, "resume=true") == 0
    assert contents(folder / "trajectory") == whole


@pytest.mark.parametrize("every", [None, 2])
def test_the_command_goes_on_with_a_longer_training(
    every: int | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["fit", "callbacks=collector", "trainer.limit_val_batches=0", "callbacks.sample_grid=null", "run.name=a"]
    words += [] if every is None else [f"callbacks.collector.every_n_steps={every}"]
    assert genlight(tmp_path, *words) == 0
    folder = tmp_path / "a" / "fit" / "trajectory"
    short = contents(folder)
    assert genlight(tmp_path, *words, "resume=true", "trainer.max_steps=300") == 0
    found = Trajectory.open(folder)
    assert found.steps == ([4, 6] if every else [3, 4, 5, 6]) + list(range(76, 301, 2))
    assert found.origin["every_n_steps"] == 2
    assert all(contents(folder)[name] == short[name] for name in short if name.startswith("step-"))
    power = Trajectory.open(folder / "ema" / "power-0.05")
    assert power.steps[:6] == [1, 2, 3, 4, 5, 6] and power.steps[-2:] == [291, 300]
    assert "will have a gap" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"window": (0.5, 0.5)},
        {"window": (0.0, 1.5)},
        {"window": (0.5,)},
        {"every_n_steps": 0},
        {"max_members": 0},
        {"mode": "all"},
        {"bins": 1},
        {"dtype": "float16"},
        {"parameters": "("},
        {"disk_limit": 0.0},
    ],
)
def test_values_out_of_range_name_the_key(options: dict[str, Any], tmp_path: Path) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=rf"callbacks\.collector\.{key}="):
        collector(tmp_path, **options)


def test_a_training_without_length_or_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set trainer\.max_steps"):
        fit(Linear(), [collector(tmp_path / "t")], tmp_path, max_steps=-1, max_epochs=-1)
    with pytest.raises(UserError, match=r"leave no step of 10 to save"):
        fit(Linear(), [collector(tmp_path / "t", window=(0.9, 0.91))], tmp_path)


STRATEGIES = ["ddp+ema", "zero2", "zero3", "fsdp"]


def four_steps(folder: Path, name: str, *, resume: bool = False, devices: int = driver.WORLD_SIZE) -> None:
    """A member after each."""
    task = driver.tiny_task()
    trainer = driver.make_trainer(name, folder, task, "auto" if devices == 1 else None, devices)
    trainer.callbacks.insert(0, CheckpointCollector(str(folder / "trajectory"), every_n_steps=1, window=(0.0, 1.0)))
    if name.split("+")[0] not in ("zero3", "fsdp"):
        bank = EMABank(str(folder / "trajectory" / "ema"), rates=(0.5, 0.9), power_snapshots=4)
        trainer.callbacks.insert(0, bank)
    start = driver.checkpoint_at(folder, driver.RESUME_STEP) if resume else None
    trainer.fit(task.module, driver.GlobalBatches(task), ckpt_path=start, weights_only=True)


def twice(folder: Path, name: str) -> None:
    """In each process; then there are `checkpoints`, `whole` (the trajectory of a run that was not stopped) and
    `trajectory` (the same after the run was continued from step 2).
    """
    four_steps(folder, name)
    if os.environ["LOCAL_RANK"] == "0":
        shutil.copytree(folder / "trajectory", folder / "whole")
    four_steps(folder, name, resume=True)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each strategy, and `one`, the trajectory of one process."""
    folder = tmp_path_factory.mktemp("two")
    four_steps(folder / "one", "ddp", devices=1)
    in_ranks(lambda: [twice(folder / name, name) for name in STRATEGIES])
    return folder


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_collect_what_one_does(name: str, two_processes: Path) -> None:
    folder = two_processes / name
    found = Trajectory.open(folder / "whole")
    assert found.names == ("first.bias", "first.weight", "last.weight", "second.bias", "second.weight", "third.bias")
    assert found.steps == [1, 2, 3, 4]
    for number in (1, 3):
        path = folder / "checkpoints" / f"step={number + 1}.ckpt"
        state = load_checkpoint(path)["current_model_state"] if "+ema" in name else consolidated_state_dict(path)
        assert all(torch.equal(found.read(number, n), state[n]) for n in found.names)
    single = Trajectory.open(two_processes / "one" / "trajectory")
    for number in range(4):
        for n in found.names:
            torch.testing.assert_close(found.read(number, n), single.read(number, n), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_resume_to_the_same_bytes(name: str, two_processes: Path) -> None:
    whole = contents(two_processes / name / "whole")
    assert contents(two_processes / name / "trajectory") == whole
    assert ("ema/rate-0.500000.safetensors" in whole) == (name in ("ddp+ema", "zero2"))
