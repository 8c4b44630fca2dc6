"""Model schedules by rules that people use, as rivals of a search: one member, one switch, two switches, chance.

Small models early and large ones late is T-Stitch (Pan et al. 2024, "T-Stitch: Accelerating Sampling in Pre-Trained
Diffusion Models with Trajectory Stitching"), large ones first is SRDiffusion (2025), large at both ends FlowBlending
(2025); small at both ends is the sandwich of model scheduling for masked language models. No rule holds for all data,
so each comes with many switch points and numbers of evaluations. A rule gives one member to a whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, groupby, pairwise
from typing import Protocol, TypeVar

import numpy as np

from genlight.diffusion.model_schedule import Kind, ModelSchedule
from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.search.records import fits

STITCHES, THREE_SEGMENTS, RANDOM = 40, 80, 10

# rules are compared at the budget: schedules that use less of it come after those that do
_USED = 0.8
# of Dirichlet draws of members, as in the search
_CONCENTRATION = 0.4
Item = TypeVar("Item")


class BudgetedZoo(Protocol):
    """What a rule must know; a search space of model schedules is one.

    Attributes:
        noise_schedule: on which the schedules are sampled.
        costs: of one call of each member, by name.
        switch: cost of a change of member.
        budget: cost that no schedule exceeds; None: any.
        kinds: kinds of schedules to make.
        max_evaluations, max_order, slots: limits of a schedule, and the grid of kind "ddim".
    """

    @property
    def noise_schedule(self) -> NoiseSchedule: ...
    @property
    def costs(self) -> Mapping[str, float]: ...
    @property
    def switch(self) -> float: ...
    @property
    def budget(self) -> float | None: ...
    @property
    def kinds(self) -> Sequence[Kind]: ...
    @property
    def max_evaluations(self) -> int: ...
    @property
    def max_order(self) -> int: ...
    @property
    def slots(self) -> int: ...


@dataclass(frozen=True)
class RuleSchedule:
    """A schedule that a rule made: the rule, which of its schedules in words, and what it costs."""

    rule: str
    name: str
    schedule: ModelSchedule
    cost: float


@dataclass(frozen=True)
class Layout:
    """A schedule without its members: evaluations of each step, slots and orders as in `ModelSchedule`."""

    kind: Kind
    sizes: tuple[int, ...]
    slots: tuple[int, ...] = ()
    orders: tuple[int, ...] = ()
    order: int = 1

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return sum(self.sizes)

    @property
    def name(self) -> str:
        """Kind, order and evaluations in short."""
        return f"{self.kind} order {self.order}, {self.nfe} evaluations"

    def with_members(self, members: Sequence[str]) -> ModelSchedule:
        """The schedule whose evaluations are made by `members`, the noise end first."""
        steps, place = [], 0
        for size in self.sizes:
            steps.append(tuple(members[place : place + size]))
            place += size
        return ModelSchedule(self.kind, tuple(steps), self.slots, self.orders)

    def with_steps(self, members: Sequence[str]) -> ModelSchedule:
        """The schedule whose steps are made by one member each."""
        return self.with_members([name for name, size in zip(members, self.sizes) for _ in range(size)])


def layouts(zoo: BudgetedZoo, evaluations: Iterable[int]) -> Iterator[Layout]:
    """Every kind and order for each number of evaluations that the zoo allows, by number of evaluations.

    A singlestep schedule has steps of one order; what is left of the evaluations makes a last step of lower order.
    """
    for nfe in evaluations:
        if not 1 <= nfe <= zoo.max_evaluations:
            continue
        for kind in zoo.kinds:
            if kind == "ddim":
                if nfe <= zoo.slots:
                    places = tuple((i * zoo.slots) // nfe - 1 for i in range(nfe, 0, -1))
                    yield Layout(kind, (1,) * nfe, slots=places)
                continue
            # multistep of order 1 throughout is singlestep of order 1
            lowest = 2 if kind == "multistep" and "singlestep" in zoo.kinds else 1
            for order in range(lowest, min(zoo.max_order, nfe) + 1):
                if kind == "multistep":
                    yield Layout(kind, (1,) * nfe, orders=tuple(min(order, i + 1) for i in range(nfe)), order=order)
                else:
                    rest = nfe % order
                    sizes = (order,) * (nfe // order) + ((rest,) if rest else ())
                    yield Layout(kind, sizes, order=order)


def cost_of(zoo: BudgetedZoo, members: Sequence[str]) -> float:
    """Cost of evaluations made by `members`, changes of member included."""
    changes = sum(left != right for left, right in pairwise(members))
    return sum(zoo.costs[name] for name in members) + zoo.switch * changes


def within(zoo: BudgetedZoo, cost: float) -> bool:
    """Whether the budget allows it."""
    return zoo.budget is None or fits(cost, zoo.budget)


def single_models(zoo: BudgetedZoo) -> list[RuleSchedule]:
    """Every member alone, at every kind, order and number of evaluations within the budget."""
    found = []
    for layout in layouts(zoo, range(1, zoo.max_evaluations + 1)):
        for name in zoo.costs:
            if rule := _rule(zoo, "single", name, layout, [name] * len(layout.sizes)):
                found.append(rule)
    return found


def chosen_singles(zoo: BudgetedZoo, limits: Iterable[float], count: int) -> list[RuleSchedule]:
    """At most `count` single models: those that no budget can do without, and others spread evenly.

    Args:
        limits: budgets. For each of them, and each member, kind and order, the one with most evaluations is measured.
    """
    every = single_models(zoo)
    largest: dict[tuple[float, str, Kind, int], RuleSchedule] = {}
    for limit in limits:
        for each in every:  # by number of evaluations
            if fits(each.cost, limit):
                schedule = each.schedule
                order = max(schedule.orders or map(len, schedule.steps))
                largest[limit, schedule.members[0], schedule.kind, order] = each
    needed = set(largest.values())
    first = [each for each in every if each in needed]
    rest = [each for each in every if each not in needed]
    kept = {*evenly(first, count), *evenly(rest, max(0, count - len(first)))}
    return [each for each in every if each in kept]


def small_first(zoo: BudgetedZoo, count: int = STITCHES) -> list[RuleSchedule]:
    """A small member, then a large one for as many steps as the budget allows; at most `count`, spread over NFE."""
    return _chosen(
        zoo, _stitches(zoo, "small_first", lambda small, large, n, k: [small] * (n - k) + [large] * k), count
    )


def large_first(zoo: BudgetedZoo, count: int = STITCHES) -> list[RuleSchedule]:
    """A large member for as many steps as the budget allows, then a small one; at most `count`, spread over NFE."""
    return _chosen(
        zoo, _stitches(zoo, "large_first", lambda small, large, n, k: [large] * k + [small] * (n - k)), count
    )


def sandwich(zoo: BudgetedZoo, count: int = THREE_SEGMENTS) -> list[RuleSchedule]:
    """Three segments, with as many large steps as the budget allows; at most `count`.

    Half of them are small, large, small, with the large ones in the first, the middle or the last third of what is
    free; half are large, small, large, with one, half or all but one of the large ones in front.
    """
    inner = [
        rule for share in (0.25, 0.5, 0.75) for rule in _stitches(zoo, "small_large_small", partial(_inside, share))
    ]
    outer = [
        rule for share in (0.25, 0.5, 0.75) for rule in _stitches(zoo, "large_small_large", partial(_outside, share))
    ]
    return [*_chosen(zoo, inner, count - count // 2), *_chosen(zoo, outer, count // 2)]


def random_schedules(zoo: BudgetedZoo, rng: np.random.Generator, count: int = RANDOM) -> list[RuleSchedule]:
    """Random schedules that use the budget: members and layout by chance, `count` different ones.

    Members of a schedule come from shares drawn from a Dirichlet distribution (the data of the predictor in Liu et al.
    2023, "OMS-DPM"); of their sequence as many evaluations are made as fit. Schedules that leave much of the budget
    come only where there are not enough others, and fewer than `count` only where there is nothing else.
    """
    names = list(zoo.costs)
    pool = list(layouts(zoo, range(1, zoo.max_evaluations + 1)))
    tight: dict[ModelSchedule, RuleSchedule] = {}
    loose: dict[ModelSchedule, RuleSchedule] = {}
    for _ in range(50 * count):
        if len(tight) == count:
            break
        shares = rng.dirichlet([_CONCENTRATION] * len(names))
        sequence = [names[i] for i in rng.choice(len(names), zoo.max_evaluations, p=shares)]
        lengths = [n for n in range(1, zoo.max_evaluations + 1) if within(zoo, cost_of(zoo, sequence[:n]))]
        allowed = [layout for layout in pool if lengths and layout.nfe == lengths[-1]]
        if not allowed:
            continue
        layout = allowed[int(rng.integers(len(allowed)))]
        schedule = layout.with_members(sequence[: layout.nfe])
        cost = cost_of(zoo, schedule.members)
        kept = tight if zoo.budget is None or cost >= _USED * zoo.budget else loose
        kept.setdefault(schedule, RuleSchedule("random", layout.name, schedule, cost))
    dearest = sorted(loose.values(), key=lambda rule: -rule.cost)
    return [*tight.values(), *dearest][:count]


def _stitches(
    zoo: BudgetedZoo, rule: str, arrange: Callable[[str, str, int, int], list[str] | None]
) -> Iterator[RuleSchedule]:
    """For each layout and pair the arrangement with the most large steps that the budget allows.

    `arrange(small, large, steps, large steps)` gives the member of each step, or None where there is no such form.
    """
    names = sorted(zoo.costs, key=lambda name: zoo.costs[name])
    pairs = [(small, large) for small, large in combinations(names, 2) if zoo.costs[small] < zoo.costs[large]]
    for layout in layouts(zoo, range(2, zoo.max_evaluations + 1)):
        steps = len(layout.sizes)
        for small, large in pairs:
            for count in range(steps - 1, 0, -1):
                members = arrange(small, large, steps, count)
                if members and (found := _rule(zoo, rule, _segments(members), layout, members)):
                    yield found
                    break


def _segments(members: Sequence[str]) -> str:
    """The members of steps in short, and how many steps each has in turn: schedules that differ are named apart."""
    return ", ".join(f"{len(list(same))} × {name}" for name, same in groupby(members))


def _inside(share: float, small: str, large: str, steps: int, count: int) -> list[str] | None:
    free = steps - count
    if free < 2:
        return None
    front = min(free - 1, max(1, round(share * free)))
    return [small] * front + [large] * count + [small] * (free - front)


def _outside(share: float, small: str, large: str, steps: int, count: int) -> list[str] | None:
    if count < 2:
        return None
    front = min(count - 1, max(1, round(share * count)))
    return [large] * front + [small] * (steps - count) + [large] * (count - front)


def _rule(zoo: BudgetedZoo, rule: str, who: str, layout: Layout, steps: Sequence[str]) -> RuleSchedule | None:
    members = [name for name, size in zip(steps, layout.sizes, strict=True) for _ in range(size)]
    cost = cost_of(zoo, members)
    if not within(zoo, cost):
        return None
    return RuleSchedule(rule, f"{who}, {layout.name}", layout.with_members(members), cost)


def _chosen(zoo: BudgetedZoo, rules: Iterable[RuleSchedule], count: int) -> list[RuleSchedule]:
    """At most `count` different ones, evenly over the list, of those that use the budget if there are enough."""
    different = list({rule.schedule: rule for rule in rules}.values())
    if zoo.budget is not None and len(different) > count:
        used = [rule for rule in different if rule.cost >= _USED * (zoo.budget or 0.0)]
        if len(used) < count:
            dearest = sorted(range(len(different)), key=lambda i: -different[i].cost)[:count]
            used = [different[i] for i in sorted(dearest)]
        different = used
    return evenly(different, count)


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, spread evenly, both ends among them."""
    if len(items) <= count:
        return list(items)
    return (
        [items[round(place)] for place in np.linspace(0, len(items) - 1, count)] if count > 1 else list(items[:count])
    )
