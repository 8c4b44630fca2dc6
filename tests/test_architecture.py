"""Facts about the tree itself: one-way imports, sizes, what the wheel holds, what users may rely on."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p
    for folder in ("genlight", "callbacks", "conf")
    for p in (ROOT / folder).rglob("*.py")
    if not p.parent.is_symlink()
)

# A package may import from its own rank or below.
RANKS = {
    "errors": 0, "io": 0, "secrets": 0, "leaving": 0, "memory": 0,
    "nets": 1,
    "diffusion": 2, "metrics": 2, "reports": 2, "search": 2, "predictors": 2, "checkpoints": 2,
    "experts": 2, "quantization": 2,
    "data": 3, "modules": 3, "trainer": 3, "callbacks": 3, "run_folder": 3, "recipes": 3,
    "loops": 4,
    "build": 5,
    "context": 4,
    "session": 6, "inspection": 6,
    "runner": 7,
    "guards": 1, "signatures": 1, "config_check": 2, "config_errors": 3, "help": 4, "options": 5,
    "cli": 8, "sweep": 8, "rerun": 8, "__main__": 9, "__init__": 0, "conf": 0,
}  # fmt: skip
WITHOUT_LIGHTNING = (
    "nets", "diffusion", "metrics", "reports", "search", "predictors", "checkpoints", "experts",
    "quantization", "io", "errors", "secrets", "leaving", "memory",
)  # fmt: skip
WITHOUT_TORCH_AT_TOP = (
    "cli",
    "config_check",
    "config_errors",
    "guards",
    "signatures",
    "help",
    "options",
    "sweep",
    "rerun",
    "errors",
    "io",
    "leaving",
    "run_folder",
    "secrets",
)
FILE_LIMIT, FUNCTION_LIMIT = 400, 60
# path or path::function -> why it may be longer
SIZE_EXCEPTIONS: dict[str, str] = {}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in ("callbacks", "conf") else parts[1]


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    names = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "genlight" and len(parts) > 1 and parts[1] in RANKS:
            assert RANKS[parts[1]] <= RANKS[here], f"{here} may not import {name}"
        if here in WITHOUT_LIGHTNING:
            assert parts[0] not in ("lightning", "hydra", "wandb", "omegaconf"), f"{here} may not import {name}"
    if here in WITHOUT_TORCH_AT_TOP:
        heavy = {"torch", "lightning", "diffusers", "numpy", "transformers"}
        assert not heavy & {name.split(".")[0] for name in imports(path, top_level_only=True)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LIMIT or name in SIZE_EXCEPTIONS
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LIMIT or f"{name}::{node.name}" in SIZE_EXCEPTIONS, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_anywhere(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in ("pickle", "joblib", "dill", "cloudpickle"), name
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "numpy.load", "np.load", "torch.hub.load"), called


def test_every_config_starts_with_a_description() -> None:
    from genlight.help import first_comment

    for file in (ROOT / "conf").rglob("*.yaml"):
        assert first_comment(file), f"{file} needs a first line '# what it is'"


def test_malicious_uploads_of_lightning_are_excluded() -> None:
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text()
    line = next(entry for entry in text.splitlines() if '"lightning' in entry)
    requirement = Requirement(line.strip().strip('",'))
    assert not requirement.specifier.contains("2.6.2") and not requirement.specifier.contains("2.6.3")
    assert "lightning==2.6.6" in (ROOT / "constraints.txt").read_text().splitlines()


def test_wheel_claims_one_name_and_holds_the_configs(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("genlight-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"genlight"}
    shipped = {name.removeprefix("genlight/conf/") for name in names if name.endswith(".yaml")}
    assert shipped == {str(p.relative_to(ROOT / "conf")) for p in (ROOT / "conf").rglob("*.yaml")}
    installed = [*map(str, ("--no-deps", "--no-index", "--no-compile", "-q", "--target", tmp_path / "site", wheel))]
    subprocess.run([sys.executable, "-m", "pip", "install", *installed], check=True, capture_output=True)
    program = (
        "import genlight, genlight.callbacks, genlight.conf, sys; from genlight.cli import accepted, main;"
        "assert all('site' in m.__file__ for m in (genlight, genlight.callbacks, genlight.conf));"
        "assert main(['--help']) == 0 and main(['fit', 'trainer.max_stps=3']) == 2;"
        "sys.exit(main(['fit', '--cfg', 'job']) or accepted(['command=fit', 'experiment=s3/digits']) is None)"
    )
    elsewhere = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=True
    )
    assert "max_steps" in done.stdout
    assert "did you mean 'trainer.max_steps'? (conf/experiment/digits.yaml:" in done.stderr
    words = [sys.executable, "-m", "genlight", "--help"]
    assert "s3/digits" in subprocess.run(words, cwd=tmp_path, env=elsewhere, capture_output=True, text=True).stdout


def test_installed_packages_agree_with_each_other() -> None:
    """Every requirement of genlight, and of what it requires, is met by the version that is installed."""
    from importlib import metadata

    from packaging.requirements import Requirement

    waiting, seen, unmet = ["genlight"], set(), []
    while waiting:
        name = waiting.pop()
        for text in metadata.requires(name) or []:
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            try:
                found = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                unmet.append(f"{name} needs {text}, which is not installed")
                continue
            if not wanted.specifier.contains(found, prereleases=True):
                unmet.append(f"{name} needs {text}, {found} is installed")
            if wanted.name not in seen:
                seen.add(wanted.name)
                waiting.append(wanted.name)
    assert unmet == []


def surface() -> dict[str, list[str]]:
    """The keys that a command line may use: those of the main config and of every group option."""
    import yaml

    from genlight.config_errors import leaf_keys

    keys = {}
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        name = str(file.relative_to(ROOT / "conf"))
        if not name.startswith("experiment/"):
            content = yaml.safe_load(file.read_text()) or {}
            content = {k: v for k, v in content.items() if k not in ("defaults", "hydra")}
            keys[name] = sorted(k for k in leaf_keys(content) if "_target_" not in k)
    return keys


def test_command_line_keys_are_the_recorded_ones() -> None:
    """A changed key is a changed promise: say so in CHANGELOG.md, then run tools/record_surface.py."""
    assert surface() == json.loads((ROOT / "tests" / "surface.json").read_text())
