"""Metrics as CSV, the record of a run; and Weights & Biases as a view of it that never stops the run.

W&B is asked first whether it answers; if it does not, or fails later, one warning is
printed and the run goes on: offline (files below the run folder, sent later by ``wandb sync``), or without W&B if
that fails too.
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from genlight.io import atomic_write_text
from genlight.secrets import masked

T = TypeVar("T")

# seconds to wait for the server's first answer, and for the last data to arrive
_ANSWER_TIMEOUT = 3.0
_FINISH_TIMEOUT = 2.0


class WholeCSVLogger(CSVLogger):
    """Lightning's ``CSVLogger``, whose file loses no rows where a run dies while a metric that is new gets its column:
    Lightning empties the file for that, and fills it again. A row that comes twice in turn is written once."""

    _last = ""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Take a row, unless it is the one before it."""
        row = repr((step, metrics))
        if step is None or row != self._last:
            super().log_metrics(metrics, step)
        self._last = row

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes, made at the first use."""
        writer = self._experiment
        if not isinstance(writer, _WholeWriter):
            writer = self._experiment = _WholeWriter(log_dir=self.log_dir)
        return writer


class _WholeWriter(ExperimentWriter):
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(self.metrics_file_path, table.getvalue())


class SilentExperiment:
    """Stands in for a W&B run: every attribute is callable, and nothing happens."""

    id: str | None = None
    name: str | None = None

    def __getattr__(self, name: str) -> SilentExperiment:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> SilentExperiment:
        return self


class ResilientWandbLogger(WandbLogger):
    """Lightning's ``WandbLogger`` for which an unreachable or failing W&B costs one warning and at most 10 seconds.

    Secrets in the config it is given are masked.

    Args:
        offline: write below ``save_dir`` only; needs no account. ``WANDB_MODE=offline`` does the same.
        log_model: upload checkpoints as artifacts, as in ``WandbLogger``; ignored, with a warning, when offline.
        init_timeout: seconds to wait for W&B to open the run.
        settings: further fields of ``wandb.Settings``.
        options: as in ``WandbLogger``.

    Raises:
        ValueError: if `init_timeout` is not between 0 and 10 seconds.
    """

    def __init__(
        self,
        offline: bool = False,
        log_model: bool | Literal["all"] = False,
        init_timeout: float = 4.0,
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not 0 < init_timeout <= 10:
            raise ValueError(f"logger.wandb.init_timeout must be above 0 and at most 10 seconds, got {init_timeout!r}")
        offline = offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        if offline and log_model:
            rank_zero_warn(
                f"logger.wandb.log_model={log_model} has no effect offline: checkpoints stay in the run folder"
            )
            log_model = False
        if options.get("tags") is not None:
            # W&B accepts no other kind of sequence, such as Hydra's
            options["tags"] = list(options["tags"])
        super().__init__(offline=offline, log_model=log_model, **options)
        # deprecated in wandb, which warns even about its absence
        self._wandb_init.pop("anonymous", None)
        self._init_timeout = init_timeout
        self._settings = dict(settings or {})
        self._warned = self._fell_silent = False

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, or an object that accepts every call and does nothing."""
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment

    def _start(self) -> Any:
        # W&B's own usage reports wait 10 seconds for a silent server at exit, offline as well
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except Exception as error:  # a broken installation raises more than ImportError
            self._warn("cannot be imported, the run goes on without it", error)
            return SilentExperiment()
        if wandb.run is not None:
            return wandb.run
        if not self._offline and os.environ.get("WANDB_MODE") != "disabled":
            try:
                answers(base_url(), _ANSWER_TIMEOUT)
                return self._init(wandb, mode=None)
            except Exception as error:
                self._warn("cannot be reached, the run goes on offline", error)
                self._offline = True
                self._log_model = False
        mode = "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "offline"
        try:
            return self._init(wandb, mode=mode)
        except Exception as error:
            self._warn("fails offline too, the run goes on without it", error)
            return SilentExperiment()

    def _init(self, wandb: Any, mode: str | None) -> Any:
        if hasattr(wandb.sdk.wandb_init, "_INIT_TIMEOUT_GRACE_SECONDS"):
            # what wandb.init waits beyond its timeout: 10 seconds, if the server accepts and stays silent
            wandb.sdk.wandb_init._INIT_TIMEOUT_GRACE_SECONDS = 1.0
        limits = {
            "init_timeout": self._init_timeout,
            "finish_timeout": _FINISH_TIMEOUT,
            "login_timeout": self._init_timeout,
        }
        settings = wandb.Settings(quiet=True, **(limits | self._settings))
        if self._save_dir is not None:
            os.makedirs(self._save_dir, exist_ok=True)
        run = wandb.init(**self._wandb_init, mode=mode, settings=settings)
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            rank_zero_warn(f"W&B {what}: {reason}")

    def _safely(self, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:
            self._warn("fails, the run goes on without what it was to log", error)
            return None

    def _while_it_answers(self, action: Callable[[], T]) -> T | None:
        """As `_safely`, for what waits for the server, up to 20 seconds each time: left out once it is silent."""
        if self._fell_silent:
            return None
        if not self._offline and not isinstance(self._experiment, SilentExperiment | None):
            try:
                answers(base_url(), _ANSWER_TIMEOUT)
            except Exception as error:
                self._fell_silent = True
                self._warn("fails, the run goes on without what it was to log", error)
                return None
        return self._safely(action)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._safely(lambda: super(ResilientWandbLogger, self).log_metrics(metrics, step))

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        plain = vars(params) if isinstance(params, Namespace) else dict(params)
        self._safely(lambda: super(ResilientWandbLogger, self).log_hyperparams(masked(plain)))

    @override
    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **options: Any) -> None:
        """Logs images (paths of PNG files, arrays, tensors), for instance one sample grid."""
        images = [os.fspath(image) if isinstance(image, Path) else image for image in images]
        self._safely(lambda: super(ResilientWandbLogger, self).log_image(key, images, step, **options))

    @override
    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Logs a table, for instance that of a report."""
        self._while_it_answers(lambda: super(ResilientWandbLogger, self).log_table(key, columns, data, dataframe, step))

    @rank_zero_only
    def log_folder(self, folder: str | os.PathLike[str], name: str, kind: str) -> None:
        """Logs a folder or a file as an artifact; offline it is copied into the offline run, to be sent by ``wandb
        sync``.

        Args:
            folder: what to upload.
            name: the artifact's name.
            kind: the artifact's type, for instance "model" or "report".
        """
        self._while_it_answers(lambda: self._log_artifact(Path(folder), name, kind))

    def _log_artifact(self, path: Path, name: str, kind: str) -> None:
        import wandb

        if isinstance(self.experiment, SilentExperiment):
            return
        artifact = wandb.Artifact(name=name, type=kind)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self.experiment.log_artifact(artifact)

    @override
    def watch(self, *args: Any, **kwargs: Any) -> None:
        self._safely(lambda: super(ResilientWandbLogger, self).watch(*args, **kwargs))

    @override
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if not self._offline and self._log_model:
            self._while_it_answers(lambda: super(ResilientWandbLogger, self).after_save_checkpoint(checkpoint_callback))

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        # the run stays open: validate may follow fit on the same logger
        if not self._offline and self._log_model:
            self._while_it_answers(lambda: super(ResilientWandbLogger, self).finalize(status))

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Closes the W&B run, waiting at most 2 seconds for data on its way; the rest stays below ``save_dir``."""
        run: Any = self._experiment
        if run is not None:
            self._safely(lambda: run.finish(exit_code=exit_code))
        self._experiment = None


def base_url() -> str:
    """The W&B server that this machine is set to use."""
    import wandb

    return str(wandb.setup().settings.base_url).rstrip("/")


def answers(url: str, timeout: float) -> None:
    """Returns if the W&B server at `url` answers a question within `timeout` seconds.

    Looking up a name can take longer than any timeout that can be set on it, so the question is asked in a thread of
    its own.

    Raises:
        ConnectionError: saying what happened instead.
    """
    outcome: list[str] = []

    def ask() -> None:
        body = json.dumps({"query": "{ __typename }"}).encode()
        request = urllib.request.Request(f"{url}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout):
                outcome.append("")
        except urllib.error.HTTPError as error:
            # whoever refuses a question without a key is alive; 5xx is not well
            outcome.append("" if error.code < 500 else f"{url} answers with status {error.code}")
        except Exception as error:
            outcome.append(f"{url}: {getattr(error, 'reason', error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise ConnectionError(f"{url} did not answer within {timeout:g} s")
    if outcome[0]:
        raise ConnectionError(outcome[0])
