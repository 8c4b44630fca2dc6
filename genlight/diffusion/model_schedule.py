"""Model schedules: which of several denoisers makes each network evaluation, and when.

OMS-DPM (Liu et al. 2023, arXiv 2306.08860): members of a zoo, of one noise schedule and of different size, take turns
within one sampling. The "null model" of the paper, which skips a position, has no place here: a schedule holds the
evaluations that are made, so that schedules that sample alike are written alike.

Names of members are their ids. A schedule becomes one `SolverSchedule` (`solver_schedule`), and so one table of
weights; `ModelSchedule.members` says who makes each of its evaluations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args
from weakref import WeakKeyDictionary

from genlight.diffusion.noise_schedules import NoiseSchedule, VPSchedule
from genlight.diffusion.solver.decisions import PredictionSpace, Scale, SolverSchedule, StepDecision, nearest_points

Kind = Literal["singlestep", "ddim", "multistep"]
KINDS: tuple[str, ...] = get_args(Kind)
MAX_STEP_ORDER = 3

# λ of σ/α = 0.002 and 80 (Karras et al. 2022, table 1), where an end of the noise schedule is infinite
_HIGH, _LOW = math.log(1 / 0.002), math.log(1 / 80)


@dataclass(frozen=True)
class ModelSchedule:
    """A solver with a member for each evaluation; valid by construction.

    Args:
        kind: "singlestep": DPM-Solver-1, 2 and 3, a member for each of the 1 to 3 evaluations of a step. "ddim": order
            1 from slot to slot of an even grid of timesteps. "multistep": DPM-Solver++, one evaluation a step.
        steps: from noise to data, the members of each step in the order in which they are evaluated.
        slots: ddim only: the grid position of each step, falling from the noise end; 0 is the position next to the
            data.
        orders: multistep only: the order of each step, 1 to 3; one that the history does not allow is lowered to it.

    Raises ValueError that names the field.
    """

    kind: Kind
    steps: tuple[tuple[str, ...], ...]
    slots: tuple[int, ...] = ()
    orders: tuple[int, ...] = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}; known are {', '.join(KINDS)}")
        object.__setattr__(self, "steps", tuple(tuple(step) for step in self.steps))
        object.__setattr__(self, "slots", tuple(self.slots))
        if not self.steps:
            raise ValueError("steps = (): a schedule needs one step or more")
        most = MAX_STEP_ORDER if self.kind == "singlestep" else 1
        for index, step in enumerate(self.steps):
            if not 1 <= len(step) <= most:
                raise ValueError(f"steps[{index}] = {step}: a step of kind {self.kind!r} has 1 to {most} evaluations")
            for name in step:
                if not isinstance(name, str) or not name:
                    raise ValueError(f"steps[{index}] = {step}: members are given by name")
        self._check_slots()
        self._check_orders()

    @property
    def members(self) -> tuple[str, ...]:
        """The member of each evaluation, from noise to data."""
        return tuple(name for step in self.steps for name in step)

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return sum(len(step) for step in self.steps)

    def canonical(self) -> "ModelSchedule":
        """The one form of all schedules that sample alike: multistep of order 1 throughout is singlestep."""
        if self.kind == "multistep" and max(self.orders) == 1:
            return ModelSchedule("singlestep", self.steps)
        return self

    def _check_slots(self) -> None:
        wanted = len(self.steps) if self.kind == "ddim" else 0
        if len(self.slots) != wanted:
            raise ValueError(f"slots = {self.slots}: {wanted} are needed for kind {self.kind!r}")
        if any(isinstance(slot, bool) or not isinstance(slot, int) or slot < 0 for slot in self.slots):
            raise ValueError(f"slots = {self.slots} must be whole numbers, 0 or more")
        if any(later >= earlier for earlier, later in pairwise(self.slots)):
            raise ValueError(f"slots = {self.slots} must fall, from the noise to the data")

    def _check_orders(self) -> None:
        wanted = len(self.steps) if self.kind == "multistep" else 0
        if len(self.orders) != wanted:
            raise ValueError(f"orders = {self.orders}: {wanted} are needed for kind {self.kind!r}")
        for order in self.orders:
            if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_STEP_ORDER:
                raise ValueError(f"orders = {self.orders} must be whole numbers from 1 to {MAX_STEP_ORDER}")
        object.__setattr__(self, "orders", tuple(min(order, i + 1) for i, order in enumerate(self.orders)))


def solver_schedule(
    candidate: ModelSchedule, noise_schedule: NoiseSchedule, slots: int | None = None
) -> SolverSchedule:
    """The decisions and times of a model schedule, one evaluation for each of its `members`.

    Singlestep and multistep steps lie between knots even in λ (`knots`). A singlestep step of order 2 evaluates at its
    start and halfway (r1 = ½), one of order 3 at the start and at thirds, in noise prediction (Lu et al. 2022a,
    algorithms 1 and 2); in data prediction where the noise schedule begins with pure noise, which noise prediction
    cannot leave above order 1. Multistep is "dpmpp_2m" of `presets` at order 2, "dpmpp_3m_exact" at order 3.

    Args:
        slots: length of the grid of a ddim schedule, see `slot_times`.

    Raises ValueError for a ddim schedule without a grid or beyond it, or times that the noise schedule lacks.
    """
    if candidate.kind == "ddim":
        return _ddim(candidate, noise_schedule, slots)
    bounds = knots(noise_schedule, len(candidate.steps))
    pure = noise_schedule.alpha(noise_schedule.t_max) == 0
    if candidate.kind == "multistep":
        steps = [_multistep(order) for order in candidate.orders]
        times = bounds
    else:
        prediction: PredictionSpace = "data" if pure else "noise"
        steps = [decision for step in candidate.steps for decision in _singlestep(len(step), prediction)]
        times = [*stage_half_log_snrs(bounds, [len(step) for step in candidate.steps]), bounds[-1]]
    return SolverSchedule((None if pure else times[0], *times[1:]), tuple(steps))


def half_log_snr_range(noise_schedule: NoiseSchedule) -> tuple[float, float]:
    """λ of the first and the last knot; σ/α = 80 and 0.002 stand for infinite ends."""
    found = _ranges.get(noise_schedule)
    if found is None:
        low, high = noise_schedule.half_log_snr(noise_schedule.t_max), noise_schedule.half_log_snr(noise_schedule.t_min)
        found = _ranges[noise_schedule] = low if math.isfinite(low) else _LOW, high if math.isfinite(high) else _HIGH
    return found


_ranges: "WeakKeyDictionary[NoiseSchedule, tuple[float, float]]" = WeakKeyDictionary()


def knots(noise_schedule: NoiseSchedule, steps: int) -> list[float]:
    """steps + 1 values of λ, rising evenly over `half_log_snr_range`."""
    low, high = half_log_snr_range(noise_schedule)
    return [*(low + (high - low) * i / steps for i in range(steps)), high]


def stage_half_log_snrs(bounds: Sequence[float], orders: Sequence[int]) -> list[float]:
    """λ of every evaluation of singlestep steps between `bounds`: each step's are even, from its start."""
    return [
        start + (end - start) * place / order
        for (start, end), order in zip(pairwise(bounds), orders, strict=True)
        for place in range(order)
    ]


