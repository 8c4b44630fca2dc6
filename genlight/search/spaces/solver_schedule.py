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
from genlight.diffusion.solver.spacings import End, are_integers
from genlight.diffusion.solver.trajectory import TeacherTrajectories
from genlight.diffusion.solver.truncation import KnownSolutions
from genlight.search.protocols import SettableSampler, Vector, require_capability
from genlight.search.spaces.solver_continuous import ContinuousGenes
from genlight.search.spaces.solver_genes import EDITS, Crossing, Draft, scale_value
from genlight.search.spaces.solver_times import OPEN_END_ROOM, Lambdas, TimeRange

DECISIONS: tuple[str, ...] = ("type", "order", "low_order", "scale", "corrector")
ALL_GENES: tuple[str, ...] = ("times", *DECISIONS)
MIN_GAP = 0.05
# inner times before an infinite end of λ stay below this size: σ/α from 1e-3 to 1e3
_OPEN_END = math.log(1e3)
_TIME_ODDS = 3.0
_MAX_EDITS = 3
_TRIES = 20
_KEY_DIGITS = 16


@dataclass(frozen=True, eq=False)
class TableSampler:
    """A schedule ready to sample with; what `SettableSampler.set_sampler` is given.

    Attributes:
        schedule: the decisions.
        table: they compiled on the noise schedule.
        integer_timesteps: as in `solver.sample`.
    """

    schedule: SolverSchedule
    table: SolverTable
    integer_timesteps: bool = False

    def __call__(
        self, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, prediction: Prediction, **options: Any
    ) -> Tensor:
        """Samples [B, ...] from standard normal noise [B, ...]; options and errors are those of `solver.sample`."""
        return sample(model, noise, self.table, prediction, integer_timesteps=self.integer_timesteps, **options)


