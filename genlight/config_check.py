"""The whole config checked before torch is imported: targets allowed, keys known, values of the right type."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from genlight import signatures
from genlight.errors import UserError
from genlight.guards import refusal

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
# Lightning sees to these only after it was imported, and to some not at all
LEAST = {
    "trainer.max_steps": -1,
    "trainer.max_epochs": -1,
    "trainer.num_nodes": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.log_every_n_steps": 0,
    "trainer.num_sanity_val_steps": -1,
}
GROUPS = ("data", "module", "metrics", "trainer", "callbacks", "search", "method", "logger", "strategy")
NEEDED = ("data", "module", "trainer", "method")


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


def nearest(name: str, candidates: list[str], cutoff: float = 0.6) -> str:
    """``; did you mean 'x'?`` for the closest candidate that is at least so alike (0 to 1), or an empty string."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


def check(config: dict[str, Any], allow: list[str] | None = None, typed: Sequence[str] = ()) -> None:
    """Check a resolved config.

    Args:
        config: plain containers, interpolations resolved.
        allow: further package roots that ``_target_`` may name.
        typed: keys given on the command line; what they belong to is looked at first, since a fault is mostly there.

    Raises:
        ConfigError: at the first fault, naming the key, the value found and what is accepted.
    """
    _check_root(config)
    _check_trainer(config)

    def order(found: tuple[str, dict[str, Any]]) -> tuple[bool, bool]:
        # to read a signature of torch or diffusers takes ten times as long as one of genlight's own
        is_typed = any(f"{key}.".startswith(f"{found[0]}.") for key in typed)
        return not is_typed, not str(found[1]["_target_"]).startswith("genlight.")

    for path, node in sorted(targets(config), key=order):
        _check_target(path, node["_target_"], tuple(allow or ()))
        _check_arguments(path, node)
        _check_guards(path, node, typed)


def _check_root(config: dict[str, Any]) -> None:
    sections = {key.split(".")[0] for key in ROOT_TYPES}
    known = sorted({*sections, *GROUPS})
    for key in config:
        if key not in known:
            raise ConfigError(key, f"there is no key '{key}'{nearest(key, known)} (known: {', '.join(known)})")
    for section in ("run", "paths", "targets"):
        names = [k.split(".")[1] for k in ROOT_TYPES if k.startswith(section + ".")]
        if not isinstance(config.get(section, {}), dict):
            raise ConfigError(section, f"{section}={config[section]!r}: it has the entries {', '.join(names)}")
        for key in config.get(section, {}):
            if key not in names:
                path = f"{section}.{key}"
                raise ConfigError(path, f"there is no key '{path}'{nearest(key, names)}")
    for group in NEEDED:
        if "_target_" not in (config.get(group) or {}):
            raise ConfigError(group, f"{group} is missing: every run needs one ({group}=<option>)")
    for path, kind in ROOT_TYPES.items():
        _check_type(path, _select(config, path), ast.parse(kind, mode="eval").body)
    ckpt_path = config.get("ckpt_path")
    if ckpt_path is not None and "://" in ckpt_path:
        raise ConfigError("ckpt_path", f"ckpt_path={ckpt_path}: URLs are refused; download the file and give its path")
    if config["resume"] and config["run"]["overwrite"]:
        raise ConfigError(
            "resume", "resume=true and run.overwrite=true exclude each other: continue the run, or replace it"
        )
    if not 0 <= config["seed"] < 2**32:
        raise ConfigError("seed", f"seed={config['seed']}: a seed lies between 0 and 2**32 - 1")


def _check_trainer(config: dict[str, Any]) -> None:
    for path, least in LEAST.items():
        value = (config.get("trainer") or {}).get(path.removeprefix("trainer."))
        if isinstance(value, int) and value < least:
            raise ConfigError(path, f"{path}={value} must be at least {least}")


def _select(config: dict[str, Any], path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        if part not in node:
            raise ConfigError(path, f"{path} is missing: every run needs it")
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
            _check_type(f"{path}.{key}", value, signatures.expanded(parameter))
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


def _check_guards(path: str, node: dict[str, Any], typed: Sequence[str]) -> None:
    """What the constructor itself says about the values, as far as its source shows it."""
    target = node["_target_"]
    signature, found = signatures.static_signature(target), signatures.constructor(target)
    if signature is None or found is None:
        return
    values = {}
    for parameter in signature.parameters.values():
        if parameter.name in node:
            values[parameter.name] = node[parameter.name]
        elif parameter.default is not None and not node.get("_partial_"):  # the call may still give it
            try:
                values[parameter.name] = ast.literal_eval(parameter.default)
            except ValueError:
                continue
    refused = refusal(found, values)
    if refused is None:
        return
    keys = [f"{path}.{name}" for name in refused.arguments if name in signature.parameters]
    key = next((key for key in keys if key in typed), next(iter(keys), path))
    # constructors name their arguments by the section in which they mostly stand
    said = re.search(rf"[\w.]*\b{re.escape(key.rpartition('.')[2])}\b", refused.message)
    is_named = said is not None and key.endswith(said[0])
    raise ConfigError(key, refused.message if is_named else f"{key}: {refused.message}")


def _check_type(path: str, value: Any, annotation: ast.expr | None) -> None:
    if not signatures.accepts(annotation, value):
        shown = "null" if value is None else repr(value)
        quoted = ""
        if isinstance(value, int | float) and signatures.accepts(annotation, ""):
            quoted = f"; as a text it is written \"{path}='{shown}'\""
        raise ConfigError(
            path, f"{path}={shown} has the wrong type: expected {signatures.describe(annotation)}{quoted}"
        )
