"""`--multirun` with real commands of the tiny experiment: folders, the table, what a second start does, kills."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import TINY, report_of, the_error, untrained_features

from genlight import io, sweep
from genlight.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = [*TINY, "trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.checkpoint.every_n_train_steps=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `seeds`, a finished sweep over two seeds."""
    root = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        untrained_features(root / "cache")
        patch.setattr(sweep, "_run", in_this_process)
        assert many(root, "seeds", "seed=1,2") == 0
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))


def in_this_process(command: list[str]) -> int:
    """A job without the seconds that a new process takes to import torch."""
    assert command[:3] == [sys.executable, "-m", "genlight"]
    return main(command[3:])


def many(root: Path, name: str, *words: str) -> int:
    return main(["fit", "--multirun", *QUICK, f"run.root={root}", f"run.name={name}", *words])


def rows(root: Path, name: str) -> list[dict]:
    return io.read_json(root / name / "sweep_fit.json")["jobs"]


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of jobs, which are noted and not run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(sweep, "_run", lambda command: commands.append(command) or 0)
    return commands


def test_each_job_is_a_run_of_its_own(root: Path) -> None:
    for seed in (1, 2):
        folder = root / "seeds" / f"seed={seed}" / "fit"
        assert report_of(folder)["seed"] == seed and io.read_json(folder / "run.json")["status"] == "finished"
        assert (folder / "artifact" / "model_index.json").is_file()
    assert sorted(path.name for path in (root / "seeds").iterdir()) == [
        "seed=1", "seed=2", "sweep_fit.csv", "sweep_fit.json", "sweep_fit.md",
    ]  # fmt: skip


