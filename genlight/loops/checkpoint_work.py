"""The work of LCSC: averages and combinations on the search draw, the best of each kind on the select draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genlight.checkpoints.baselines import baseline_candidates
from genlight.checkpoints.post_hoc import PostHocEMA, post_hoc_averages
from genlight.checkpoints.trajectory import SavedAverage, check_averages, read_averages
from genlight.errors import UserError
from genlight.loops.checkpoint_gradient import descended
from genlight.loops.cost import CHOICE
from genlight.loops.draw_metrics import DrawMetrics
from genlight.loops.evaluation import CandidateTrainer, MetricObjective, in_turn
from genlight.loops.search import SearchRunner, SearchTask
from genlight.search.engine import SearchResult
from genlight.search.evaluation import is_lost, one_by_one
from genlight.search.plan import PlainPlan
from genlight.search.protocols import Evaluation
from genlight.search.random_search import RandomSearch
from genlight.search.records import Problem, Record
from genlight.search.spaces.checkpoint_coefficients import CheckpointCoefficients, Combination

if TYPE_CHECKING:
    from genlight.loops.checkpoint_search import CheckpointSearch

LCSC, RANDOM, GRADIENT = "LCSC", "random search", "gradient"
TRACKED, POST_HOC = "tracked ema", "post-hoc ema"
# of each kind of baseline, how many are looked at again on noise that did not choose them
BEST_OF_KIND = 3
_RANDOM_GENERATION = 20
TRACKING, DESCENT = "tracked averages", "gradient descent"  # in the account of time


Weights = Combination | SavedAverage | PostHocEMA


@dataclass(frozen=True)
class Variant:
    """One set of weights that was measured.

    Attributes:
        name: e.g. "ema 3.16".
        kind: e.g. "ema", "LCSC".
        weights: a combination, or an average that was tracked in training or made of such.
        search, select: scores on these draws, lower is better; search is nan where only few samples were measured.
    """

    name: str
    kind: str
    weights: Weights
    search: float
    select: float = float("nan")

    @property
    def is_measured(self) -> bool:
        """Whether no measurement of it failed."""
        return not math.isinf(self.search) and math.isfinite(self.select)


@dataclass
class CheckpointWork:
    """Everything that the steps of the method share.

    Attributes:
        method: the settings.
        evaluations, module, datamodule: of the run.
        space: of the checkpoints.
        weights: fingerprint of the module as it was loaded, before any combination was written into it.
        results: the searches that were done, by kind.
    """

    method: CheckpointSearch
    evaluations: CandidateTrainer
    module: Any
    datamodule: Any
    space: CheckpointCoefficients
    weights: str
    results: dict[str, SearchResult[Combination]] = field(default_factory=dict)

    @cached_property
    def runner(self) -> SearchRunner:
        """Runs searches in the run folder."""
        return SearchRunner(self.evaluations, self.method.settings)

    @cached_property
    def baselines(self) -> dict[str, Combination]:
        """Every usual average as a candidate, by name; without coefficients below zero where the search has none."""
        every = baseline_candidates(self.space.trajectory, self.space, self.method.singles)
        signed = self.method.signed
        return {name: each for name, each in every.items() if signed or self.space.weights(each).min() >= -1e-9}

    @cached_property
    def draws(self) -> DrawMetrics:
        """The metric on each draw."""
        method = self.method
        return DrawMetrics(
            self.evaluations, self.module, self.datamodule, method.objective, method.mode, self.runner.folder
        )

    def objective(self, draw: str) -> MetricObjective:
        """The metric on the noise of a draw; for "search" and "select" against halves of the training images."""
        return self.draws.objective(self.space, draw)

    def task(self, kind: str = LCSC) -> SearchTask:
        """The search, or the random one it is compared with; both begin with all baselines."""
        settings = self.method.settings
        planner: Any = settings.strategy
        if kind == RANDOM:
            planner = PlainPlan(RandomSearch(_RANDOM_GENERATION), screening_fidelity=None)
        initial = [*self.space.initial_candidates(), *self.baselines.values()]
        name = kind.lower().replace(" ", "-")
        plan = self.runner.plan(name, lambda budget: planner.plan(self.space, budget, initial))
        problem = Problem(self.space, settings.seed, settings.fidelity)
        evaluator = one_by_one(self.objective("search"), settings.time_limit_s)
        return SearchTask(name, problem, plan, evaluator, self._depends_on())

    def _depends_on(self) -> dict[str, str]:
        sampler = str(getattr(self.module, "num_inference_steps", ""))
        return {**self.draws.describe(), "sampler": sampler, "weights": self.weights}

    @property
    def searched_kinds(self) -> list[str]:
        """Ways to search, each with a budget of its own."""
        return [LCSC, *([RANDOM] if self.method.random_search else [])]

    @property
    def averages(self) -> Path | None:
        """The folder of averages that the training tracked at every step; only of the whole training."""
        folder = self.method.folder
        return None if self.method.until is not None or folder is None else Path(folder) / "ema"

    @cached_property
    def post_hoc(self) -> list[PostHocEMA]:
        """Averages of other lengths, made of those that the training saved on its way."""
        return [] if self.averages is None else post_hoc_averages(self.averages, self.space.trajectory.shapes)

    def check_averages(self) -> None:
        """CorruptFileError for averages that are damaged or of other parameters; only headers are read."""
        if self.averages is not None:
            check_averages(self.averages, self.space.trajectory.shapes)
        self.post_hoc  # noqa: B018 - opens them

    def search(self) -> list[Variant]:
        """All searches, and the best of every kind with both scores; the winner of each kind comes first.

        Raises:
            UserError: no combination could be measured.
        """
        for kind in self.searched_kinds:
            self.results[kind] = self.runner.run(self.task(kind))
        found = self._of_records()
        with self.evaluations.timing(TRACKING):
            found += self._tracked()
        with self.evaluations.timing(DESCENT):
            found += self._descended()
        with self.evaluations.timing(CHOICE):
            scores = self.judge([variant.weights for variant in found], "select", self.method.select)
        judged = [replace(variant, select=score) for variant, score in zip(found, scores, strict=True)]
        measured = [variant for variant in judged if variant.is_measured]
        if not any(variant.kind == LCSC for variant in measured):
            samples = self.method.settings.fidelity
            raise UserError(f"no combination could be measured on {samples} samples: see {self.runner.folder}")
        if failed := [variant.name for variant in judged if not variant.is_measured]:
            self.runner.notes.append(f"could not be measured, and are left out: {', '.join(failed)}")
        return sorted(measured, key=lambda variant: variant.select)

    def _of_records(self) -> list[Variant]:
        """Of every kind those that were best on the search draw: scores of different fidelities are not compared."""
        names = {self.space.key(candidate): name for name, candidate in reversed(self.baselines.items())}
        found: list[Variant] = []
        for kind, result in self.results.items():
            scored = [record for record in result.records if record.score is not None]
            ranked: Sequence[Record[Combination]] = sorted(scored, key=lambda record: record.rank)
            full = [record for record in ranked if record.fidelity == self.method.settings.fidelity]
            if kind == LCSC:
                found += _averages(full, names)
                known = {variant.kind for variant in found}
                screened = [record for record in ranked if record.fidelity != self.method.settings.fidelity]
                rest = [each for each in _averages(screened, names) if each.kind not in known]
                found += [replace(each, search=math.nan) for each in rest]
            made = [record for record in full if record.key not in names] or full[:1]
            made = made[: self.method.settings.finalists]
            found += [Variant(f"{kind} {r.index}", kind, r.candidate, float(r.score or 0.0)) for r in made]
        kept: list[Variant] = []
        for variant in found:
            limit = self.method.settings.finalists if variant.kind in self.results else BEST_OF_KIND
            if variant.kind == "power":
                variant = Variant(variant.name, "power ema", variant.weights, variant.search)
            if sum(other.kind == variant.kind for other in kept) < limit:
                kept.append(variant)
        return kept

    def _tracked(self) -> list[Variant]:
        """The best averages that the training tracked, and of those that are made of what it saved on its way."""
        if self.averages is None:
            return []
        tracked = read_averages(self.averages, self.space.trajectory.shapes)
        kept: list[Variant] = []
        for kind, named in (
            (TRACKED, {f"{TRACKED} {average.rate:.6g}": average for average in tracked}),
            (POST_HOC, {f"{POST_HOC} {average.sigma_rel:.3g}": average for average in self.post_hoc}),
        ):
            scores = self.judge(list(named.values()), "search", self.method.settings.fidelity)
            found = [Variant(name, kind, named[name], score) for name, score in zip(named, scores, strict=True)]
            kept += sorted(found, key=lambda variant: variant.search)[:BEST_OF_KIND]
        return kept

    def _descended(self) -> list[Variant]:
        """What gradient descent makes of the newest checkpoint and of the best combination."""
        settings, best = self.method.gradient, self.results[LCSC].best
        if settings is None or best is None:
            return []
        starts = [self.space.initial_candidates()[0], best.candidate]
        pieces = [partial(descended, self, settings, start) for start in starts]
        work = [partial(self.evaluations.inside, self.module, piece) for piece in pieces]
        found = [end for end in in_turn(self.evaluations, work) if end is not None]
        scores = self.judge(found, "search", self.method.settings.fidelity)
        return [
            Variant(f"{GRADIENT} {number}", GRADIENT, each, score)
            for number, (each, score) in enumerate(zip(found, scores, strict=True))
        ]

    def apply(self, weights: Weights) -> None:
        """Write weights into the module."""
        if isinstance(weights, Combination):
            self.space.apply(self.module, weights)
            return
        live: Mapping[str, Any] = self.module.live_weights()
        self.space.mixer(self.module)  # which keeps the original weights
        with torch.no_grad():
            for name, value in weights.tensors.items():
                live[name].copy_(value)

    def judge(self, weights: Sequence[Weights], draw: str, count: int) -> list[float]:
        """Scores on a draw, lower is better; infinite where a measurement fails."""
        objective = self.objective(draw)

        def one(given: Weights) -> float:
            try:
                score = self.measured(objective, given, count).score
            except (ValueError, FloatingPointError, RuntimeError) as error:
                if is_lost(error):
                    raise
                return math.inf
            return math.inf if math.isnan(score) else score

        pieces: list[Callable[[], float]] = [partial(one, each) for each in weights]
        return in_turn(self.evaluations, pieces)

    def measured(self, objective: MetricObjective, weights: Weights, count: int) -> Evaluation:
        """The score and the metrics of weights on so many samples."""
        self.apply(weights)
        return objective.evaluate_applied(count)

    def report(self, weights: Weights) -> dict[str, float]:
        """Every metric on the report draw, against the real images that had no part in the search."""
        objective = self.objective("report")
        found = self.measured(objective, weights, self.datamodule.num_samples).facts
        return {name: float(value) for name, value in found.items()}


def _averages(ranked: Sequence[Record[Combination]], names: Mapping[str, str]) -> list[Variant]:
    """The usual averages among records, in their order.

    Args:
        ranked: with scores.
        names: of the averages, by key.
    """
    found = [(names[record.key], record) for record in ranked if record.key in names]
    return [Variant(name, name.split(" ")[0], record.candidate, float(record.score or 0.0)) for name, record in found]
