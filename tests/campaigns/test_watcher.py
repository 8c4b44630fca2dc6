"""What counts as left by a power loss."""

import os
from pathlib import Path

import pytest
from campaigns.watcher import State, Synced

from genlight.io import primitives


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Synced:
    monkeypatch.setattr(os, "fsync", os.fsync)
    found = Synced()
    found.trace()
    return found


def left(synced: Synced, folder: Path) -> State:
    status = folder.stat()
    return synced.below((status.st_dev, status.st_ino))


def test_names_and_contents_are_as_their_last_sync_left_them(tmp_path: Path, synced: Synced) -> None:
    primitives.atomic_write_text(tmp_path / "a" / "file", "old")
    kept: State = {"a": None, "a/file": b"old"}
    assert left(synced, tmp_path) == kept
    (tmp_path / "a" / "file").write_text("new")
    (tmp_path / "a" / "other").write_text("never synced")
    (tmp_path / "b").mkdir()
    assert left(synced, tmp_path) == kept
    primitives.sync_folder(tmp_path / "a")
    assert left(synced, tmp_path) == {**kept, "a/other": b""}


def test_a_removal_that_is_not_synced_is_undone_even_if_the_inode_is_used_again(tmp_path: Path, synced: Synced) -> None:
    primitives.atomic_write_text(tmp_path / "file", "old")
    (tmp_path / "file").unlink()
    for number in range(20):
        (tmp_path / str(number)).write_text("new")
        assert synced.content(tmp_path / str(number)) == b""
    assert left(synced, tmp_path) == {"file": b"old"}
    primitives.sync_folder(tmp_path)
    assert left(synced, tmp_path).keys() == {str(number) for number in range(20)}


@pytest.mark.parametrize("is_synced", [True, False])
def test_a_rename_without_a_sync_of_its_folder_is_lost(
    is_synced: bool, tmp_path: Path, synced: Synced, monkeypatch: pytest.MonkeyPatch
) -> None:
    primitives.atomic_write_text(tmp_path / "file", "old")
    if not is_synced:
        monkeypatch.setattr(primitives, "sync_folder", lambda folder: None)
    primitives.atomic_write_text(tmp_path / "file", "new")
    assert left(synced, tmp_path) == {"file": b"new" if is_synced else b"old"}
