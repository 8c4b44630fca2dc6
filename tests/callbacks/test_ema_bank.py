"""The tracked averages, against the weights of every step and the closed forms of their profiles."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from oracles.toy_training import ToyModule, quiet, train

from genlight.callbacks import ema_bank, room
from genlight.callbacks.checkpoint_collector import CheckpointCollector
from genlight.callbacks.ema_bank import RATES, EMABank
from genlight.checkpoints.ema_profiles import (
    online_ema_weights,
    power_gamma,
    power_weights,
    reconstruct_power_ema,
)
from genlight.checkpoints.trajectory import Trajectory, read_averages
from genlight.errors import UserError
from genlight.trainer.strategies import DeepSpeedCPUStrategy

quiet()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(folder: Path, *, bank: dict[str, Any] | None = None, **options: Any) -> Trajectory:
    """Train with a bank; the weights after every step are the trajectory."""
    collector = CheckpointCollector(str(folder / "t"), every_n_steps=1, window=(0.0, 1.0))
    callbacks = (collector, EMABank(str(folder / "t" / "ema"), **(bank or {})))
    train(folder / "run", callbacks=callbacks, **({"checkpoint": {"every_n_train_steps": 6}} | options))
    return Trajectory.open(folder / "t")


def every_step(found: Trajectory, name: str) -> numpy.ndarray:
    return numpy.stack([found.read(n, name).double().numpy() for n in range(len(found.members))])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_average_is_its_profile_over_the_steps(accumulated: int, tmp_path: Path) -> None:
    found = run(tmp_path, accumulate_grad_batches=accumulated, val_check_interval=3)
    averages = read_averages(tmp_path / "t" / "ema", found.shapes)
    assert [a.rate for a in averages] == list(RATES) and {a.step for a in averages} == {17}
    start = ToyModule().state_dict()
    for name in found.names:
        values = numpy.concatenate([start[name].double().numpy()[None], every_step(found, name)])
        for average in averages:
            expected = numpy.tensordot(online_ema_weights(17, average.rate), values, 1)
            numpy.testing.assert_allclose(average.tensors[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    for sigma_rel in (0.05, 0.1):
        power = Trajectory.open(tmp_path / "t" / "ema" / f"power-{sigma_rel:g}")
        assert power.steps == list(range(1, 18)) and power.origin["sigma_rel"] == sigma_rel
        for number, step in enumerate(power.steps):
            weights = power_weights(range(1, step + 1), power_gamma(sigma_rel))
            for name in power.names:
                expected = numpy.tensordot(weights, every_step(found, name)[:step], 1)
                numpy.testing.assert_allclose(power.read(number, name).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_third_width_is_reconstructed_from_two(tmp_path: Path) -> None:
    tracked = {"sigma_rels": (0.05, 0.10, 0.15), "rates": (), "power_snapshots": 20}
    run(tmp_path, bank=tracked, max_steps=200, checkpoint={"every_n_train_steps": 1000})
    two = [Trajectory.open(tmp_path / "t" / "ema" / f"power-{s}") for s in ("0.05", "0.1")]
    direct = Trajectory.open(tmp_path / "t" / "ema" / "power-0.15")
    ends = [float(step) for power in two for step in power.steps]
    gammas = [float(power.origin["gamma"]) for power in two for _ in power.steps]
    weights, error = reconstruct_power_ema(ends, gammas, power_gamma(0.15), end=200.0)
    assert error < 0.02
    for name in direct.names:
        parts = torch.cat([torch.stack([power.read(n, name) for n in range(20)]) for power in two])
        made = torch.tensordot(torch.from_numpy(weights), parts.double(), 1)
        wanted, last = direct.read(-1, name).double(), two[0].read(-1, name).double()
        # much nearer than the nearest average that was saved
        assert (made - wanted).norm() < 0.05 * (last - wanted).norm()


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path)
    whole = contents(tmp_path / "t")
    (checkpoint,) = (tmp_path / "run").glob("*step=6.ckpt")
    for path in (tmp_path / "t" / "ema").glob("rate-*"):
        path.unlink()
    run(tmp_path, resume=checkpoint)
    assert contents(tmp_path / "t") == whole


def test_a_run_that_died_after_its_last_step_ends_when_it_is_resumed(tmp_path: Path) -> None:
    run(tmp_path, max_steps=12)
    whole = contents(tmp_path / "t")
    (checkpoint,) = (tmp_path / "run").glob("*step=12.ckpt")
    rates = list((tmp_path / "t" / "ema").glob("rate-*"))
    for path in rates:
        path.unlink()
    run(tmp_path, max_steps=12, resume=checkpoint)
    assert len(rates) == len(RATES) and contents(tmp_path / "t") == whole
    # of a run that tracked nothing there is nothing to write
    train(tmp_path / "bare", max_steps=12)
    (bare,) = (tmp_path / "bare").glob("*step=12.ckpt")
    train(tmp_path / "bare", max_steps=12, resume=bare, callbacks=(EMABank(str(tmp_path / "late")),))
    assert not (tmp_path / "late").exists()


def test_a_checkpoint_of_other_settings_is_refused_and_one_without_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    (checkpoint,) = (tmp_path / "run").glob("*step=6.ckpt")
    with pytest.raises(UserError, match="keep the run's settings"):
        run(tmp_path, bank={"rates": (0.5,)}, resume=checkpoint)
    train(tmp_path / "bare", max_steps=17)
    told: list[str] = []
    monkeypatch.setattr(ema_bank, "rank_zero_warn", told.append)
    (bare,) = (tmp_path / "bare").glob("*step=6.ckpt")
    train(tmp_path / "bare", resume=bare, callbacks=(EMABank(str(tmp_path / "late")),))
    assert len(told) == 1 and "they begin at step 6" in told[0]


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks\.ema_bank\.disk_limit=1e-09 allows .* fewer power_snapshots"):
        run(tmp_path, bank={"disk_limit": 1e-9})


def test_averages_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"1.0 kB are free: fewer than 10 callbacks\.ema_bank\.rates, or .*=null"):
        run(tmp_path)


def test_weights_in_shards_are_refused() -> None:
    strategy = DeepSpeedCPUStrategy(stage=3, logging_batch_size_per_gpu=1)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    with pytest.raises(UserError, match="weights that DeepSpeedCPUStrategy has sharded: leave it out"):
        EMABank("ema").on_train_start(trainer, ToyModule())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"rates": (1.0,)}, "rates"),
        ({"rates": (0.9, 0.9)}, "rates"),
        ({"sigma_rels": (0.3,)}, "sigma_rels"),
        ({"sigma_rels": (0.1, 0.1)}, "sigma_rels"),
        ({"power_snapshots": 0}, "power_snapshots"),
    ],
)
def test_values_out_of_range_name_the_key(options: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"callbacks\.ema_bank\.{key}"):
        EMABank(str(tmp_path), **options)
