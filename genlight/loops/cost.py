"""What a method will cost, from pieces of it that are measured: the same account for every method.

Everything until the estimate is time that was spent; then comes what is left of the first validation, what the method
itself has to do, as phases, and its pictures and files. What each phase really took is kept beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from genlight.callbacks.begun import has_begun
from genlight.callbacks.progress import display_of
from genlight.callbacks.timing import MEASURED, StepTimer, print_line
from genlight.errors import UserError
from genlight.loops.evaluation import CandidateTrainer, measured
from genlight.reports.cost import CostEstimate, Phase, PlannedFile, estimate
from genlight.reports.finishing import finishing
from genlight.reports.progress import IN_ALL
from genlight.reports.report import size
from genlight.search.archive import count_records
from genlight.search.plan import SearchPlan
from genlight.search.records import Problem
from genlight.search.rehearsal import Rehearsal, rehearsed

# parts of every method, for the account of time
CHOICE, REPORT = "choice", "report"
# what a run shows while it finds out what all of it will cost
_ESTIMATE = "estimate"
# the share of a search that making up proposals beforehand may take, and seconds that it may always take
_REHEARSAL_SHARE, _REHEARSAL_SECONDS = 0.05, 1.0
_QUARTER = 4
# of the report draw, at most
_BATCHES = 2


@dataclass(frozen=True)
class FirstValidation:
    """The validation of the run's own weights that every method begins with.

    Attributes:
        logged: metrics by name.
        batch_seconds: of some batches after the first, or of that one alone.
        done, every: batches that were measured, and that there are.
    """

    logged: dict[str, float]
    batch_seconds: tuple[float, ...]
    done: int
    every: int

    @property
    def left(self) -> Phase:
        """What a dry run leaves out of it."""
        return Phase("first validation", self.batch_seconds, self.every - self.done)


@dataclass(frozen=True)
class SampleLine:
    """Seconds of a measurement as a line over its samples: `fixed` for none, `each` for one more."""

    fixed: float
    each: float

    def seconds(self, samples: int) -> float:
        """Of a measurement of so many."""
        return self.fixed + self.each * samples

    def scaled(self, seconds: float, factor: float) -> float:
        """Of a measurement with as much beside its samples, and `factor` times as many of them."""
        fixed = min(self.fixed, seconds)
        return fixed + (seconds - fixed) * factor


def first_validation(trainer: Any, module: Any, datamodule: Any, *, dry: bool = False) -> FirstValidation:
    """Validate on the report draw; in a dry run on a few batches of it."""
    timer = _timer(trainer)
    trainer.limit_val_batches = 1 + MEASURED if dry else 1.0
    begun = time.monotonic()
    logged = trainer.validate(module, datamodule=datamodule, verbose=False)
    elapsed = time.monotonic() - begun
    done = sum(int(count) for count in trainer.num_val_batches)
    trainer.limit_val_batches = 1.0
    first, *others = (timer.batches if timer else []) or [elapsed]
    together = int(datamodule.eval_batch_size) * int(trainer.world_size)
    every = -(-int(datamodule.num_samples) // together) if dry else done
    values = {name: float(value) for name, value in logged[0].items()}
    return FirstValidation(values, tuple(others) or (first,), done, max(every, done))


def announce(trainer: Any, predicted: CostEstimate) -> None:
    """Say beforehand what a run will cost, and show it from now on; UserError where the disk has no room for it."""
    if not predicted.fits_on_disk:
        needed, free = size(predicted.disk_needed_bytes), size(predicted.disk_free_bytes)
        raise UserError(f"the run will keep {needed} in {trainer.default_root_dir}, where {free} are free: make room")
    if trainer.is_global_zero:
        print_line(predicted.line())
    left = predicted.total_seconds - predicted.setup_seconds
    has_begun(trainer)
    display_of(trainer).expect({**{phase.name: phase.total for phase in predicted.phases}, IN_ALL: left})


def announced(trainer: Any, find: Callable[[], CostEstimate]) -> CostEstimate:
    """What a run will cost, found out while that is shown, and said; see `announce`."""
    with display_of(trainer).phase(_ESTIMATE):
        predicted = find()
    announce(trainer, predicted)
    return predicted


def _timer(trainer: Any) -> StepTimer | None:
    """The timer of a run; a trainer that a program made by itself has none."""
    return next((each for each in trainer.callbacks if isinstance(each, StepTimer)), None)


def times(seconds: Sequence[float], factor: float) -> tuple[float, ...]:
    """Each of some seconds, so many times."""
    return tuple(value * factor for value in seconds)


def artifact_of(module: Any) -> PlannedFile:
    """The artifact of a module: its parameters."""
    return PlannedFile("artifact", sum(p.numel() * p.element_size() for p in module.parameters()))


def timed(work: Sequence[Callable[[], Any]]) -> tuple[float, ...]:
    """Seconds of each piece of work; the first one warms up and is left out, unless there is no other."""
    seconds = []
    for piece in work:
        begun = time.monotonic()
        piece()
        seconds.append(time.monotonic() - begun)
    return tuple(seconds[1:] or seconds)


def sample_line(measure: Callable[[int], Any], most: int) -> SampleLine:
    """The line through measurements of `most` samples and of a quarter of them; `most` first, for data that is made
    when it is first asked for, such as tokens.
    """
    few = min(most, max(2, most // _QUARTER))  # of one image alone there are no statistics
    small, large = timed([partial(measure, count) for count in (most, few, most)])
    each = max(0.0, (large - small) / (most - few)) if most > few else large / most
    return SampleLine(max(0.0, small - each * few), each)


def report_line(evaluations: CandidateTrainer, module: Any, datamodule: Any) -> SampleLine:
    """Of all metrics on the report draw, with the module as it is."""
    most = min(int(datamodule.num_samples), _BATCHES * int(datamodule.eval_batch_size))
    return sample_line(partial(measured, evaluations, module, datamodule, "report"), most)


def rehearsal_of(problem: Problem[Any], plan: SearchPlan, candidate_seconds: float) -> Rehearsal:
    """What a search will propose, and how long it takes over that, by made-up scores.

    Args:
        problem, plan: of the search.
        candidate_seconds: of one measurement, which says how long a rehearsal is worth while.
    """
    most = max(_REHEARSAL_SECONDS, _REHEARSAL_SHARE * candidate_seconds * plan.budget.evaluations)
    return rehearsed(problem, plan, most)


def search_phase(
    name: str, evaluations: CandidateTrainer, candidate_seconds: Sequence[float], rehearsal: Rehearsal
) -> Phase:
    """Candidates that a search still has to propose and to measure.

    Args:
        name: of the search, below whose folder earlier runs left records.
        evaluations: of the run.
        candidate_seconds: of measurements, each of them a mean over all candidates.
        rehearsal: of the search.
    """
    known = count_records(Path(evaluations.trainer.default_root_dir) / "search" / name)
    proposing = rehearsal.seconds / max(1, rehearsal.count)
    each = tuple(value / evaluations.shares + proposing for value in candidate_seconds)
    return Phase(f"search {name}", each, max(0, rehearsal.count - known))


def method_cost(
    evaluations: CandidateTrainer,
    first: FirstValidation,
    phases: Sequence[Phase],
    files: Sequence[PlannedFile],
    pictures: int,
) -> CostEstimate:
    """The estimate of a whole run of a method, after everything was measured that the phases are made of.

    Args:
        evaluations: of the run.
        first: its first validation.
        phases: what the method has to do from now on.
        files: what it keeps.
        pictures: how many it draws.
    """
    every = [phase for phase in (first.left, *phases, finishing(pictures)) if phase.count]
    trainer, timer = evaluations.trainer, _timer(evaluations.trainer)
    spent = time.monotonic() - timer.started if timer else sum(first.batch_seconds)
    return estimate(every, files, trainer.default_root_dir, setup_seconds=spent)
