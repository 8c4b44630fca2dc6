"""What a result depends on besides its config: command, source revision, packages, machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from genlight.secrets import masked, masked_command

PACKAGES = (
    "genlight",
    "torch",
    "lightning",
    "torchmetrics",
    "diffusers",
    "transformers",
    "datasets",
    "deepspeed",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scipy",
    "safetensors",
    "wandb",
)


def environment(arguments: Sequence[str]) -> dict[str, Any]:
    """The part of a report that does not depend on the result.

    Args:
        arguments: the words of the command, e.g. ["python", "-m", "genlight", "fit", "seed=1"].
    """
    revision, dirty = git_state()
    return {
        "command": masked_command(arguments),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": revision,
        "git_dirty": dirty,
        "versions": versions(),
        "machine": machine(),
    }


def git_state() -> tuple[str | None, bool | None]:
    """Revision of the running source and whether it differs from it; (None, None) when it is not a tracked checkout."""
    package = Path(__file__).resolve().parents[1]
    # an installed copy may lie inside somebody else's repository, which then knows nothing of it
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    revision = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain")
    return (None, None) if revision is None else (revision.strip(), bool(changes))


@cache
def source_digest() -> str:
    """SHA-256 of all Python files of the running package."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def git_diff() -> str:
    """What the running source adds to its revision, as a patch without credentials; files that are new are left out.
    Only for a checkout that `git_state` calls changed: an installed copy may lie in the repository of others."""
    found = _git(Path(__file__).resolve().parents[1], "diff", "HEAD", "--no-color", "--no-ext-diff")
    return "" if found is None else str(masked(found))


def versions() -> dict[str, str]:
    """Python and the packages that results depend on, as far as they are installed. Imports none of them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB and GPUs (these only if torch is loaded already)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": usable,
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, env=environ, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
