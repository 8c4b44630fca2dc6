"""What Hydra and OmegaConf report, as one line: the key, where it is set, what would be right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from genlight.config_check import ConfigError, nearest
from genlight.errors import UserError

CONF = Path(__file__).parent / "conf"


def explain(error: Exception, overrides: list[str]) -> UserError:
    """The one-line form of an error raised while a config was composed or resolved."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return UserError(f"'{error.override}' is not an override of the form key=value: {_first_line(error)}")
    cause = error.__cause__ if error.__cause__ is not None else error
    text = str(error)
    refused = re.search(r"Could not override '([^']+)'", text)
    if refused and "No match in the defaults list" in text:
        groups = sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))
        return UserError(f"there is no config group '{refused[1]}'{nearest(refused[1], groups)} ({', '.join(groups)})")
    if refused:
        return _unknown_key(refused[1], overrides)
    key = getattr(cause, "full_key", None)
    return ConfigError(str(key or ""), f"{key + ': ' if key else ''}{_first_line(cause)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _missing_option(error: Any) -> UserError:
    wanted = str(error.missing_cfg_file or "")
    group, _, option = wanted.partition("/")
    options = options_of(group)
    if not group or not options:
        return UserError(f"there is no config '{wanted}': {_first_line(error)}")
    shown = ", ".join(options)
    return UserError(f"there is no {group} '{option}'{nearest(option, options)} (there are: {shown})")


def options_of(group: str) -> list[str]:
    """Options of a config group that ship with genlight, nested names with a slash."""
    folder = CONF / group
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def _unknown_key(key: str, overrides: list[str]) -> UserError:
    """An override of a key that does not exist: compose without it and look for its nearest name."""
    from hydra import compose

    group_choices = [o for o in overrides if "=" in o and not o.startswith(("~", "+")) and _is_group(o.split("=")[0])]
    try:
        config = compose("config", overrides=["command=fit", *group_choices], return_hydra_config=True)
    except Exception:
        return UserError(f"there is no key '{key}'")
    if key.startswith("hydra."):
        keys = [f"hydra.{k}" for k in leaf_keys(_plain(config.hydra))]
    else:
        keys = [k for k in leaf_keys(_plain(config)) if not k.startswith("hydra.")]
    if any(k.startswith(f"{key}.") for k in keys):
        return UserError(
            f"{key} has entries of its own, and a value for it may name only these: to replace them all write "
            f"~{key} +{key}={{…}}, to add one +{key}.<name>=<value>"
        )
    match = nearest(key, keys)
    if match:
        name = match.split("'")[1]
        where = locate(name, dict(config.hydra.runtime.choices))
        return UserError(f"there is no key '{key}'{match}{f' ({where})' if where else ''}")
    parent = key.rpartition(".")[0]
    siblings = sorted({k[len(parent) + 1 :].split(".")[0] for k in keys if k.startswith(parent + ".")})
    hint = f" ({parent} has: {', '.join(siblings)})" if siblings else ""
    return UserError(f"there is no key '{key}'{hint}")


def _is_group(key: str) -> bool:
    return (CONF / key.split("@")[0]).is_dir()


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=False)


def leaf_keys(node: Any, prefix: str = "") -> list[str]:
    """Dotted paths of all values in nested dictionaries, and of the dictionaries themselves."""
    if not isinstance(node, dict):
        return []
    keys = []
    for name, value in node.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        keys += [path, *leaf_keys(value, path)]
    return keys


def locate(key: str, choices: dict[str, Any], extra: tuple[Path, ...] = ()) -> str | None:
    """``conf/<file>.yaml:<line>`` where a dotted key is set, looking in the order of Hydra's last word.

    Args:
        key: dotted path in the composed config.
        choices: Hydra's ``runtime.choices``, group to option.
        extra: further config folders (``--config-dir``), searched first.
    """
    parts = key.split(".")
    candidates = [(f"experiment/{choices.get('experiment')}.yaml", parts)]
    if parts[0] in choices:
        candidates.append((f"{parts[0]}/{choices[parts[0]]}.yaml", parts[1:]))
    candidates.append(("config.yaml", parts))
    for name, path in candidates:
        for root in (*extra, CONF):
            line = _line_of(root / name, path)
            if line is not None:
                return f"{root if root in extra else 'conf'}/{name}:{line}"
    return None


def _line_of(file: Path, path: list[str]) -> int | None:
    import yaml

    if not file.is_file():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    node = yaml.compose(file.read_text(), Loader=loader)
    line = None
    for part in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        for name, value in node.value:
            if name.value == part:
                node, line = value, name.start_mark.line + 1
                break
        else:
            return None
    return line
