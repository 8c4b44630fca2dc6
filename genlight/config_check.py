"""The whole config checked before torch is imported: targets allowed, keys known, values of the right type."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from typing import Any

from genlight import signatures
from genlight.errors import UserError

ALLOWED_ROOTS = ("genlight", "torch.nn", "torch.optim", "diffusers", "transformers", "torchmetrics", "lightning")
# Classes below the allowed roots that read files or run code named by the config; genlight's own modules load weights.
FORBIDDEN_NAMES = {"load", "from_pretrained", "from_single_file", "load_state_dict", "load_from_checkpoint"}
FORBIDDEN_PARTS = {"hub", "cli", "subprocess", "os", "sys", "pickle", "serialization"}
RESERVED = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
ROOT_TYPES = {
    "command": "str",
    "seed": "int",
    "ckpt_path": "str | None",
    "resume": "bool",
    "dry_run": "bool",
    "traceback": "bool",
    "run.name": "str",
    "run.root": "str",
    "run.overwrite": "bool",
    "run.dir": "str",
    "paths.cache": "str",
    "targets.allow": "list[str]",
}
GROUPS = ("data", "module", "metrics", "trainer", "callbacks", "search", "method", "logger", "strategy")


class ConfigError(UserError):
    """A key or value of the config is wrong; ``key`` is its dotted path, for finding file and line."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def resolved(config: Any) -> dict[str, Any]:
    """A composed config as plain containers, interpolations resolved.

    Raises:
        OmegaConfBaseException: a value is missing, or refers to what is not there.
    """
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return plain  # type: ignore[no-any-return]


def nearest(name: str, candidates: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest candidate, or an empty string."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def check(config: dict[str, Any], allow: list[str] | None = None) -> None:
    """Check a resolved config.

    Args:
        config: plain containers, interpolations resolved.
        allow: further package roots that ``_target_`` may name.

    Raises:
        ConfigError: at the first fault, naming the key, the value found and what is accepted.
    """
    _check_root(config)
    for path, node in targets(config):
        _check_target(path, node["_target_"], tuple(allow or ()))
        _check_arguments(path, node)


def _check_root(config: dict[str, Any]) -> None:
    sections = {key.split(".")[0] for key in ROOT_TYPES}
    known = sorted({*sections, *GROUPS})
    for key in config:
        if key not in known:
            raise ConfigError(key, f"there is no key '{key}'{nearest(key, known)} (known: {', '.join(known)})")
    for section in ("run", "paths", "targets"):
        names = [k.split(".")[1] for k in ROOT_TYPES if k.startswith(section + ".")]
        for key in config.get(section, {}):
            if key not in names:
                path = f"{section}.{key}"
                raise ConfigError(path, f"there is no key '{path}'{nearest(key, names)}")
    for path, kind in ROOT_TYPES.items():
        _check_type(path, _select(config, path), ast.parse(kind, mode="eval").body)
    ckpt_path = config.get("ckpt_path")
    if ckpt_path is not None and "://" in ckpt_path:
        raise ConfigError("ckpt_path", f"ckpt_path={ckpt_path}: URLs are refused; download the file and give its path")
    if not 0 <= config["seed"] < 2**32:
        raise ConfigError("seed", f"seed={config['seed']}: a seed lies between 0 and 2**32 - 1")


def _select(config: dict[str, Any], path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node[part]
    return node


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted path and content of every node of a config that has a `_target_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def _check_target(path: str, target: Any, allow: tuple[str, ...]) -> None:
    key = f"{path}._target_"
    if not isinstance(target, str):
        raise ConfigError(key, f"{key}: {target!r} is not the dotted name of a class")
    parts = target.split(".")
    roots = (*ALLOWED_ROOTS, *allow)
    if not any(target.startswith(root + ".") for root in roots):
        raise ConfigError(
            key,
            f"{key}={target} is not allowed: a target lies under {', '.join(roots)}; "
            f"another package is allowed by targets.allow=[{parts[0]}] on the command line",
        )
    if parts[-1] in FORBIDDEN_NAMES or FORBIDDEN_PARTS & set(parts[1:]) or any(p.startswith("_") for p in parts):
        raise ConfigError(key, f"{key}={target} is not allowed: a target names a class to build, not a loader")
    if signatures.exists(target) is False:
        module, _, name = target.rpartition(".")
        raise ConfigError(key, f"{key}={target} does not exist{nearest(name, signatures.names_in(module))}")


def _check_arguments(path: str, node: dict[str, Any]) -> None:
    signature = signatures.static_signature(node["_target_"])
    if signature is None:
        return
    name = node["_target_"].rsplit(".", 1)[-1]
    for key, value in node.items():
        if key in RESERVED:
            continue
        parameter = signature.parameters.get(key)
        if parameter is not None:
            _check_type(f"{path}.{key}", value, parameter.annotation)
        elif not signature.open:
            known = list(signature.parameters)
            raise ConfigError(
                f"{path}.{key}",
                f"there is no key '{path}.{key}': {name} takes {', '.join(known) or 'no arguments'}"
                f"{nearest(key, known)}",
            )
    if node.get("_partial_") or node.get("_args_"):
        return
    missing = [p.name for p in signature.parameters.values() if p.required and p.name not in node]
    if missing:
        raise ConfigError(path, f"{path} lacks {', '.join(missing)}, which {name} needs")


def _check_type(path: str, value: Any, annotation: ast.expr | None) -> None:
    if not signatures.accepts(annotation, value):
        shown = "null" if value is None else repr(value)
        raise ConfigError(path, f"{path}={shown} has the wrong type: expected {signatures.describe(annotation)}")
