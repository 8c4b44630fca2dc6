"""From an accepted config to objects: every target looked at once more as the real thing, then built."""

from __future__ import annotations

import inspect
from typing import Any

from genlight.config_check import ALLOWED_ROOTS, RESERVED, ConfigError, nearest, targets
from genlight.errors import UserError

# what changes the disk or starts other programs
NO_TARGETS = ("genlight.io", "genlight.run_folder", "genlight.runner", "genlight.session", "genlight.cli")


def check_targets(config: dict[str, Any], allow: list[str]) -> None:
    """Import what every ``_target_`` names and compare its signature with the keys, before anything is built.

    The static check cannot follow every alias: here the object itself must come from an allowed package.

    Raises:
        ConfigError: target missing, from another package, a function of a library, or not taking a key.
    """
    for path, node in targets(config):
        found = _locate(path, node["_target_"])
        origin = getattr(found, "__module__", "") or ""
        roots = {root.split(".")[0] for root in (*ALLOWED_ROOTS, *allow)}
        if origin.split(".")[0] not in roots or not callable(found) or origin.startswith(NO_TARGETS):
            raise ConfigError(path, f"{path}._target_={node['_target_']} leads to {origin}, which is not allowed")
        own = {"genlight", *(root.split(".")[0] for root in allow)}
        if not inspect.isclass(found) and origin.split(".")[0] not in own:
            # functions of libraries read files and run what they hold
            raise ConfigError(path, f"{path}._target_={node['_target_']} is a function: a target names a class")
        _check_keys(path, node, found)


def _locate(path: str, target: str) -> Any:
    import importlib

    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        known = [n for n in dir(importlib.import_module(module.split(".")[0])) if not n.startswith("_")]
        raise ConfigError(
            f"{path}._target_", f"{path}._target_={target} does not exist{nearest(name, known)}"
        ) from None


def _check_keys(path: str, node: dict[str, Any], found: Any) -> None:
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in node:
        if key not in RESERVED and key not in parameters:
            known = list(parameters)
            raise ConfigError(f"{path}.{key}", f"there is no key '{path}.{key}': {found.__name__} takes "
                              f"{', '.join(known)}{nearest(key, known)}")  # fmt: skip


def build(node: Any, key: str, **arguments: Any) -> Any:
    """Instantiate one section of the config.

    Args:
        node: the section (its ``_target_`` checked before).
        key: its name, for error messages.
        **arguments: further keyword arguments of the constructor.

    Raises:
        UserError: the constructor refused a value; the message begins with the key.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        named = type(cause).__name__ == "MisconfigurationException"  # Lightning's, which is not imported for its name
        if named or isinstance(cause, UserError | ValueError | TypeError | ImportError):
            raise UserError(f"{_full_key(error) or key}: {cause}") from error
        raise


def _full_key(error: Exception) -> str:
    for line in str(error).splitlines():
        if line.startswith("full_key: "):
            return line.removeprefix("full_key: ").strip()
    return ""
