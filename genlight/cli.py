"""The command line: parse → compose → check → run. Nothing heavy is imported before the config is accepted."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

from genlight.config_check import ConfigError, check, nearest, resolved
from genlight.errors import FAILURE, USAGE_ERROR, UserError
from genlight.help import COMMANDS, help_text, versions_text

INSPECT = "inspect"
MULTIRUN = ("--multirun", "-m")
RERUN = "--rerun"
FLAGS = (*MULTIRUN, "--run", "-r", "--resolve", "--hydra-help", "--shell-completion", "-sc")
# these show something and run nothing
SHOWING = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
VALUES = {flag: ("job", "hydra", "all") for flag in ("--cfg", "-c")}
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--info", "-i")


def entry_point() -> None:
    """Console entry: exits with the code of `main`. Until a config is accepted nothing is worth collecting, and looking
    for it takes a tenth of the time of an error."""
    gc.disable()
    sys.exit(main())


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code (0 done, 1 failed, 2 wrong usage, 130/143 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if "--versions" in arguments or "--version" in arguments:
            sys.stdout.write(versions_text())
            return 0
        if RERUN in arguments and not _asks_for_help(arguments):
            return _run_hydra(arguments)
        command, words = split_command(arguments)
        if command is None:
            sys.stdout.write(_help(arguments))
            return 0
        return _run_hydra(flags_first([f"command={command}", *_of_inspection(command, words)]))
    except UserError as error:
        if "traceback=true" in arguments:
            raise
        _print_error(error)
        return USAGE_ERROR
    except OSError as error:  # of what surrounds runs: a run tells its own
        if "traceback=true" in arguments:
            raise
        _print_error(error)
        return FAILURE


def _help(arguments: list[str]) -> str:
    """The general page, or what the words beside `--help` mean: groups, options, keys."""
    words = [word for word in arguments if word[0] != "-" and "=" not in word and word not in ("help", *COMMANDS)]
    if not words:
        return help_text()
    from genlight.options import explained

    return "\n".join(explained(word) for word in words)


def split_command(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The command word and the rest; the command is None where help is asked for.

    Raises:
        UserError: no command or an unknown one.
    """
    if not arguments or _asks_for_help(arguments):
        return None, []
    if "--experimental-rerun" in arguments:
        raise UserError(f"--experimental-rerun reads a pickle, which genlight never does; see {RERUN}")
    for index, word in enumerate(arguments):
        if word.startswith("command="):
            word = word.removeprefix("command=")
        elif "=" in word or word.startswith(("-", "~")) or _is_option_value(arguments, index):
            continue
        if word not in COMMANDS:
            raise UserError(f"there is no command '{word}'{nearest(word, list(COMMANDS))} ({', '.join(COMMANDS)})")
        return word, [*arguments[:index], *arguments[index + 1 :]]
    raise UserError(f"no command is given: the first word is one of {', '.join(COMMANDS)} (--help shows more)")


def _of_inspection(command: str, words: list[str]) -> list[str]:
    """The words; where a model is to be inspected whose folder alone is named, any module that takes one will do.

    Raises:
        UserError: a sweep of inspections.
    """
    if command != INSPECT:
        return words
    if any(word in MULTIRUN for word in words):
        raise UserError("inspect shows one model and leaves no results that could be compared: --multirun is for runs")
    keys = {word.lstrip("+").split("=")[0] for word in words}
    return words if keys & {"module", "experiment"} or "module.pretrained" not in keys else ["module=pipeline", *words]


def _asks_for_help(arguments: list[str]) -> bool:
    return any(word in ("-h", "--help", "help") for word in arguments)


def _is_option_value(arguments: list[str], index: int) -> bool:
    return index > 0 and arguments[index - 1] in FLAGS_WITH_VALUE


def flags_first(words: list[str]) -> list[str]:
    """The same words with flags and their values before the overrides: Hydra's parser takes no other order.

    Raises:
        UserError: an unknown flag, or one without its value.
    """
    flags, overrides = [], []
    for index, word in enumerate(words):
        if word.startswith("-"):
            known = [*FLAGS, *FLAGS_WITH_VALUE]
            if word.split("=")[0] not in known:
                raise UserError(f"there is no flag '{word}'{nearest(word, known)}")
            flags.append(word)
            if word in FLAGS_WITH_VALUE and (index + 1 == len(words) or words[index + 1].startswith("-")):
                raise UserError(f"{word} needs a value after it")
        elif _is_option_value(words, index):
            known = list(VALUES.get(words[index - 1], [word]))
            if word not in known:
                raise UserError(f"{words[index - 1]} {word}: it is one of {', '.join(known)}{nearest(word, known)}")
            flags.append(word)
        else:
            # what Hydra itself knows is fixed: a key that is added there is a misspelt one
            is_hydras = word.startswith(("+hydra.", "++hydra.")) and "hydra.job.env_set." not in word
            overrides.append(word.lstrip("+") if is_hydras else word)
    return [*flags, *overrides]


