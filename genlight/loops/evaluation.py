"""Candidates measured by Lightning's Trainer, on one device or spread over processes, with the same result."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from genlight.callbacks.progress import display_of
from genlight.data.loaders import KeptLoader
from genlight.errors import UserError
from genlight.search.evaluation import Evaluator, Keyed, is_lost, one_line, over_ranks
from genlight.search.protocols import Evaluation, SearchSpace
from genlight.trainer.consolidate import gather_full_weights
from genlight.trainer.resident import is_sharded, local_trainer, silenced

Result = TypeVar("Result")


class CandidateTrainer:
    """The trainer of a run as a search uses it: silent, and with the module left on its device.

    Where each process holds the whole module, each measures candidates of its own, by a trainer of its own. Where the
    module is sharded, all processes measure the same candidate together.

    Args:
        trainer: of the run; it must have validated once, which starts its other processes.

    Attributes:
        spent: seconds by part of the method, see `timing`.
        display: shows how far the run is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.sharded = is_sharded(trainer)
        self.spent: dict[str, float] = {}
        self.display = display_of(trainer)
        self._loaders: WeakKeyDictionary[Any, dict[tuple[Any, ...], KeptLoader]] = WeakKeyDictionary()

    @property
    def shares(self) -> int:
        """How many processes measure different candidates at a time."""
        return 1 if self.sharded else int(self.trainer.world_size)

    def rounds(self, count: int) -> int:
        """How many times processes work beside each other until so many pieces of work are done."""
        return -(-count // self.shares)

    @cached_property
    def _local(self) -> Trainer:
        return local_trainer(self.trainer)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Show a part of a method, and count its seconds, which the report holds against what was predicted."""
        begun = time.monotonic()
        try:
            with self.display.phase(name):
                yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - begun

    def validate(self, module: LightningModule, **data: Any) -> dict[str, float]:
        """One validation; what it logged, by name. `data` is `dataloaders` or `datamodule`.

        Where every process has candidates of its own, the metrics of the module must not wait for the others: see
        `alone`.
        """
        quiet: AbstractContextManager[Trainer] = silenced(self.trainer) if self.sharded else nullcontext(self._local)
        if not self.sharded and "datamodule" in data:
            # with a data module Lightning waits for all processes, which have candidates of their own
            data = {"dataloaders": self._loader(data["datamodule"])}
        with quiet as trainer:
            logged = trainer.validate(module, verbose=False, **data)
        return {name: float(value) for name, value in (logged[0] if logged else {}).items()}

    def _loader(self, datamodule: Any) -> KeptLoader:
        """All batches of a data module as it stands; noise is drawn once, not for each candidate."""
        loaders = self._loaders.setdefault(datamodule, {})
        key = (datamodule.draw, datamodule.num_samples, datamodule.eval_batch_size)
        if key not in loaders:
            loaders[key] = KeptLoader(whole_loader(datamodule))
        return loaders[key]

    def inside(self, module: LightningModule, work: Callable[[], Result]) -> Result:
        """Call `work` in a validation step: the module on its device, in the trainer's precision, without gradients.

        What `work` returns must not be on a device that others wait for: it stays with this process.
        """
        step = _Inside(module, work)
        one: Any = [0]
        self.validate(step, dataloaders=DataLoader(one, batch_size=None))
        result: Result = step.result[0]
        return result

    def spread(self, evaluator: Evaluator[Any]) -> Evaluator[Any]:
        """The evaluator, spread over the processes that have candidates of their own."""
        if self.shares == 1:
            return evaluator
        return over_ranks(evaluator, int(self.trainer.global_rank), self.shares, self._gather)

    def clock(self) -> float:
        """Monotonic seconds, the same on all processes."""
        now = time.monotonic()
        return now if self.trainer.world_size == 1 else float(self.trainer.strategy.broadcast(now))

    def agreed(self, value: Any) -> Any:
        """The value of the first process, on all of them."""
        return value if self.trainer.world_size == 1 else self.trainer.strategy.broadcast(value)

    def fingerprint(self, module: Any) -> str:
        """`module.fingerprint()`, of the whole weights where each process holds a part."""
        if not self.sharded:
            return str(module.fingerprint())
        full = gather_full_weights(module, keep=self.trainer.is_global_zero)
        return str(self.agreed(module.fingerprint(full) if self.trainer.is_global_zero else None))

    def _gather(self, outcomes: list[Keyed]) -> list[list[Keyed]]:
        return [self.trainer.strategy.broadcast(outcomes, src) for src in range(self.shares)]


@contextmanager
def drawing(datamodule: Any, draw: str, num_samples: int) -> Iterator[None]:
    """The data module on the first `num_samples` of a draw, for a while."""
    before = datamodule.draw, datamodule.num_samples
    datamodule.draw, datamodule.num_samples = draw, num_samples
    try:
        yield
    finally:
        datamodule.draw, datamodule.num_samples = before


def whole_loader(datamodule: Any) -> Any:
    """The batches of a data module that was set up, all of them in each process."""
    before, datamodule.trainer = datamodule.trainer, None
    try:
        return datamodule.val_dataloader()
    finally:
        datamodule.trainer = before


def noise_of(datamodule: Any, draw: str, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The first `count` noises [count, ...] of a draw and their conditions, whatever the number of processes."""
    with drawing(datamodule, draw, count):
        batches = list(whole_loader(datamodule))
    noise = torch.cat([batch["noise"] for batch in batches])
    conditions = {"label": torch.cat([batch["label"] for batch in batches])} if "label" in batches[0] else {}
    return noise, conditions


class _Inside(LightningModule):
    """A validation of one step that calls a function."""

    def __init__(self, module: LightningModule, work: Callable[[], Any]) -> None:
        super().__init__()
        self.module, self.work = module, work
        self.result: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.result = [self.work()]


@dataclass(frozen=True)
class MetricObjective:
    """Scores a candidate by a metric that `validate` logs, on the noise of one draw.

    Attributes:
        evaluations: what validates.
        space: applies candidates to the module.
        module, datamodule: of the run.
        metric: such as "val/fd_digits".
        mode: "min", or "max" for metrics where more is better.
        draw: the noise it is measured on.
        metrics: in place of the module's, such as those against other real images; None: the module's.
    """

    evaluations: CandidateTrainer
    space: SearchSpace[Any]
    module: Any
    datamodule: Any
    metric: str
    mode: str = "min"
    draw: str = "search"
    metrics: Any = None

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"method.mode = {self.mode!r} must be min or max")

    def evaluate(self, candidate: Any, fidelity: int) -> Evaluation:
        """The metric over `fidelity` samples, negated where more is better. Raises UserError if it is not logged."""
        self.space.apply(self.module, candidate)
        return self.evaluate_applied(fidelity)

    def evaluate_applied(self, fidelity: int) -> Evaluation:
        """The score of the module as it is; see `evaluate`."""
        found = measured(self.evaluations, self.module, self.datamodule, self.draw, fidelity, self.metrics)
        if self.metric not in found:
            raise UserError(f"method.objective={self.metric}: validate logs {', '.join(found) or 'no metric'}")
        return Evaluation(
            as_logged(self.mode, found[self.metric]), {k: v for k, v in found.items() if not k.endswith("_std")}
        )


