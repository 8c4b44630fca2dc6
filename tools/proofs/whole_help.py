"""Help and errors of the command line: two hundred bad commands, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _commands import ROOT

from genlight.reports.proof import Bar, bar_at_most

sys.path.insert(0, str(ROOT / "tests"))
from bad_commands import BadCommand, bad_commands
from oracles.processor_time import children_seconds, keeping_modules

LIMIT_S = 0.5
TIMES = 5
# a command that is accepted by mistake would begin a training
TIMEOUT_S = 60


def help_bars(count: int = 200, seed: int = 0) -> list[Bar]:
    """The bars of help and bad commands.

    Args:
        count: bad commands.
        seed: of the rules that make them.
    """
    with tempfile.TemporaryDirectory() as folder:
        helped, *answers = _answers([BadCommand("help", ("--help",), ()), *bad_commands(count, seed)], Path(folder))
    for answer in answers:
        if not answer["is_one_line"] or not answer["names"] or answer["cpu_s"] > LIMIT_S:
            print(
                f"{answer['rule']}: {' '.join(answer['words'])}\n  {answer['cpu_s']:.2f} s  {answer['error'].strip()}"
            )
    slowest = max(answer["cpu_s"] for answer in answers)
    return [
        bar_at_most("help.cpu-s", "CPU seconds of --help", round(helped["cpu_s"], 3), LIMIT_S),
        _none("help.tracebacks", f"of {count} bad commands, tracebacks", [a["has_traceback"] for a in answers]),
        _none("help.accepted", f"of {count} bad commands, with exit code 0", [a["code"] == 0 for a in answers]),
        _none("help.lines", f"of {count} bad commands, not told in one line", [not a["is_one_line"] for a in answers]),
        _none(
            "help.unnamed", f"of {count} bad commands, answers without what is right", [not a["names"] for a in answers]
        ),
        bar_at_most(
            "help.slowest-cpu-s", f"CPU seconds of the slowest of {count} bad commands", round(slowest, 3), LIMIT_S
        ),
    ]


def _none(name: str, what: str, faults: list[bool]) -> Bar:
    return bar_at_most(name, what, sum(faults), 0)


def _answers(commands: Sequence[BadCommand], folder: Path) -> list[dict[str, Any]]:
    """What each command answers, and its processor time: of those above the limit the least of `TIMES` rounds over all
    of them, since modules are compiled at first, and a busy neighbour on the same core adds half as much."""
    answers = [_once(command, folder) for command in commands]
    for _ in range(TIMES - 1):
        for command, answer in zip(commands, answers, strict=True):
            if answer["cpu_s"] > LIMIT_S and answer["code"] is not None:
                answer["cpu_s"] = min(answer["cpu_s"], _once(command, folder)["cpu_s"])
    return answers


def _once(command: BadCommand, folder: Path) -> dict[str, Any]:
    before = children_seconds()
    words = [sys.executable, "-m", "genlight", *command.words]
    environ = keeping_modules(folder / "compiled") | {"PYTHONPATH": str(ROOT)}
    code: int | None = None
    try:
        done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
        code, error = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        error = "accepted, and stopped after a minute"
    return {
        "rule": command.rule,
        "words": command.words,
        "code": code,
        "error": error,
        "has_traceback": "Traceback" in error,
        "is_one_line": code == 2 and error.startswith("error: ") and error.count("\n") == 1,
        "names": any(name in error for name in command.named),
        "cpu_s": children_seconds() - before,
    }


if __name__ == "__main__":
    for bar in help_bars(int(sys.argv[1]) if len(sys.argv) > 1 else 200):
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")