def slot_times(noise_schedule: NoiseSchedule, slots: int) -> list[float]:
    """Times of the grid of a ddim schedule by slot, rising to `t_max`; the last step of a schedule ends at `t_min`.

    Variance-preserving schedules of T timesteps have slot i at (i + 1) T/slots - 1, the "trailing" timesteps of
    diffusers: whole numbers where slots divide T. (The paper's code has i T/slots, and ends beyond t = 0.) Others have
    even `t_of_fraction`.

    Raises ValueError for fewer than one slot, or so many that the first is not above `t_min`.
    """
    if slots < 1:
        raise ValueError(f"slots = {slots} must be 1 or more")
    if isinstance(noise_schedule, VPSchedule):
        count = noise_schedule.num_train_timesteps
        if slots >= count:
            raise ValueError(f"slots = {slots} must be fewer than the {count} timesteps of {noise_schedule!r}")
        return [(i + 1) * count / slots - 1 for i in range(slots)]
    return [noise_schedule.t_of_fraction((i + 1) / slots) for i in range(slots)]


def to_slots(schedule: ModelSchedule, names: Sequence[str], length: int) -> tuple[int, ...]:
    """The vector form of the paper (sections 3 and C), a in {0 … M}^length: 0 is the null model, k is names[k - 1].

    Singlestep: groups of three, the first at the data end, in each the last that is not 0 is evaluated first; empty
    groups come last. Ddim: an entry for each slot.

    Raises ValueError for a name that is not in `names`, a schedule that is too long, or one of kind "multistep".
    """
    ids = {name: number for number, name in enumerate(names, start=1)}
    unknown = sorted(set(schedule.members) - ids.keys())
    if unknown:
        raise ValueError(f"names = {tuple(names)} lacks {', '.join(unknown)}")
    if schedule.kind == "multistep":
        raise ValueError("kind = 'multistep' has no vector form")
    values = [0] * length
    if schedule.kind == "singlestep":
        if length % 3 or 3 * len(schedule.steps) > length:
            raise ValueError(f"length = {length} must be a multiple of 3, and hold {len(schedule.steps)} groups of 3")
        for group, step in enumerate(reversed(schedule.steps)):
            values[3 * group : 3 * group + len(step)] = [ids[name] for name in reversed(step)]
        return tuple(values)
    if schedule.slots[0] >= length:
        raise ValueError(f"length = {length} must exceed the highest slot, {schedule.slots[0]}")
    for slot, (name,) in zip(schedule.slots, schedule.steps, strict=True):
        values[slot] = ids[name]
    return tuple(values)