def _run_hydra(overrides: list[str]) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.register_new_resolver("genlight.cache", cache_folder, replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, which print them in one line
    codes: list[int] = []

    def job(config: Any) -> None:
        codes.append(_run_job(config, overrides))

    original = sys.argv
    sys.argv = [original[0], *overrides]
    try:
        if RERUN in overrides:
            from genlight.rerun import rerun

            return rerun(overrides)
        if any(word in MULTIRUN for word in overrides) and not any(word in SHOWING for word in overrides):
            from genlight.sweep import run_sweep

            gc.enable()
            return run_sweep([word for word in overrides if word not in MULTIRUN])
        if not any(word.startswith("-") for word in overrides) and accepted(overrides) is None:
            return USAGE_ERROR
        hydra.main(config_path="pkg://genlight.conf", config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # the last from Hydra's own checks
        from genlight.config_errors import explain

        if "traceback=true" in overrides:
            raise
        with _composing():
            raise explain(error, overrides) from None
    finally:
        sys.argv = original
    return max(codes, default=0)


def _composing() -> Any:
    """Hydra's compose API needs an initialized search path, also after hydra.main gave up."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    return initialize_config_module("genlight.conf", version_base="1.3")


def accepted(overrides: list[str]) -> Any:
    """The composed config of a command; None where it is wrong, which is told. Composing and checking once before
    Hydra's main, which composes twice, an error answers in half the time."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    with _composing():
        config = compose("config", overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        choices = dict(config.hydra.runtime.choices)
        job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        with open_dict(job):
            return job if _check_job(job, choices, overrides) else None


def _check_job(config: Any, choices: dict[str, Any], overrides: list[str]) -> bool:
    from omegaconf.errors import OmegaConfBaseException

    try:
        typed = [word.lstrip("+~").split("=")[0] for word in overrides]
        check(resolved(config), allow=_typed_allow(overrides), typed=typed)
    except (ConfigError, OmegaConfBaseException) as error:
        _print_error(_with_place(error, choices, overrides))
        return False
    return True


def _run_job(config: Any, overrides: list[str]) -> int:
    """The command itself. The only place from which torch is imported."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config = HydraConfig.get()
    if not _check_job(config, dict(hydra_config.runtime.choices), overrides):
        return USAGE_ERROR
    from genlight.runner import run

    gc.enable()
    return run(config, choices=dict(hydra_config.runtime.choices), overrides=list(hydra_config.overrides.task))


def _typed_allow(overrides: list[str]) -> list[str]:
    """``targets.allow`` counts only where a person typed it, never from a file."""
    import yaml

    typed = [o.split("=", 1)[1] for o in overrides if o.lstrip("+").startswith("targets.allow=")]
    return [str(name) for text in typed for name in (yaml.safe_load(text) or [])]


def _with_place(error: Exception, choices: dict[str, Any], overrides: list[str]) -> UserError:
    """The error with the file and line, or the override, that set the key."""
    from pathlib import Path

    from genlight.config_errors import explain, locate

    if not isinstance(error, ConfigError):
        error = explain(error, overrides)
    key = getattr(error, "key", "")
    if not key:
        return UserError(str(error))
    if any(o.lstrip("+").split("=")[0] == key for o in overrides):
        return UserError(f"{error} (set on the command line)")
    folders = tuple(Path(overrides[i + 1]) for i, o in enumerate(overrides[:-1]) if o in ("--config-dir", "-cd"))
    place = locate(key, choices, folders)
    return UserError(f"{error} (set in {place})" if place else str(error))


def cache_folder() -> str:
    """Where features, statistics and decoded data are kept: ``GENLIGHT_CACHE``, or the user's cache folder."""
    named = os.environ.get("GENLIGHT_CACHE")
    if named:
        return named
    from platformdirs import user_cache_dir

    return user_cache_dir("genlight")


def _print_error(error: Exception) -> None:
    text = " ".join(str(error).split())
    sys.stderr.write(f"error: {text}\n")
