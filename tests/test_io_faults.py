"""Every write of genlight.io with every one of its system calls failing, or the process dying there: old or new,
whole."""

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracles.faults import EXIT_CODE, die_at, fail_at, hooked, in_child
from safetensors import SafetensorError

from genlight import io
from genlight.io import primitives


def write_folder(path: Path, text: str) -> None:
    with io.atomic_folder(path, replace=True) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text(text * 50)
        io.atomic_write_json(folder / "config.json", {"text": text})


def read_folder(path: Path) -> str:
    io.verify_folder(path)
    text = io.read_json(path / "config.json")["text"]
    assert (path / "inner" / "weights").read_text() == text * 50
    return str(text)


def write_state(path: Path, text: str) -> None:
    io.save_state(path, {"text": text, "weights": torch.full((60,), float(len(text)))}, kind="test")


def read_state(path: Path) -> str:
    state = io.load_state(path, kind="test")
    assert torch.equal(state["weights"], torch.full((60,), float(len(state["text"]))))
    return str(state["text"])


def copy(path: Path, text: str) -> None:
    source = path.parent.parent / "source"
    source.write_text(text * 100)
    io.copy_to_folder(source, path.parent, path.name)


WRITERS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], str]]] = {
    "text": (lambda path, text: io.atomic_write_text(path, text * 100), lambda path: path.read_text()[: len("old")]),
    "json": (lambda path, text: io.atomic_write_json(path, {"a": text}), lambda path: io.read_json(path)["a"]),
    "state": (write_state, read_state),
    "folder": (write_folder, read_folder),
    "copy": (copy, lambda path: path.read_text()[: len("old")]),
}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several write calls per file, so that faults also fall inside a file."""
    monkeypatch.setattr(primitives, "CHUNK_BYTES", 128)


@pytest.fixture(params=[True, False], ids=["exchange", "two-renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(primitives, "_exchange", lambda first, second: False)
    return bool(request.param)


def test_a_disk_that_fills_up_under_a_library_is_told_like_any_other(tmp_path: Path) -> None:
    """safetensors has an error of its own for it."""

    def written(number: int) -> None:
        with io.atomic_folder(tmp_path / "artifact"):
            raise SafetensorError(f"Error while serializing: I/O error: told by the system (os error {number})")

    with pytest.raises(io.DiskFullError, match=f"disk full while writing {tmp_path}"):
        written(errno.ENOSPC)
    with pytest.raises(SafetensorError):
        written(errno.EIO)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("start", ["old", None])
def test_old_or_new_when_any_call_fails(
    name: str, code: int, start: str | None, exchange: bool, tmp_path: Path
) -> None:
    write, read = WRITERS[name]
    number = 0
    while True:
        number += 1
        path = tmp_path / str(number) / "file"
        if start:
            write(path, start)
        try:
            with hooked(fail_at(number, code)):
                write(path, "new")
        except OSError as error:
            assert error.errno == code == errno.EIO
        except io.DiskFullError as error:
            assert code == errno.ENOSPC
            assert str(error).startswith("disk full while writing ") and str(tmp_path) in str(error)
            assert "\n" not in str(error) and " needed, " in str(error) and " free" in str(error)
        else:
            break
        found = read(path) if path.exists() else None
        assert found in (start, "new"), f"call {number}"
        if path.parent.exists():
            if start and name != "folder":
                assert leftovers(path.parent) == [], f"call {number}"
            io.remove_leftovers(path.parent)
            assert (read(path) if path.exists() else None) in (start, "new")
            assert leftovers(path.parent) == []
        write(path, "later")
        assert read(path).startswith("lat")
    assert number > 5 and read(path) == "new"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("start", ["old", None])
def test_old_or_new_when_the_process_dies_at_any_call(
    name: str, start: str | None, exchange: bool, tmp_path: Path
) -> None:
    write, read = WRITERS[name]
    number, status = 0, EXIT_CODE
    while status == EXIT_CODE:
        number += 1
        path = tmp_path / str(number) / "file"
        if start:
            write(path, start)

        def action(path: Path = path, number: int = number) -> None:
            with hooked(die_at(number)):
                write(path, "new")

        status = in_child(action)
        assert status in (0, EXIT_CODE)
        if path.parent.exists():
            if exchange or name != "folder":
                assert (read(path) if path.exists() else None) in (start, "new"), f"call {number}"
            io.remove_leftovers(path.parent)
            assert leftovers(path.parent) == []
        assert (read(path) if path.exists() else None) in (start, "new"), f"call {number}"
        write(path, "later")
        assert read(path).startswith("lat")
    assert number > 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_appending_keeps_every_whole_line(code: int, tmp_path: Path) -> None:
    number, path = 0, tmp_path / "history.jsonl"
    written = ["first" * 60]
    io.append_line(path, written[0])
    with path.open("ab") as file:
        file.write(b"torn")
    while True:
        number += 1
        try:
            with hooked(fail_at(number, code)):
                io.append_line(path, "next" * 60)
        except (OSError, io.DiskFullError):
            assert io.read_lines(path) == written
        else:
            break
    assert number >= 4 and io.read_lines(path) == [*written, "next" * 60]


def test_appending_when_the_process_dies_at_any_call(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    number, status, whole = 0, EXIT_CODE, []
    while status == EXIT_CODE:
        number += 1

        def action(number: int = number) -> None:
            with hooked(die_at(number)):
                io.append_line(path, "x" * 300)

        status = in_child(action)
        lines = io.read_lines(path) if path.exists() else []
        assert lines in (whole, [*whole, "x" * 300])
        whole = lines
    assert number > 5 and len(whole) >= 1


def test_file_is_synced_before_its_name_and_its_name_after(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []
    with hooked(lambda name, path: calls.append((name, path.name))):
        io.atomic_write_bytes(tmp_path / "file", b"x" * 200)
    temporary = calls[0][1]
    assert temporary.startswith(".file.tmp-")
    assert calls == [
        ("create", temporary),
        ("write", "file"),
        ("write", "file"),
        ("fsync", "file"),
        ("rename", "file"),
        ("fsync", tmp_path.name),
    ]


def test_all_of_a_folder_is_synced_before_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "old")
    calls: list[tuple[str, str]] = []
    with hooked(lambda name, path: calls.append((name, path.name))):
        write_folder(tmp_path / "model", "new")
    swap = calls.index(("exchange", "model"))
    synced = [name for call, name in calls[:swap] if call == "fsync"]
    temporary = next(name for call, name in calls if call == "mkdir")
    assert set(synced) >= {"weights", "config.json", "inner", "manifest.json", temporary}
    assert synced.index("weights") < synced.index("manifest.json") < len(synced)
    assert calls[swap + 1] == ("fsync", tmp_path.name) and calls[swap + 2] == ("remove", temporary)


def test_a_file_size_limit_of_the_system_reads_as_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, "old")

    def action() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(io.DiskFullError, match=r"disk full while writing .*: [0-9,]+ bytes needed, [0-9,]+ free"):
            io.save_state(path, torch.zeros(10_000), kind="test")

    assert in_child(action) == 0
    assert read_state(path) == "old" and leftovers(tmp_path) == []


def test_other_errors_are_raised_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        io.atomic_write_text(tmp_path, "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, None])
def test_systems_without_the_exchange_fall_back(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        ctypes.set_errno(code or 0)
        return -1

    library = SimpleNamespace(renameat2=refuse) if code else SimpleNamespace()
    write_folder(tmp_path / "model", "old")
    with monkeypatch.context() as patch:
        patch.setattr(primitives.ctypes, "CDLL", lambda *arguments, **options: library)
        write_folder(tmp_path / "model", "new")
    assert read_folder(tmp_path / "model") == "new" and os.listdir(tmp_path) == ["model"]


def test_an_unknown_failure_of_the_exchange_is_raised(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileNotFoundError):
        primitives._exchange(tmp_path / "missing", tmp_path / "there")
