"""`--rerun <run folder>`: the command of a finished run once more, in a folder beside it, and both results compared.

The command is that of the folder's record, with what is typed after the folder on top. The config is composed anew;
where it is no longer the recorded one, the keys are told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genlight import io
from genlight.cli import RERUN, main
from genlight.errors import FAILURE, USAGE_ERROR, UserError
from genlight.help import COMMANDS
from genlight.reports.report import Report, read_report, result_table
from genlight.run_folder import config_differences, process_rank, read_run
from genlight.secrets import MASK
from genlight.sweep import MAY_DIFFER, composed, split_flags

# what belongs to the first run alone
_DROPPED = ("resume", "dry_run", "traceback", "run.name", "run.dir", "run.overwrite")
_BEGIN = ["python", "-m", "genlight"]


def rerun(arguments: Sequence[str]) -> int:
    """Repeat a run and compare; returns 0 where all metrics and weights are the same to the last bit, 1 where they are
    not, else the code of the command that failed.

    Args:
        arguments: words of a command line with `--rerun <folder>` among them. The others are overrides, which replace
            those of the record, and `--config-dir`. The new run is `<run.name>-rerun` where `run.name` is not given.

    Raises:
        UserError: no finished run there; a word that cannot be repeated; another flag.
    """
    place = arguments.index(RERUN)
    given = [*arguments, "-"][place + 1]
    if given.startswith("-") or "=" in given:
        raise UserError(f"{RERUN} needs the folder of a finished run after it, such as runs/demo/fit")
    if process_rank() or "RANK" in os.environ:
        raise UserError(f"{RERUN} starts its processes itself: leave the launcher out, and set trainer.devices")
    flags, typed = split_flags([*arguments[:place], *arguments[place + 2 :]])
    if others := [flag for flag in flags[::2] if flag not in ("--config-dir", "-cd")]:
        raise UserError(f"{RERUN} takes overrides and --config-dir, not {others[0]}")
    folder = Path(given)
    old, before = _finished(folder)
    keys = [_key(word) for word in typed]
    words = [*repeated(old["command"][4:], keys), *typed]
    if "run.name" not in keys:
        words.append(f"run.name='{old['config']['run']['name']}-rerun'")
    # else it would take the scores of the run that it is compared with
    own_scores = not any(key.endswith("search.shared") for key in keys)
    if own_scores and "shared" in (old["config"].get("search") or {}):
        words.append("search.shared=false")
    command = old["command"][3]
    found = composed(flags, [f"command={command}", *words])
    if found is None:
        return USAGE_ERROR
    plain, record = found
    changed = config_differences(old["config"], record, (*MAY_DIFFER, *keys))
    if changed:
        sys.stderr.write(f"beside what is typed the config differs from the recorded one: {'; '.join(changed)}\n")
    code = _repeat([command, *flags, *words], own_scores)
    if code or plain["dry_run"]:
        return code
    again = Path(plain["run"]["dir"])
    return _told(before, read_report(again / "report.json"), _same_weights(folder, again), folder, again)


def repeated(words: Sequence[str], typed: Sequence[str]) -> list[str]:
    """The overrides of a record that a repetition takes over.

    Args:
        words: recorded overrides.
        typed: keys that are given anew.

    Raises:
        UserError: a word that only a person may say and no file (SECURITY.md), or one whose secret was not recorded.
    """
    kept = [word for word in words if _key(word) not in (*_DROPPED, *typed)]
    for word in kept:
        key = _key(word)
        if key.startswith(("-", "hydra", "targets")) or "trust_remote_code" in word:
            raise UserError(f"the record holds {word}, which counts only where it is typed: add it to the command")
        if MASK in word:
            raise UserError(f"the record holds {word}: secrets are not recorded, add {key}=… to the command")
    return kept


def _repeat(words: list[str], own_scores: bool) -> int:
    """The exit code of a command. With `own_scores` no search takes those of other runs, nor one that the command
    starts, such as the stages of a stack."""
    from genlight.loops.search import OWN_SCORES

    if own_scores:
        os.environ[OWN_SCORES] = "1"
    try:
        return main(words)
    finally:
        os.environ.pop(OWN_SCORES, None)


def metric_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each metric of either result, with what was added to it; None where one lacks it."""
    rows = []
    for name in dict.fromkeys([*before, *after]):
        first, second = before.get(name), after.get(name)
        difference = None if first is None or second is None else second - first
        rows.append({"metric": name, "recorded": first, "again": second, "difference": difference})
    return rows


def surroundings(before: Report, after: Report) -> list[str]:
    """What both results do not have in common beside numbers: machine, versions, revision, data, weights."""
    first, second = (_surroundings(report) for report in (before, after))
    names = dict.fromkeys([*first, *second])
    return [
        f"{name}: {first.get(name)}, now {second.get(name)}" for name in names if first.get(name) != second.get(name)
    ]


def _surroundings(report: Report) -> dict[str, Any]:
    weights = {f"weights {each.source}": each.hub_commit or each.sampled_sha256 for each in report.weights}
    known = {"revision": report.git_revision, "data": report.data, "deterministic": report.deterministic}
    return {**report.machine, **report.versions, **known, **weights}


def _finished(folder: Path) -> tuple[dict[str, Any], Report]:
    """Record and report of a finished run; UserError for another folder."""
    old = read_run(folder)
    if old["status"] != "finished" or not (folder / "report.json").is_file():
        raise UserError(f"{folder} holds a run that is {old['status']}: only a finished one can be compared with")
    words, config = old["command"], old["config"]
    is_text = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not is_text or words[:3] != _BEGIN or words[3:4] not in [[name] for name in COMMANDS]:
        raise UserError(f"{folder} was not made by a command of genlight: {words}")
    if not isinstance(config, dict) or not isinstance(config.get("run"), dict) or "name" not in config["run"]:
        raise UserError(f"{folder} has a record without run.name")
    return old, read_report(folder / "report.json")


def _key(word: str) -> str:
    return word.lstrip("+~").split("=")[0].split("@")[0]


def _same_weights(before: Path, after: Path) -> dict[str, bool]:
    """For each file of weights of either artifact, whether both hold it with the same bytes."""
    first, second = (
        {str(path.relative_to(folder)): io.sha256_of(path) for path in sorted(folder.glob("artifact/**/*.safetensors"))}
        for folder in (before, after)
    )
    return {name: first.get(name) == second.get(name) for name in dict.fromkeys([*first, *second])}


def _told(before: Report, after: Report, weights: Mapping[str, bool], folder: Path, again: Path) -> int:
    """The comparison on the terminal, and its exit code."""
    from rich.console import Console

    console = Console(highlight=False)
    rows = metric_rows(before.metrics, after.metrics)
    if rows:
        console.print(result_table(rows, console.width))
    differing = [row["metric"] for row in rows if row["difference"] != 0]
    differing += [name for name, same in weights.items() if not same]
    for line in surroundings(before, after):
        console.print(f"differs: {line}", soft_wrap=True, markup=False)
    verdict = f"not the same: {', '.join(differing)}" if differing else "the same to the last bit"
    console.print(f"metrics compared: {len(rows)}, files of weights: {len(weights)}")
    console.print(f"{folder} and {again}: {verdict}", soft_wrap=True, markup=False)
    return FAILURE if differing else 0
