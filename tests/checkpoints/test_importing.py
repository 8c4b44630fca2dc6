"""Checkpoints of the trainer as a trajectory: the trained weights, not their average, and of one training only."""

from pathlib import Path

import pytest
import torch
from oracles.toy_training import ToyModule, quiet, train

from genlight import io
from genlight.checkpoints.importing import import_checkpoints
from genlight.checkpoints.trajectory import Trajectory
from genlight.checkpoints.writer import TrajectoryWriter
from genlight.errors import UserError

quiet()
NAMES = sorted(name for name, _ in ToyModule().named_parameters())


def checkpoint(path: Path, step: int, value: float = 1.0, **more) -> Path:
    state = {"global_step": step, "state_dict": {"w": torch.full((3,), value)}} | more
    io.save_state(path, state, kind="checkpoint")
    return path


def test_raw_weights_are_taken_where_the_run_was_averaged(tmp_path: Path) -> None:
    train(tmp_path / "run", max_steps=6)
    paths = list((tmp_path / "run").glob("*.ckpt"))
    found = import_checkpoints(paths, tmp_path / "t", NAMES)
    assert found.steps == [1, 2, 3, 4, 5, 6] and found.origin["weights"] == "current_model_state"
    for number, step in enumerate(found.steps):
        (path,) = (tmp_path / "run").glob(f"*step={step}.ckpt")
        raw = io.load_state(path, kind="checkpoint")["current_model_state"]
        assert all(torch.equal(found.read(number, name), raw[name]) for name in NAMES)


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one.ckpt", 10)
    for other, message in (
        (checkpoint(tmp_path / "same.ckpt", 10), r"same\.ckpt and .*one\.ckpt are both of step 10"),
        (checkpoint(tmp_path / "m.ckpt", 20, genlight_module={"a": 1}), r"m\.ckpt is of another training .* module is"),
        (checkpoint(tmp_path / "ema.ckpt", 20, current_model_state={"w": torch.ones(3)}), "weights is 'current_model"),
        (checkpoint(tmp_path / "s.ckpt", 20, state_dict={"w": torch.ones(4)}), r"shape of w is \(4,\), there \(3,\)"),
        (checkpoint(tmp_path / "n.ckpt", 20, state_dict={}), r"n\.ckpt holds no parameter 'w'"),
        (tmp_path / "none.ckpt", "is no checkpoint file"),
    ):
        with pytest.raises(UserError, match=message):
            import_checkpoints([one, other], tmp_path / "t", ["w"])
    with pytest.raises(UserError, match="no checkpoint was given"):
        import_checkpoints([], tmp_path / "t", ["w"])
    assert not (tmp_path / "t").exists()
    import_checkpoints([one], tmp_path / "t", ["w"])
    with pytest.raises(UserError, match="holds a trajectory already"):
        import_checkpoints([one], tmp_path / "t", ["w"])


def test_damaged_files_may_be_left_out_and_are_named(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / f"{step}.ckpt", step) for step in (10, 20, 30)]
    paths[1].write_bytes(paths[1].read_bytes()[:-5])
    with pytest.raises(io.CorruptFileError, match=r"20\.ckpt"):
        import_checkpoints(paths, tmp_path / "t", ["w"])
    found = import_checkpoints(paths, tmp_path / "t", ["w"], skip_damaged=True)
    assert found.steps == [10, 30] and "20.ckpt" in found.damaged[0]
    assert Trajectory.open(tmp_path / "t").damaged == found.damaged
    with pytest.raises(UserError, match=r"no checkpoint was given .*20\.ckpt"):
        import_checkpoints(paths[1:2], tmp_path / "none", ["w"], skip_damaged=True)


def test_an_import_that_is_stopped_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed would search it as if it were the whole."""
    paths = [checkpoint(tmp_path / f"{step}.ckpt", step) for step in (10, 20)]
    monkeypatch.setattr(TrajectoryWriter, "close", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        import_checkpoints(paths, tmp_path / "t", ["w"])
    assert not (tmp_path / "t").exists()
