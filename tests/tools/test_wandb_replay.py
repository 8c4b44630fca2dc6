"""metrics.csv as a run of W&B: every step once, whatever was sent before."""

import json
import runpy
import time
from pathlib import Path
from typing import Any

import pytest

from genlight.errors import UserError
from genlight.run_folder import RunFolder

PROGRAM = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "wandb_replay.py"))
main, replay, identity = PROGRAM["main"], PROGRAM["replay"], PROGRAM["identity"]
# training and validation of a step stand in rows of their own
TABLE = "epoch,step,train/loss,val/fd\n0,0,1.5,\n0,2,1.25,\n0,2,,9.0\n1,4,1.0,\n"
STEPS = {
    0: {"epoch": 0.0, "train/loss": 1.5},
    2: {"epoch": 0.0, "train/loss": 1.25, "val/fd": 9.0},
    4: {"epoch": 1.0, "train/loss": 1.0},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"run": {"name": "demo"}, "logger": {"api_key": "very-secret"}}
    RunFolder.open(tmp_path / "fit", command=["fit"], config=config).close()
    (tmp_path / "fit" / "metrics.csv").write_text(TABLE)
    (tmp_path / "fit" / "report.json").write_text(json.dumps({"metrics": {"val/fd": 9.0}}))
    return tmp_path / "fit"


class Server:
    """Keeps what a run logs, and begins a run of a known id behind its last step, as W&B does."""

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.summary: dict[str, float] = {}
        self.config: dict[str, Any] = {}

    def init(self, **options: Any) -> "Server":
        assert options["resume"] == "allow" and options["mode"] == "online"
        self.config, self.rows = options["config"], self.history.setdefault(options["id"], [])
        self.step = self.rows[-1][0] + 1 if self.rows else 0
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None: ...


def test_a_second_replay_sends_what_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    server = Server()
    monkeypatch.setattr(wandb, "init", server.init)
    assert replay(folder, "p") == 3 and replay(folder, "p") == 0
    with (folder / "metrics.csv").open("a") as file:
        file.write("1,6,0.5,\n")
    assert replay(folder, "p") == 1
    (rows,) = server.history.values()
    expected = STEPS | {6: {"epoch": 1.0, "train/loss": 0.5}}
    assert rows == [(step, values | {"trainer/global_step": step}) for step, values in expected.items()]
    assert server.summary == {"val/fd": 9.0} and server.config["logger"]["api_key"] == "***"


def test_a_moved_folder_is_the_same_run_and_another_start_is_not(folder: Path, tmp_path: Path) -> None:
    before = identity(folder)
    moved = folder.rename(tmp_path / "moved")
    assert identity(moved) == before
    record = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(record | {"created": "2020-01-01T00:00:00+00:00"}))
    assert identity(moved) != before


def test_a_run_that_has_not_ended_is_named(folder: Path) -> None:
    (folder / "metrics.csv").unlink()
    with pytest.raises(UserError, match=r"metrics\.csv is missing"):
        replay(folder, "p")


def offline_history(file: Path) -> dict[int, dict[str, float]]:
    """The history in W&B's file of an offline run: after 7 bytes, records in the frames of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, whole, found = file.read_bytes(), 7, b"", {}
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last part
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found[int(values["trainer/global_step"])] = values
    return found


def test_offline_runs_hold_each_step_under_one_id(folder: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    main([str(folder), "--offline"])
    assert f"3 steps of {folder} sent to the run {identity(folder)}" in capsys.readouterr().out
    (file,) = folder.glob(f"wandb/offline-run-*/run-{identity(folder)}.wandb")
    deadline = time.monotonic() + 60
    while (history := offline_history(file)).keys() != STEPS.keys() and time.monotonic() < deadline:
        time.sleep(0.2)  # a process of W&B's writes it
    assert history.keys() == STEPS.keys()
    for step, values in STEPS.items():
        assert {name: history[step][name] for name in values} == values and history[step]["_step"] == step
    assert b"very-secret" not in file.read_bytes()
