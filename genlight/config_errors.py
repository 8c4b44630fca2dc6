"""What Hydra and OmegaConf report, as one line: the key, where it is set, what would be right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genlight.config_check import ConfigError, nearest
from genlight.errors import UserError

CONF = Path(__file__).parent / "conf"
# what looks like a name, and is read as something else
_NO_TEXT = ("null", "true", "false")


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
        return _unknown_group(refused[1])
    group = re.search(r"config group '([^']+)' does not", " ".join(text.split()))
    if group:
        return _unknown_group(group[1])
    deleted = re.search(r"Could not delete from config\. '([^']+)' does not exist", text)
    if refused or deleted:
        key = (refused or deleted)[1]  # type: ignore[index]
        return _unknown_key(key, overrides, _composed(error))
    return _other(error, cause, text, overrides)


def _other(error: Exception, cause: BaseException, text: str, overrides: list[str]) -> UserError:
    if "Config group override must be" in f"{text} {cause}":
        return _no_option(overrides)
    ambiguous = re.search(r"Ambiguous value for argument '([^=']+)=", text)
    if ambiguous:
        return UserError(
            f"{ambiguous[1]} has several values: add --multirun for one run each, or write [a,b] for a list"
        )
    present = re.search(r"An item is already at '([^']+)'", text)
    if present:
        return UserError(f"{present[1]} is there already: write {present[1]}=<value> without the + to change it")
    twice = re.search(r"Multiple values for ([\w/@.]+)", text)
    if twice:
        group = twice[1].rstrip(".")
        return UserError(f"{group} has an option already: write {group}=<option> without the + to choose another")
    merged = re.search(r"Error merging override (\S+?)=", text)
    key = getattr(cause, "full_key", None) or (merged[1].lstrip("+~") if merged else "")
    message = _first_line(cause)
    unknown = re.match(r"Key '([^']+)' not in", message)
    if unknown and key:
        return _unknown_key(str(key), [], _composed(error))
    return ConfigError(str(key), f"{f'{key}: ' if key else ''}{message}")


def _no_option(overrides: list[str]) -> UserError:
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if not key:
            return UserError(f"'{override}' names no key: the form is key=value")
        if _is_group(key) and (not value or not re.fullmatch(r"[A-Za-z_][\w/.-]*", value) or value in _NO_TEXT):
            options = options_of(key)
            way_out = f"; {key}=none leaves it out" if "none" in options else ""
            return UserError(f"{key}={value} names no option of {key} (there are: {', '.join(options)}){way_out}")
    return UserError("a config group takes the name of one of its options: group=option")


def _unknown_group(name: str) -> UserError:
    groups = sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))
    return UserError(f"there is no config group '{name}'{nearest(name, groups)} ({', '.join(groups)})")


@dataclass(frozen=True)
class _Composed:
    """A config as it stood when an override did not fit, and the options that were chosen."""

    config: Any
    choices: dict[str, Any]


def _composed(error: BaseException) -> _Composed | None:
    """What Hydra had composed until the error, found in its frames: to compose once more doubles the time that an error
    takes. None where it is not there."""
    import traceback

    for frame, _ in traceback.walk_tb(error.__traceback__):
        config, chosen = frame.f_locals.get("cfg"), frame.f_locals.get("defaults_list")
        if config is not None and chosen is not None and "hydra" in config:
            return _Composed(config, dict(getattr(chosen.overrides, "known_choices", {})))
    return None


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


def _unknown_key(key: str, overrides: list[str], found: _Composed | None) -> UserError:
    """An override of a key that does not exist: look for its nearest name in the config as it would be without it."""
    from hydra import compose

    if found is None:
        chosen = [o for o in overrides if "=" in o and not o.startswith(("~", "+")) and _is_group(o.split("=")[0])]
        try:
            config = compose("config", overrides=["command=fit", *chosen], return_hydra_config=True)
        except Exception:
            return UserError(f"there is no key '{key}'")
        found = _Composed(config, dict(config.hydra.runtime.choices))
    if key.startswith("hydra."):
        keys = [f"hydra.{k}" for k in leaf_keys(_plain(found.config.hydra))]
    else:
        keys = [k for k in leaf_keys(_plain(found.config)) if k.split(".")[0] != "hydra"]
    if any(k.startswith(f"{key}.") for k in keys):
        return UserError(
            f"{key} has entries of its own, and a value for it may name only these: to replace them all write "
            f"~{key} +{key}={{…}}, to add one +{key}.<name>=<value>"
        )
    match = _nearest_key(key, keys)
    if match:
        name = match.split("'")[1]
        where = locate(name, found.choices)
        return UserError(f"there is no key '{key}'{match}{f' ({where})' if where else ''}")
    parent = key.rpartition(".")[0]
    siblings = sorted({k[len(parent) + 1 :].split(".")[0] for k in keys if k.startswith(parent + ".")})
    hint = f" ({parent} has: {', '.join(siblings)})" if siblings else ""
    return UserError(f"there is no key '{key}'{hint}")


def _nearest_key(key: str, keys: list[str]) -> str:
    """As `nearest`. A key whose last name is found in full elsewhere stands in the wrong section; a key with the same
    section is nearer than one whose text happens to be alike."""
    section, _, last = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    elsewhere = [k for k in keys if k.rpartition(".")[2] == last]
    return nearest(key, siblings, 0.8) or nearest(key, elsewhere, 0.0) or nearest(key, keys)


def _is_group(key: str) -> bool:
    return bool(key) and (CONF / key.split("@")[0]).is_dir()


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
