"""What a run needs and another experiment makes: fitted by a command of its own where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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
        command = [sys.executable, "-m", "genlight", "fit", f"experiment={recipe}", "run.overwrite=true", *words]
        # one process, even where this one is one of several
        alone = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
        done = subprocess.run(command, check=False, env=alone)
        if done.returncode != 0:
            raise UserError(f"fit experiment={recipe} failed (exit code {done.returncode}), see above")
