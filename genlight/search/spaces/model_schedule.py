"""The space of model schedules within a budget: which member of a zoo makes each evaluation of a sampler.

OMS-DPM (Liu et al. 2023, arXiv 2306.08860). Every candidate of a space with a budget keeps it: draws are drawn to it,
children that exceed it are made again, and lightened where that keeps failing.
"""

import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight.diffusion.model_schedule import (
    KINDS,
    MAX_STEP_ORDER,
    Kind,
    ModelSchedule,
    half_log_snr_range,
    knots,
    slot_times,
    solver_schedule,
    stage_half_log_snrs,
)
from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.search.protocols import ScheduledMembers, SettableSampler, Vector, require_capability
from genlight.search.records import fits
from genlight.search.spaces.model_allocation import Curve, evaluation_weights, weighed_basis
from genlight.search.spaces.model_indicators import ModelIndicators, added_errors
from genlight.search.spaces.model_sampler import ModelScheduleSampler
from genlight.search.spaces.model_schedule_edits import (
    EDITS,
    Draft,
    Limits,
    below,
    cross,
    cut_to,
    enrich,
    keeps,
    lighten,
    random_draft,
    total_cost,
)

Features = np.ndarray[Any, np.dtype[np.float32]]

_KEY_DIGITS = 16
_MAX_EDITS = 10
_TRIES = 20
_KEPT = 4096
# columns that tell an evaluation's order and place: (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)
_PLACES = 6
# what is counted of the squared error that an evaluation adds, at least: half-steps add none
_LEAST_ERROR = 1e-6
# what is no weight, of the largest
_NO_WEIGHT = 1e-9


