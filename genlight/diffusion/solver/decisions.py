"""A solver schedule: every decision of a diffusion ODE solver, step by step, as plain frozen values.

The space is that of USF (Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic
Models"). DDIM, DPM-Solver, DEIS, UniPC and PNDM are points of it (`presets`).

Notation: λ = ln(α/σ); one step goes from a source s to a target t, h = λ_t - λ_s > 0. m is the network's output as
noise ε̂ or data x̂_0. A step of order n expands m around s, with derivatives D_1 … D_{n-1} estimated from stored
evaluations:

    noise:  x_t = (α_t/α_s) x_s - σ_t Σ_{k<n} h^{k+1} φ_{k+1}(h) c_k D_k
    data:   x_t = (σ_t/σ_s) x_s + α_t Σ_{k<n} h^{k+1} φ_{k+1}(-h) c_k D_k        D_0 = m_s, c_0 = 1

Stored evaluations are named by negative numbers: -1 is the latest, -2 the one before, whatever the source.

Objects of this file are valid by construction: what can be judged without a noise schedule is checked when they are
made, and a bad value raises `ValueError` that names the field. The rest is checked by `compile_schedule`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args

PredictionSpace = Literal["noise", "data"]
Variable = Literal["half_log_snr", "sigma"]
ScaleName = Literal["bh1", "bh2", "exp", "minus_exp"]
CorrectorKind = Literal["pseudo", "implicit"]
TimeDomain = Literal["half_log_snr", "time"]
AnalyticalFirstStep = Literal["zero", "mean"]
MAX_ORDER = 4

# unknown fields and numbers that are not finite are errors when a schedule is read
_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False, "strict": True}


@dataclass(frozen=True)
class LinearScale:
    """c = 1 + omega · h; h counts as positive in both prediction spaces."""

    omega: float
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        object.__setattr__(self, "omega", _finite("omega", self.omega))


# a number is the factor itself; names are functions of z = h (noise) or -h (data): bh1 and bh2 see `phi`,
# exp is 1 + (e^z - 1)/2, minus_exp is 1 - (e^z - 1)/2
Scale = float | ScaleName | LinearScale


@dataclass(frozen=True)
class Corrector:
    """A second update of the same step after the evaluation at its target ("new").

    Args:
        kind: "pseudo" keeps the evaluation made at the predicted x (PEC, free); "implicit" evaluates again at the
            corrected x and stores that (PECE, one more evaluation).
        scales: factors c_1, c_2, … of the derivatives, 1 where none is given.
        points: the stored points of each derivative D_1, D_2, …, numbered as in the step; the new point always joins
            them. None: those of the step, and one derivative more from all of them (order n + 1).
        weights: explicit weights, as in `StepDecision`, for (source, *points, new).
    """

    kind: CorrectorKind = "pseudo"
    scales: tuple[Scale, ...] = ()
    points: tuple[tuple[int, ...], ...] | None = None
    weights: tuple[float, ...] | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _known("corrector.kind", self.kind, CorrectorKind)
        object.__setattr__(self, "scales", _scales("corrector.scales", self.scales))
        if self.weights is not None:
            object.__setattr__(self, "weights", _numbers("corrector.weights", self.weights))
            if self.scales:
                raise ValueError("corrector.scales: explicit weights leave nothing to scale; leave one of the two out")


@dataclass(frozen=True)
class StepDecision:
    """How one step is made.

    Args:
        prediction: "noise" or "data", the output that is expanded.
        order: n, 1 to 4, the number of terms; with explicit weights the number of evaluations that enter.
        source: the stored evaluation from which the step starts; -1 is multistep, an older one singlestep.
        points: for each derivative D_1 … D_{n-1} the stored evaluations that estimate it together with the source, at
            least k for D_k. Fewer for D_1 than for D_2 is low-order derivative estimation.
        variable: "half_log_snr": outputs are polynomials in λ. "sigma": in σ/(α + σ), which is σ of flow matching and
            finite where λ is not (pure noise, clean image); scales are then plain numbers.
        scales: c_1, c_2, …, 1 where none is given.
        weights: explicit weights of (source, *points[0]): the step is the first-order one with Σ w_j m_j for m_s.
        corrector: None on the last step.
    """

    prediction: PredictionSpace = "data"
    order: int = 1
    source: int = -1
    points: tuple[tuple[int, ...], ...] = ()
    variable: Variable = "half_log_snr"
    scales: tuple[Scale, ...] = ()
    weights: tuple[float, ...] | None = None
    corrector: Corrector | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        if str(self.prediction) == "ems":
            raise ValueError("prediction = 'ems' needs statistics of the model, which a schedule does not hold")
        _known("prediction", self.prediction, PredictionSpace)
        _known("variable", self.variable, Variable)
        object.__setattr__(self, "scales", _scales("scales", self.scales))
        if not 1 <= self.order <= MAX_ORDER:
            raise ValueError(f"order = {self.order}; 1 to {MAX_ORDER} are known")
        if self.source >= 0:
            raise ValueError(f"source = {self.source}: stored evaluations are -1 (the latest), -2, …")
        if self.weights is None:
            self._check_derivatives()
        else:
            object.__setattr__(self, "weights", _numbers("weights", self.weights))
            self._check_weights(self.weights)
        for points in (*self.points, *((self.corrector and self.corrector.points) or ())):
            self._check_points(points)
        if self.corrector is not None:
            self._check_corrector(self.corrector)
        if self.variable == "sigma":
            for scale in (*self.scales, *(self.corrector.scales if self.corrector else ())):
                if not isinstance(scale, float):
                    raise ValueError(f"scales: {scale!r} is a function of h; with variable = 'sigma' use a number")

    def all_points(self) -> tuple[int, ...]:
        """Every active point, the newest first."""
        return tuple(sorted({point for points in self.points for point in points}, reverse=True))

    def corrector_points(self) -> tuple[tuple[int, ...], ...]:
        """The stored points of each derivative of the corrector, without the new point that joins them all."""
        if self.corrector is None:
            raise ValueError("this step has no corrector")
        if self.corrector.points is not None:
            return self.corrector.points
        mine = self.points if self.weights is None else self.points * (self.order - 1)
        return (*mine, self.all_points())

    def _check_derivatives(self) -> None:
        if len(self.points) != self.order - 1:
            raise ValueError(
                f"points = {self.points}: order {self.order} needs a set of points for each of {self.order - 1} "
                f"derivatives, not {len(self.points)}"
            )
        for k, points in enumerate(self.points, start=1):
            if len(points) < k:
                raise ValueError(f"points[{k - 1}] = {points}: derivative {k} needs at least {k} points")
        if len(self.scales) > self.order - 1:
            raise ValueError(f"scales = {self.scales}: order {self.order} has {self.order - 1} derivatives")

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if self.scales:
            raise ValueError("scales: explicit weights leave nothing to scale; leave one of the two out")
        if len(self.points) > 1 or len(weights) != self.order or len(self.all_points()) != self.order - 1:
            raise ValueError(
                f"weights = {weights}: order {self.order} takes {self.order} weights, for the source and for "
                f"{self.order - 1} points in one set, not points = {self.points}"
            )

    def _check_points(self, points: tuple[int, ...]) -> None:
        for point in points:
            if point >= 0:
                raise ValueError(f"points: {point} lies in the future; stored evaluations are -1, -2, …")
            if point == self.source:
                raise ValueError(f"points: {point} is the source itself, which has no difference to itself")
        if len(set(points)) != len(points):
            raise ValueError(f"points = {points}: a point is named twice")

    def _check_corrector(self, corrector: Corrector) -> None:
        if corrector.weights is not None:
            points = corrector.points if corrector.points is not None else (self.all_points(),)
            if len(points) != 1 or len(corrector.weights) != len(points[0]) + 2:
                raise ValueError(
                    f"corrector.weights = {corrector.weights}: one weight each for the source, the points of one set "
                    f"and the new point is needed, {len(points[0]) + 2 if points else 2} for {points}"
                )
            return
        sets = self.corrector_points()
        for k, points_of in enumerate(sets, start=1):
            if len(points_of) + 1 < k:
                raise ValueError(f"corrector.points[{k - 1}] = {points_of}: derivative {k} needs {k - 1} and the new")
        if len(corrector.scales) > len(sets):
            raise ValueError(f"corrector.scales = {corrector.scales}: it has {len(sets)} derivatives")


@dataclass(frozen=True)
class SolverSchedule:
    """A solver for one number of steps N.

    Args:
        times: N + 1 times from noise to data. `None` stands for the infinite end of λ: as the first time pure noise
            (λ = -inf, where the noise schedule has it), as the last the clean image (σ = 0).
        steps: N decisions; step i goes to times[i + 1].
        time_domain: "half_log_snr": times are λ, rising; "time": times of the noise schedule, falling. Two neighbours
            may be equal only if the step to the second starts from an older point (Runge-Kutta stages).
        afs: analytical first step, which saves the first evaluation: x̂_0 := 0 ("zero") or a given mean image ("mean"),
            ε̂ := (x - α x̂_0)/σ.

    The network is evaluated at times[0] … times[N - 1], at the predicted x; corrections change x, not evaluations.
    """

    times: tuple[float | None, ...]
    steps: tuple[StepDecision, ...]
    time_domain: TimeDomain = "half_log_snr"
    afs: AnalyticalFirstStep | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _known("time_domain", self.time_domain, TimeDomain)
        if self.afs is not None:
            _known("afs", self.afs, AnalyticalFirstStep)
        if not self.steps or len(self.times) != len(self.steps) + 1:
            raise ValueError(f"times: {len(self.times)} times do not bound {len(self.steps)} steps of at least one")
        times = tuple(None if time is None else _finite("times", time) for time in self.times)
        object.__setattr__(self, "times", times)
        if None in times[1:-1]:
            raise ValueError(f"times[{times.index(None, 1)}] is null: only the first and the last time may be infinite")
        positions = [self._position(index) for index in range(len(times))]
        for index, step in enumerate(self.steps):
            try:
                self._check_history(index, step)
                self._check_order_of_times(index, step, positions)
            except ValueError as error:
                raise ValueError(f"steps[{index}].{error}") from None
        if self.nfe < 1:
            raise ValueError(f"afs = {self.afs!r} takes the only evaluation away; use more steps")
        if times[-1] is None:
            check_clean_end(self.steps[-1], len(self.steps) - 1)

    @property
    def nfe(self) -> int:
        """Network evaluations: one for each step, one more for each implicit corrector, one fewer with `afs`."""
        implicit = sum(step.corrector is not None and step.corrector.kind == "implicit" for step in self.steps)
        return len(self.steps) + implicit - (self.afs is not None)

    def _check_history(self, index: int, step: StepDecision) -> None:
        stored = index + 1
        if -step.source > stored:
            raise ValueError(f"source = {step.source}: only {stored} evaluations are stored by then")
        old = step.corrector.points if step.corrector and step.corrector.points else ()
        reach = -min((point for points in (*step.points, *old) for point in points), default=-1)
        if reach > stored or (step.weights is None and step.order > stored):
            raise ValueError(
                f"order = {step.order} with points {step.points} reaches back {max(reach, step.order)} evaluations; "
                f"only {stored} are stored by then"
            )
        if step.corrector is not None and index == len(self.steps) - 1:
            raise ValueError("corrector: the last step has none, because the network is not evaluated after it")

    def _check_order_of_times(self, index: int, step: StepDecision, position: list[float]) -> None:
        source, target = position[index + 1 + step.source], position[index + 1]
        if target < position[index] or target <= source:
            direction = "rise" if self.time_domain == "half_log_snr" else "fall"
            raise ValueError(
                f"times: {self.times[index + 1]} after {self.times[index]}, from {self.times[index + 1 + step.source]}"
                f": times in the domain {self.time_domain} must {direction} strictly from the source of each step"
            )
        if step.weights is None:
            for points in step.points:
                self._check_distinct([position[index + 1 + j] for j in (step.source, *points)])
        if step.corrector is not None and step.corrector.weights is None:
            for points in step.corrector_points():
                self._check_distinct([target, *(position[index + 1 + j] for j in (step.source, *points))])

    def _position(self, index: int) -> float:
        """A number that rises with λ and orders the times."""
        time = self.times[index]
        if time is None:
            return -math.inf if index == 0 else math.inf
        return time if self.time_domain == "half_log_snr" else -time

    @staticmethod
    def _check_distinct(positions: list[float]) -> None:
        if len(set(positions)) != len(positions):
            raise ValueError("points: two evaluations at one time cannot estimate a derivative")


def nearest_points(order: int, source: int = -1, stored: int | None = None) -> tuple[tuple[int, ...], ...]:
    """The default points: each of order - 1 derivatives from the order - 1 evaluations nearest to the source.

    `stored` is the number of evaluations there are; without it the history is taken to be long enough.
    """
    count = order - source if stored is None else stored
    candidates = [-j for j in range(1, count + 1) if -j != source]
    nearest = sorted(candidates, key=lambda j: (abs(j - source), -j))[: order - 1]
    return (tuple(sorted(nearest, reverse=True)),) * (order - 1)


def check_clean_end(step: StepDecision, index: int) -> None:
    """Raise ValueError if a step to σ = 0 expands in λ, which is infinite there."""
    if step.order > 1 and step.weights is None and step.variable == "half_log_snr":
        raise ValueError(
            f"steps[{index}].order = {step.order}: the step to the clean image (sigma = 0) has infinite h and must "
            "be of order 1, or use variable = 'sigma'"
        )


@cache
def _choices(literal: Any) -> tuple[str, ...]:
    return get_args(literal)


def _known(name: str, value: object, literal: Any) -> None:
    if value not in _choices(literal):
        raise ValueError(f"{name} = {value!r}; known are {', '.join(_choices(literal))}")


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: {value!r} is not a finite number")
    return float(value)


def _numbers(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(_finite(name, value) for value in values)


def _scales(name: str, scales: Iterable[Scale]) -> tuple[Scale, ...]:
    result: list[Scale] = []
    for scale in scales:
        if isinstance(scale, str):
            _known(name, scale, ScaleName)
            result.append(scale)
        else:
            result.append(scale if isinstance(scale, LinearScale) else _finite(name, scale))
    return tuple(result)
