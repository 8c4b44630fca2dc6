"""`--multirun`: one run for each combination of values, one after the other, and one table over all of them.

Each job is an ordinary command in a process of its own, in the folder `<run.root>/<run.name>/<its values>/<command>`.
The same command again skips what is finished, goes on with what was killed, and tries again what failed.
"""

from __future__ import annotations

import csv
import hashlib
import io as text_io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from genlight import io
from genlight.cli import FLAGS_WITH_VALUE, accepted
from genlight.config_check import resolved
from genlight.errors import USAGE_ERROR, UserError
from genlight.run_folder import RUN_FILE, config_differences, process_rank, read_run, run_path
from genlight.runner import recorded
from genlight.secrets import masked_override

_KIND, _VERSION = "sweep", 1
# what each job is given by the sweep
_OWN = ("resume", "run.name")
# where the jobs of a sweep must agree, for their folders lie together
_SHARED = ("run.name", "run.root", "run.dir", "command")
# what a finished run may differ in and still be what is asked for
MAY_DIFFER = (
    "resume",
    "dry_run",
    "traceback",
    "run",
    "paths",
    "logger",
    "callbacks.progress",
    "search.shared",
    "method.search.shared",
    "trainer.enable_model_summary",
)
_LONGEST = 100
_NOTED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """One combination of values.

    Attributes:
        label: of its folder, such as "seed=1".
        values: what differs between jobs, by key.
        words: overrides of its command, without those that the sweep gives.
    """

    label: str
    values: Mapping[str, str]
    words: tuple[str, ...]


