"""The objects of one run and what is done with them: fit, validate, dry run."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from genlight import io
from genlight.build import build
from genlight.callbacks.begun import Begun
from genlight.callbacks.exact_resume import last_metrics
from genlight.callbacks.progress import display_of
from genlight.callbacks.timing import MEASURED, WARM_UP, StepTimer, print_line
from genlight.context import Run
from genlight.errors import UserError
from genlight.leaving import let_requeue
from genlight.loops.result import MethodResult
from genlight.modules.combined import other_sampler
from genlight.recipes import Training, fit_where_missing
from genlight.reports.cost import after_trainings, free_bytes, longer, network_macs, real_cost
from genlight.reports.environment import environment
from genlight.reports.figures import curves
from genlight.reports.finishing import finishing
from genlight.reports.handing_over import ARTIFACT, print_result, track
from genlight.reports.metrics_csv import merge_metrics
from genlight.reports.not_finite import finite, finite_row, not_finite
from genlight.reports.origin import weights_record
from genlight.reports.progress import IN_ALL
from genlight.reports.report import FeaturesRecord, Report, parse_report, write_report
from genlight.run_folder import process_rank
from genlight.trainer.checkpoint_io import AtomicCheckpointIO, load_checkpoint, newest_whole_checkpoint
from genlight.trainer.consolidate import consolidated_state_dict
from genlight.trainer.resident import is_sharded
from genlight.trainer.sharded_folder import TRAINER_FILE, is_sharded_checkpoint
from genlight.trainer.strategies import check_callbacks

CHECKPOINTS = "checkpoints"
_PICTURES = 2


class Session:
    """Builds trainer, module, data and metrics of a run, cheapest check first, and carries the run out."""

    def __init__(self, this: Run) -> None:
        self.run = this
        config = this.config
        seed_everything(config.seed, workers=True, verbose=False)
        self.room = this.room or this.plain["run"]["root"]
        self.timer = StepTimer(this.started, stop=bool(config.dry_run), folder=self.room)
        self.begun = Begun(this.begin)
        self.trainer = self._build_trainer()
        self.datamodule: Any = build(config.data, "data")
        self.module: Any = build(config.module, "module")
        self.metrics = build(config.metrics, "metrics") if config.metrics and "_target_" in config.metrics else None
        self.floor: Any = None

    def fit(self) -> None:
        """Train, then write the artifact and the report."""
        self._prepare_module()
        self._prepare_data("select")
        checkpoint = self._resume_from() if self.run.plain["resume"] else None
        self.trainer.fit(self.module, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True)
        metrics = last_metrics(self.trainer)
        if self.trainer.is_global_zero:
            report = self._report(metrics, "select", num_samples=0)
            self._save_artifact(report, "training", self._whole_module().save_pretrained)
            self._finish(report)

    def validate(self) -> None:
        """Load the weights to be measured, and let the method do its work."""
        method = self._build_method()
        self._prepare_measurement()
        self.timer.quiet = self.begun.says_itself = getattr(method, "predicts_cost", False)
        with display_of(self.trainer).phase(IN_ALL):
            result = method.run(self.trainer, self.module, self.datamodule)
        whole = self._whole_module() if result.save is not None else None  # on all processes: they may hold a part each
        if self.trainer.is_global_zero:
            measured = getattr(self.metrics, "num_samples", 0) or getattr(self.datamodule, "num_samples", 0)
            self.run.notes.extend(result.notes)
            report = self._report(
                dict(result.metrics), str(self.datamodule.draw), result.num_samples or measured, result
            )
            if result.save is not None:
                self._save_artifact(report, result.method, lambda folder: result.save(folder, whole), result.parts)
            self._finish(report)
            if report.not_finite and not report.metrics:
                raise UserError(f"no metric of this model is a number: see {self.run.folder / 'report.md'}")

    def dry_run(self, trainings: Sequence[Training]) -> None:
        """A few steps, and what the whole run will cost, with the fits that were found missing on the way.

        Args:
            trainings: where `genlight.recipes` notes them.
        """
        estimate = None
        self.datamodule.dry_run = True
        if self.run.command == "fit":
            if 0 <= self.trainer.max_steps < WARM_UP + MEASURED:
                raise UserError(
                    f"trainer.max_steps={self.trainer.max_steps} is too short to be estimated: a dry run takes "
                    f"{WARM_UP + MEASURED} steps"
                )
            self._prepare_module()
            self._prepare_data("select")
            self._leave_out(trainings)
            self.trainer.fit(self.module, datamodule=self.datamodule)
            estimate = self.timer.estimate
            if estimate is not None:  # with what is left of the data, curves and samples
                estimate = longer(estimate, (*getattr(self.datamodule, "left", ()), finishing(_PICTURES)), self.room)
        else:
            method = self._build_method()
            self._prepare_measurement()
            self._leave_out(trainings)
            self.timer.quiet = True
            with display_of(self.trainer).phase(IN_ALL):
                estimate = method.dry_run(self.trainer, self.module, self.datamodule)
        if estimate is None:
            raise UserError("the run is too short to be estimated: it has fewer than five steps")
        if self.trainer.is_global_zero:
            from rich.console import Console

            estimate = after_trainings(estimate, {training.name: training.seconds for training in trainings})
            extra = {**estimate.extra, **network_macs(self.module)}
            free = free_bytes(self.room)  # the dry run itself lies elsewhere
            Console().print(replace(estimate, extra=extra, disk_free_bytes=free).table())

    def _leave_out(self, trainings: Sequence[Training]) -> None:
        """What it took to ask fits for their cost is no part of the run's own time of setting up."""
        self.timer.started += sum(training.spent for training in trainings)

    def _build_trainer(self) -> Trainer:
        config = self.run.config
        if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise UserError(
                f"trainer.accelerator={config.trainer.accelerator}: torch sees no GPU here; use cpu or auto"
            )
        strategy = build(config.strategy, "strategy")
        callbacks = [build(node, f"callbacks.{name}") for name, node in (config.callbacks or {}).items() if node]
        saving = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
        self.timer.kept_checkpoints = sum(max(c.save_top_k, 1) for c in saving)
        if config.dry_run:
            callbacks = [c for c in callbacks if c not in saving]
        check_callbacks(strategy, callbacks, str(config.trainer.precision))
        loggers = [] if config.dry_run else self._build_loggers()
        # a single process opens the folder; its children and torchrun's other processes write nothing of their own
        trainer: Trainer = build(
            config.trainer,
            "trainer",
            strategy=strategy,
            callbacks=[*callbacks, self.timer, self.begun],
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=str(self.run.folder),
            enable_checkpointing=not config.dry_run,
            enable_progress_bar=any(type(c).__name__ == "StepProgress" for c in callbacks),
        )
        if self.run.command == "fit" and is_sharded(trainer) and not (saving or config.dry_run):
            raise UserError("callbacks.checkpoint is left out, but of weights in shards a checkpoint is the result")
        let_requeue(trainer)
        return trainer

    def _build_loggers(self) -> list[Any]:
        loggers = []
        for name, node in (self.run.config.logger or {}).items():
            if node:
                extra = {"id": self._tracking_id()} if "id" in node and node.id is None else {}
                loggers.append(build(node, f"logger.{name}", **extra))
        for logger in loggers:
            logger.log_hyperparams(self.run.recorded)
        return loggers

    def _tracking_id(self) -> str:
        """The same for every part of an interrupted run, so that a tracker shows them as one."""
        file = self.run.folder / "tracking.json"
        if not file.is_file():
            if process_rank() != 0:
                return ""
            io.atomic_write_json(file, {"kind": "tracking", "version": 1, "id": uuid.uuid4().hex[:10]})
        return str(io.read_json(file)["id"])

    def _build_method(self) -> Any:
        """The method, and whatever it needs before weights are read, such as a model that is trained where missing."""
        method = build(self.run.config.method, "method")
        if hasattr(method, "prepare"):
            method.prepare(self.run.plain["run"]["root"], self.run.plain["paths"]["cache"])
        return method

    def _prepare_measurement(self) -> None:
        """Weights, evaluation noise and the real side of the metrics."""
        draw = str(getattr(self.datamodule, "draw", "report"))
        if draw == "search":
            raise UserError("data.draw=search: that noise chooses candidates and cannot judge them; use report")
        self._prepare_module()
        self._load_weights(self.module)
        self._prepare_data(draw)
        self._prepare_metrics()
        given = self.run.plain["module"].get("pretrained") or self.run.plain["ckpt_path"]
        if remark := other_sampler(given, self.module):
            self.run.notes.append(remark)
            print_line(f"warning: {remark}")
        # the setting is for validations inside a fit; a measurement takes everything
        self.trainer.limit_val_batches = 1.0

    def _prepare_module(self) -> None:
        """Whatever the module needs first, such as a teacher that is trained where it is missing."""
        if hasattr(self.module, "prepare"):
            self.module.prepare(self.run.plain["run"]["root"], self.run.plain["paths"]["cache"])

    def _prepare_data(self, draw: str) -> None:
        if hasattr(self.module, "check_data"):
            self.module.check_data(self.datamodule)
        if hasattr(self.module, "sample_shape"):
            self.datamodule.noise_shape = tuple(self.module.sample_shape)
        self.datamodule.draw = draw

    def _prepare_metrics(self) -> None:
        """The real side of the metrics: features at hand, statistics of real images, the floor."""
        if self.metrics is None or not hasattr(self.module, "sample"):
            return
        if hasattr(self.metrics, "set_reference") and self.datamodule.num_samples < 2:
            raise UserError(f"data.num_samples={self.datamodule.num_samples}: metrics need 2 samples or more")
        if getattr(self.metrics, "extractor", None) is not None:
            _ensure_features(self.metrics.extractor, Path(self.run.plain["paths"]["cache"]))
        if not hasattr(self.metrics, "set_reference"):
            self.module.metrics = self.metrics  # they need no real images
            return
        from genlight.metrics.reference import floor, prepare

        cache = Path(self.run.plain["paths"]["cache"])
        device = self.trainer.strategy.root_device
        prepare(self.metrics, self.datamodule, cache, device)
        self.floor = floor(self.metrics, self.datamodule, cache, num_samples=self.datamodule.num_samples, device=device)
        self.module.metrics = self.metrics

    def _load_weights(self, module: Any) -> None:
        given = self.run.plain["ckpt_path"]
        if given is None:
            if not getattr(module, "pretrained", None):
                self.run.notes.append("ckpt_path is null: the untrained network was measured")
            return
        path = Path(given)
        if not path.exists():
            raise UserError(f"ckpt_path={given}: there is no such file or folder")
        if (path / "run.json").is_file():
            path = self._newest(path / CHECKPOINTS)
        if (path / "model_index.json").is_file():
            module.load_pretrained(path)
            return
        if path.is_dir() and not is_sharded_checkpoint(path):
            raise UserError(
                f"ckpt_path={given}: the folder is neither a run (run.json), nor a diffusers pipeline "
                "(model_index.json), nor a sharded checkpoint (manifest.json)"
            )
        if path.is_dir():
            state = consolidated_state_dict(path)
        else:
            checkpoint = load_checkpoint(path)
            state = checkpoint["state_dict"]
            module.on_load_checkpoint(checkpoint)
        module.load_state_dict(state)

    def _newest(self, folder: Path, set_aside: bool = False) -> Path:
        """The newest whole checkpoint; newer ones are named, and with `set_aside` those that are damaged renamed.

        Where none is whole all keep their names: what can't be read now may be read another time.
        """
        found, skipped = newest_whole_checkpoint(folder)
        if found is None:
            raise UserError(f"{folder} holds no whole checkpoint{f': {skipped[0][1]}' if skipped else ''}")
        for bad, error in skipped:
            self.run.notes.append(f"{bad.name} was passed over: {error}")
            print_line(f"warning: {bad} is passed over: {error}")
            if set_aside and isinstance(error, io.CorruptFileError) and process_rank() == 0:
                io.rename(bad, bad.with_name(bad.name + ".damaged"))
        return found

    def _resume_from(self) -> str | None:
        """The newest whole checkpoint of the run folder; None starts from the beginning."""
        folder = self.run.folder / CHECKPOINTS
        if not folder.is_dir() or not any(folder.glob("*.ckpt")):
            print_line("nothing was saved yet: the run starts from the beginning")
            return None
        path = self._newest(folder, set_aside=True)
        done = int(io.read_labels(path / TRAINER_FILE if path.is_dir() else path).get("step", "0"))
        if 0 <= self.trainer.max_steps < done:
            raise UserError(f"{path} has {done} steps already, more than trainer.max_steps={self.trainer.max_steps}")
        print_line(f"continuing from {path}")
        return str(path)

    def _report(
        self, metrics: dict[str, float], draw: str, num_samples: int, result: MethodResult | None = None
    ) -> Report:
        this, extractor = self.run, getattr(self.metrics, "extractor", None)
        measured = self.floor is not None and extractor is not None
        features: dict[str, Any] | None = None
        if measured:
            features = {**extractor.describe(), **self.metrics.describe()}  # type: ignore[union-attr]
            known = {field.name for field in fields(FeaturesRecord)}
            features = {k: v for k, v in features.items() if k in known}
        predicted = (result.predicted if result else None) or self.timer.estimate
        lost = not_finite(metrics, self.metrics)
        this.notes.extend(lost.values())
        for remark in lost.values():
            print_line(f"warning: {remark}")
        record = {
            **environment(this.words),
            "experiment": this.experiment,
            "config_hash": this.fingerprint,
            "seed": this.plain["seed"],
            "data": getattr(self.datamodule, "fingerprint", None),
            "weights": [asdict(weights_record(source)) for source in self._base_models()],
            "deterministic": this.plain["trainer"].get("deterministic"),
            "draw": draw,
            "metrics": finite(metrics),
            "not_finite": list(lost),
            "table": [finite_row(row) for row in result.table] if result else [],
            "floor": self.floor.to_dict() if measured else None,
            "features": features,
            "num_samples": num_samples,
            "predicted": None if predicted is None else predicted.to_dict(),
            "real": real_cost(time.monotonic() - this.started, result.spent if result else {}),
            "files": [],
            "notes": this.notes,
        }
        return parse_report(record)

    def _save_artifact(
        self,
        report: Report,
        method: str,
        write: Callable[[Path], None],
        parts: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        from genlight.reports.model_card import write_model_card

        with io.atomic_folder(self.run.folder / ARTIFACT, replace=True) as folder:
            write(folder)
            data = str(getattr(self.datamodule, "name", "data"))
            for name, metrics in {"": report.metrics, **(parts or {})}.items():
                one = replace(report, metrics=finite(metrics))
                write_model_card(folder / name, one, dataset=data, method=method, base_model=self._base_models())

    def _base_models(self) -> list[str]:
        """Where the weights came from that this run began with."""
        module = self.run.plain["module"]
        members = (module.get("members") or {}).values()
        measured = self.run.plain["ckpt_path"] if self.run.command == "validate" else None
        given = [module.get("pretrained") or measured, module.get("teacher")]
        given += [each.get("source") if isinstance(each, dict) else each for each in members]
        return list(dict.fromkeys(source for source in given if isinstance(source, str)))

    def _whole_module(self) -> Any:
        """The module; where its weights lie in shards, a fresh one with the weights of the last checkpoint of a fit, or
        with those that a measurement was given."""
        if not is_sharded(self.trainer):
            return self.module
        module = build(self.run.config.module, "module")
        if self.run.command == "fit":
            module.load_state_dict(consolidated_state_dict(self._newest(self.run.folder / CHECKPOINTS)))
        else:
            self._load_weights(module)
        module.class_names = getattr(self.module, "class_names", None)
        if hasattr(module, "check_data"):
            module.check_data(self.datamodule)  # a language model takes its tokenizer from there
        return module

    def _finish(self, report: Report) -> None:
        """Pictures, report, and the files named for the person who waited."""
        folder = self.run.folder
        figures, table = folder / "figures", folder / "metrics.csv"
        parts = sorted(folder.glob("metrics/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
        if merge_metrics(parts, table) and self.run.command == "fit":
            curves(table, figures / "curves.png")
        files = sorted(figures.glob("*.png")) + ([table] if table.exists() else [])
        names = [str(f.relative_to(folder)) for f in files]
        if (folder / ARTIFACT).is_dir():
            names.append(ARTIFACT)
        seconds = time.monotonic() - self.run.started
        report = write_report(folder, replace(report, files=names, real={**report.real, "total_seconds": seconds}))
        for logger in self.trainer.loggers:
            track(logger, folder, report)
        print_result(folder, report, files)


def _ensure_features(extractor: Any, cache: Path) -> None:
    """Train the feature network where it is missing and there is a recipe."""
    if extractor.recipe:
        what = f"the feature network {extractor.name}"
        word = f"paths.cache={cache}"
        fit_where_missing(extractor.recipe, extractor.is_available, what, cache, word, replace=True)
    extractor.setup()
