"""What a result depends on besides its config: command, source revision, packages, machine. Secrets are masked."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

MASK = "***"
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
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey"}
# texts that look like credentials whatever they are called, and the user part of a URL
_SECRET_TEXT = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_\-]{12,}")
_URL_LOGIN = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
# name: or name= inside a text such as {api_key:abc,project:x}, and what can stand after it
_INNER_KEY = re.compile(r"""([A-Za-z_][\w.\-]*)["']?\s*[:=]\s*""")
_INNER_VALUE = re.compile(r"""\[[^\]]*\]?|\{[^}]*\}?|"[^"]*"?|'[^']*'?|[^,}\]]+""")


def is_secret(key: str, value: Any = "") -> bool:
    """Whether a config key names a credential: token, secret, password, api_key, any *_key; the last two if it is text.

    A token may also be a number of a network (token_dim: 64): only texts count there.
    """
    words = [word for word in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()) if word]
    if any(word in _SECRET_WORDS for word in words):
        return True
    is_key = len(words) > 1 and words[-1] in ("key", "keys")
    return ("token" in words or "authorization" in words or is_key) and not isinstance(value, bool | int | float)


def masked(config: Any) -> Any:
    """A copy of nested dicts and lists with the value of every secret key replaced, and credentials in texts too."""
    if isinstance(config, Mapping):
        return {key: _hidden(value) if is_secret(str(key), value) else masked(value) for key, value in config.items()}
    if isinstance(config, str):
        return _masked_text(config)
    if isinstance(config, Sequence):
        return [masked(value) for value in config]
    return config


def masked_override(override: str) -> str:
    """A command-line override (``logger.api_key=abc``, ``+a={token:x}``) without its secrets."""
    key, equals, value = override.partition("=")
    if equals and value and is_secret(key.lstrip("+~-").rsplit(".", 1)[-1]):
        return f"{key}={MASK}"
    return _masked_text(f"{key}{equals}{_without_inner_secrets(value)}")


def masked_command(arguments: Sequence[str]) -> str:
    """The command as one line that a shell accepts, without its secrets."""
    result: list[str] = []
    for position, argument in enumerate(arguments):
        before = arguments[position - 1] if position else ""
        follows_secret = before.startswith("--") and "=" not in before and is_secret(before.lstrip("-"))
        result.append(MASK if follows_secret else masked_override(argument))
    return shlex.join(result)


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


def _hidden(value: Any) -> Any:
    """Masks every leaf below a secret key; what is not set shows nothing and stays."""
    if isinstance(value, Mapping):
        return {key: _hidden(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_hidden(inner) for inner in value]
    # ${oc.env:NAME} says where a secret comes from, not what it is
    is_reference = isinstance(value, str) and re.fullmatch(r"\$\{oc\.env:\w+(,null)?\}", value)
    return value if value is None or value == "" or is_reference else MASK


def _without_inner_secrets(text: str) -> str:
    """Masks the values of secret keys in Hydra's form of dicts, at any depth."""
    shown, position = "", 0
    for key in _INNER_KEY.finditer(text):
        value = _INNER_VALUE.match(text, key.end())
        if key.start() >= position and value and is_secret(key[1].rsplit(".", 1)[-1]):
            shown += text[position : key.end()] + MASK
            position = value.end()
    return shown + text[position:]


def _masked_text(text: str) -> str:
    return _SECRET_TEXT.sub(MASK, _URL_LOGIN.sub(MASK, text))


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
