"""Random model schedules, random edits of them, and what brings one down to a budget.

After OMS-DPM (Liu et al. 2023, arXiv 2306.08860): its mutation replaces entries of a vector in which most are null;
here the same changes are made to the evaluations there are: another member, one evaluation more or fewer, another
grouping; and two exchange their members, which leaves the cost as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from genlight.diffusion.model_schedule import Kind
from genlight.search.records import fits


@dataclass(frozen=True)
class Limits:
    """What a draft may be.

    Attributes:
        costs: of one evaluation by each member, positive.
        switch: of one change of member between evaluations.
        max_evaluations: network evaluations at most.
        max_order: evaluations of a singlestep step, and order of a multistep one, at most.
        slots: length of the ddim grid.
    """

    costs: tuple[float, ...]
    switch: float
    max_evaluations: int
    max_order: int
    slots: int


@dataclass
class Draft:
    """A model schedule taken apart, with members by number; fields as in `ModelSchedule`."""

    kind: Kind
    steps: list[list[int]]
    slots: list[int] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return sum(map(len, self.steps))

    def copy(self) -> "Draft":
        """One that can be edited apart from this."""
        return Draft(self.kind, [[*step] for step in self.steps], [*self.slots], [*self.orders])

    def find(self, number: int) -> tuple[int, int]:
        """Step, and place in it, of the evaluation `number`."""
        for index, step in enumerate(self.steps):
            if number < len(step):
                return index, number
            number -= len(step)
        raise IndexError(number)

    def remove(self, index: int, place: int) -> None:
        """Take one evaluation away, and its step where it was the only one."""
        del self.steps[index][place]
        if not self.steps[index]:
            self.remove_step(index)

    def remove_step(self, index: int) -> None:
        """Take a step away."""
        del self.steps[index]
        if self.kind == "ddim":
            del self.slots[index]
        if self.kind == "multistep":
            del self.orders[index]


def below(rng: np.random.Generator, count: int) -> int:
    """A whole number from 0 to count - 1; several times as fast as `rng.integers`."""
    return int(rng.random() * count)


def total_cost(members: Sequence[int], limits: Limits) -> float:
    """What evaluations by these members, in turn, cost."""
    total = sum(map(limits.costs.__getitem__, members))
    if limits.switch:
        total += limits.switch * sum(a != b for a, b in pairwise(members))
    return total


def draft_cost(draft: Draft, limits: Limits) -> float:
    """What a draft costs: to the last digit what the schedule made of it does."""
    return total_cost([member for step in draft.steps for member in step], limits)


def random_draft(
    kind: Kind, rng: np.random.Generator, limits: Limits, draw: Callable[[], int], null_probability: float
) -> Draft:
    """The paper's random vector: groups of `max_order` positions, slots, or steps, each empty or given a member."""
    positions = limits.slots if kind == "ddim" else limits.max_evaluations
    kept = np.flatnonzero(rng.random(positions) >= null_probability).tolist() or [below(rng, positions)]
    if kind == "ddim":
        kept.reverse()
        return Draft("ddim", [[draw()] for _ in kept], slots=kept)
    if kind == "multistep":
        return Draft("multistep", [[draw()] for _ in kept], orders=[1 + below(rng, limits.max_order) for _ in kept])
    groups: dict[int, list[int]] = {}
    for position in kept:
        groups.setdefault(position // limits.max_order, []).append(draw())
    return Draft("singlestep", list(groups.values()))


def keeps(draft: Draft, limits: Limits, budget: float | None) -> bool:
    """Whether a draft has no more evaluations than allowed, and costs `budget` at most."""
    return draft.nfe <= limits.max_evaluations and (budget is None or fits(draft_cost(draft, limits), budget))


def edit_member(draft: Draft, rng: np.random.Generator, limits: Limits) -> bool:
    """Another member for one evaluation."""
    count = len(limits.costs)
    if count < 2:
        return False
    index, place = draft.find(below(rng, draft.nfe))
    step = draft.steps[index]
    step[place] = (step[place] + 1 + below(rng, count - 1)) % count
    return True


def edit_exchange(draft: Draft, rng: np.random.Generator, limits: Limits) -> bool:
    """The members of two evaluations, exchanged."""
    index, place = draft.find(below(rng, draft.nfe))
    own = draft.steps[index][place]
    others = [(i, j) for i, step in enumerate(draft.steps) for j, member in enumerate(step) if member != own]
    if not others:
        return False
    other, there = others[below(rng, len(others))]
    draft.steps[index][place], draft.steps[other][there] = draft.steps[other][there], own
    return True


def edit_insert(draft: Draft, rng: np.random.Generator, limits: Limits) -> bool:
    """One evaluation more, by any member."""
    return insert(draft, rng, limits, below(rng, len(limits.costs)))


def insert(draft: Draft, rng: np.random.Generator, limits: Limits, member: int) -> bool:
    """One evaluation more by `member`: as a step of its own, or, singlestep, as often into a step there is."""
    if draft.nfe >= limits.max_evaluations:
        return False
    if draft.kind == "ddim":
        slot = below(rng, limits.slots)
        if slot in draft.slots:
            return False
        index = sum(other > slot for other in draft.slots)
        draft.slots.insert(index, slot)
        draft.steps.insert(index, [member])
        return True
    if draft.kind == "singlestep" and rng.random() < 0.5:
        step = draft.steps[below(rng, len(draft.steps))]
        if len(step) < limits.max_order:
            step.insert(below(rng, len(step) + 1), member)
            return True
    index = below(rng, len(draft.steps) + 1)
    draft.steps.insert(index, [member])
    if draft.kind == "multistep":
        draft.orders.insert(index, 1 + below(rng, limits.max_order))
    return True


def edit_drop(draft: Draft, rng: np.random.Generator, limits: Limits) -> bool:
    """One evaluation fewer."""
    count = draft.nfe
    if count < 2:
        return False
    draft.remove(*draft.find(below(rng, count)))
    return True


def edit_grouping(draft: Draft, rng: np.random.Generator, limits: Limits) -> bool:
    """Singlestep: two steps become one, or one becomes two. Ddim: a slot moves. Multistep: another order."""
    index = below(rng, len(draft.steps))
    if draft.kind == "multistep":
        before, highest = draft.orders[index], min(limits.max_order, index + 1)
        draft.orders[index] = 1 + below(rng, highest)
        return draft.orders[index] != before
    if draft.kind == "ddim":
        high = draft.slots[index - 1] if index else limits.slots
        low = draft.slots[index + 1] if index + 1 < len(draft.slots) else -1
        before = draft.slots[index]
        draft.slots[index] = low + 1 + below(rng, high - low - 1)
        return draft.slots[index] != before
    step = draft.steps[index]
    if rng.random() < 0.5:
        if index + 1 == len(draft.steps) or len(step) + len(draft.steps[index + 1]) > limits.max_order:
            return False
        step.extend(draft.steps.pop(index + 1))
        return True
    if len(step) < 2:
        return False
    cut = 1 + below(rng, len(step) - 1)
    draft.steps[index : index + 1] = [step[:cut], step[cut:]]
    return True


Edit = Callable[[Draft, np.random.Generator, Limits], bool]
# a change of member twice as often as each of the others
EDITS: tuple[Edit, ...] = (edit_member, edit_member, edit_exchange, edit_insert, edit_drop, edit_grouping)


def lighten(draft: Draft, rng: np.random.Generator, limits: Limits, budget: float) -> None:
    """Replace evaluations by lighter ones or drop them, at random, until the draft costs `budget` at most.

    It ends: every change lowers the sum of the members' costs, down to one evaluation by the lightest.

    Raises ValueError where that one costs more.
    """
    while not fits(draft_cost(draft, limits), budget):
        count = draft.nfe
        index, place = draft.find(below(rng, count))
        step = draft.steps[index]
        own = limits.costs[step[place]]
        lighter = [member for member, cost in enumerate(limits.costs) if cost < own]
        if lighter and (count == 1 or rng.random() < 0.5):
            step[place] = lighter[below(rng, len(lighter))]
        elif count > 1:
            draft.remove(index, place)
        else:
            raise ValueError(f"space.budget = {budget:g}: the cheapest schedule costs {min(limits.costs):g}")


def enrich(
    draft: Draft,
    rng: np.random.Generator,
    limits: Limits,
    target: float,
    draw: Callable[[], int],
    tries: int = 40,
    near: float = 0.9,
) -> None:
    """Add evaluations by members from `draw`, or make some heavier, as long as the draft costs `target` at most.

    It ends at `near` · target, or after `tries`.
    """
    cost = draft_cost(draft, limits)
    for _ in range(tries):
        if cost >= near * target:
            return
        new = draft.copy()
        if rng.random() < 0.5:
            insert(new, rng, limits, draw())
        else:
            index, place = new.find(below(rng, new.nfe))
            own = limits.costs[new.steps[index][place]]
            heavier = [member for member, other in enumerate(limits.costs) if other > own]
            if heavier:
                new.steps[index][place] = heavier[below(rng, len(heavier))]
        dearer = draft_cost(new, limits)
        if dearer <= target:
            draft.steps, draft.slots, draft.orders, cost = new.steps, new.slots, new.orders, dearer


def cross(first: Draft, second: Draft, rng: np.random.Generator) -> Draft:
    """The steps of `first` down to a random place, those of `second` from there on; of one kind.

    The place is a share of the way in λ, or a slot.
    """
    cut = rng.random()
    if first.kind == "ddim":
        # the slot at the cut, between the lowest and the highest of either
        low, high = min(first.slots[-1], second.slots[-1]), max(first.slots[0], second.slots[0])
        place = low + cut * (high - low)
        head = sum(slot > place for slot in first.slots)
        tail = sum(slot > place for slot in second.slots)
    else:
        head, tail = round(cut * len(first.steps)), round(cut * len(second.steps))
    if head == 0 and tail == len(second.steps):
        head = 1
    return Draft(
        first.kind,
        [[*step] for step in (*first.steps[:head], *second.steps[tail:])],
        [*first.slots[:head], *second.slots[tail:]],
        [*first.orders[:head], *second.orders[tail:]],
    )


def cut_to(draft: Draft, rng: np.random.Generator, limits: Limits) -> None:
    """Drop evaluations at random until there are no more than allowed."""
    while draft.nfe > limits.max_evaluations:
        edit_drop(draft, rng, limits)
