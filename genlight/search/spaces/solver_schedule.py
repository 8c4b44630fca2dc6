"""The space of solver schedules with a fixed number of network evaluations, on one noise schedule."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import MAX_ORDER, SolverSchedule, StepDecision, nearest_points
from genlight.diffusion.solver.edits import fitted
from genlight.diffusion.solver.levels import levels_of
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.serialization import canonical_key
from genlight.diffusion.solver.spacings import End
from genlight.search.protocols import SettableSampler, Vector, require_capability
from genlight.search.spaces.solver_genes import EDITS, Crossing, Draft, Lambdas, TimeRange, resampled, scale_value

DECISIONS: tuple[str, ...] = ("type", "order", "low_order", "scale", "corrector")
ALL_GENES: tuple[str, ...] = ("times", *DECISIONS)
MIN_GAP = 0.05
# inner times before an infinite end of λ stay below this size: σ/α from 1e-3 to 1e3
_OPEN_END = math.log(1e3)
_TIME_ODDS = 3.0
_MAX_EDITS = 3
_TRIES = 20
# room in λ that softmax coordinates have beyond an infinite end, so that a time may lie at its bound
_VECTOR_ROOM = 1.0
_KEY_DIGITS = 16


@dataclass(frozen=True, eq=False)
class TableSampler:
    """A schedule ready to sample with; what `SettableSampler.set_sampler` is given.

    Attributes:
        schedule: the decisions.
        table: they compiled on the noise schedule.
    """

    schedule: SolverSchedule
    table: SolverTable

    def __call__(
        self, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, prediction: Prediction, **options: Any
    ) -> Tensor:
        """Samples [B, ...] from standard normal noise [B, ...]; arguments and errors are those of `solver.sample`."""
        return sample(model, noise, self.table, prediction, **options)


@dataclass(frozen=True)
class SolverScheduleSpace:
    """Solver schedules of one NFE; candidates are `SolverSchedule`.

    Attributes:
        noise_schedule: what the times are times of.
        nfe: network evaluations of every candidate.
        genes: which decisions may change, of `solver_genes.EDITS`: "times", "type", "order", "low_order", "scale",
            "corrector", and, only where named, "source" (singlestep), "variable" (expansion in σ/(α + σ)) and
            "implicit" (a step for a corrector with an evaluation of its own).
        end: where schedules end, see `spacings.grid`.
        max_order: highest order that edits give.
        min_gap: smallest step in λ that edits of times leave.
        start_slack, end_slack: how far, in λ, the first time may rise and the last fall; 0: that end is fixed.
        integer_times: times are whole numbers of the noise schedule's time, for networks that look them up.
        template: decisions of random candidates where they are no genes, and of `from_vector`; None: DPM-Solver++(2M).
    """

    noise_schedule: NoiseSchedule
    nfe: int
    genes: tuple[str, ...] = ALL_GENES
    end: End = "t_min"
    max_order: int = 3
    min_gap: float = MIN_GAP
    start_slack: float = 0.0
    end_slack: float = 0.0
    integer_times: bool = False
    template: SolverSchedule | None = field(default=None, repr=False)

    candidate_type = SolverSchedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "genes", tuple(self.genes))
        unknown = [gene for gene in self.genes if gene not in EDITS]
        if unknown or not self.genes:
            raise ValueError(f"space.genes = {self.genes!r} must be some of {', '.join(EDITS)}")
        if self.nfe < 1:
            raise ValueError(f"space.nfe = {self.nfe} must be 1 or more")
        if not 1 <= self.max_order <= MAX_ORDER:
            raise ValueError(f"space.max_order = {self.max_order} must be 1 to {MAX_ORDER}")
        if not self.min_gap > 0 or not self.start_slack >= 0 or not self.end_slack >= 0:
            raise ValueError("space: min_gap must be positive, start_slack and end_slack not negative")
        if self.end not in ("t_min", "clean"):
            raise ValueError(f"space.end = {self.end!r}; known are t_min and clean")
        for name, slack, end in (
            ("start_slack", self.start_slack, self.range.start),
            ("end_slack", self.end_slack, self.range.end),
        ):
            if slack > 0 and math.isinf(end):
                raise ValueError(
                    f"space.{name} = {slack}: that end of {self.noise_schedule!r} is infinite and cannot move"
                )
        if self.integer_times and self.noise_schedule.family != "vp":
            raise ValueError(f"space.integer_times: times of {self.noise_schedule!r} are no whole numbers")
        if self.template is not None and self.template.nfe != self.nfe:
            raise ValueError(f"space.template makes {self.template.nfe} evaluations, not {self.nfe}")

    @cached_property
    def range(self) -> TimeRange:
        """Bounds of the times, in λ."""
        schedule = self.noise_schedule
        start, last = schedule.half_log_snr(schedule.t_max), schedule.half_log_snr(schedule.t_min)
        end = math.inf if self.end == "clean" else last
        low = start if math.isfinite(start) else -_OPEN_END
        high = last if math.isfinite(last) else _OPEN_END
        return TimeRange(start, end, self.start_slack, self.end_slack, low, high, self.min_gap)

    def sample(self, rng: np.random.Generator) -> SolverSchedule:
        """Random times and, where they are genes, random decisions."""
        draft = self._draft(self._template)
        if "times" in self.genes:
            walls = self._walls(draft)
            gaps = rng.dirichlet(np.full(len(draft.steps), 3.0))
            lambdas = walls[0] + (walls[1] - walls[0]) * np.concatenate([[0.0], gaps.cumsum()])
            lambdas[0], lambdas[-1] = draft.lambdas[0], draft.lambdas[-1]
            draft.lambdas = self.range.settle(lambdas)
        decisions = [gene for gene in self.genes if gene != "times"]
        for _ in range(3 * len(draft.steps) if decisions else 0):
            self._edit(draft, str(rng.choice(decisions)), rng, 1.0)
        return self._finished(draft, self._template)

    def mutate(self, candidate: SolverSchedule, rng: np.random.Generator, *, size: float = 1.0) -> SolverSchedule:
        """One to three genes changed; an edit of a time is a Gaussian of `size` × the smaller neighbouring gap in λ."""
        odds = np.array([_TIME_ODDS if gene == "times" else 1.0 for gene in self.genes])
        odds /= odds.sum()
        for _ in range(_TRIES):
            draft = self._draft(candidate)
            wanted = int(rng.integers(1, _MAX_EDITS + 1))
            done = sum(self._edit(draft, str(gene), rng, size) for gene in rng.choice(self.genes, wanted, p=odds))
            if done:
                return self._finished(draft, candidate)
        return candidate

    def crossover(self, a: SolverSchedule, b: SolverSchedule, rng: np.random.Generator) -> SolverSchedule:
        """Step by step, or whole fields. Parents with another number of steps, as implicit correctors give, lend times.

        Only genes come from `b`.
        """
        crossing = Crossing("times" in self.genes, any(gene != "times" for gene in self.genes))
        first, second = self._draft(a), self._draft(b)
        child = self._finished(crossing.cross(first, second, rng), a)
        if child.nfe == self.nfe:
            return child
        # implicit correctors of both met: decisions stay those of one parent
        return self._finished(replace(crossing, decisions=False).cross(first, second, rng), a)

    def cost(self, candidate: SolverSchedule) -> dict[str, float]:
        """The network evaluations."""
        return {"nfe": float(candidate.nfe)}

    def key(self, candidate: SolverSchedule) -> str:
        """Equal for schedules with one table, up to rounding of λ; see `schedule_key`."""
        return schedule_key(candidate, self.noise_schedule)

    def fingerprint(self) -> str:
        """The noise schedule and every option, as JSON."""
        options = {
            "space": "solver_schedule",
            "noise_schedule": self.noise_schedule.fingerprint(),
            "nfe": self.nfe,
            "genes": self.genes,
            "end": self.end,
            "max_order": self.max_order,
            "min_gap": self.min_gap,
            "slack": [self.start_slack, self.end_slack],
            "integer_times": self.integer_times,
            "template": None if self.template is None else self.key(self.template),
        }
        return json.dumps(options, sort_keys=True)

    def apply(self, target: Any, candidate: SolverSchedule) -> None:
        """Hand the compiled schedule to `target.set_sampler`. Raises UserError if it has none."""
        require_capability(target, SettableSampler, self)
        target.set_sampler(TableSampler(candidate, compile_schedule(candidate, self.noise_schedule)))

    def encode(self, candidate: SolverSchedule) -> Tensor:
        """Float32 [steps, 23]: times, one-hot choices, and what the factors amount to in each step."""
        draft = self._draft(candidate)
        lambdas = draft.lambdas.clip(self.range.low - _VECTOR_ROOM, self.range.high + _VECTOR_ROOM)
        rows = [_features(step, i, draft, lambdas) for i, step in enumerate(draft.steps)]
        return torch.tensor(rows, dtype=torch.float32)

    @property
    def vector_bounds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """No bounds: coordinates are logarithms of the N - 1 first gaps in λ over the last one, float64 [N - 1, 2]."""
        return np.tile([-np.inf, np.inf], (len(self._template.steps) - 1, 1))

    def to_vector(self, candidate: SolverSchedule) -> Vector:
        """The times; decisions are left out. Other numbers of steps than the template's are interpolated."""
        draft, template = self._draft(candidate), self._draft(self._template)
        if len(draft.steps) != len(template.steps):
            draft = replace(template, lambdas=resampled(draft, len(template.steps), template.lambdas))
        low, high = self._walls(draft)
        walled = np.concatenate([[low], draft.lambdas[1:-1], [high]])
        gaps = np.diff(walled) - self._vector_gap(low, high, len(draft.steps))
        gaps = np.maximum(gaps, 1e-6)
        vector: Vector = np.log(gaps[:-1] / gaps[-1])
        return vector

    def from_vector(self, vector: Vector) -> SolverSchedule:
        """The template's decisions at the times of a point."""
        draft = self._draft(self._template)
        low, high = self._walls(draft)
        count = len(draft.steps)
        logits = np.append(np.asarray(vector, dtype=np.float64), 0.0)
        weights = np.exp(logits - logits.max())
        gap = self._vector_gap(low, high, count)
        gaps = gap + (high - low - count * gap) * weights / weights.sum()
        lambdas = draft.lambdas.copy()
        lambdas[1:-1] = low + gaps.cumsum()[:-1]
        draft.lambdas = self.range.settle(lambdas)
        return self._finished(draft, self._template)

    @cached_property
    def _template(self) -> SolverSchedule:
        """Decisions to begin with, on even λ."""
        if self.template is not None:
            return self.template
        low, high = self.range.low, self.range.high
        times: list[float | None] = [*np.linspace(low, high, self.nfe + 1).tolist()]
        if self.end == "clean" and math.isfinite(self.noise_schedule.half_log_snr(self.noise_schedule.t_min)):
            times = [*np.linspace(low, high, self.nfe).tolist(), None] if self.nfe > 1 else [low, None]
        times[0] = self.range.start if math.isfinite(self.range.start) else None
        times[-1] = self.range.end if math.isfinite(self.range.end) else None
        last = self.nfe - 1
        steps = [
            StepDecision("data", 2, points=nearest_points(2), scales=("bh2",)) if 0 < i < last else StepDecision("data")
            for i in range(self.nfe)
        ]
        return SolverSchedule(tuple(times), tuple(steps))

    def _draft(self, candidate: SolverSchedule) -> Draft:
        if candidate.time_domain == "half_log_snr":
            ends = (-math.inf, math.inf)
            times = [ends[i > 0] if time is None else time for i, time in enumerate(candidate.times)]
        else:
            times = [level.half_log_snr for level in levels_of(candidate, self.noise_schedule)]
        return Draft(np.array(times, dtype=np.float64), list(candidate.steps), self.range, self.max_order)

    def _edit(self, draft: Draft, gene: str, rng: np.random.Generator, size: float) -> bool:
        done = EDITS[gene](draft, rng, size)
        if done:
            draft.steps = self._repaired(draft)
        return done

    def _repaired(self, draft: Draft) -> list[StepDecision]:
        """Decisions cut back to what history and ends allow."""
        steps = fitted(draft.steps, [None if math.isinf(time) else float(time) for time in draft.lambdas])
        return [
            # a noise-type expansion from pure noise has no value
            replace(step, prediction="data")
            if draft.lambdas[max(0, i + 1 + step.source)] == -math.inf and _expands(step)
            else step
            for i, step in enumerate(steps)
        ]

    def _finished(self, draft: Draft, parent: SolverSchedule) -> SolverSchedule:
        """The draft as a schedule; times are the parent's own numbers where they did not change."""
        steps = tuple(self._repaired(draft))
        unchanged = len(parent.times) == len(draft.lambdas) and np.array_equal(
            self._draft(parent).lambdas, draft.lambdas
        )
        if unchanged and (self.integer_times or parent.time_domain == "half_log_snr"):
            return replace(parent, steps=steps)
        if self.integer_times:
            return SolverSchedule(self._on_integers(draft.lambdas), steps, "time", parent.afs)
        times = tuple(None if math.isinf(time) else float(time) for time in draft.lambdas)
        return SolverSchedule(times, steps, "half_log_snr", parent.afs)

    def _on_integers(self, lambdas: Lambdas) -> tuple[float | None, ...]:
        """Falling whole times nearest to λ."""
        schedule = self.noise_schedule
        finite = torch.from_numpy(lambdas.clip(self.range.low, self.range.high))
        times = schedule.t_of_half_log_snr(finite).round().numpy()
        if lambdas[0] == -math.inf:
            times[0] = schedule.t_max
        clean = lambdas[-1] == math.inf
        last = len(times) - (2 if clean else 1)
        for i in range(1, last + clean):
            times[i] = min(times[i], times[i - 1] - 1)
        lowest = schedule.t_min + np.arange(last - 1, -1, -1) if clean else times[last] + np.arange(last - 1, 0, -1)
        times[1 : last + clean] = np.maximum(times[1 : last + clean], lowest)
        if last > 0 and times[1] >= times[0]:
            raise ValueError(f"space.nfe = {self.nfe}: {schedule!r} has not so many whole times")
        plain: list[float | None] = times.tolist()
        return (*plain[:-1], None) if clean else tuple(plain)

    def _walls(self, draft: Draft) -> tuple[float, float]:
        """λ between which the gaps of all steps are shared out."""
        low, high = float(draft.lambdas[0]), float(draft.lambdas[-1])
        return (
            low if math.isfinite(low) else self.range.low - _VECTOR_ROOM,
            high if math.isfinite(high) else self.range.high + _VECTOR_ROOM,
        )

    def _vector_gap(self, low: float, high: float, count: int) -> float:
        return min(self.min_gap, (high - low) / (2 * count))


