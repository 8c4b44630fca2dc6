"""What runs where there is a GPU: its commands are taken, it ends in time, and its records fit the page of results."""

import os
import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import OmegaConf

from genlight import cli
from genlight.config_check import resolved
from genlight.reports.results_page import CLAIMS, read_claims
from genlight.run_folder import LOCK_FILE
from genlight.trainer.strategies import check_callbacks

ROOT = Path(__file__).resolve().parents[2]
PROOFS = ROOT / "tools" / "proofs"
PARTS = ("speed", "quality")
# of a GPU's quarter of an hour, what two starts of the machine leave
SECONDS = 720
# in place of `timeout`: tells what it was given, and runs nothing
TIMEOUT = """#!/bin/bash
shift 4
printf '%s\\n' "$(printf '%s\\t' "$@")" >> "$RECORDED"  # at once, since steps run side by side
"""
Step = tuple[int, list[str]]
Load = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Step]]:
    """Limit and words of each step of gpu.sh, by part."""
    found = {}
    for part in PARTS:
        place = tmp_path_factory.mktemp(part)
        (place / "timeout").write_text(TIMEOUT)
        (place / "timeout").chmod(0o755)
        variables = {key: value for key, value in os.environ.items() if key != "SECONDS_EACH"}
        variables |= {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}", "RECORDED": str(place / "recorded")}
        variables |= {"PYTHON": "python", "GENLIGHT_DATA": str(place)}
        (place / "found").mkdir()
        (place / "found" / "part.json").write_text("{}")
        words = ["bash", str(PROOFS / "gpu.sh"), part, str(place / "found")]
        subprocess.run(words, env=variables, check=True, capture_output=True)
        lines = [line.rstrip("\t").split("\t") for line in (place / "recorded").read_text().splitlines()]
        found[part] = [(int(limit), command) for limit, *command in lines]
        packed = subprocess.run(["tar", "tzf", place / "found.tar.gz"], check=True, capture_output=True, text=True)
        assert {"./part.json", f"./{'join' if part == 'speed' else 'latency'}.log"} <= set(packed.stdout.split())
    return found


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(str(PROOFS))
    return lambda name: runpy.run_path(str(PROOFS / f"{name}.py"))


def of_genlight(steps: dict[str, list[Step]]) -> list[list[str]]:
    return [command[3:] for part in PARTS for _, command in steps[part] if command[1:3] == ["-m", "genlight"]]


def composed(command: str, *words: str) -> dict[str, Any]:
    OmegaConf.register_new_resolver("genlight.cache", cli.cache_folder, replace=True)
    config = cli.accepted([f"command={command}", *words])
    assert config is not None
    return resolved(config)


def test_each_command_is_taken_with_its_callbacks(
    steps: dict[str, list[Step]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    commands = of_genlight(steps)
    assert len(commands) == 4
    for words in commands:
        config = composed(*words)
        strategy = instantiate(config["strategy"])
        callbacks = [instantiate(node) for node in config["callbacks"].values() if node]
        check_callbacks(strategy, callbacks, config["trainer"]["precision"])
        # Lightning raises at the first step
        assert "strategy=fsdp" not in words or config["trainer"]["gradient_clip_val"] is None


def test_features_end_by_time(steps: dict[str, list[Step]]) -> None:
    words = next(words for words in of_genlight(steps) if "experiment=features/cifar10" in words)
    config = composed(*words)
    assert config["trainer"]["max_time"] == "00:00:01:00" and config["trainer"]["precision"] == "bf16-mixed"
    assert config["module"]["lr_scheduler"]["seconds"] == 60


def test_all_limits_are_less_than_the_time_there_is(steps: dict[str, list[Step]]) -> None:
    script, total = (PROOFS / "gpu.sh").read_text(), 0
    for part in PARTS:
        lines = re.split(r"^(\w+|\*)\)$", script, flags=re.MULTILINE)
        together = len(re.findall(r" &$", lines[lines.index(part) + 1], re.MULTILINE))
        limits = [limit for limit, _ in steps[part]]
        total += max(limits[:together]) + sum(limits[together:])
        assert 4 < together < len(limits)
    assert total < SECONDS


def test_kernels_are_tested_on_the_gpu(steps: dict[str, list[Step]]) -> None:
    words = next(command for _, command in steps["speed"] if "gpu" in command)
    marked = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"\bmark\.gpu\b", path.read_text())]
    given = [ROOT / word for word in words if word.startswith("tests/")]
    assert len(marked) >= 4 and all(path.exists() for path in given)
    assert not [path for path in marked if not any(path.is_relative_to(place) for place in given)]


