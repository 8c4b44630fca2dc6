"""Whole commands disturbed at a few of their writes; `make proof NAME=faults` does it at all of them."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from campaigns import commands, damage, processes
from campaigns.commands import CALIBRATION, COMMANDS, FIT, folder_of, reference, run

from genlight.loops import quantization_statistics

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `<command>/whole`, a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    os.environ["GENLIGHT_CACHE"] = str(folder / "cache")
    for name, words in COMMANDS.items():
        reference(folder / name, words)
    return folder


@pytest.mark.parametrize(("name", "count"), [("fit", 4), ("search", 2), ("calibration", 2)])
def test_a_kill_at_any_write_is_resumed_to_the_same_results(name: str, count: int, root: Path) -> None:
    assert commands.killed(root / name, COMMANDS[name], count).wrong == []


def test_what_was_not_synced_is_not_needed(root: Path) -> None:
    # of both kinds: with the names that are there, and with those that were synced
    assert commands.killed(root / "fit", FIT, 4, power=True).wrong == []


@pytest.mark.parametrize(("name", "count"), [("fit", 2), ("calibration", 1)])
def test_a_full_disk_from_any_write_on_is_one_line_and_loses_nothing(name: str, count: int, root: Path) -> None:
    assert commands.failing(root / name, COMMANDS[name], errno.ENOSPC, count, for_good=True).wrong == []


def test_one_write_that_fails_is_one_line_and_loses_nothing(root: Path) -> None:
    assert commands.failing(root / "fit", FIT, errno.EIO, 1).wrong == []


def test_no_room_for_the_artifact_is_one_line_and_loses_nothing(root: Path) -> None:
    assert commands.artifact_without_room(root / "fit", FIT).wrong == []


def test_a_cut_file_is_named_or_passed_over(root: Path) -> None:
    for name, words in COMMANDS.items():
        folder = folder_of(root / name / "whole", words)
        assert damage.cuts(folder, lengths=6).wrong == []
    assert damage.cut_checkpoints(folder_of(root / "fit" / "whole", FIT)).wrong == []


def test_a_flipped_bit_is_noticed_and_named(root: Path) -> None:
    for name, words in COMMANDS.items():
        folder = folder_of(root / name / "whole", words)
        assert damage.flips(folder, 40).wrong == []


def test_a_run_with_a_harmed_file_ends_with_one_line_or_the_same_results(root: Path) -> None:
    place = root / "fit"
    found = damage.harmed_runs(place, FIT, place / "whole", reference(place, FIT), 2)
    assert found.wrong == []


def test_a_wall_clock_that_jumps_changes_nothing(root: Path) -> None:
    assert processes.clock_jumps(root / "fit").wrong == []


@pytest.mark.skipif(not processes.can_unshare(), reason="this system lets no process mount a file system of its own")
def test_a_small_disk_fills_up_in_one_line(tmp_path: Path, root: Path) -> None:
    assert processes.small_disk(tmp_path) == ""


@pytest.mark.parametrize(
    ("name", "number", "times"),
    [("search", signal.SIGTERM, 1), ("search", signal.SIGINT, 2), ("fit", signal.SIGINT, 1)],
)
def test_a_signal_at_any_write_is_resumed_to_the_same_results(name: str, number: int, times: int, root: Path) -> None:
    assert commands.signalled(root / name, COMMANDS[name], number, 1, times).wrong == []


def test_a_signal_inside_a_silent_validation_ends_in_order(root: Path) -> None:
    """Sent while Lightning validates without callbacks, as curves, finalists and reports are measured."""

    def before() -> None:
        original = quantization_statistics.numbered_calls

        def sending(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        quantization_statistics.numbered_calls = sending

    place = root / "signal-inside"
    ended = run(place, CALIBRATION, before=before)
    assert ended.code == 143, ended.text
    assert commands.resumed(place, CALIBRATION, reference(root / "calibration", CALIBRATION)) == []
