"""Methods one after another on one model: each stage is a run of its own, and reads the artifact of the one before."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from genlight import io
from genlight.callbacks.begun import has_begun
from genlight.callbacks.progress import display_of
from genlight.callbacks.timing import print_line
from genlight.errors import UserError
from genlight.loops.cost import first_validation
from genlight.loops.evaluation import CandidateTrainer, check_logged, checked_mode, direction
from genlight.loops.result import MethodResult
from genlight.loops.stack_report import measured_row, stack_result
from genlight.modules.artifact_kind import schedule_files
from genlight.modules.scheduled_zoo import read_scheduled_zoo
from genlight.quantization.accounting import tensor_bytes
from genlight.recipes import fit_run_where_missing, run_command
from genlight.reports.cost import CostEstimate, Phase, PlannedFile, estimate, seconds_said
from genlight.reports.report import read_report
from genlight.run_folder import RUN_FILE, read_run

PLAIN = "plain"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_SOURCE = re.compile(r"<([\w.-]+)>")
_TIMES = ("total_seconds", "low_seconds", "high_seconds")


class Stack:
    """The method `stack`: stages in order, then the plain model and what each stage made of it in one table.

    A stage is `validate experiment=<experiment> module.pretrained=<artifact of the stage before> <its words>`, in the
    folder `stages/<name>/validate` of the run. One that has finished is not done again; one that was stopped goes on.

    A stage of OMS takes turns between networks of others: its words have ``module.members={a: <lcsc>, b: <w8a8>}`` in
    place of the artifact before. What it leaves are members and schedules, so it must be the last.

    Args:
        stages: by name, the words of each stage's command, in order. ``<name>`` in a word is the artifact of that
            stage, ``<plain>`` the model to begin with.
        ckpt_path: of the command: the run folder, or the diffusers folder, of the model to begin with.
        experiment: what the stages stand on: data, metrics, and a module that reads ``module.pretrained``.
        reader: called with ``pretrained``, an artifact, gives the module that is measured.
        recipe: the experiment whose fit makes ckpt_path where it is missing. None: it must be there.
        shared: words that all stages get, and the fit of the recipe.
        objective: name of a metric that validate logs, such as "val/fd_digits": what a loss is counted in.
        mode: "min", "max", or "auto": as the metric says which way it is better.

    Raises:
        ValueError: no stage, a name that is none for a folder, words that are not a list or name a stage that does not
            come before, or members before the last stage.
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
        mode: Literal["auto", "min", "max"] = "auto",
    ) -> None:
        if not stages:
            raise ValueError("method.stages is empty: name the methods that are to follow each other")
        for number, (name, words) in enumerate(stages.items()):
            if name == PLAIN or not _NAME.fullmatch(name):
                raise ValueError(f"method.stages: {name!r} must be a name for a folder, and not {PLAIN}")
            if isinstance(words, str) or not all(isinstance(word, str) and "=" in word for word in words):
                raise ValueError(f"method.stages.{name} = {words!r} must be a list of words key=value of a command")
            known = (PLAIN, *list(stages)[:number])
            if unknown := [source for word in words for source in _SOURCE.findall(word) if source not in known]:
                raise ValueError(
                    f"method.stages.{name}: <{unknown[0]}> must be one of {', '.join(known)}, which come before"
                )
            if _has_members(words) and number < len(stages) - 1:
                raise ValueError(
                    f"method.stages.{name} leaves members and schedules, which no stage reads: it must be the last"
                )
        self.stages = {name: tuple(words) for name, words in stages.items()}
        self.experiment, self.objective, self.mode = experiment, objective, checked_mode(mode)
        self.reader, self.ckpt_path, self.recipe, self.shared = reader, ckpt_path, recipe, tuple(shared)
        self._run_root: str | Path = "runs"

    def prepare(self, run_root: str | Path, cache: str | Path) -> None:
        """Fit the model to begin with where it is missing and there is a recipe.

        Args:
            run_root: folder of all runs.
            cache: of features and data.

        Raises:
            UserError: ckpt_path is not the folder of a fit, or the fit failed.
        """
        self._run_root = run_root
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
        self.mode = direction(self.mode, self.objective, module.metrics)
        artifacts = dict[str, Path]()
        has_begun(trainer)
        display_of(trainer).close()  # each stage shows its own progress
        for name in self.stages:
            artifacts[name] = self._stage(name, {PLAIN: start, **artifacts}, folder)
        evaluations, metrics = CandidateTrainer(trainer), module.metrics
        rows = [measured_row(PLAIN, evaluations, module, datamodule)]
        images = {PLAIN: module.grid_images}
        for name, artifact in evaluations.display.counted(artifacts.items(), "artifacts"):
            for row, made in self._made(name, artifact).items():
                made.metrics = metrics
                made.check_data(datamodule)
                rows.append(measured_row(row, evaluations, made, datamodule))
                images[row] = made.grid_images
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
        found, sources = dict[str, tuple[float, ...]](), dict.fromkeys((PLAIN, *self.stages), self._start())
        for name in self.stages:
            # what a stage would fit is looked for in the folder of all runs
            words = (*self._words(name, sources), f"run.root={self._run_root}", "dry_run=true")
            text = run_command("validate", *words, show=False)
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

    def _words(self, name: str, sources: Mapping[str, Path]) -> tuple[str, ...]:
        """The command of a stage that reads the last of `sources`, or its members among them."""
        words = [_SOURCE.sub(lambda found: str(sources[found[1]]), word) for word in self.stages[name]]
        read = () if _has_members(words) else (f"module.pretrained={list(sources.values())[-1]}",)
        return (f"experiment={self.experiment}", *read, f"run.name={name}", *self.shared, *words)

    def _made(self, name: str, artifact: Path) -> dict[str, Any]:
        """What a stage made, to be measured: by name of the row, its folder, or its zoo by each model schedule."""
        files = schedule_files(artifact)
        if not files:
            return {name: self.reader(pretrained=str(artifact))}
        rows = [name] if len(files) == 1 else [f"{name}, {file.stem.rsplit('_', 1)[-1]} calls" for file in files]
        return {row: read_scheduled_zoo(file) for row, file in zip(rows, files, strict=True)}

    def _stage(self, name: str, sources: Mapping[str, Path], folder: Path) -> Path:
        """The artifact of a stage; done unless it has finished."""
        run = folder / name / "validate"
        finished = (run / RUN_FILE).is_file() and read_run(run)["status"] == "finished"
        if not finished:
            print_line(f"stage {name}: {' '.join(self.stages[name])}")
            io.create_folder(folder)
            run_command("validate", *self._words(name, sources), f"run.root={folder}", "resume=true")
        if not (run / "artifact").is_dir():
            raise UserError(f"method.stages.{name} leaves no artifact: its words name a method that only measures")
        return run / "artifact"


def _has_members(words: Sequence[str]) -> bool:
    return any(word.startswith("module.members=") for word in words)


def _total(seconds: Mapping[str, tuple[float, ...]], module: Any, folder: Path) -> CostEstimate:
    """The sum of what stages cost: of each its total, low and high seconds."""
    phases = [Phase(f"stage {name}", parts[:1], 1) for name, parts in seconds.items()]
    files = [PlannedFile("artifact", tensor_bytes(module), len(seconds) + 1)]
    low, high = (sum(parts[i] for parts in seconds.values()) for i in (1, 2))
    return replace(estimate(phases, files, folder), low_seconds=low, high_seconds=high)