def jobs_of(words: Sequence[str]) -> list[Job]:
    """The jobs of the overrides of a command, in the order of Hydra's sweeps: the last key varies fastest.

    Raises:
        UserError: a key that all jobs share has several values, or a launcher of others is asked for.
        HydraException: an override that cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices: list[list[tuple[str, str, str]]] = []
    for override, word in zip(OverridesParser.create().parse_overrides(list(words)), words, strict=True):
        key = str(override.get_key_element())
        if key in ("hydra/launcher", "hydra/sweeper"):
            raise UserError(
                f"{key}: the jobs of a sweep run one after the other; start them one by one for another way"
            )
        if not override.is_sweep_override():
            choices.append([("", "", word)])
            continue
        if key in _SHARED:
            raise UserError(f"{key} cannot be swept: every job has its folder below that of run.name")
        if not override.is_discrete_sweep():
            raise UserError(f"{word}: an interval has no values to try; use range or a list")
        texts = [str(value) for value in override.sweep_string_iterator()]
        choices.append([(key.lstrip("+~"), text, f"{key}={text}") for text in texts])
    found = []
    for each in itertools.product(*choices):
        values = {key: value for key, value, _ in each if key}
        found.append(Job(_label(values), values, tuple(word for _, _, word in each)))
    return found


def _label(values: Mapping[str, str]) -> str:
    """A name of a folder, the same for equal values and different for others."""
    exact = ",".join(f"{key}={value}" for key, value in values.items())
    label = re.sub(r"[^\w.,=+\-]", "_", exact)
    if label == exact and len(label) <= _LONGEST:
        return label or "single"
    return f"{label[:_LONGEST]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def run_sweep(words: list[str]) -> int:
    """Run all jobs of a command line that asks for several; returns 0, or the code of the first that did not end well.

    Args:
        words: flags, without that of the sweep, and overrides.

    Raises:
        UserError: the words make no sweep.
    """
    if process_rank() or "RANK" in os.environ:
        raise UserError("--multirun starts processes of its own: leave the launcher out, and set trainer.devices")
    flags, overrides = split_flags(words)
    overrides = [word for word in overrides if word.lstrip("+").split("=")[0] != "resume"]
    jobs = jobs_of(overrides)
    configs = []
    for job in jobs:  # all of them before any is run
        config = composed(flags, job.words)
        if config is None:
            return USAGE_ERROR
        configs.append(config)
    plain, _ = configs[0]
    first, command = plain["run"]["name"], plain["command"]
    folder = run_path(plain["run"]["root"], first)
    codes = []
    for number, (job, (plain, record)) in enumerate(zip(jobs, configs, strict=True), 1):
        place = folder / job.label / command
        if not plain["run"]["overwrite"] and not plain["dry_run"] and _is_finished(place, record):
            _say(f"job {number} of {len(jobs)}, {job.label}: finished already")
            codes.append(0)
            continue
        _say(f"job {number} of {len(jobs)}: {job.label}")
        codes.append(_run(_command(flags, job, f"{first}/{job.label}", resume=not plain["run"]["overwrite"])))
        if codes[-1] in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            break  # the person, or the scheduler, wants all of it to stop
    if not plain["dry_run"]:
        _report(folder, command, [masked_override(word) for word in words], jobs, codes)
    return next((code for code in codes if code), 0)


def composed(flags: Sequence[str], words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The config of a command, resolved and as it is recorded; None where it is wrong, which is told.

    Args:
        flags: of its command line; those that name folders of configs count.
        words: its overrides, `command=…` among them.
    """
    folders = [flags[i + 1] for i, flag in enumerate(flags[:-1]) if flag in ("--config-dir", "-cd")]
    searched = [f"hydra.searchpath=[file://{Path(folder).absolute()}]" for folder in folders]
    config = accepted([*searched, *words])
    if config is None:
        return None
    plain = resolved(config)
    return plain, recorded(config, plain)


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides."""
    flags, overrides = [], []
    for index, word in enumerate(words):
        if word.startswith("-") or (index and words[index - 1] in FLAGS_WITH_VALUE):
            flags.append(word)
        else:
            overrides.append(word)
    return flags, overrides


def _command(flags: Sequence[str], job: Job, name: str, resume: bool) -> list[str]:
    words = [word for word in job.words if word.split("=")[0] not in _OWN]
    return [sys.executable, "-m", "genlight", *flags, *words, f"run.name='{name}'", f"resume={str(resume).lower()}"]


def _is_finished(place: Path, record: Mapping[str, Any]) -> bool:
    """Whether the folder holds a finished run of this config."""
    if not (place / RUN_FILE).is_file():
        return False
    try:
        old = read_run(place)
    except UserError:  # the job itself says what is wrong with its folder
        return False
    return old["status"] == "finished" and not config_differences(old["config"], record, MAY_DIFFER)


def _run(command: list[str]) -> int:
    """The exit code of a child process; 128 + n where signal n ended it, or this one was told to stop."""
    with _passing_on() as (children, told):
        children.append(subprocess.Popen(command))
        code = children[0].wait()
    return 128 + told[0] if told else 128 - code if code < 0 else code


@contextmanager
def _passing_on() -> Iterator[tuple[list[Any], list[int]]]:
    """SIGTERM goes on to the child, as does SIGUSR1, which counts as one; Ctrl-C reaches it from the terminal anyhow.
    All are noted."""
    children: list[Any] = []
    told: list[int] = []

    def handle(number: int, frame: Any) -> None:
        told.append(signal.SIGTERM if number == signal.SIGUSR1 else number)
        if number != signal.SIGINT:
            for child in children:
                child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield children, told
        return
    before: dict[int, Any] = {number: signal.signal(number, handle) for number in _NOTED}
    try:
        yield children, told
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def _report(folder: Path, command: str, words: list[str], jobs: Sequence[Job], codes: Sequence[int]) -> None:
    """`sweep_<command>.json`, `.csv` and `.md`, and the table for the terminal."""
    from rich.console import Console

    from genlight.reports.report import result_table, table_lines

    ends = [*codes, *[None] * (len(jobs) - len(codes))]
    rows = [_row(folder, command, job, code) for job, code in zip(jobs, ends, strict=True)]
    stem = f"sweep_{command}"
    content = {"kind": _KIND, "version": _VERSION, "command": words, "jobs": rows}
    io.atomic_write_json(io.create_folder(folder) / f"{stem}.json", content)
    shown = [{**row["values"], "status": row["status"], "seconds": row["seconds"], **row["metrics"]} for row in rows]
    table = text_io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in shown for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(shown)
    io.atomic_write_text(folder / f"{stem}.csv", table.getvalue())
    io.atomic_write_text(folder / f"{stem}.md", "\n".join(["# Sweep", "", *table_lines(shown), ""]))
    console = Console(highlight=False)
    console.print(result_table(shown, console.width))
    console.print(f"look at\n  {folder / stem}.md", soft_wrap=True)


def _row(folder: Path, command: str, job: Job, code: int | None) -> dict[str, Any]:
    """What came of a job, by what its folder says; it never began where there is no code."""
    place = folder / job.label / command
    row: dict[str, Any] = {"name": job.label, "values": dict(job.values), "folder": str(place.relative_to(folder))}
    if not (place / RUN_FILE).is_file():
        return {**row, "status": "not begun" if code is None else "failed", "seconds": None, "metrics": {}}
    try:
        run = read_run(place)
        report = io.read_json(place / "report.json") if run["status"] == "finished" else {}
    except (UserError, OSError) as error:
        _say(f"warning: {error}")
        return {**row, "status": "damaged", "seconds": None, "metrics": {}}
    status = str(run["status"])
    if status == "running" and code:
        status = "killed"
    elif code and status == "finished":
        status = "failed"  # to be begun again: the folder holds an earlier run, of another config
    metrics = report.get("metrics", {}) if status == "finished" else {}
    parts = [(part["started"], part["ended"]) for part in (*run["earlier"], run) if part["ended"]]
    seconds = sum((datetime.fromisoformat(end) - datetime.fromisoformat(begun)).total_seconds() for begun, end in parts)
    return {**row, "status": status, "seconds": seconds, "metrics": metrics}


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
