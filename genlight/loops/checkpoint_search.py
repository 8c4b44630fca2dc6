"""LCSC: better weights out of a training run's own checkpoints, by a searched linear combination.

Liu et al. 2025, "Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better"
(arXiv 2404.02241): coefficients of either sign that sum to one, found without gradients on the metric of the sampler
that will be used. Added here: CMA-ES on geometric bins as the default, every usual average in the same table, and
disjoint noise and real images for searching, choosing and reporting.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from genlight.checkpoints.bases import Basis, GeometricBins
from genlight.checkpoints.files import FileTrajectory, paths_of
from genlight.checkpoints.importing import import_checkpoints
from genlight.checkpoints.lora import grouped_pairs
from genlight.checkpoints.mixing import check_names
from genlight.checkpoints.part import TrajectoryPart
from genlight.checkpoints.trajectory import INDEX_FILE, Trajectory
from genlight.errors import UserError, in_config
from genlight.loops.checkpoint_cost import combination_cost
from genlight.loops.checkpoint_gradient import GradientDescent
from genlight.loops.checkpoint_remarks import remarks_before
from genlight.loops.checkpoint_report import combination_result
from genlight.loops.checkpoint_work import CheckpointWork
from genlight.loops.cost import announced, first_validation
from genlight.loops.evaluation import CandidateTrainer, check_logged, checked_mode, direction
from genlight.loops.result import MethodResult
from genlight.loops.search import SearchSettings
from genlight.quantization.convert import quantized_layers
from genlight.reports.cost import CostEstimate
from genlight.search.protocols import LiveWeights, require_capability
from genlight.search.spaces.checkpoint_coefficients import CheckpointCoefficients

# where the collector of a run writes
TRAJECTORY = "trajectory"
# where checkpoints of the trainer are gathered, in the run folder
_IMPORTED = "imported"


class CheckpointSearch:
    """The method `lcsc`: one set of weights, a signed combination of the checkpoints that a training saved.

    Args:
        search: how combinations are chosen and how many are measured.
        trajectory: folder that `callbacks=collector` wrote; null: `trajectory` in the run that ckpt_path names. A list:
            checkpoints that other programs saved, as `FileTrajectory.open` takes them, or ``.ckpt`` files of a fit.
        skip_damaged: leave damaged checkpoints out instead of ending with an error.
        ckpt_path: of the command.
        objective: name of a metric that validate logs, such as "val/fd_digits".
        mode: "min", "max", or "auto": as the metric says which way it is better.
        until: only checkpoints up to this optimizer step, as if the training had ended there; null: all.
        basis: what coefficients belong to: geometric bins, every checkpoint, or moving averages.
        groups: patterns of parameter names; each group has coefficients of its own.
        signed: False: averages only, no coefficient is negative.
        singles: how many single checkpoints are measured, evenly spaced.
        select: samples for choosing among the best, on noise and real images of their own.
        random_search: also search by random combinations, with the same budget, for comparison.
        gradient: gradient descent besides, from the newest checkpoint and from the best combination; null: none.
        device_bytes: most bytes for the checkpoints held on the device; null: half of what is free.

    Raises:
        ValueError: a value out of range.
    """

    predicts_cost = True

    def __init__(
        self,
        search: SearchSettings,
        objective: str,
        trajectory: str | Sequence[str] | None = None,
        ckpt_path: str | None = None,
        mode: Literal["auto", "min", "max"] = "auto",
        until: int | None = None,
        basis: Basis | None = None,
        groups: Sequence[str] = (".*",),
        signed: bool = True,
        singles: int = 20,
        select: int = 2000,
        random_search: bool = True,
        gradient: GradientDescent | None = None,
        device_bytes: int | None = None,
        skip_damaged: bool = False,
    ) -> None:
        if not isinstance(search, SearchSettings):
            raise ValueError("method=lcsc searches: choose how by search=lcsc (or genetic, random)")
        if min(singles, select) < 1:
            raise ValueError(f"method.singles = {singles!r} and method.select = {select!r} must be 1 or more")
        self.settings, self.objective, self.mode = search, objective, checked_mode(mode)
        self.places: tuple[str, ...] = () if trajectory is None or isinstance(trajectory, str) else tuple(trajectory)
        own = ckpt_path and str(Path(ckpt_path) / TRAJECTORY)
        self.folder = None if self.places else trajectory if isinstance(trajectory, str) else own
        self.until, self.basis, self.groups, self.signed = until, basis or GeometricBins(), tuple(groups), signed
        self.singles, self.select, self.random_search = singles, select, random_search
        self.gradient, self.device_bytes, self.skip_damaged = gradient, device_bytes, skip_damaged

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Measure what is known, search, choose, and report on noise and images that had no part in it.

        Raises:
            UserError: no trajectory, weights that are sharded or do not fit it, a metric that is not logged.
            CorruptFileError: a checkpoint that is damaged or of another training.
        """
        space = self.space(trainer, module)
        first = first_validation(trainer, module, datamodule)
        work = self._work(trainer, module, datamodule, space, first.logged)
        predicted = announced(trainer, lambda: combination_cost(work, first))
        return combination_result(work, first.logged, predicted)

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """Measure three combinations, and multiply."""
        space = self.space(trainer, module)
        first = first_validation(trainer, module, datamodule, dry=True)
        return combination_cost(self._work(trainer, module, datamodule, space, first.logged), first)

    def space(self, trainer: Any, module: Any) -> CheckpointCoefficients:
        """The space of the run's checkpoints."""
        module.configure_model()
        if quantized_layers(module):
            raise UserError(
                "method=lcsc: the network of the module is quantized, and a linear combination of codes means nothing: "
                "combine the checkpoints first, then quantize"
            )
        trajectory = self._trajectory(trainer, module)
        part = trajectory if self.until is None else TrajectoryPart(trajectory, self.until)
        if len(part.members) < 3:
            where = self.folder or list(self.places)
            raise UserError(f"{where} holds {len(part.members)} checkpoints; a combination needs three or more")
        with in_config("method"):
            space = CheckpointCoefficients(
                part, self.basis, self.groups, signed=self.signed, device_bytes=self.device_bytes
            )
            grouped_pairs(part.names, self.groups)
        require_capability(module, LiveWeights, space, ("every generator and language model of genlight",))
        with in_config("method.trajectory"):
            check_names(part, module.live_weights())
        return space

    def _trajectory(self, trainer: Any, module: Any) -> Trajectory | FileTrajectory:
        """The checkpoints, opened and checked."""
        if self.places:
            return self._from_files(trainer, module)
        if self.folder is None:
            raise UserError("method=lcsc combines the checkpoints of a run: give ckpt_path=<its folder>")
        if not Path(self.folder).is_dir():
            raise UserError(
                f"{self.folder} is not there: train with callbacks=collector, which saves the checkpoints to combine, "
                "or name their folder by method.trajectory"
            )
        return Trajectory.open(self.folder, skip_damaged=self.skip_damaged)

    def _from_files(self, trainer: Any, module: Any) -> Trajectory | FileTrajectory:
        """Checkpoints of other programs where they lie; those of the trainer are gathered in the run folder first."""
        live = module.live_weights()
        if not all(place.endswith(".ckpt") for place in self.places):
            buffers = [name for name, _ in module.named_buffers()]
            return FileTrajectory.open(self.places, live, buffers, skip_damaged=self.skip_damaged)
        if trainer.world_size > 1:
            raise UserError("method.trajectory: .ckpt files are gathered by one process: use trainer.devices=1")
        folder = Path(trainer.default_root_dir) / _IMPORTED
        if (folder / INDEX_FILE).is_file():  # of the run that is resumed
            return Trajectory.open(folder)
        trained = [name for name, weight in live.items() if weight.requires_grad]
        return import_checkpoints(paths_of(self.places), folder, trained, skip_damaged=self.skip_damaged)

    def _work(
        self, trainer: Any, module: Any, datamodule: Any, space: CheckpointCoefficients, logged: dict[str, float]
    ) -> CheckpointWork:
        evaluations = CandidateTrainer(trainer)
        if evaluations.sharded:
            raise UserError("method=lcsc writes whole weights: use strategy=auto or strategy=ddp")
        check_logged(self.objective, logged)
        self.mode = direction(self.mode, self.objective, getattr(module, "metrics", None))
        if self.gradient is not None:
            self.gradient.check(module, getattr(module, "metrics", None), self.objective)
        work = CheckpointWork(self, evaluations, module, datamodule, space, evaluations.fingerprint(module))
        work.check_averages()
        work.runner.remark(remarks_before(work))
        return work
