"""A command that a run starts is one process of its own, whatever launched the run."""

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from genlight.errors import UserError
from genlight.recipes import LAUNCHED, run_command
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