def from_slots(values: Sequence[int], names: Sequence[str], kind: Kind = "singlestep") -> ModelSchedule:
    """The schedule that a vector of the paper describes; see `to_slots`. Empty groups may stand anywhere.

    Raises ValueError for an id beyond `names`, a group in which a 0 comes before another id, nothing but zeros.
    """
    for value in values:
        if not 0 <= value <= len(names):
            raise ValueError(f"values: {value} is no id; there are 0 to {len(names)}")
    if kind == "ddim":
        kept = [position for position in range(len(values) - 1, -1, -1) if values[position]]
        return ModelSchedule("ddim", tuple((names[values[position] - 1],) for position in kept), tuple(kept))
    if kind != "singlestep" or len(values) % 3:
        raise ValueError(f"values: kind {kind!r} with {len(values)} entries has no vector form; groups have 3")
    steps: list[tuple[str, ...]] = []
    for first in range(len(values) - 3, -1, -3):
        group = tuple(values[first : first + 3])
        filled = [value for value in group if value]
        if any(group[len(filled) :]):
            raise ValueError(f"values[{first}:{first + 3}] = {group}: zeros come after the ids of a group")
        if filled:
            steps.append(tuple(names[value - 1] for value in reversed(filled)))
    return ModelSchedule("singlestep", tuple(steps))


def _ddim(candidate: ModelSchedule, noise_schedule: NoiseSchedule, slots: int | None) -> SolverSchedule:
    if slots is None or candidate.slots[0] >= slots:
        raise ValueError(f"slots = {slots}: a ddim schedule with slot {candidate.slots[0]} needs a longer grid")
    times = slot_times(noise_schedule, slots)
    chosen = (*(times[slot] for slot in candidate.slots), noise_schedule.t_min)
    return SolverSchedule(chosen, (StepDecision("data"),) * len(candidate.steps), time_domain="time")


def _singlestep(order: int, prediction: PredictionSpace) -> list[StepDecision]:
    """The stages of one step. The middle stage of order 3 expands exactly, the one of order 2 is the midpoint rule."""
    first = StepDecision(prediction)
    if order == 1:
        return [first]
    second = StepDecision(prediction, 2, source=-2, points=((-1,),))
    if order == 2:
        return [first, replace(second, scales=("bh2",))]
    return [first, second, StepDecision(prediction, 2, source=-3, points=((-1,),))]


def _multistep(order: int) -> StepDecision:
    scales: tuple[Scale, ...] = ("bh2",) if order == 2 else ()
    return StepDecision("data", order, points=nearest_points(order), scales=scales)
