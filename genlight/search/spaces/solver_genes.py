"""The genes of a solver schedule: small edits of a draft, and parts of two drafts put together.

A draft is the schedule taken apart: λ of its times (±inf at infinite ends) and its decisions. Edits leave a draft whose
decisions fit each other; what they make impossible elsewhere (history, ends) is cut back when the draft is finished.
The edits are those of S³ (Liu et al. 2024, arXiv 2312.07243).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from genlight.diffusion.solver.decisions import (
    AnalyticalFirstStep,
    Corrector,
    LinearScale,
    PredictionSpace,
    Scale,
    StepDecision,
    nearest_points,
)
from genlight.diffusion.solver.phi import bh1, bh2, expm1
from genlight.search.spaces.solver_times import Generator, Lambdas, TimeRange

SCALES: tuple[Scale, ...] = (1.0, "bh1", "bh2", "exp", "minus_exp")
_ORDER_ODDS = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1}
_FIRST_DERIVATIVE_ODDS = 0.7
# standard deviation of an edit of ω at full size, or of a plain factor
_OMEGA_DEVIATION = 0.13
# a factor of another step or sign must not blow a step up
_SCALE_RANGE = (-3.0, 3.0)
_MAX_SOURCE = 3


@dataclass
class Draft:
    """A schedule taken apart: λ [N + 1] and N decisions, and how far its space lets them go."""

    lambdas: Lambdas
    steps: list[StepDecision]
    range: TimeRange
    max_order: int
    afs: AnalyticalFirstStep | None = None
    mean_first_step: bool = False

    def length(self, index: int) -> float:
        """h of a step from its source; infinite at an infinite end."""
        return float(self.lambdas[index + 1] - self.lambdas[max(0, index + 1 + self.steps[index].source)])

    def split(self, index: int, prediction: PredictionSpace) -> None:
        """A step more: of order 2 at most, to the middle of the one at `index`."""
        bounds = self.lambdas[index : index + 2].clip(self.range.low, self.range.high)
        self.steps.insert(index, with_order(StepDecision(prediction), min(2, index + 1), index + 1))
        self.lambdas = self.range.settle(np.insert(self.lambdas, index + 1, bounds.mean()))

    def remove(self, index: int) -> None:
        """A step less, not the last."""
        del self.steps[index]
        self.lambdas = np.delete(self.lambdas, index + 1)

    def widest(self) -> int:
        """The step with the largest finite h."""
        gaps = np.diff(self.lambdas)
        return int(np.argmax(np.where(np.isfinite(gaps), gaps, -1.0)))

    def implicit(self) -> list[int]:
        """The steps that cost two evaluations."""
        return [i for i, step in enumerate(self.steps) if step.corrector and step.corrector.kind == "implicit"]


def factor(scale: Scale, h: float, prediction: PredictionSpace) -> float:
    """The number c that a scale stands for in a step of length h, which is finite where the scale depends on it."""
    if isinstance(scale, float):
        return scale
    if isinstance(scale, LinearScale):
        return 1 + scale.omega * h
    z = h if prediction == "noise" else -h
    if scale in ("bh1", "bh2"):
        return float(bh1(z) if scale == "bh1" else bh2(z))
    return float(1 + 0.5 * expm1(z) if scale == "exp" else 1 - 0.5 * expm1(z))


def scale_value(scale: Scale, h: float, prediction: PredictionSpace) -> float:
    """The factor c that a scale stands for in a step of length h, within [-3, 3]; 1 where h is infinite."""
    if isinstance(scale, float):
        return scale
    if not math.isfinite(h):
        return 1.0
    return min(max(factor(scale, h, prediction), _SCALE_RANGE[0]), _SCALE_RANGE[1])


def edit_time(draft: Draft, rng: Generator, size: float) -> bool:
    """Move one time by a Gaussian of `size` × the smaller gap to its neighbours."""
    movable = draft.range.movable(draft.lambdas)
    if not movable:
        return False
    index = int(rng.choice(movable))
    gaps = np.diff(draft.lambdas)[max(0, index - 1) : index + 1]
    # the gap to an infinite end says nothing
    gap = min((float(gap) for gap in gaps if math.isfinite(gap)), default=1.0)
    moved = draft.lambdas.copy()
    moved[index] += rng.normal() * size * max(gap, draft.range.min_gap)
    draft.lambdas = draft.range.settle(moved)
    return True


def edit_type(draft: Draft, rng: Generator, size: float) -> bool:
    """Flip noise and data in one step."""
    index = int(rng.integers(len(draft.steps)))
    step = draft.steps[index]
    draft.steps[index] = replace(step, prediction="data" if step.prediction == "noise" else "noise")
    return True


def edit_order(draft: Draft, rng: Generator, size: float) -> bool:
    """Another order for one step that has a history."""
    if len(draft.steps) < 2 or draft.max_order < 2:
        return False
    index = int(rng.integers(1, len(draft.steps)))
    step = draft.steps[index]
    orders = [n for n in range(1, min(draft.max_order, index + 1) + 1) if n != step.order or step.weights]
    if not orders:
        return False
    odds = np.array([_ORDER_ODDS[n] for n in orders])
    draft.steps[index] = with_order(step, int(rng.choice(orders, p=odds / odds.sum())), index + 1)
    return True


def edit_low_order(draft: Draft, rng: Generator, size: float) -> bool:
    """Another number of points for one derivative below the highest; fewer than order - 1 is low-order estimation."""
    possible = [i for i, step in enumerate(draft.steps) if step.order >= 3 and step.weights is None]
    if not possible:
        return False
    index = int(rng.choice(possible))
    step = draft.steps[index]
    k = int(rng.integers(1, step.order - 1))
    counts = [n for n in range(k, step.order) if n != len(step.points[k - 1])]
    chosen = nearest_points(int(rng.choice(counts)) + 1, step.source, index + 1)[0]
    points = (*step.points[: k - 1], chosen, *step.points[k:])
    draft.steps[index] = replace(step, points=points, corrector=plain_corrector(step.corrector, step))
    return True


def edit_scale(draft: Draft, rng: Generator, size: float) -> bool:
    """Another factor of one derivative: one of the named ones, or the old one as 1 + ω h with ω moved."""
    possible = [i for i, step in enumerate(draft.steps) if step.order >= 2]
    if not possible:
        return False
    index = int(rng.choice(possible))
    step = draft.steps[index]
    if step.weights is not None:
        # the weights keep their sum: a constant output stays exact
        moved = np.array(step.weights[1:]) + rng.normal(size=step.order - 1) * _OMEGA_DEVIATION * size
        weights = (sum(step.weights) - float(moved.sum()), *moved.tolist())
        draft.steps[index] = replace(step, weights=weights)
        return True
    k = 0 if step.order == 2 or rng.random() < _FIRST_DERIVATIVE_ODDS else int(rng.integers(1, step.order - 1))
    scales = [*step.scales, *[1.0] * (step.order - 1 - len(step.scales))]
    scales[k] = _other_scale(scales[k], step, draft.length(index), rng, size)
    draft.steps[index] = replace(step, scales=tuple(scales))
    return True


def edit_corrector(draft: Draft, rng: Generator, size: float) -> bool:
    """Add or remove a free corrector, or change its c_1; one that costs an evaluation stays."""
    if len(draft.steps) < 2:
        return False
    index = int(rng.integers(len(draft.steps) - 1))
    step, old = draft.steps[index], draft.steps[index].corrector
    if old is None:
        scale: Scale = 1.0 if step.variable == "sigma" else SCALES[int(rng.integers(3))]
        draft.steps[index] = replace(step, corrector=Corrector(scales=(scale,)))
        return True
    if old.kind == "pseudo" and (old.weights is not None or rng.random() < 0.5):
        draft.steps[index] = replace(step, corrector=None)
        return True
    if old.weights is not None or not step.corrector_points():
        return False
    first = old.scales[0] if old.scales else 1.0
    scales = (_other_scale(first, step, draft.length(index), rng, size), *old.scales[1:])
    draft.steps[index] = replace(step, corrector=replace(old, scales=scales))
    return True


def edit_source(draft: Draft, rng: Generator, size: float) -> bool:
    """Start one step from another stored evaluation: older than the latest is a singlestep solver."""
    if len(draft.steps) < 2:
        return False
    index = int(rng.integers(1, len(draft.steps)))
    step = draft.steps[index]
    sources = [-k for k in range(1, min(_MAX_SOURCE, index + 1) + 1) if -k != step.source]
    changed = replace(step, source=-1, order=1, points=(), weights=None, corrector=None, scales=())
    changed = replace(changed, source=int(rng.choice(sources)))
    changed = with_order(changed, step.order, index + 1)
    scales = step.scales if step.weights is None else ()
    draft.steps[index] = replace(changed, scales=scales, corrector=plain_corrector(step.corrector, changed))
    return True


def edit_variable(draft: Draft, rng: Generator, size: float) -> bool:
    """Expand one step in the other variable, λ or σ/(α + σ)."""
    index = int(rng.integers(len(draft.steps)))
    step = draft.steps[index]
    if step.variable == "sigma":
        draft.steps[index] = replace(step, variable="half_log_snr")
        return True
    h = draft.length(index)
    corrector = step.corrector
    if corrector is not None:
        values = tuple(scale_value(scale, h, step.prediction) for scale in corrector.scales)
        corrector = replace(corrector, scales=values)
    scales = tuple(scale_value(scale, h, step.prediction) for scale in step.scales)
    draft.steps[index] = replace(step, variable="sigma", scales=scales, corrector=corrector)
    return True


def edit_implicit(draft: Draft, rng: Generator, size: float) -> bool:
    """Exchange a step for a corrector that costs an evaluation, or back: their sum stays."""
    implicit = draft.implicit()
    if implicit and rng.random() < 0.5:
        index = int(rng.choice(implicit))
        step = draft.steps[index]
        draft.steps[index] = replace(step, corrector=None)
        where = draft.widest() if rng.random() < 0.5 else int(rng.integers(len(draft.steps)))
        draft.split(where, step.prediction)
        return True
    # neither the last step, which has no corrector, nor one that costs two evaluations already
    free = [i for i in range(len(draft.steps) - 1) if i not in implicit]
    if len(free) < 2:
        return False
    index, gone = (int(i) for i in rng.choice(free, size=2, replace=False))
    draft.steps[index] = replace(draft.steps[index], corrector=Corrector("implicit"))
    draft.remove(gone)
    return True


def edit_afs(draft: Draft, rng: Generator, size: float) -> bool:
    """Another analytical first step; the evaluation that it saves is a step more, and without one a step less."""
    kinds: tuple[AnalyticalFirstStep | None, ...] = (None, "zero", "mean") if draft.mean_first_step else (None, "zero")
    others = [kind for kind in kinds if kind != draft.afs]
    kind = others[int(rng.integers(len(others)))]
    if kind is None:
        implicit = draft.implicit()
        free = [i for i in range(len(draft.steps) - 1) if i not in implicit]
        if not free:
            return False
        draft.remove(free[int(rng.integers(len(free)))])
    elif draft.afs is None:
        where = draft.widest()
        draft.split(where, draft.steps[where].prediction)
    draft.afs = kind
    return True


Edit = Callable[[Draft, Generator, float], bool]
EDITS: dict[str, Edit] = {
    "times": edit_time,
    "type": edit_type,
    "order": edit_order,
    "low_order": edit_low_order,
    "scale": edit_scale,
    "corrector": edit_corrector,
    "source": edit_source,
    "variable": edit_variable,
    "implicit": edit_implicit,
    "afs": edit_afs,
}


def with_order(step: StepDecision, order: int, stored: int) -> StepDecision:
    """The step with another order and the nearest points, for `stored` evaluations; explicit weights are dropped."""
    order = min(order, stored)
    scales = () if step.weights is not None else step.scales[: order - 1]
    points = nearest_points(order, step.source, stored) if order > 1 else ()
    bare = replace(step, order=order, points=points, scales=scales, weights=None, corrector=None)
    return replace(bare, corrector=plain_corrector(step.corrector, bare))


def plain_corrector(corrector: Corrector | None, step: StepDecision) -> Corrector | None:
    """The corrector with the points of `step` and the factors that make sense there."""
    if corrector is None:
        return None
    scales: tuple[Scale, ...] = () if corrector.weights is not None else corrector.scales[: step.order]
    if step.variable == "sigma":
        scales = tuple(scale if isinstance(scale, float) else 1.0 for scale in scales)
    return Corrector(corrector.kind, scales)


def _other_scale(scale: Scale, step: StepDecision, h: float, rng: Generator, size: float) -> Scale:
    if step.variable == "half_log_snr" and rng.random() < 0.5:
        others = [other for other in SCALES if other != scale]
        return others[int(rng.integers(len(others)))]
    value = scale_value(scale, h, step.prediction)
    move = float(rng.normal()) * _OMEGA_DEVIATION * size
    if step.variable == "sigma" or not math.isfinite(h):
        return value + move
    return LinearScale((value - 1) / h + move)


@dataclass(frozen=True)
class Crossing:
    """Parts of two drafts put together; which parts may be taken from the second is said by the genes.

    Attributes:
        times: times may come from both.
        decisions: decisions may come from both.
    """

    times: bool = True
    decisions: bool = True
    whole_field_odds: float = field(default=0.5)

    def cross(self, a: Draft, b: Draft, rng: Generator) -> Draft:
        """A new draft: step by step, or whole fields (times, types, orders with their points, correctors)."""
        count = len(a.steps)
        same = len(b.steps) == count
        other = b.lambdas if same else resampled(b, count, a.lambdas)
        pick = rng.random(count) < 0.5
        whole = rng.random() < self.whole_field_odds
        lambdas = a.lambdas.copy()
        if self.times:
            if whole:
                share = float(rng.choice([0.0, 1.0])) if self.decisions and same else float(rng.random())
                inner = share * a.lambdas[1:-1] + (1 - share) * other[1:-1]
            else:
                inner = np.where(pick[:-1], other[1:-1], a.lambdas[1:-1])
            lambdas[1:-1] = inner
            for end in (0, -1):
                if math.isfinite(lambdas[end]) and math.isfinite(other[end]) and pick[end]:
                    lambdas[end] = other[end]
            lambdas = a.range.settle(lambdas)
        steps = list(a.steps)
        if self.decisions and same:
            if whole:
                fields = rng.random(3) < 0.5
                steps = [_mixed(x, y, fields) for x, y in zip(a.steps, b.steps)]
            else:
                steps = [y if taken else x for x, y, taken in zip(a.steps, b.steps, pick)]
        return replace(a, lambdas=lambdas, steps=steps)


def _mixed(a: StepDecision, b: StepDecision, fields: np.ndarray) -> StepDecision:
    """Step a with the type, the expansion (order, points, factors travel together) or the corrector of b."""
    typed, expanded, corrected = (bool(value) for value in fields)
    base = b if expanded else a
    step = replace(base, prediction=b.prediction if typed else a.prediction)
    other = b.corrector if corrected else a.corrector
    if corrected == expanded:
        return step
    step = replace(step, corrector=None)
    return replace(step, corrector=plain_corrector(other, step))


def resampled(draft: Draft, count: int, like: Lambdas) -> Lambdas:
    """The times of a draft at `count` steps, linear between its own; an end is its own where `like` is finite too."""
    finite = draft.lambdas.clip(draft.range.low, draft.range.high)
    result: Lambdas = np.interp(np.linspace(0, 1, count + 1), np.linspace(0, 1, len(finite)), finite)
    for end in (0, -1):
        both = math.isfinite(like[end]) and math.isfinite(draft.lambdas[end])
        result[end] = draft.lambdas[end] if both else like[end]
    return result