@dataclass(frozen=True)
class SolverScheduleSpace:
    """Solver schedules of one NFE; candidates are `SolverSchedule`.

    Attributes:
        noise_schedule: what the times are times of.
        nfe: network evaluations of every candidate.
        genes: which decisions may change, of `solver_genes.EDITS`: "times", "type", "order", "low_order", "scale",
            "corrector", and, only where named, "source" (singlestep), "variable" (expansion in σ/(α + σ)),
            "implicit" (a step for a corrector with an evaluation of its own) and "afs" (a step for the first
            evaluation, which is then analytical).
        end: where schedules end, see `spacings.grid`.
        max_order: highest order that edits give.
        min_gap: smallest step in λ that edits of times leave.
        start_slack, end_slack: how far, in λ, the first time may rise and the last fall; 0: that end is fixed.
        integer_times: times are whole numbers of the noise schedule's time, for networks that look them up.
        mean_first_step: the gene "afs" may also take the mean image, which the sampler must then be given.
        template: decisions of random candidates where they are no genes, and of `from_vector`; None: DPM-Solver++(2M).
        trajectories: of the teacher, for `indicators`; None: they do without.
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
    mean_first_step: bool = False
    template: SolverSchedule | None = field(default=None, repr=False)
    trajectories: TeacherTrajectories | None = field(default=None, repr=False)

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
        if "afs" in self.genes and (self.noise_schedule.family == "flow" or math.isinf(self.range.start)):
            raise ValueError(
                f"space.genes: 'afs' on {self.noise_schedule!r} gives schedules that no diffusers scheduler can carry; "
                "leave it out"
            )
        if self.mean_first_step and "afs" not in self.genes:
            raise ValueError("space.mean_first_step needs the gene 'afs'")
        if self.start_slack + self.end_slack > 0 and not self.range.has_room():
            raise ValueError(
                f"space: start_slack = {self.start_slack} and end_slack = {self.end_slack} must leave some of the "
                f"{self.range.end - self.range.start:.4g} in λ between the ends"
            )
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
        draft = self.draft(self._template)
        if "times" in self.genes:
            draft.lambdas = self.range.draw(draft.lambdas, rng)
        decisions = [gene for gene in self.genes if gene != "times"]
        for _ in range(3 * len(draft.steps) if decisions else 0):
            self._edit(draft, str(rng.choice(decisions)), rng, 1.0)
        return self.finished(draft, self._template)

    def mutate(self, candidate: SolverSchedule, rng: np.random.Generator, *, size: float = 1.0) -> SolverSchedule:
        """One to three genes changed; an edit of a time is a Gaussian of `size` × the smaller neighbouring gap in λ."""
        odds = self._odds
        for _ in range(_TRIES):
            draft = self.draft(candidate)
            wanted = int(rng.integers(1, _MAX_EDITS + 1))
            drawn = rng.choice(len(odds), wanted, p=odds)
            done = sum(self._edit(draft, self.genes[i], rng, size) for i in drawn.tolist())
            if done:
                return self.finished(draft, candidate)
        return candidate

    def crossover(self, a: SolverSchedule, b: SolverSchedule, rng: np.random.Generator) -> SolverSchedule:
        """Step by step, or whole fields. Parents with another number of steps, as implicit correctors give, lend times.

        Only genes come from `b`.
        """
        crossing = Crossing("times" in self.genes, any(gene != "times" for gene in self.genes))
        first, second = self.draft(a), self.draft(b)
        child = self.finished(crossing.cross(first, second, rng), a)
        if child.nfe == self.nfe:
            return child
        # implicit correctors of both met: decisions stay those of one parent
        return self.finished(replace(crossing, decisions=False).cross(first, second, rng), a)

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
        if self.mean_first_step:
            options["mean_first_step"] = True
        if self.trajectories is not None:
            options["trajectories"] = self.trajectories.fingerprint
        return json.dumps(options, sort_keys=True)

    def apply(self, target: Any, candidate: SolverSchedule) -> None:
        """Hand the compiled schedule to `target.set_sampler`. Raises UserError if it has none."""
        require_capability(target, SettableSampler, self)
        table = compile_schedule(candidate, self.noise_schedule)
        target.set_sampler(TableSampler(candidate, table, self.integer_times))

    def encode(self, candidate: SolverSchedule) -> Tensor:
        """Float32 [steps, 25]: times, one-hot choices, and what the factors amount to in each step."""
        draft = self.draft(candidate)
        lambdas = draft.lambdas.clip(self.range.low - OPEN_END_ROOM, self.range.high + OPEN_END_ROOM)
        rows = [_features(step, i, draft, lambdas) for i, step in enumerate(draft.steps)]
        return torch.tensor(rows, dtype=torch.float32)

    @property
    def indicator_names(self) -> tuple[str, ...]:
        """Those of `trajectories`, or without them of `KnownSolutions`."""
        return self._cheap.names

    def indicators(self, candidate: SolverSchedule) -> Vector:
        """Logarithms of the errors that are predicted without the network, float64 [indicator_names]."""
        return self._cheap.log_errors(compile_schedule(candidate, self.noise_schedule))

    @cached_property
    def _cheap(self) -> TeacherTrajectories | KnownSolutions:
        return self.trajectories or KnownSolutions(self.noise_schedule, self.end)

    @property
    def vector_bounds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """No bounds, float64 [n, 2]; coordinates are those of `ContinuousGenes` for the template."""
        return self._continuous.vector_bounds

    def to_vector(self, candidate: SolverSchedule) -> Vector:
        """Times and factors, as far as they are genes; other decisions are left out. See `ContinuousGenes`."""
        return self._continuous.to_vector(candidate)

    def from_vector(self, vector: Vector) -> SolverSchedule:
        """The template's discrete decisions with the times and factors of a point."""
        return self._continuous.from_vector(vector)

    def around(self, candidate: SolverSchedule) -> "SolverScheduleSpace":
        """The same space with `candidate` as its template, so that its vectors are the continuous genes of `candidate`.

        Raises ValueError for another number of evaluations.
        """
        return replace(self, template=candidate)

    @cached_property
    def _continuous(self) -> ContinuousGenes:
        return ContinuousGenes(self, self._template)

    @cached_property
    def _odds(self) -> Vector:
        """How often each gene is edited."""
        odds: Vector = np.array([_TIME_ODDS if gene == "times" else 1.0 for gene in self.genes])
        odds /= odds.sum()
        return odds

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

    def draft(self, candidate: SolverSchedule) -> Draft:
        """The schedule taken apart, to be edited."""
        if candidate.time_domain == "half_log_snr":
            ends = (-math.inf, math.inf)
            times = [ends[i > 0] if time is None else time for i, time in enumerate(candidate.times)]
        else:
            times = [level.half_log_snr for level in levels_of(candidate, self.noise_schedule)]
        lambdas, steps = np.array(times, dtype=np.float64), list(candidate.steps)
        return Draft(lambdas, steps, self.range, self.max_order, candidate.afs, self.mean_first_step)

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

    def finished(self, draft: Draft, parent: SolverSchedule) -> SolverSchedule:
        """The draft as a schedule; times are the parent's own numbers where they did not change and are allowed."""
        steps = tuple(self._repaired(draft))
        unchanged = len(parent.times) == len(draft.lambdas) and np.array_equal(
            self.draft(parent).lambdas, draft.lambdas
        )
        whole = parent.time_domain == "time" and are_integers(parent.times)
        if unchanged and (whole if self.integer_times else parent.time_domain == "half_log_snr"):
            return replace(parent, steps=steps, afs=draft.afs)
        if self.integer_times:
            return SolverSchedule(self._on_integers(draft.lambdas), steps, "time", draft.afs)
        times = tuple(None if math.isinf(time) else float(time) for time in draft.lambdas)
        return SolverSchedule(times, steps, "half_log_snr", draft.afs)

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


def schedule_key(schedule: SolverSchedule, noise_schedule: NoiseSchedule) -> str:
    """Sixteen hexadecimal digits: `canonical_key` of the schedule without differences that make none.

    A step of order 1 is the same for noise and data unless its source was corrected.
    """
    steps = list(schedule.steps)
    for i, step in enumerate(steps):
        before = i + step.source  # the step that led to the source
        corrected = before >= 0 and steps[before].corrector is not None
        if not _expands(step) and not corrected:
            steps[i] = replace(step, prediction="data", variable="half_log_snr") if _is_other(step) else step
    return canonical_key(schedule, noise_schedule, steps=steps)[:_KEY_DIGITS]


def _is_other(step: StepDecision) -> bool:
    return step.prediction != "data" or step.variable != "half_log_snr"


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
        float(draft.afs is not None),
        float(draft.afs == "mean"),
    ]
