"""Other experiments as parts of a run, each by a command of its own: fitted where what they make is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from genlight import io
from genlight.callbacks.timing import print_line
from genlight.errors import UserError

# what a launcher of several processes tells each of them
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID")


def fit_where_missing(recipe: str, is_there: Callable[[], bool], what: str, folder: str | Path, *words: str) -> None:
    """Fit the experiment `recipe`, in a process of its own, unless `is_there`; other processes wait for it.

    Args:
        what: is missing, for the person who watches.
        folder: where the lock lies on which others wait.
        words: overrides of the command.

    Raises:
        UserError: the fit failed.
    """
    from filelock import FileLock

    if is_there():
        return
    io.create_folder(Path(folder))
    with FileLock(Path(folder) / f".{recipe.replace('/', '-')}.lock"):
        if is_there():
            return
        print_line(f"{what} is not there yet: fit experiment={recipe}")
        run_command("fit", f"experiment={recipe}", "run.overwrite=true", *words)


def fit_run_where_missing(
    recipe: str, source: str | Path, key: str, cache: str | Path, words: Sequence[str] = ()
) -> None:
    """Fit the experiment `recipe` into the run folder `source` unless that has an artifact.

    Args:
        source: <run.root>/<run.name>/fit.
        key: of the config that names it, for messages.
        cache: of features and data.
        words: overrides of the command.

    Raises:
        UserError: `source` is no folder of a fit, or the fit failed.
    """
    folder = Path(source)
    if folder.name != "fit":
        raise UserError(
            f"{key} = {source} is not the folder of a fit, <run.root>/<run.name>/fit, which experiment={recipe} would "
            "make"
        )
    artifact, root = folder / "artifact", folder.parent.parent
    own = (f"run.root={root}", f"run.name={folder.parent.name}", f"paths.cache={cache}", *words)
    fit_where_missing(recipe, artifact.is_dir, f"{key} = {source}", root, *own)
    if not artifact.is_dir():
        raise UserError(f"fit experiment={recipe} has not written {key} = {source}")


def run_command(command: str, *words: str, show: bool = True) -> str:
    """A command of genlight in a process of its own, even where this one is one of several.

    Args:
        command: "fit" or "validate".
        words: the experiment and overrides.
        show: let it write where this process writes.

    Returns:
        What it wrote to its standard output, "" where that was shown.

    Raises:
        UserError: it failed.
    """
    alone = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    done = subprocess.run(
        [sys.executable, "-m", "genlight", command, *words],
        check=False,
        env=alone if show else {**alone, "COLUMNS": "200"},
        stdout=None if show else subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise UserError(f"{command} {words[0]} failed (exit code {done.returncode}), see above")
    return done.stdout or ""
