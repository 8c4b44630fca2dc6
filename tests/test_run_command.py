"""A command that a run starts is one process of its own, whatever launched the run."""

import csv
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import TINY, run_forked
from oracles.faults import hooked
from oracles.kills import at_checkpoint

from genlight import io, recipes
from genlight.errors import UserError
from genlight.recipes import LAUNCHED, fit_below_where_missing, fit_where_missing, run_command
from genlight.run_folder import process_rank


def test_a_command_inherits_no_place_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth of eight that srun or torchrun started: its command opens a run folder all the same."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(
        subprocess, "run", lambda words, **options: started.append(options) or SimpleNamespace(returncode=0, stdout="")
    )
    for name, value in {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "RANK": "3", "GENLIGHT_CACHE": "cache"}.items():
        monkeypatch.setenv(name, value)
    run_command("fit", "experiment=digits")
    given = started[0]["env"]
    assert not [name for name in given if name.startswith("SLURM_") or name in LAUNCHED]
    assert process_rank(given) == 0 and given["GENLIGHT_CACHE"] == "cache"


def test_a_command_is_read_and_its_failure_is_told() -> None:
    """By real processes, which import no torch."""
    assert "validate" in run_command("fit", "--help", show=False)
    with pytest.raises(UserError, match=r"fit trainer\.max_stps=1 failed \(exit code 2\)"):
        run_command("fit", "trainer.max_stps=1", show=False)


def test_a_fit_that_was_killed_goes_on_and_one_of_another_config_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its first checkpoint, that of two of six steps; what it then leaves is not fitted again."""
    folder = tmp_path / "digits" / "fit"

    def fit(*words: str, replace: bool = False) -> None:
        every = (f"run.root={tmp_path}", f"paths.cache={tmp_path}/cache", *TINY, *words)
        fit_where_missing("digits", (folder / "artifact").is_dir, "it", tmp_path, *every, replace=replace)

    moment, own = at_checkpoint(folder, "first checkpoint"), os.getpid()

    def kill(primitive: str, path: Path) -> None:
        if os.getpid() != own and moment(primitive, Path(path)):
            os._exit(9)

    monkeypatch.setattr(recipes, "run_command", run_forked)
    with hooked(kill), pytest.raises(UserError, match="exit code 9"):
        fit()
    assert not (folder / "artifact").exists()
    fit()
    assert len(io.read_json(folder / "run.json")["earlier"]) == 1
    rows = list(csv.DictReader((folder / "metrics" / "version_1" / "metrics.csv").open()))
    assert sorted({int(row["step"]) for row in rows if row["train/loss"]}) == [2, 3, 4, 5]
    fit("module=none")
    io.remove_path(folder / "artifact")
    with pytest.raises(UserError, match=r"it is not there, and the fit in .* did not go on as this one"):
        fit("seed=1")
    assert io.read_json(folder / "run.json")["config"]["seed"] == 0 and any(folder.glob("checkpoints/*"))
    fit("seed=1", replace=True)
    record = io.read_json(folder / "run.json")
    assert record["earlier"] == [] and record["config"]["seed"] == 1 and (folder / "artifact").is_dir()


def test_what_no_fit_would_make_starts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt folder beside a model that is finished; where the fit would make it, it is made."""
    asked: list[str] = []

    def fit(command: str, *words: str) -> str:
        asked.extend(words)
        (tmp_path / "some" / "model" / "fit" / "artifact").mkdir(parents=True)
        return ""

    monkeypatch.setattr(recipes, "run_command", fit)
    made, wrong = tmp_path / "some" / "model" / "fit" / "artifact", tmp_path / "some" / "modl" / "fit" / "artifact"
    message = re.escape(f"module.it = {wrong} is not there, and is not what fit experiment=some/model makes")
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            fit_below_where_missing("some/model", wrong, "module.it", tmp_path, "cache")
        fit_below_where_missing("some/model", made, "module.it", tmp_path, "cache")
        assert asked == ["experiment=some/model", f"run.root={tmp_path}", "paths.cache=cache"]
    with pytest.raises(UserError, match=f"which is {made}"):
        fit_below_where_missing("some/model", made.with_name("artefact"), "module.it", tmp_path, "cache")