@dataclass(frozen=True)
class ModelScheduleSpace:
    """Model schedules on one noise schedule; candidates are `ModelSchedule`.

    Attributes:
        noise_schedule: that of all members.
        costs: of one evaluation by each member of the zoo, by name: milliseconds or any other unit, positive.
        budget: the most that a candidate may cost; None: anything.
        kinds: the kinds of `ModelSchedule` that are drawn.
        max_evaluations: network evaluations at most.
        slots: length of the grid of ddim schedules.
        max_order: evaluations of a singlestep step, and order of a multistep one, at most.
        switch: cost of one change of member between evaluations.
        null_probability: share of positions that a random draw leaves empty, before it is brought to its cost.
        concentration: of the Dirichlet distribution over members, one draw for each random candidate; below 1, most
            evaluations of a candidate are by few members.
        curves: mean squared error of each member's ε̂ at λ, by name, for `encode` and `indicators`; None: they do
            without.

    Raises ValueError that names the field, and for a budget below the cheapest schedule.
    """

    noise_schedule: NoiseSchedule
    costs: Mapping[str, float]
    budget: float | None = None
    kinds: Sequence[Kind] = ("singlestep",)
    max_evaluations: int = 36
    slots: int = 100
    max_order: int = MAX_STEP_ORDER
    switch: float = 0.0
    null_probability: float = 0.8
    concentration: float = 0.4
    curves: Mapping[str, Curve] | None = None
    _structures: dict[Any, Features] = field(default_factory=dict, init=False, repr=False, compare=False)

    candidate_type = ModelSchedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", {str(name): float(cost) for name, cost in self.costs.items()})
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if not self.costs or not all(name and 0 < cost < math.inf for name, cost in self.costs.items()):
            raise ValueError(f"space.costs = {dict(self.costs)} must name one member or more, each at a positive cost")
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise ValueError(f"space.kinds = {self.kinds} must be some of {', '.join(KINDS)}")
        if self.max_evaluations < 1:
            raise ValueError(f"space.max_evaluations = {self.max_evaluations} must be 1 or more")
        if not 1 <= self.max_order <= MAX_STEP_ORDER:
            raise ValueError(f"space.max_order = {self.max_order} must be 1 to {MAX_STEP_ORDER}")
        if not 0 <= self.switch < math.inf:
            raise ValueError(f"space.switch = {self.switch} must not be negative")
        if not 0 <= self.null_probability < 1 or not 0 < self.concentration < math.inf:
            raise ValueError(
                f"space.null_probability = {self.null_probability} must lie in [0, 1) and space.concentration = "
                f"{self.concentration} be positive"
            )
        if self.budget is not None and not (fits(min(self.costs.values()), self.budget) and self.budget < math.inf):
            raise ValueError(
                f"space.budget = {self.budget}: the cheapest schedule costs {min(self.costs.values()):g}; give at "
                "least that, or null"
            )
        if "ddim" in self.kinds:
            slot_times(self.noise_schedule, self.slots)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The members."""
        return tuple(self.costs)

    def with_budget(self, budget: float | None) -> "ModelScheduleSpace":
        """The same space with another budget. ValueError where no schedule keeps it."""
        other = replace(self, budget=budget)
        # features do not depend on it
        object.__setattr__(other, "_structures", self._structures)
        return other

    def without(self, names: Iterable[str]) -> "ModelScheduleSpace":
        """The same space without some members. ValueError where none is left, or the budget is below the cheapest."""
        dropped = set(names)
        return replace(self, costs={name: cost for name, cost in self.costs.items() if name not in dropped})

    def sample(self, rng: np.random.Generator) -> ModelSchedule:
        """Random: members from a Dirichlet draw, positions left empty at random (appendix of the paper).

        With a budget the candidate is then brought to a cost between the cheapest and the budget, even in its
        logarithm, so that small budgets are as well populated as large ones.
        """
        limits = self._limits
        share = rng.dirichlet([self.concentration] * len(limits.costs))
        cumulative = share.cumsum()

        def draw() -> int:
            return min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(limits.costs) - 1)

        kind = self.kinds[below(rng, len(self.kinds))]
        draft = random_draft(kind, rng, limits, draw, self.null_probability)
        cut_to(draft, rng, limits)
        if self.budget is not None:
            lowest = min(limits.costs)
            target = min(self.budget, lowest * (self.budget / lowest) ** rng.random())
            lighten(draft, rng, limits, target)
            enrich(draft, rng, limits, target, draw)
        return self._made(draft)

    def mutate(self, candidate: ModelSchedule, rng: np.random.Generator, *, size: float = 1.0) -> ModelSchedule:
        """One to ten · `size` edits, no more than the candidate has evaluations and one: see `model_schedule_edits`.

        A child beyond the budget is made again, as in the paper; after twenty tries the last one is lightened.
        """
        most = max(1, min(round(_MAX_EDITS * size), candidate.nfe + 1))
        own = self._draft(candidate)
        for _ in range(_TRIES):
            draft = own.copy()
            for _ in range(1 + below(rng, most)):
                EDITS[below(rng, len(EDITS))](draft, rng, self._limits)
            if keeps(draft, self._limits, self.budget) and (child := self._made(draft)) != candidate:
                return child
        return self._within(draft, rng)

    def crossover(self, a: ModelSchedule, b: ModelSchedule, rng: np.random.Generator) -> ModelSchedule:
        """The noisy part of `a` and the clean part of `b`; parents of different kinds give `a`.

        Beyond the budget another place is cut, as `mutate` tries again.
        """
        first, second = self._draft(a), self._draft(b)
        if a.kind != b.kind:
            return self._within(first, rng)
        for _ in range(_TRIES):
            draft = cross(first, second, rng)
            if keeps(draft, self._limits, self.budget):
                break
        return self._within(draft, rng)

    def cost(self, candidate: ModelSchedule) -> dict[str, float]:
        """ "cost", that of all evaluations and changes of member, and "nfe".

        Raises ValueError for a member that is not in the zoo.
        """
        members = self._ids(candidate.members)
        return {"cost": total_cost(members, self._limits), "nfe": float(len(members))}

    def encode(self, candidate: ModelSchedule) -> Tensor:
        """Float32 [evaluations, features]: the member and its cost; order and place; λ here and at the step's ends.

        Further the place in the schedule, its evaluations, steps and cost, its kind where there are several, and, where
        `curves` are known, half the logarithm of the squared error that it adds to the result (`model_allocation`).
        """
        members = self._ids(candidate.members)
        structure = self._structure(candidate)
        own = 1 if self.curves else 0
        width = structure.shape[1] - own * len(self.names)
        rows = np.empty((len(members), width + len(self.names) + 2 + own), dtype=np.float32)
        rows[:, :width] = structure[:, :width]
        rows[:, width : width + len(self.names) + 1] = self._member_features[members]
        if own:
            rows[:, -2] = structure[np.arange(len(members)), width + np.array(members)]
        rows[:, -1] = math.log(total_cost(members, self._limits) / max(self._limits.costs))
        return torch.from_numpy(rows)

    def effect(self, candidate: ModelSchedule) -> tuple[Hashable, Vector]:
        """Its form and, where `curves` are known, the squared error that each evaluation adds, float64 [evaluations].

        Without curves the form has the members too, but for those of evaluations that have no weight in the result,
        as the first one of a singlestep step of order 2.
        """
        members, shape = self._ids(candidate.members), _shape(candidate)
        if self.curves:
            logs = self._structure(candidate)[np.arange(len(members)), np.array(members) - len(self.names)]
            return shape, np.exp(2 * logs.astype(np.float64))
        weights = np.abs(evaluation_weights(self._table(candidate), self.noise_schedule)[0])
        weighed = weights > _NO_WEIGHT * weights.max()
        return (shape, tuple(np.where(weighed, members, -1).tolist())), np.zeros(0)

    @property
    def indicator_names(self) -> tuple[str, ...]:
        """Those of `ModelIndicators`, and what a candidate costs."""
        return (*self._indicators.names, "cost", "nfe")

    def indicators(self, candidate: ModelSchedule) -> Vector:
        """Float64 [indicator_names]: logarithms of errors, of cost and evaluations the negative ones."""
        members = self._ids(candidate.members)
        found = self._indicators(_shape(candidate), lambda: self.sampler(candidate).table, members)
        return np.concatenate([found, -np.log([total_cost(members, self._limits), len(members)])])

    @cached_property
    def _indicators(self) -> ModelIndicators:
        curves = None if self.curves is None else tuple(self.curves[name] for name in self.names)
        return ModelIndicators(self.noise_schedule, curves)

    def apply(self, target: Any, candidate: ModelSchedule) -> None:
        """Hand sampler and members to the target.

        Raises:
            UserError: it has no `set_sampler` or no `set_members`.
            ValueError: a member is not in the zoo.
        """
        require_capability(target, SettableSampler, self)
        require_capability(target, ScheduledMembers, self)
        self._ids(candidate.members)
        sampler = self.sampler(candidate)
        target.set_members(sampler.timesteps, candidate.members)
        target.set_sampler(sampler)

    def sampler(self, candidate: ModelSchedule) -> ModelScheduleSampler:
        """The candidate compiled."""
        solver = solver_schedule(candidate, self.noise_schedule, self.slots)
        table = compile_schedule(solver, self.noise_schedule)
        timesteps = self.noise_schedule.model_timestep(table.times)
        return ModelScheduleSampler(candidate, solver, table, tuple(timesteps.tolist()))

    def key(self, candidate: ModelSchedule) -> str:
        """Sixteen hexadecimal digits, equal for schedules that sample alike."""
        plain = candidate.canonical()
        if plain.kind == "ddim" and plain.slots == (self.slots - 1,) and self._ends_alike:
            # one step over the whole range is the same in all kinds
            plain = ModelSchedule("singlestep", plain.steps)
        text = repr((plain.kind, plain.steps, plain.slots, plain.orders))
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]

    def fingerprint(self) -> str:
        """The noise schedule and every option, as JSON. The order of the members counts: features follow it."""
        options: dict[str, Any] = {
            "space": "model_schedule",
            "noise_schedule": self.noise_schedule.fingerprint(),
            "costs": list(self.costs.items()),
            "budget": self.budget,
            "kinds": self.kinds,
            "max_evaluations": self.max_evaluations,
            "slots": self.slots if "ddim" in self.kinds else None,
            "max_order": self.max_order,
            "switch": self.switch,
            "draw": [self.null_probability, self.concentration],
        }
        if self.curves is not None:
            options["curves"] = [repr(self.curves[name]) for name in self.names]
        return json.dumps(options, sort_keys=True)

    @cached_property
    def _limits(self) -> Limits:
        return Limits(tuple(self.costs.values()), self.switch, self.max_evaluations, self.max_order, self.slots)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def _ids(self, members: Sequence[str]) -> list[int]:
        try:
            return [self._numbers[name] for name in members]
        except KeyError as error:
            raise ValueError(f"member {error.args[0]!r} is not in space.costs: {', '.join(self.names)}") from None

    def _draft(self, candidate: ModelSchedule) -> Draft:
        steps = [self._ids(step) for step in candidate.steps]
        return Draft(candidate.kind, steps, list(candidate.slots), list(candidate.orders))

    def _within(self, draft: Draft, rng: np.random.Generator) -> ModelSchedule:
        """The schedule of a draft, brought within evaluations and budget."""
        cut_to(draft, rng, self._limits)
        if self.budget is not None:
            lighten(draft, rng, self._limits, self.budget)
        return self._made(draft)

    def _made(self, draft: Draft) -> ModelSchedule:
        steps = tuple(tuple(self.names[member] for member in step) for step in draft.steps)
        return ModelSchedule(draft.kind, steps, tuple(draft.slots), tuple(draft.orders))

    @cached_property
    def _member_features(self) -> Features:
        """One-hot and cost, relative to the dearest, of each member."""
        costs = np.array(self._limits.costs)
        return np.concatenate([np.eye(len(costs)), (costs / costs.max())[:, None]], axis=1).astype(np.float32)

    def _structure(self, candidate: ModelSchedule) -> Features:
        """What does not depend on the members, then log errors of each if `curves` are known; kept for children."""
        shape = _shape(candidate)
        found = self._structures.get(shape)
        if found is None:
            if len(self._structures) > _KEPT:
                self._structures.clear()
            found = self._structure_of(candidate, shape[1])
            if self.curves:
                found = np.concatenate([found, self._log_errors(candidate)], axis=1)
            self._structures[shape] = found
        return found

    def _log_errors(self, candidate: ModelSchedule) -> Features:
        """Half the logarithm of the squared error that each member would add at each evaluation, [E, members]."""
        curves = [(self.curves or {})[name] for name in self.names]
        errors = added_errors(self._table(candidate), self.noise_schedule, curves)
        return (0.5 * np.log(np.maximum(errors.T, _LEAST_ERROR))).astype(np.float32)

    def _table(self, candidate: ModelSchedule) -> SolverTable:
        """Compiled, with the weights of the evaluations in the result."""
        solver = solver_schedule(candidate, self.noise_schedule, self.slots)
        return compile_schedule(solver, self.noise_schedule, basis=weighed_basis(self.noise_schedule))

    def _structure_of(self, candidate: ModelSchedule, orders: tuple[int, ...]) -> Features:
        high = half_log_snr_range(self.noise_schedule)[1]
        if candidate.kind == "ddim":
            if candidate.slots[0] >= self.slots:
                raise ValueError(f"slots = {candidate.slots} lie beyond space.slots = {self.slots}")
            bounds = [*(self._slot_half_log_snrs[slot] for slot in candidate.slots), high]
        else:
            bounds = knots(self.noise_schedule, len(orders))
        sizes = [len(step) for step in candidate.steps]
        here = stage_half_log_snrs(bounds, sizes)
        count, rows = len(here), list[list[float]]()
        for index, order in enumerate(orders):
            start, end = bounds[index], bounds[index + 1]
            for place in range(sizes[index]):
                one_hot = [0.0] * _PLACES
                one_hot[order * (order - 1) // 2 + place] = 1.0
                kinds = [float(candidate.kind == kind) for kind in self.kinds] if len(self.kinds) > 1 else []
                at = here[len(rows)]
                span = [at, start, end, end - start, math.log(max(end - start, 1e-3))]
                size = [len(rows) / count, count / self.max_evaluations, len(orders) / self.max_evaluations]
                rows.append([*span, *one_hot, *size, *kinds])
        return np.array(rows, dtype=np.float32)

    @cached_property
    def _ends_alike(self) -> bool:
        """Whether ddim and the other kinds end at one time."""
        return math.isfinite(self.noise_schedule.half_log_snr(self.noise_schedule.t_min))

    @cached_property
    def _slot_half_log_snrs(self) -> list[float]:
        low, high = half_log_snr_range(self.noise_schedule)
        times = torch.tensor(slot_times(self.noise_schedule, self.slots), dtype=torch.float64)
        return [float(value) for value in self.noise_schedule.half_log_snr(times).clamp(low, high)]


def _shape(candidate: ModelSchedule) -> tuple[Kind, tuple[int, ...], tuple[int, ...]]:
    """All of a schedule but its members."""
    return candidate.kind, candidate.orders or tuple(map(len, candidate.steps)), candidate.slots