def test_the_table_holds_what_differs_and_what_came_of_it(root: Path) -> None:
    found = rows(root, "seeds")
    assert [(row["values"], row["status"]) for row in found] == [
        ({"seed": "1"}, "finished"),
        ({"seed": "2"}, "finished"),
    ]
    for row in found:
        assert row["metrics"] == report_of(root / "seeds" / row["folder"])["metrics"] and row["seconds"] >= 0
    with (root / "seeds" / "sweep_fit.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["seed"] for row in table] == ["1", "2"]
    assert float(table[0]["train/loss"]) == found[0]["metrics"]["train/loss"]
    assert (root / "seeds" / "sweep_fit.md").read_text().startswith("# Sweep\n\n| seed | status | seconds |")


def test_a_second_start_runs_only_what_is_not_there(root: Path, no_run: list, capsys: pytest.CaptureFixture) -> None:
    assert many(root, "seeds", "seed=1,2,3", "resume=true") == 0
    assert [word for command in no_run for word in command if word.startswith("seed=")] == ["seed=3"]
    assert "run.name='seeds/seed=3'" in no_run[0] and no_run[0][-1] == "resume=true"
    assert capsys.readouterr().err.count("finished already") == 2
    assert [row["status"] for row in rows(root, "seeds")] == ["finished", "finished", "failed"]


def test_another_config_is_no_finished_job(root: Path, no_run: list) -> None:
    assert many(root, "seeds", "seed=1,2", "trainer.max_steps=3") == 0
    assert len(no_run) == 2
    assert many(root, "seeds", "seed=1,2", "trainer.enable_model_summary=true", "run.overwrite=true") == 0
    assert len(no_run) == 4 and no_run[-1][-1] == "resume=false"


def test_one_failed_job_does_not_stop_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Only once it is built is the first network refused: 8 channels are not divisible by 3 groups."""
    monkeypatch.setattr(sweep, "_run", in_this_process)
    assert many(root, "mixed", "module.network.norm_num_groups=3,4", "trainer.max_steps=1") == 1
    found = {row["values"]["module.network.norm_num_groups"]: row for row in rows(root, "mixed")}
    assert found["3"]["status"] == "failed" and found["3"]["metrics"] == {}
    assert found["4"]["status"] == "finished" and found["4"]["metrics"]
    assert "error: " in capsys.readouterr().err


def test_a_damaged_folder_is_one_row_and_stops_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(root / "seeds", root / "harmed")
    (root / "harmed" / "seed=1" / "fit" / "run.json").write_text('{"kind": "run", "ver')
    (root / "harmed" / "seed=2" / "fit" / "report.json").unlink()
    monkeypatch.setattr(sweep, "_run", in_this_process)
    assert many(root, "harmed", "seed=1,2,3") == 1
    found = rows(root, "harmed")
    assert [row["status"] for row in found] == ["damaged", "damaged", "finished"] and found[2]["metrics"]
    assert "run.json" in capsys.readouterr().err


def test_a_killed_sweep_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: SIGTERM reaches the job that runs, which saves; the next start goes on with it."""
    words = [*QUICK, "trainer.max_steps=200", "callbacks.checkpoint.every_n_train_steps=5", "seed=1,2"]
    words += ["fit", "--multirun", f"run.root={root}", "run.name=killed"]
    child = subprocess.Popen([sys.executable, "-m", "genlight", *words], env=os.environ.copy())
    first = root / "killed" / "seed=1" / "fit"
    deadline = time.monotonic() + 300
    while not list(first.glob("checkpoints/*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(300) == 143
    assert [row["status"] for row in rows(root, "killed")] == ["interrupted", "not begun"]
    # no more than was done is asked for now
    monkeypatch.setattr(sweep, "_run", in_this_process)
    length = f"trainer.max_steps={io.read_labels(first / 'checkpoints' / 'interrupted.ckpt')['step']}"
    assert many(root, "killed", "seed=1,2", "callbacks.checkpoint.every_n_train_steps=5", length) == 0
    assert [row["status"] for row in rows(root, "killed")] == ["finished", "finished"]
    assert io.read_json(first / "run.json")["earlier"][0]["status"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_a_scheduler_sends_goes_on_to_the_job(number: int) -> None:
    program = f"import os, signal, time; signal.signal({number}, lambda *_: os._exit(0)); "
    program += f"os.kill(os.getppid(), {number}); time.sleep(9)"
    before = signal.getsignal(number)
    assert sweep._run([sys.executable, "-c", program]) == 143
    assert signal.getsignal(number) is before


def test_combinations_and_labels() -> None:
    jobs = sweep.jobs_of(["experiment=digits", "seed=0,1", "module.network.layers=[1,2],[3]", "run.root=/x"])
    assert [dict(job.values) for job in jobs] == [
        {"seed": seed, "module.network.layers": layers} for seed in "01" for layers in ("[1,2]", "[3]")
    ]
    assert jobs[1].words == ("experiment=digits", "seed=0", "module.network.layers=[3]", "run.root=/x")
    labels = [job.label for job in sweep.jobs_of(["ckpt_path=a/b,a_b,'a b'", "seed=range(3)"])]
    assert len(set(labels)) == 9 and all("/" not in label and " " not in label for label in labels)
    assert [job.label for job in sweep.jobs_of(["seed=3"])] == ["single"]
    long = sweep.jobs_of([f"ckpt_path={'a' * 300}1,{'a' * 300}2"])
    assert len({job.label for job in long}) == 2 and all(len(job.label) < 150 for job in long)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run.name=a,b"], "run.name cannot be swept"),
        (["seed=interval(0,1)"], "seed=interval(0,1): an interval has no values to try"),
        (["hydra/launcher=joblib"], "hydra/launcher: the jobs of a sweep run one after the other"),
        (["trainer.max_stps=1,2"], "did you mean 'trainer.max_steps'?"),
        (["seed=1,-1"], "a seed lies between"),
        (["experiment=digits,digit"], "there is no experiment 'digit'; did you mean 'digits'?"),
    ],
)
def test_a_wrong_sweep_is_refused_before_any_job(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--multirun", f"run.root={tmp_path}/runs", *words]) == 2
    assert expected in the_error(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_a_launcher_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["fit", "--multirun", "seed=1,2"]) == 2
    assert "leave the launcher out" in the_error(capsys.readouterr().err)
