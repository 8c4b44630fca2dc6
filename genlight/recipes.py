"""Other experiments as parts of a run, each by a command of its own: fitted where what they make is missing.

A dry run fits nothing to its end. Where something is missing, it goes on in copies of the folders of runs and of the
cache, made of links (`in_copy`); there the missing fit is asked by a dry run of its own what it costs, and a few steps
of it leave something of the right shape to measure on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genlight import io
from genlight.callbacks.timing import print_line
from genlight.errors import USAGE_ERROR, UserError
from genlight.reports.cost import seconds_said
from genlight.run_folder import RUN_FILE

# what a launcher of several processes tells each of them; SLURM's variables all begin alike
SLURM = "SLURM_"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID")
# a file beside the copies of a dry run
_COPY = "copy-of-a-dry-run"
# a fit that leaves all that whole ones do
_FEW_STEPS = (
    "trainer.max_steps=20",
    "trainer.val_check_interval=20",
    "trainer.limit_val_batches=1",
    "trainer.num_sanity_val_steps=0",
)


@dataclass(frozen=True)
class Training:
    """A fit that a run would begin with.

    Attributes:
        name: of its run.
        seconds: in all, at least and at most, as its own dry run says.
        spent: seconds that it took to know that, and to make something to measure on.
    """

    name: str
    seconds: tuple[float, float, float]
    spent: float


class NotThere(UserError):
    """A dry run needs what a fit would make."""


class RefusedCommand(UserError):
    """A command was wrong, or its run folder is of another config: it did nothing."""


_trainings: ContextVar[list[Training] | None] = ContextVar("trainings", default=None)


@contextmanager
def fits_nothing() -> Iterator[list[Training]]:
    """Within it a missing fit raises NotThere, or in a copy is added to the list that this gives."""
    found: list[Training] = []
    token = _trainings.set(found)
    try:
        yield found
    finally:
        _trainings.reset(token)


def fit_where_missing(
    recipe: str, is_there: Callable[[], bool], what: str, folder: str | Path, *words: str, replace: bool = False
) -> None:
    """Fit the experiment `recipe`, in a process of its own, unless `is_there`; other processes wait for it.

    A fit that was interrupted goes on from its checkpoint.

    Args:
        what: is missing, for the person who watches.
        folder: of the runs, where the lock lies on which others wait.
        words: overrides of the command, which leave its run in `folder`.
        replace: begin anew where the run that is there is of another config.

    Raises:
        UserError: the fit failed, or `folder` has a run of another config.
        NotThere: in a dry run, outside of its copies.
    """
    from filelock import FileLock

    if is_there():
        return
    if any((place / _COPY).is_file() for place in Path(folder).absolute().parents):
        _rehearse(recipe, what, words)
        return
    if _trainings.get() is not None:
        raise NotThere(f"{what} is not there, and a dry run fits nothing: make it first, by fit experiment={recipe}")
    io.create_folder(Path(folder))
    with FileLock(Path(folder) / f".{recipe.replace('/', '-')}.lock"):
        if is_there():
            return
        print_line(f"{what} is not there yet: fit experiment={recipe}")
        command = ("fit", f"experiment={recipe}", *words)
        run = Path(folder) / _name_of(recipe, words) / "fit"
        if not (run / RUN_FILE).is_file():
            run_command(*command)
            return
        try:
            run_command(*command, "resume=true")
        except UserError as error:
            if not (replace and isinstance(error, RefusedCommand)):
                raise UserError(
                    f"{what} is not there, and the fit in {run} did not go on as this one, see above: where it cannot, "
                    "end it by its own command, or remove the folder"
                ) from error
            print_line(f"{run} is begun anew")
            run_command(*command, "run.overwrite=true")


def _name_of(recipe: str, words: Sequence[str]) -> str:
    """Of the run of a command."""
    return next((word.removeprefix("run.name=") for word in words if word.startswith("run.name=")), recipe)


def _rehearse(recipe: str, what: str, words: Sequence[str]) -> None:
    """Ask a fit what it costs, and do a few steps of it."""
    begun = time.monotonic()
    print_line(f"{what} is not there yet: a few steps of fit experiment={recipe} stand for it")
    said = seconds_said(run_command("fit", f"experiment={recipe}", *words, "dry_run=true", show=False))
    if said is None:
        raise UserError(f"the dry run of fit experiment={recipe} gave no estimate")
    run_command("fit", f"experiment={recipe}", "run.overwrite=true", *words, *_FEW_STEPS, show=False)
    if (found := _trainings.get()) is not None:
        found.append(Training(_name_of(recipe, words), said, time.monotonic() - begun))


def in_copy(config: Any, folder: Path) -> Any:
    """The same config with `run.root` and `paths.cache` copied below `folder`, by links: what is written there leaves
    the folders of the user as they are. Paths that are typed out below `run.root` follow it.
    """
    from omegaconf import OmegaConf

    runs, cache = folder / "runs", folder / "cache"
    io.create_folder(folder)
    io.atomic_write_text(folder / _COPY, "")
    _link(Path(config.run.root), runs)
    _link(Path(config.paths.cache), cache)
    typed = re.compile(rf"(?<![\w./-]){re.escape(str(config.run.root).rstrip('/'))}/")

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [moved(inner) for inner in value]
        return typed.sub(lambda _: f"{runs}/", value) if isinstance(value, str) else value

    made = OmegaConf.create(moved(OmegaConf.to_container(config, resolve=False)))
    for key, path in (("run.root", runs), ("run.dir", config.run.dir), ("paths.cache", cache)):
        OmegaConf.update(made, key, str(path))
    return made


def _link(folder: Path, copy: Path) -> None:
    """Make `copy` of folders like those in `folder`, down to those of runs, and of links to all that lies in them.

    A run in the copy is replaced link by link, so that its files stay. Hidden files, such as locks, are left out.
    """
    io.create_folder(copy)
    for place, folders, files in os.walk(folder.absolute()):
        here, inside = io.create_folder(copy / Path(place).relative_to(folder.absolute())), Path(place)
        whole = [name for name in folders if RUN_FILE in files or (inside / name).is_symlink()]
        for name in (*files, *whole):
            if not name.startswith("."):
                (here / name).symlink_to(inside / name)
        folders[:] = [
            name for name in folders if name not in whole and not name.startswith(".") and inside / name != copy.parent
        ]


def fit_below_where_missing(recipe: str, source: str | Path, key: str, run_root: str | Path, cache: str | Path) -> None:
    """Fit the experiment `recipe` below `run_root` where `source`, the folder of its run or one in it, is missing.

    Args:
        source: <run_root>/<recipe>/fit, or a folder below.
        key: of the config that names it, for messages.
        run_root: folder of all runs.
        cache: of features and data.

    Raises:
        UserError: `source` is missing and not what the fit makes, the fit failed, or it left no such folder.
    """
    made = Path(run_root) / recipe / "fit" / "artifact"
    is_to_come = Path(source).absolute().is_relative_to(made.parent.absolute()) and not made.exists()
    if not Path(source).exists() and not is_to_come:
        raise UserError(
            f"{key} = {source} is not there, and is not what fit experiment={recipe} makes, which is {made}"
        )
    words = (f"run.root={run_root}", f"paths.cache={cache}")
    fit_where_missing(recipe, Path(source).exists, f"{key} = {source}", run_root, *words)
    if not Path(source).exists():
        raise UserError(f"fit experiment={recipe} has not written {key} = {source}")


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
        RefusedCommand: it did not begin.
        UserError: it failed.
    """
    alone = {key: value for key, value in os.environ.items() if not (key in LAUNCHED or key.startswith(SLURM))}
    done = subprocess.run(
        [sys.executable, "-m", "genlight", command, *words],
        check=False,
        env=alone if show else {**alone, "COLUMNS": "200"},
        stdout=None if show else subprocess.PIPE,
        text=True,
    )
    check_ended(done.returncode, command, words[0])
    return done.stdout or ""


def check_ended(code: int, command: str, word: str) -> None:
    """RefusedCommand or UserError for the exit code of a command that did not do its work."""
    if code != 0:
        kind = RefusedCommand if code == USAGE_ERROR else UserError
        raise kind(f"{command} {word} failed (exit code {code}), see above")
