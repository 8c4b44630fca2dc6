"""Trajectories on disk: what is written comes back, any crash leaves one that opens, any damage is named."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.faults import EXIT_CODE, die_at, fail_at, hooked, in_child

from genlight import io
from genlight.checkpoints import trajectory
from genlight.checkpoints.trajectory import Average, Trajectory, check_averages, read_averages, save_average
from genlight.checkpoints.writer import BackgroundWriter, Snapshot, TrajectoryWriter
from genlight.errors import UserError

SHAPES = {"b.weight": (3, 2), "a.bias": (4,), "c.scalar": ()}
ORIGIN = {"run": "one", "module": "toy"}


def weights(step: int) -> dict[str, torch.Tensor]:
    """A drift of small steps, as of a training."""
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    generator.manual_seed(step)
    return {
        name: start[name] + 0.001 * step + 1e-3 * torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
    }


def writer(folder: Path, **options) -> TrajectoryWriter:
    return TrajectoryWriter(folder, SHAPES, ORIGIN, **({"every_n_steps": 10} | options))


def filled(folder: Path, steps=range(10, 60, 10), **options) -> Path:
    output = writer(folder, **options)
    for step in steps:
        output.append(step, weights(step), lr=1.0 / step)
    output.close()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_holds(folder: Path, steps: list[int]) -> None:
    found = Trajectory.open(folder)
    assert found.steps == steps
    for number, step in enumerate(steps):
        assert all(torch.equal(found.read(number, name), weights(step)[name]) for name in SHAPES)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    found = Trajectory.open(filled(tmp_path / "t"))
    assert found.names == ("a.bias", "b.weight", "c.scalar") and found.shapes == SHAPES
    assert found.origin == {**ORIGIN, "every_n_steps": 10}
    assert [(m.first_step, m.count, m.lr, m.dtype) for m in found.members[:2]] == [
        (10, 1, 0.1, "float32"),
        (20, 1, 0.05, "float32"),
    ]
    assert_holds(tmp_path / "t", [10, 20, 30, 40, 50])
    for name in SHAPES:
        assert torch.equal(found.read_difference(1, name), weights(20)[name] - weights(50)[name])
        assert not found.read_difference(-1, name).any()
        assert found.read(1, name).data_ptr() == found.read(1, name).data_ptr()  # mapped, not copied


def test_the_fingerprint_tells_contents_apart(tmp_path: Path) -> None:
    prints = {
        Trajectory.open(filled(tmp_path / name, **options)).fingerprint
        for name, options in {
            "one": {},
            "same": {},
            "shorter": {"max_members": 4},
            "interval": {"every_n_steps": 5},
            "steps": {"steps": range(10, 50, 10)},
        }.items()
    }
    assert len(prints) == 4


def test_only_the_newest_are_kept_and_resuming_drops_later_ones(tmp_path: Path) -> None:
    folder = filled(tmp_path, range(10, 80, 10), max_members=4)
    assert_holds(folder, [40, 50, 60, 70])
    assert len(contents(folder)) == 5
    resumed = writer(folder, max_members=4, resume_at=59)
    assert resumed.steps == [40, 50]
    resumed.append(60, weights(60))
    assert_holds(folder, [40, 50, 60])
    assert len(contents(folder)) == 4
    writer(folder, resume_at=0).close()
    with pytest.raises(UserError, match="holds no member yet"):
        Trajectory.open(folder)


def test_a_resumed_writer_ends_with_the_same_bytes(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16_difference"):
        whole = filled(tmp_path / f"whole-{dtype}", dtype=dtype)
        folder = tmp_path / f"resumed-{dtype}"
        killed = writer(folder, dtype=dtype)
        for step in (10, 20, 30):
            killed.append(step, weights(step), lr=1.0 / step)
        filled(folder, range(30, 60, 10), dtype=dtype, resume_at=20)
        assert contents(whole) == contents(folder)


def test_differences_are_near_and_the_newest_is_exact(tmp_path: Path) -> None:
    found = Trajectory.open(filled(tmp_path / "bf16", dtype="bfloat16_difference"))
    assert [m.dtype for m in found.members] == ["bfloat16_difference"] * 4 + ["float32"]
    for number, step in enumerate(found.steps):
        for name in SHAPES:
            exact = weights(step)[name] - weights(50)[name]
            stored = found.read_difference(number, name)
            assert torch.equal(stored, exact.bfloat16().float())
            assert ((found.read(number, name) - weights(step)[name]).abs() <= exact.abs() * 2**-8 + 2e-7).all()
    assert torch.equal(found.read(-1, "b.weight"), weights(50)["b.weight"])


def test_a_closed_trajectory_of_differences_can_go_on(tmp_path: Path) -> None:
    folder = filled(tmp_path, dtype="bfloat16_difference")
    before = {name: Trajectory.open(folder).read(1, name).clone() for name in SHAPES}
    output = writer(folder, dtype="bfloat16_difference", resume_at=40)
    output.append(50, weights(51))
    found = Trajectory.open(folder)
    assert found.steps == [10, 20, 30, 40, 50] and all(m.dtype == "float32" for m in found.members)
    assert all(torch.equal(found.read(1, name), before[name]) for name in SHAPES)


def test_a_training_that_goes_on_may_have_another_interval(tmp_path: Path) -> None:
    folder = filled(tmp_path, [10, 20])
    output = writer(folder, every_n_steps=25, resume_at=20)
    output.append(45, weights(45))
    assert_holds(folder, [10, 20, 45])
    assert Trajectory.open(folder).origin["every_n_steps"] == 25


def test_means_replace_all_members(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    output = writer(folder, dtype="bfloat16_difference")
    output.replace_all([Snapshot(10, 40, 4, None, weights(1)), Snapshot(50, 50, 1, 0.5, weights(2))])
    found = Trajectory.open(folder)
    assert [(m.first_step, m.last_step, m.count) for m in found.members] == [(10, 40, 4), (50, 50, 1)]
    assert len(contents(folder)) == 3
    output.close()
    found = Trajectory.open(folder)
    assert [(m.first_step, m.last_step, m.count) for m in found.members] == [(10, 40, 4), (50, 50, 1)]
    torch.testing.assert_close(found.read(0, "a.bias"), weights(1)["a.bias"], rtol=0, atol=1e-4)


def append_next(folder: Path) -> None:
    output = writer(folder, max_members=3)
    output.append(40, weights(40), lr=0.1)
    output.close()


def convert(folder: Path) -> None:
    writer(folder, dtype="bfloat16_difference").close()


@pytest.mark.parametrize("action", [append_next, convert])
@pytest.mark.parametrize("fault", ["ENOSPC", "death"])
def test_any_failing_call_leaves_a_trajectory_that_opens_and_goes_on(action, fault: str, tmp_path: Path) -> None:
    done = filled(tmp_path / "done", [10, 20, 30])
    action(done)
    number = 0
    while True:
        number += 1
        folder = filled(tmp_path / f"{number}", [10, 20, 30])
        if fault == "death":

            def killed(folder: Path = folder, number: int = number) -> None:
                with hooked(die_at(number)):
                    action(folder)

            status = in_child(killed)
            assert status in (0, EXIT_CODE)
            survived = status == 0
        else:
            try:
                with hooked(fail_at(number, errno.ENOSPC)):
                    action(folder)
                survived = True
            except (io.DiskFullError, OSError) as error:  # plain where a file cannot be removed
                assert str(folder) in str(error)
                survived = False
        if survived:
            break
        found = Trajectory.open(folder)
        assert found.steps in ([10, 20, 30], [20, 30, 40])
        if found.steps[-1] == 30:
            action(folder)
        else:
            writer(folder, max_members=3).close()
        assert contents(folder) == contents(done)
    assert number > 8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_bit_is_named(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = filled(Path(scratch), [10, 20])
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        if path.name == "index.json":
            try:
                # a changed blank or line break changes nothing that is read
                assert (
                    Trajectory.open(folder).fingerprint == Trajectory.open(filled(folder / "x", [10, 20])).fingerprint
                )
            except UserError as error:
                assert "index.json" in str(error)
        else:
            with pytest.raises(io.CorruptFileError, match=path.name):
                Trajectory.open(folder, check="hash")


@pytest.mark.parametrize("check", ["names", "hash"])
def test_truncated_missing_and_foreign_files_are_named_without_reading_them(check, tmp_path: Path) -> None:
    other = filled(tmp_path / "other", [20, 21])
    for name, damage in {
        "truncated": lambda path: os.truncate(path, path.stat().st_size - 5),
        "empty": lambda path: os.truncate(path, 0),
        "missing": lambda path: path.unlink(),
        "foreign": lambda path: path.write_bytes((other / "step-00000021.safetensors").read_bytes()),
        "text": lambda path: path.write_text("weights"),
    }.items():
        folder = filled(tmp_path / name)
        damage(folder / "step-00000020.safetensors")
        with pytest.raises(io.CorruptFileError, match=r"step-00000020\.safetensors"):
            Trajectory.open(folder, check=check)
        found = Trajectory.open(folder, check=check, skip_damaged=True)
        assert found.steps == [10, 30, 40, 50]
        assert len(found.damaged) == 1 and "step-00000020" in found.damaged[0]


def test_the_base_of_differences_is_never_left_out(tmp_path: Path) -> None:
    folder = filled(tmp_path, dtype="bfloat16_difference")
    (folder / "step-00000050.safetensors").unlink()
    with pytest.raises(io.CorruptFileError, match=r"step-00000050\.safetensors is missing"):
        Trajectory.open(folder, skip_damaged=True)


def test_a_file_of_other_parameters_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path, [10, 20])
    index = trajectory.read_index(folder)
    for change, message in (({"d": (1,)}, "lacks parameter 'd'"), ({"a.bias": (5,)}, "'a.bias' is F32")):
        trajectory.write_index(folder, trajectory.Index(index.origin, index.shapes | change, index.members))
        with pytest.raises(io.CorruptFileError, match=message):
            Trajectory.open(folder, check="names")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = filled(tmp_path / "t", [10])
    index = trajectory.read_index(folder)
    outside = trajectory.Member(10, 10, 1, None, "../secret.safetensors", "", "float32")
    trajectory.write_index(folder, trajectory.Index(index.origin, index.shapes, (outside,)))
    with pytest.raises(io.CorruptFileError, match="not a name inside"):
        Trajectory.open(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"origin": {**ORIGIN, "run": "two"}}, "origin run is 'one' there and 'two' here"),
        ({"every_n_steps": 20}, "origin every_n_steps is 10 there and 20 here"),
        ({"shapes": {**SHAPES, "a.bias": (5,)}}, r"shape a.bias is \(4,\) there and \(5,\) here"),
    ],
)
def test_another_training_is_refused_before_anything_changes(options: dict, message: str, tmp_path: Path) -> None:
    folder = filled(tmp_path)
    before = contents(folder)
    arguments = {"shapes": SHAPES, "origin": ORIGIN, "every_n_steps": 10, "resume_at": 0} | options
    other = TrajectoryWriter(folder, arguments.pop("shapes"), arguments.pop("origin"), **arguments)
    for action in (other.check, other.close):
        with pytest.raises(UserError, match=message):
            action()
    assert contents(folder) == before


def test_wrong_input_is_named(tmp_path: Path) -> None:
    output = writer(tmp_path)
    output.append(20, weights(20))
    for step, tensors, message in (
        (20, weights(20), "step 20 cannot follow step 20"),
        (30, {**weights(1), "d": torch.ones(1)}, "parameter 'd' at step 30"),
        (30, {**weights(1), "a.bias": torch.ones(5)}, r"'a.bias' at step 30 has shape \(5,\)"),
        (30, {**weights(1), "a.bias": torch.ones(4).double()}, "float32"),
        (30, {"a.bias": torch.ones(4)}, "'b.weight' at step 30 has shape None"),
    ):
        with pytest.raises(ValueError, match=message):
            output.append(step, tensors)
    assert_holds(tmp_path, [20])
    for options, message in (
        ({"max_members": 0}, "max_members"),
        ({"dtype": "int4"}, "dtype"),
        ({"every_n_steps": 0}, "every_n"),
    ):
        with pytest.raises(ValueError, match=message):
            writer(tmp_path, **options)
    with pytest.raises(ValueError, match="check must be one of"):
        Trajectory.open(tmp_path, check="none")
    with pytest.raises(UserError, match="holds no trajectory"):
        Trajectory.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match="'z' is no parameter"):
        Trajectory.open(tmp_path).read(0, "z")


def test_averages_come_back_and_others_are_refused(tmp_path: Path) -> None:
    for rate in (0.99, 0.9):
        save_average(tmp_path / f"rate-{rate}.safetensors", Average(rate, 50, weights(50)))
    found = read_averages(tmp_path, SHAPES)
    assert [(a.rate, a.step) for a in found] == [(0.9, 50), (0.99, 50)]
    assert torch.equal(found[0].tensors["b.weight"], weights(50)["b.weight"])
    damaged = bytearray(found[1].path.read_bytes())
    damaged[-1] ^= 1
    found[1].path.write_bytes(damaged)
    with pytest.raises(io.CorruptFileError, match=r"rate-0\.99\.safetensors"):
        found[1].tensors  # noqa: B018
    with pytest.raises(io.CorruptFileError, match=r"rate-0.9.safetensors belongs to another trajectory"):
        read_averages(tmp_path, {**SHAPES, "a.bias": (5,)})
    with pytest.raises(io.CorruptFileError, match=r"parameter 'c'; callbacks\.ema_bank\.parameters"):
        check_averages(tmp_path, {**SHAPES, "c": (1,)})
    assert read_averages(tmp_path / "none", SHAPES) == []
    (tmp_path / "rate-0.5.safetensors").write_bytes(b"short")
    with pytest.raises(io.CorruptFileError, match=r"rate-0\.5\.safetensors is truncated"):
        check_averages(tmp_path, SHAPES)


def test_jobs_run_in_order_and_the_first_error_stops_them() -> None:
    done: list[int] = []
    background = BackgroundWriter(1)
    for number in range(5):
        background.put(lambda number=number: done.append(number))
    background.flush()
    assert done == [0, 1, 2, 3, 4]

    def fail() -> None:
        raise OSError("no")

    background.put(fail)
    background.put(lambda: done.append(5))
    with pytest.raises(OSError, match="no"):
        background.flush()
    background.stop()
    assert done == [0, 1, 2, 3, 4]