def check_logged(objective: str, logged: Collection[str], *others: str) -> None:
    """UserError if validate does not log the objective of a method, naming what it does log.

    Args:
        objective: the value of method.objective.
        logged: names that validate logs; deviations of metrics are none to choose.
        others: further objectives that the method knows.
    """
    known = [*others, *(name for name in logged if not name.endswith("_std"))]
    if objective not in (*others, *logged):
        raise UserError(f"method.objective={objective}: validate does not log it; choose one of {', '.join(known)}")


def checked_mode(mode: str) -> str:
    """ValueError if a method's `mode` is none of those that `direction` reads."""
    if mode not in ("auto", "min", "max"):
        raise ValueError(f"method.mode = {mode!r} must be auto, min or max")
    return mode


def direction(mode: str, objective: str, metrics: Any) -> str:
    """ "min" or "max": which way the objective of a method is better.

    Args:
        mode: of the method; "auto": as the metric says.
        objective: such as "val/fd_digits".
        metrics: of the module; what has no `higher_is_better` says nothing.

    Raises:
        UserError: the metric goes the other way, or says nothing where nothing else does.
    """
    more = (getattr(metrics, "higher_is_better", None) or {}).get(objective.removeprefix("val/"))
    if more is None and mode == "auto":
        raise UserError(
            f"method.objective={objective}: the metric does not say whether more or less of it is better; "
            "set method.mode=max or method.mode=min"
        )
    if more is None:
        return mode
    word, known = ("more", "max") if more else ("less", "min")
    if mode not in ("auto", known):
        raise UserError(f"method.objective={objective}: {word} of it is better; set method.mode={known}, or auto")
    return known