def test_a_record_of_nothing_has_every_bar_of_the_claims(load: Load, tmp_path: Path) -> None:
    bars = {
        "experts_gpu": load("experts_gpu")["bars_of"]({}),
        "quantized_gpu": load("quantized_gpu")["bars_of"]([]),
        "lcsc_cifar": load("lcsc_cifar")["bars_of"]({"search": {"failed": "out of time"}}),
    }
    viditq, dd = load("viditq_cifar"), load("dd_cifar")
    bars["viditq_cifar"] = viditq["bars_of"](viditq["Results"]({}))
    given = SimpleNamespace(folder=tmp_path, scale="tiny", seconds=1, seed=0, out=tmp_path / "dd.json", words=[])
    bars["dd_cifar"] = dd["Run"](given).bars()
    claims = [claim.gpu for claim in read_claims(ROOT / "docs" / "results" / CLAIMS)]
    assert {name for claim in claims for name in claim} == bars.keys()
    for name, made in bars.items():
        assert {bar for claim in claims for bar in claim.get(name, [])} <= {bar.id for bar in made}, name
        assert not any(bar.holds for bar in made) and {bar.value for bar in made} == {"not measured"}


def test_bars_of_lcsc_are_ratios_of_what_was_found(load: Load) -> None:
    program = load("lcsc_cifar")
    kinds = {"LCSC": 9.0, "tracked ema": 12.0, "swa": 10.0}
    rows = [{"kind": kind, "select": value, program["METRIC"]: value} for kind, value in kinds.items()]
    found = {"search": {"rows": rows, "calls": {"apply": {"median": 1.0}, "measure": {"median": 20.0}}}}
    bars = {bar.id: (bar.value, bar.holds) for bar in program["bars_of"](found)}
    assert bars["cifar"] == (0.75, True) and bars["cifar-all"] == (0.9, True) and bars["apply"] == (0.05, True)
    assert bars["two"] == bars["collect"] == ("not measured", False)


def test_weights_held_are_without_the_workspaces_of_products(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"weights": 100, "workspace": 32}
    clear = lambda: held.pop("workspace", None)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: sum(held.values()))
    assert load("quantized_gpu")["held"](None, torch.device("cuda")) == 100


def test_features_that_another_command_makes_are_waited_for(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    program = load("viditq_cifar")
    features_in, made = program["features_in"], tmp_path / "cache" / program["FEATURES"]
    assert features_in(tmp_path, 60.0) is None
    made.parent.mkdir(parents=True)
    lock = FileLock(made.parents[1] / LOCK_FILE)
    lock.acquire()
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            made.touch()
            lock.release()

    monkeypatch.setattr("time.sleep", sleep)
    assert features_in(tmp_path, 60.0) == made and len(waits) == 3
    # LCSC's waits for the same, and makes none of its own
    waits.clear()
    lock.acquire()
    assert load("lcsc_cifar")["features"](SimpleNamespace(left=9.0, tiny=True)) == {"seconds": 0.0}
    assert len(waits) == 3


def test_the_real_command_of_viditq_compiles_nothing(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, commands = load("viditq_cifar")["measured"], dict[str, list[str]]()

    def started(log: Path, *words: str) -> None:
        commands[log.stem] = list(words)

    monkeypatch.setitem(measured.__globals__, "started", started)
    monkeypatch.setitem(measured.__globals__, "ended", lambda *_: "nothing was run")
    monkeypatch.setitem(measured.__globals__, "features_in", lambda *_: None)
    given = SimpleNamespace(samples=64, count=8, seeds=[0], validated=8, tiny=True)
    measured(given, tmp_path, 100.0)
    method = composed(*commands["validate"][2:])["method"]
    assert not method["compiled"] and not method["rivals"] and method["samples"] == 32