def schedule_key(schedule: SolverSchedule, noise_schedule: NoiseSchedule) -> str:
    """Sixteen hexadecimal digits: `canonical_key` of the schedule without differences that make none.

    A step of order 1 is the same for noise and data unless its source was corrected.
    """
    steps = list(schedule.steps)
    for i, step in enumerate(steps):
        before = i + step.source  # the step that led to the source
        corrected = before >= 0 and steps[before].corrector is not None
        if not _expands(step) and not corrected:
            steps[i] = replace(step, prediction="data", variable="half_log_snr")
    return canonical_key(replace(schedule, steps=tuple(steps)), noise_schedule)[:_KEY_DIGITS]


def _expands(step: StepDecision) -> bool:
    """Whether more than the source's own output enters."""
    return step.order > 1 or step.weights is not None or step.corrector is not None


def _features(step: StepDecision, index: int, draft: Draft, lambdas: Lambdas) -> list[float]:
    count = len(draft.steps)
    h = float(lambdas[index + 1] - lambdas[index])
    factors = [0.0, 0.0]
    for k, scale in enumerate((*step.scales, 1.0, 1.0)[: min(2, step.order - 1)]):
        factors[k] = scale_value(scale, h, step.prediction)
    points = [float(len(step.points[k])) if k < len(step.points) else 0.0 for k in range(2)]
    weights = [*(step.weights or ()), 0.0, 0.0, 0.0][:3]
    corrector, corrected = step.corrector, 0.0
    if corrector is not None:
        corrected = scale_value(corrector.scales[0] if corrector.scales else 1.0, h, step.prediction)
    return [
        index / count,
        float(lambdas[index]),
        float(lambdas[index + 1]),
        h,
        math.log(max(h, 1e-3)),
        float(step.prediction == "noise"),
        *(float(step.order == n) for n in range(1, MAX_ORDER + 1)),
        float(-step.source),
        *points,
        *factors,
        float(step.variable == "sigma"),
        *weights,
        float(corrector is not None),
        float(corrector is not None and corrector.kind == "implicit"),
        corrected,
        1 / count,
    ]