def as_logged(mode: str, score: float) -> float:
    """The metric of a score, or the score of a metric: scores are minimised, whatever the mode."""
    return score if mode == "min" else -score


def score_label(mode: str, metric: str) -> str:
    """What an axis of scores shows."""
    return metric if mode == "min" else f"-{metric}"


def measured(
    evaluations: CandidateTrainer, module: Any, datamodule: Any, draw: str, num_samples: int, metrics: Any = None
) -> dict[str, float]:
    """The metrics of the module as it is, or others in their place, on the first `num_samples` of a draw."""
    own: Any = getattr(module, "metrics", None)
    metrics = own if metrics is None else metrics
    if metrics is not own:
        module.metrics = metrics
    synced = getattr(metrics, "sync", None)
    if synced is not None and not evaluations.sharded:
        metrics.sync = False
    try:
        with drawing(datamodule, draw, num_samples):
            return evaluations.validate(module, datamodule=datamodule)
    finally:
        if synced is not None:
            metrics.sync = synced
        if metrics is not own:
            module.metrics = own


def in_turn(evaluations: CandidateTrainer, work: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of independent pieces of work, each done by one process where every one holds the whole module.

    Each is a step of the phase that is shown. Where one raises, all processes raise: UserError where it was another's.
    """
    share = evaluations.shares
    rank = int(evaluations.trainer.global_rank) if share > 1 else 0
    own = [(index, piece) for index, piece in enumerate(work) if index % share == rank]
    parts = _of_all(evaluations, share, lambda: {index: piece() for index, piece in evaluations.display.counted(own)})
    return [parts[index % share][index] for index in range(len(work))]


def in_rounds(evaluations: CandidateTrainer, work: Sequence[Callable[[], Any]]) -> Iterator[list[Any]]:
    """As `in_turn`, for results that are kept on the way: in their order, round by round, each process doing one."""
    share = evaluations.shares
    rank = int(evaluations.trainer.global_rank) if share > 1 else 0
    for start in range(0, len(work), share):
        pieces = work[start : start + share]
        yield _of_all(evaluations, len(pieces), pieces[rank] if rank < len(pieces) else lambda: None)


def _of_all(evaluations: CandidateTrainer, sources: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` gives on each of the first `sources` processes, on all of them.

    Where it raises on one of these every process raises, for the others would wait for it.
    """
    if evaluations.shares == 1:
        return [work()]
    mine, error = None, None
    try:
        mine = work()
    except Exception as caught:
        if is_lost(caught):
            raise  # nothing can be shared any more
        error = caught
    said = None if error is None else one_line(error)
    parts = [evaluations.trainer.strategy.broadcast((mine, said), src) for src in range(sources)]
    if error is not None:
        raise error
    for _, failure in parts:
        if failure is not None:
            raise UserError(f"another process failed: {failure}")
    return [part for part, _ in parts]
