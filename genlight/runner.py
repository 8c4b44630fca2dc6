"""One run: build what the config names, see that it fits together, train or measure, report."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from genlight import io
from genlight.config_check import resolved
from genlight.context import Run
from genlight.errors import FAILURE, USAGE_ERROR, UserError
from genlight.leaving import leaving_on_signals
from genlight.reports.environment import environment, git_diff
from genlight.run_folder import ERROR_FILE, OtherConfigError, RunFolder, config_differences, process_rank, run_path

# what a resumed run may change
FREE_KEYS = (
    "resume",
    "dry_run",
    "traceback",
    "run",
    "paths",
    "logger",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.enable_model_summary",
    "search.budget",
    "search.seconds",
    "search.shared",
    "method.search.budget",
    "method.search.seconds",
    "method.search.shared",
    "method.drop_failing",
    # the measurements of layers know nothing of the budget
    "method.mixed.objective",
    "method.mixed.average_bits",
    "method.mixed.average_activation_bits",
    "method.mixed.megabytes",
    "method.mixed.bit_operations",
    "method.mixed.milliseconds",
    "method.mixed.ratios",
    "callbacks.progress",
    # scores do not depend on these, and checkpoints that do say so themselves
    "strategy",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "data.num_workers",
)
# what depends on it has it in its own fingerprint; inside a fit it decides what is validated
FREE_TO_MEASURE = ("data.eval_batch_size",)
_COUNTED = ("devices", "num_nodes")
_LESS_MEMORY = {
    "fit": "a new run with a lower data.batch_size (and a higher trainer.accumulate_grad_batches) takes less",
    "validate": "the same command with resume=true and a lower data.eval_batch_size goes on",
}


def run(config: Any, choices: dict[str, Any], overrides: list[str]) -> int:
    """Carry out one accepted config; returns the exit code. Faults are told in one line, details go to a file."""
    with ExitStack() as scratch, leaving_on_signals():
        return _run(config, choices, overrides, scratch)


def _run(config: Any, choices: dict[str, Any], overrides: list[str], scratch: ExitStack) -> int:
    from omegaconf import OmegaConf

    started = time.monotonic()
    trace = bool(config.traceback)
    folder: RunFolder | None = None
    state, code = "failed", FAILURE
    try:
        if config.command == "inspect":
            config.dry_run = True  # as that, it leaves nothing behind
        if config.dry_run:
            place = scratch.enter_context(tempfile.TemporaryDirectory(prefix="genlight-"))
            OmegaConf.update(config, "run.dir", place)
        plain = resolved(config)
        run_path(config.run.root, config.run.name)  # refuses a name that leads out of the root
        words = ["python", "-m", "genlight", config.command]
        words += [o for o in overrides if not o.startswith("command=")]
        experiment, path = str(choices.get("experiment")), Path(plain["run"]["dir"])
        this = Run(config, plain, recorded(config, plain), config.command, words, experiment, path, started)
        if process_rank() == 0:
            folder = _open_folder(this)
            this.fingerprint, this.begin = folder.fingerprint, folder.begin
            _remark_on_processes(this, folder)
            surroundings = environment(words)
            io.atomic_write_json(folder.path / "environment.json", surroundings)
            if surroundings["git_dirty"] and (changes := git_diff()):
                io.atomic_write_text(folder.path / "source.diff", changes)
        _carry_out(this)
        state, code = "finished", 0
    except SystemExit as stop:
        state, code = "interrupted", int(stop.code or 0)
        if folder is not None and not (config.dry_run or folder.replaces):
            sys.stderr.write("stopped: the same command with resume=true goes on from what is saved\n")
    except KeyboardInterrupt:
        state, code = "interrupted", 128 + signal.SIGINT
    except Exception as error:
        if trace:
            raise
        _tell(error, folder, config.command)
        code = USAGE_ERROR if isinstance(error, OtherConfigError) else FAILURE
    finally:
        if folder is not None and not _closed(folder, state):
            code = code or FAILURE
    return code


def _closed(folder: RunFolder, state: str) -> bool:
    """Record how the run ended; a full or broken disk may not take it, which is told in one line."""
    comes_back = folder.replaces and state != "finished"
    try:
        folder.close(state)
        if comes_back:
            sys.stderr.write(f"{folder.path} is as it was: nothing was replaced\n")
    except (UserError, OSError) as error:
        # what lies aside comes back when the folder is opened again
        sys.stderr.write(f"error: {folder.path} stays marked as running: {_in_one_line(error)}\n")
        return False
    return True


def _open_folder(this: Run) -> RunFolder:
    run_keys = this.plain["run"]
    return RunFolder.open(
        this.folder,
        command=this.words,
        config=this.recorded,
        resume=this.plain["resume"],
        overwrite=run_keys["overwrite"],
        ignore_keys=free_keys(this.command),
    )


def free_keys(command: str) -> tuple[str, ...]:
    """What a resumed run of a command may change."""
    return (*FREE_KEYS, *(FREE_TO_MEASURE if command == "validate" else ()))


def _remark_on_processes(this: Run, folder: RunFolder) -> None:
    """Say that a fit goes on with another global batch."""
    if this.command != "fit" or folder.earlier is None:
        return
    before, now = ({key: config["trainer"].get(key) for key in _COUNTED} for config in (folder.earlier, this.recorded))
    if changed := config_differences({"trainer": before}, {"trainer": now}):
        remark = (
            f"the training goes on with another number of processes ({'; '.join(changed)}), and so with another global "
            "batch, which is data.batch_size times their number times trainer.accumulate_grad_batches"
        )
        this.notes.append(remark)
        sys.stderr.write(f"warning: {remark}\n")


def recorded(config: Any, plain: dict[str, Any]) -> dict[str, Any]:
    """The config as it is written: secrets masked; what comes from the environment, or is a place below the run folder,
    left as a reference, so that a folder can be moved."""
    from omegaconf import OmegaConf

    from genlight.secrets import masked

    return masked(_keep_references(plain, OmegaConf.to_container(config, resolve=False)))  # type: ignore[no-any-return]


def _keep_references(resolved: Any, raw: Any) -> Any:
    if isinstance(resolved, dict) and isinstance(raw, dict):
        return {key: _keep_references(value, raw.get(key)) for key, value in resolved.items()}
    return raw if isinstance(raw, str) and ("${oc.env:" in raw or "${run.dir}" in raw) else resolved


def _tell(error: Exception, folder: RunFolder | None, command: str) -> None:
    """One line for the person; the traceback of what was not foreseen goes to a file."""
    text = _in_one_line(error)
    foreseen = isinstance(error, UserError) or _is_misconfigured(error)
    if type(error).__name__ == "OutOfMemoryError":
        way_out = _LESS_MEMORY.get(command, "a smaller model takes less")
        if folder is not None and folder.replaces:
            way_out = way_out.replace("resume=true and ", "")
        text, foreseen = f"out of memory on the device: {text}; {way_out}", True
    if not foreseen:
        text = f"{type(error).__name__}: {text}"
        if folder is not None:
            with suppress(UserError, OSError):  # the disk may be what failed
                io.atomic_write_text(folder.path / ERROR_FILE, traceback.format_exc())
                text += f" (details in {folder.path / ERROR_FILE}; traceback=true shows them)"
    rank = process_rank()
    sys.stderr.write(f"error: {f'[process {rank}] ' if rank else ''}{text}\n")


def _is_misconfigured(error: Exception) -> bool:
    """Whether Lightning refuses what it was told; a run that ends before it is imported does not import it for this."""
    raises = sys.modules.get("lightning.fabric.utilities.exceptions")
    return raises is not None and isinstance(error, raises.MisconfigurationException)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _carry_out(this: Run) -> None:
    from genlight.build import check_targets

    _quiet()
    check_targets(this.plain, this.plain["targets"]["allow"])
    if this.command == "inspect":
        from genlight.inspection import inspect_model

        return inspect_model(this)
    from genlight.session import Session

    if this.plain["dry_run"]:
        _dry_run(this)
    elif this.command == "fit":
        Session(this).fit()
    else:
        Session(this).validate()


def _dry_run(this: Run) -> None:
    """What the run will cost; where it needs what a fit would make, once more on copies of its folders."""
    from genlight.recipes import NotThere, fits_nothing, in_copy
    from genlight.session import Session

    with fits_nothing() as trainings:
        with suppress(NotThere):
            Session(this).dry_run(trainings)
            return
        config = in_copy(this.config, this.folder / "copy")
        root, now = str(this.plain["run"]["root"]), time.monotonic()
        copied = replace(this, config=config, plain=resolved(config), started=now, notes=[], room=root)
        Session(copied).dry_run(trainings)


def _quiet() -> None:
    """Keep what Lightning says at every start off the screen; warnings about the run itself stay."""
    import logging
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*WeightAveraging callback with a model that overrides the configure_model.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory.*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", text)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
