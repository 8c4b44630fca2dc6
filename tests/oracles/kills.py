"""Commands that are killed at a moment of their writing, in forked children of this process."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from oracles.faults import hooked, in_child

from genlight.cli import main

Moment = Callable[[str, Path], bool]


def kill(words: list[str], moment: Moment) -> None:
    """Run a command and SIGKILL its process before the first write at which `moment(primitive, path)` holds."""

    def hook(primitive: str, path: Path) -> None:
        if moment(primitive, Path(path)):
            os.kill(os.getpid(), signal.SIGKILL)

    def command() -> None:
        with hooked(hook):
            raise SystemExit(main(words))

    assert in_child(command) == -signal.SIGKILL


def at_line(search: str, lines: int) -> Moment:
    """When the archive of a search has so many lines."""

    def moment(primitive: str, path: Path) -> bool:
        history = path.parent / "history.jsonl"
        return path.parent.name == search and history.is_file() and len(history.read_bytes().splitlines()) == lines

    return moment


def at_checkpoint(folder: Path, name: str) -> Moment:
    """When the fit in a folder has a checkpoint; or, of `inside a save`, its second is written and has no name yet."""
    checkpoints = folder / "checkpoints"

    def moment(primitive: str, path: Path) -> bool:
        done = len(list(checkpoints.glob("step-*.ckpt")))
        return {
            "first checkpoint": done == 1,
            "inside a save": done == 1 and primitive == "rename" and "step-000004" in str(path),
            "after the last step": (checkpoints / "step-000006.ckpt").exists(),
        }[name]

    return moment
