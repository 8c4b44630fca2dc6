"""Methods one after another on one model: each stage is a run of its own, and reads the artifact of the one before."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from genlight import io
from genlight.callbacks.timing import print_line
from genlight.errors import UserError
from genlight.loops.cost import first_validation
from genlight.loops.evaluation import CandidateTrainer, check_logged
from genlight.loops.result import MethodResult
from genlight.loops.stack_report import measured_row, stack_result
from genlight.quantization.accounting import tensor_bytes
from genlight.recipes import fit_run_where_missing, run_command
from genlight.reports.cost import CostEstimate, Phase, PlannedFile, estimate, seconds_said
from genlight.reports.report import read_report
from genlight.run_folder import RUN_FILE, read_run

PLAIN = "plain"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_TIMES = ("total_seconds", "low_seconds", "high_seconds")


class Stack:
    """The method `stack`: stages in order, then the plain model and what each stage made of it in one table.

    A stage is `validate experiment=<experiment> module.pretrained=<artifact of the stage before> <its words>`, in the
    folder `stages/<name>/validate` of the run. One that has finished is not done again; one that was stopped goes on.

    Args:
        stages: by name, the words of each stage's command, in order.
        ckpt_path: of the command: the run folder, or the diffusers folder, of the model to begin with.
        experiment: what the stages stand on: data, metrics, and a module that reads ``module.pretrained``.
        reader: called with ``pretrained``, an artifact, gives the module that is measured.
        recipe: the experiment whose fit makes ckpt_path where it is missing. None: it must be there.
        shared: words that all stages get, and the fit of the recipe.
        objective: name of a metric that validate logs, such as "val/fd_digits": what a loss is counted in.
        mode: "min", or "max" for a metric where more is better.

    Raises:
        ValueError: no stage, a name that is none for a folder, or words that are not a list.
    """

    predicts_cost = True

    def __init__(
        self,
        stages: Mapping[str, Any],
        experiment: str,
        objective: str,
        reader: Callable[..., Any],
        ckpt_path: str | None = None,
        recipe: str | None = None,
        shared: Sequence[str] = (),
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if not stages:
            raise ValueError("method.stages is empty: name the methods that are to follow each other")
        for name, words in stages.items():
            if name == PLAIN or not _NAME.fullmatch(name):
                raise ValueError(f"method.stages: {name!r} must be a name for a folder, and not {PLAIN}")
            if isinstance(words, str) or not all(isinstance(word, str) and "=" in word for word in words):
                raise ValueError(f"method.stages.{name} = {words!r} must be a list of words key=value of a command")
        if mode not in ("min", "max"):
            raise ValueError(f"method.mode = {mode!r} must be min or max")
        self.stages = {name: tuple(words) for name, words in stages.items()}
        self.experiment, self.objective, self.mode = experiment, objective, mode
        self.reader, self.ckpt_path, self.recipe, self.shared = reader, ckpt_path, recipe, tuple(shared)

    def prepare(self, run_root: str | Path, cache: str | Path) -> None:
        """Fit the model to begin with where it is missing and there is a recipe.

        Raises:
            UserError: ckpt_path is not the folder of a fit, or the fit failed.
        """
        if self.ckpt_path is not None and self.recipe is not None and not Path(self.ckpt_path).exists():
            fit_run_where_missing(self.recipe, self.ckpt_path, "ckpt_path", cache, self.shared)

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Do the stages, then measure every artifact on the report draw.

        Raises:
            UserError: no model to begin with, several processes, a metric that is not logged, or a stage that failed.
        """
        self._check(trainer)
        start, folder = self._start(), Path(trainer.default_root_dir) / "stages"
        logged = first_validation(trainer, module, datamodule).logged
        check_logged(self.objective, logged)
        artifacts, source = dict[str, Path](), start
        for name in self.stages:
            source = artifacts[name] = self._stage(name, source, folder)
        evaluations, metrics = CandidateTrainer(trainer), module.metrics
        rows = [measured_row(PLAIN, evaluations, module, datamodule)]
        images = {PLAIN: module.grid_images}
        for name, artifact in artifacts.items():
            made = self.reader(pretrained=str(artifact))
            made.metrics = metrics
            made.check_data(datamodule)
            rows.append(measured_row(name, evaluations, made, datamodule))
            images[name] = made.grid_images
        said: dict[str, Any] = {
            name: read_report(path.parent / "report.json").predicted for name, path in artifacts.items()
        }
        times = {name: tuple(float(of[key]) for key in _TIMES) for name, of in said.items() if of is not None}
        predicted = _total(times, module, folder) if len(times) == len(artifacts) else None
        return stack_result(self, folder.parent, rows, images, artifacts, predicted)

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """The dry run of each stage, all on the model to begin with, and their sum."""
        self._check(trainer)
        first_validation(trainer, module, datamodule, dry=True)
        start, found = self._start(), dict[str, tuple[float, ...]]()
        for name in self.stages:
            text = run_command("validate", *self._words(name, start), "dry_run=true", show=False)
            print_line(f"stage {name}\n{text}")
            if (said := seconds_said(text)) is None:
                raise UserError(f"the dry run of method.stages.{name} gave no estimate: {text.strip()[-200:]}")
            found[name] = said
        return _total(found, module, Path(trainer.default_root_dir))

    def _check(self, trainer: Any) -> None:
        if trainer.world_size > 1:
            raise UserError(
                "method=stack starts each stage as a command of its own: use strategy=auto and trainer.devices=1, and "
                "give strategy and devices to stages by method.shared"
            )

    def _start(self) -> Path:
        """The folder of the model to begin with."""
        if self.ckpt_path is None:
            raise UserError("method=stack begins with a model: give ckpt_path=<folder of a fit, or of diffusers>")
        folder = Path(self.ckpt_path)
        if (folder / RUN_FILE).is_file():
            folder = folder / "artifact"
        if not folder.is_dir():
            raise UserError(f"ckpt_path={self.ckpt_path} is a run without an artifact: its fit has not finished")
        return folder

    def _words(self, name: str, source: Path) -> tuple[str, ...]:
        own = (f"experiment={self.experiment}", f"module.pretrained={source}", f"run.name={name}")
        return (*own, *self.shared, *self.stages[name])

    def _stage(self, name: str, source: Path, folder: Path) -> Path:
        """The artifact of a stage that reads `source`; done unless it has finished."""
        run = folder / name / "validate"
        finished = (run / RUN_FILE).is_file() and read_run(run)["status"] == "finished"
        if not finished:
            print_line(f"stage {name}: {' '.join(self.stages[name])}")
            io.create_folder(folder)
            run_command("validate", *self._words(name, source), f"run.root={folder}", "resume=true")
        if not (run / "artifact").is_dir():
            raise UserError(f"method.stages.{name} leaves no artifact: its words name a method that only measures")
        return run / "artifact"


def _total(seconds: Mapping[str, tuple[float, ...]], module: Any, folder: Path) -> CostEstimate:
    """The sum of what stages cost: of each its total, low and high seconds."""
    phases = [Phase(f"stage {name}", parts[:1], 1) for name, parts in seconds.items()]
    files = [PlannedFile("artifact", tensor_bytes(module), len(seconds) + 1)]
    low, high = (sum(parts[i] for parts in seconds.values()) for i in (1, 2))
    return replace(estimate(phases, files, folder), low_seconds=low, high_seconds=high)
