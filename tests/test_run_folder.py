"""One run, one folder, one process; nothing in a run folder is ever built from."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.faults import EXIT_CODE, die_at, fail_at, hooked, in_child

from genlight import io
from genlight.errors import UserError
from genlight.run_folder import (
    RunFolder,
    config_fingerprint,
    process_rank,
    read_run,
    run_path,
)

CONFIG = {"seed": 1, "trainer": {"max_steps": 10, "precision": None}, "list": [1, {"a": 2}], "empty": {}}


def take(path: Path, config: dict = CONFIG, **options) -> RunFolder:
    return RunFolder.open(path, command=["genlight", "fit"], config=config, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_is_recorded_from_start_to_end(tmp_path: Path) -> None:
    with take(tmp_path / "run") as folder:
        record = read_run(folder.path)
        assert record["status"] == "running" and record["config"] == CONFIG and record["ended"] is None
        assert record["fingerprint"] == folder.fingerprint == config_fingerprint(CONFIG)
        assert not folder.resumed
    assert read_run(tmp_path / "run")["status"] == "finished"
    folder.close("failed")
    assert read_run(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(143), "interrupted")],
)
def test_the_status_tells_how_a_run_ended(error: BaseException, status: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), take(tmp_path):
        raise error
    assert read_run(tmp_path)["status"] == status


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with take(tmp_path) as folder, pytest.raises(ValueError, match="'done'"):
        folder.close("done")


def start_holder(path: Path) -> subprocess.Popen[str]:
    program = (
        "import sys, time; from genlight.run_folder import RunFolder;"
        f"RunFolder.open({str(path)!r}, command=['fit'], config={{}}); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_stops_at_once_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    holder = start_holder(tmp_path / "run")
    try:
        before = contents(tmp_path)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            start = time.monotonic()
            with pytest.raises(UserError) as error:
                take(tmp_path / "run", {}, **options)
            assert time.monotonic() - start < 2
            owner = json.loads((tmp_path / "run" / "owner.json").read_text())
            for word in (f"process {holder.pid} on {os.uname().nodename}", owner["started"]):
                assert word in str(error.value)
            assert contents(tmp_path) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with take(tmp_path / "run", {}, resume=True) as folder:
        assert folder.resumed
    assert [entry["status"] for entry in read_run(tmp_path / "run")["earlier"]] == ["running"]


def test_a_holder_that_has_not_written_its_name_yet(tmp_path: Path) -> None:
    with take(tmp_path):
        (tmp_path / "owner.json").write_text("{")
        assert in_child(lambda: take(tmp_path, resume=True)) == 1
        with pytest.raises(UserError, match="another process that has just started"):
            take(tmp_path, resume=True)


def test_an_occupied_folder_needs_resume_or_overwrite(tmp_path: Path) -> None:
    take(tmp_path).close()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"status finished.*resume=true.*overwrite=true.*run\.name"):
        take(tmp_path)
    with pytest.raises(UserError, match="exclude each other"):
        take(tmp_path, resume=True, overwrite=True)
    assert contents(tmp_path) == before


def test_overwrite_removes_the_old_run_only(tmp_path: Path) -> None:
    take(tmp_path).close()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a").write_text("x")
    (tmp_path / "run.json").write_text("torn")
    with take(tmp_path, {"seed": 2}, overwrite=True) as folder:
        assert not folder.resumed
    assert set(contents(tmp_path)) == {".lock", "owner.json", "run.json"}
    assert read_run(tmp_path)["config"] == {"seed": 2}


def occupied(path: Path) -> dict[str, bytes]:
    """Make a folder with a finished run; what it holds beside who has it."""
    take(path).close()
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "a").write_text("x")
    (path / "old").write_text("x")
    return kept(path)


def kept(path: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(path).items() if name != ".lock"}


@pytest.mark.parametrize("error", [UserError("x"), KeyboardInterrupt()])
def test_a_run_that_fails_before_it_begins_replaces_nothing(error: BaseException, tmp_path: Path) -> None:
    before = occupied(tmp_path)
    with pytest.raises(type(error)), take(tmp_path, {"seed": 2}, overwrite=True) as folder:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "error.log").write_text("why")
        assert folder.replaces and not (tmp_path / "old").exists()
        raise error
    assert kept(tmp_path) == {**before, "error.log": b"why"}


def test_a_run_that_has_begun_stays_although_it_fails(tmp_path: Path) -> None:
    occupied(tmp_path)
    with pytest.raises(UserError), take(tmp_path, {"seed": 2}, overwrite=True) as folder:
        folder.begin()
        folder.begin()
        raise UserError("x")
    assert set(contents(tmp_path)) == {".lock", "owner.json", "run.json"}
    assert read_run(tmp_path)["status"] == "failed"


def test_what_a_run_reads_is_not_replaced(tmp_path: Path) -> None:
    before = occupied(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoints")
    for source in (tmp_path / "link", tmp_path / "run"):
        config = {"module": {"members": [{"source": str(source)}]}, "callbacks": {"dirpath": str(source)}}
        with pytest.raises(UserError, match=r"module\.members\.0\.source=.* which run\.overwrite=true would replace"):
            take(tmp_path / "run", config, overwrite=True)
        assert kept(tmp_path / "run") == before
    take(tmp_path / "run", {"callbacks": {"dirpath": str(source)}, "data": str(tmp_path)}, overwrite=True).close()


def test_the_earlier_run_is_not_gone_on_with_in_silence(tmp_path: Path) -> None:
    before = occupied(tmp_path)

    def killed() -> None:
        take(tmp_path, overwrite=True)
        os._exit(9)

    in_child(killed)
    with pytest.raises(UserError, match=r"the earlier run is back: repeat the command with run\.overwrite=true, or"):
        take(tmp_path, resume=True)
    assert kept(tmp_path) == before
    with take(tmp_path, resume=True) as folder:
        assert folder.resumed


def test_a_kill_at_any_call_of_replacing_leaves_one_run_whole(tmp_path: Path) -> None:
    """The old one, which is back when the folder is opened again, or the new one; also if that opening is killed."""
    number, status, left = 0, EXIT_CODE, []
    while status == EXIT_CODE:
        number += 1
        path = tmp_path / str(number)
        before = occupied(path)

        def replaced(path: Path = path, number: int = number) -> None:
            with hooked(die_at(number)):
                folder = take(path, {"seed": 2}, overwrite=True)
                (path / "new").write_text("x")
                folder.begin()
                folder.close()

        def opened_again(path: Path = path, number: int = number) -> None:
            with hooked(die_at(number % 7 + 1)), suppress(UserError):
                take(path)

        status = in_child(replaced)
        in_child(opened_again)
        with pytest.raises(UserError, match="holds a run already"):
            take(path)
        left.append(read_run(path)["config"]["seed"])
        found = {name: content for name, content in kept(path).items() if name != "owner.json"}
        if left[-1] == 1:
            assert found == {name: content for name, content in before.items() if name != "owner.json"}
        else:
            assert {name for name in found if ".tmp-" not in name} == {"run.json", "new"}
    assert left == sorted(left) and set(left) == {1, 2}


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"no run of genlight \(thesis\.tex\)"):
            take(tmp_path, **options)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_resume_starts_an_empty_folder_and_sweeps_what_a_kill_left(tmp_path: Path) -> None:
    with take(tmp_path, resume=True) as folder:
        assert not folder.resumed
    (tmp_path / ".x.ckpt.tmp-1-ab").write_text("half")
    with take(tmp_path, resume=True) as folder:
        assert folder.resumed and not (tmp_path / ".x.ckpt.tmp-1-ab").exists()


def test_resume_names_the_first_differing_keys(tmp_path: Path) -> None:
    take(tmp_path).close()
    other = {"seed": 2, "trainer": {"max_steps": 20, "precision": None}, "list": [1, {"a": 3}, 4], "empty": {}, "z": 1}
    with pytest.raises(UserError) as error:
        take(tmp_path, other, resume=True)
    message = str(error.value)
    assert "list.1.a: was 2, now 3; list.2: was '(absent)', now 4; seed: was 1, now 2 (and 2 more)" in message
    assert read_run(tmp_path)["status"] == "finished"


def test_ignored_keys_may_differ(tmp_path: Path) -> None:
    ignore = ("trainer.max_steps", "resume")
    take(tmp_path, ignore_keys=ignore).close()
    changed = {**CONFIG, "trainer": {"max_steps": 99, "precision": None}, "resume": True}
    with take(tmp_path, changed, resume=True, ignore_keys=ignore) as folder:
        assert folder.resumed
    assert config_fingerprint(CONFIG, ignore) == config_fingerprint(changed, ignore) != config_fingerprint(changed)
    assert config_fingerprint({"a": {"b": 1}}, ["a"]) == config_fingerprint({})
    assert config_fingerprint({"ab": 1}, ["a"]) != config_fingerprint({})
    assert config_fingerprint({"a": 1, "b": 2}) == config_fingerprint({"b": 2, "a": 1})
    assert config_fingerprint({"a": [1]}) == config_fingerprint({"a": (1,)}) != config_fingerprint({"a": [[1]]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "not the record of a run"),
        ('{"kind": "other"}', "not the record of a run"),
        ('{"kind": "run", "version": 2}', "version 2"),
        ('{"kind": "run", "version": 1}', "lacks fields"),
    ],
)
def test_foreign_records_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_run(tmp_path)
    with pytest.raises(UserError, match=reason):
        take(tmp_path, resume=True)
    assert (tmp_path / "run.json").read_text() == text


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(io.CorruptFileError, match=r"has no run\.json"):
        read_run(tmp_path)


def test_a_config_in_a_run_folder_is_data(tmp_path: Path) -> None:
    config = {"callbacks": {"_target_": "os.mkdir", "path": str(tmp_path / "sentinel")}}
    take(tmp_path / "run", config).close()
    take(tmp_path / "run", config, resume=True).close()
    assert read_run(tmp_path / "run")["config"] == config and not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    "key", ["token", "hf_token", "secret", "client_secret", "password", "api_key", "WANDB_API_KEY"]
)
def test_secrets_never_reach_the_disk(key: str, tmp_path: Path) -> None:
    command = ["genlight", "fit", f"logger.{key}=hunter2", f"+{key}=hunter2", "seed=1"]
    config = {"logger": {key: "hunter2", "n": 1}, "list": [{key: "hunter2"}]}
    RunFolder.open(tmp_path, command=command, config=config).close()
    assert all(b"hunter2" not in data for data in contents(tmp_path).values())
    record = read_run(tmp_path)
    assert record["config"] == {"logger": {key: "***", "n": 1}, "list": [{key: "***"}]}
    assert record["command"] == ["genlight", "fit", f"logger.{key}=***", f"+{key}=***", "seed=1"]
    RunFolder.open(tmp_path, command=command, config={**config, "logger": {key: "other", "n": 1}}, resume=True).close()


def test_any_config_value_is_recorded_and_compared(tmp_path: Path) -> None:
    config = {"max": float("inf"), "path": Path("a"), 1: (1, float("nan")), "x": 1e300}
    take(tmp_path, config).close()
    assert read_run(tmp_path)["config"] == {"max": "inf", "path": "a", "1": [1, "nan"], "x": 1e300}
    take(tmp_path, config, resume=True).close()


@settings(max_examples=300, deadline=None)
@given(name=st.text(max_size=10) | st.sampled_from(["..", "../x", "/tmp/x", "a/../../b", "a/b", "", ".", "x" * 201]))
def test_run_names_cannot_escape(name: str, tmp_path_factory) -> None:
    root = tmp_path_factory.getbasetemp() / "runs"
    try:
        path = run_path(root, name)
    except UserError as error:
        assert "run.name" in str(error)
        return
    assert path.resolve().is_relative_to(root.resolve()) and path != root


def test_run_names_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 3"):
        run_path(tmp_path, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
        ({"SLURM_PROCID": "2"}, 2),
        ({"RANK": "x"}, 0),
    ],
)
def test_the_rank_is_read_from_the_launcher(environ: dict[str, str], rank: int) -> None:
    assert process_rank(environ) == rank


def test_a_kill_at_any_call_of_opening_leaves_a_folder_that_opens_again(tmp_path: Path) -> None:
    for options in ({"overwrite": True}, {"resume": True}):
        number, status = 0, EXIT_CODE
        while status == EXIT_CODE:
            number += 1
            path = tmp_path / str(options) / str(number)
            if number % 2:
                take(path).close()
                (path / "old").write_text("x")

            def action(path: Path = path, number: int = number, options: dict = options) -> None:
                with hooked(die_at(number)):
                    take(path, **options).close()

            status = in_child(action)
            take(path, **options).close()
            assert read_run(path)["status"] == "finished"
        assert number > 8


def test_a_full_disk_at_any_call_of_closing_frees_the_lock(tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        folder = take(tmp_path / str(number))
        try:
            with hooked(fail_at(number, errno.ENOSPC)):
                folder.close()
        except io.DiskFullError:
            take(tmp_path / str(number), resume=True).close()
        else:
            break
    assert number > 4
