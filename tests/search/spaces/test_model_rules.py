"""Rules keep their form, their budget and their number; where small-first is known to be best it wins."""

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from genlight.diffusion.model_schedule import solver_schedule
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.solver.compile import compile_schedule
from genlight.search.spaces.model_allocation import analytic_allocation, evaluation_weights
from genlight.search.spaces.model_rules import (
    chosen_singles,
    large_first,
    layouts,
    random_schedules,
    sandwich,
    single_models,
    small_first,
)
from genlight.search.spaces.model_schedule import ModelScheduleSpace

VP = VPSchedule()


@dataclass(frozen=True)
class Zoo:
    costs: dict = field(default_factory=lambda: {"w16": 0.015, "w32": 0.043, "w64": 0.135, "w128": 0.468, "w192": 1.0})
    budget: float | None = 2.0
    switch: float = 0.0
    kinds: tuple = ("singlestep",)
    max_evaluations: int = 36
    max_order: int = 3
    slots: int = 100
    noise_schedule: VPSchedule = VP


RULES = {
    "single": single_models,
    "small_first": small_first,
    "large_first": large_first,
    "sandwich": sandwich,
    "random": lambda zoo: random_schedules(zoo, np.random.default_rng(0)),
}


def segments(rule):
    """The member of each segment of steps."""
    assert all(len(set(step)) == 1 for step in rule.schedule.steps)
    return [name for name, _ in itertools.groupby(step[0] for step in rule.schedule.steps)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("budget", [0.2, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("switch", [0.0, 0.03])
def test_every_rule_keeps_the_budget_and_says_what_it_costs(name, budget, switch):
    zoo = Zoo(budget=budget, switch=switch, kinds=("singlestep", "ddim", "multistep"))
    made = RULES[name](zoo)
    assert made and len({rule.schedule for rule in made}) == len(made)
    for rule in made:
        members = rule.schedule.members
        changes = sum(a != b for a, b in itertools.pairwise(members))
        assert rule.cost == pytest.approx(sum(zoo.costs[m] for m in members) + switch * changes)
        assert rule.cost <= budget * (1 + 1e-9)
        assert rule.schedule.nfe <= zoo.max_evaluations and rule.name
        solver_schedule(rule.schedule, VP, zoo.slots)


@pytest.mark.parametrize("budget", [1.0, 2.0, 4.0, 8.0])
def test_numbers_of_the_comparison(budget):
    zoo = Zoo(budget=budget)
    assert len(small_first(zoo)) == len(large_first(zoo)) == 40
    assert len(sandwich(zoo)) == 80
    assert len(random_schedules(zoo, np.random.default_rng(1))) == 10
    for rules in (small_first(zoo), large_first(zoo), sandwich(zoo), random_schedules(zoo, np.random.default_rng(1))):
        assert np.mean([rule.cost for rule in rules]) >= 0.75 * budget
        assert len({rule.schedule.nfe for rule in rules}) >= 5


def test_singles_are_every_member_at_every_number_of_evaluations_and_order():
    made = single_models(Zoo(budget=None))
    assert len(made) == 5 * (36 * 3 - 3)  # an order needs as many evaluations
    assert len(made) == len({rule.schedule for rule in made})
    for rule in made:
        assert len(set(rule.schedule.members)) == 1 and 1 <= rule.schedule.nfe <= 36
    cheap = single_models(Zoo(budget=2.0))
    large = [rule for rule in cheap if rule.schedule.members[0] == "w192"]
    assert [rule.schedule.nfe for rule in large] == [1, 2, 2] and [rule.cost for rule in large] == [1.0, 2.0, 2.0]


def test_the_most_evaluations_that_fit_are_among_the_singles_of_every_budget_member_and_order():
    limits = (1.0, 2.0, 4.0, 8.0)
    zoo = Zoo(budget=limits[-1], kinds=("singlestep", "multistep"))
    every = single_models(zoo)
    chosen = chosen_singles(zoo, limits, 120)
    assert len(chosen) == len({each.schedule for each in chosen}) == 120 and set(chosen) <= set(every)
    for limit, member, kind, order in itertools.product(limits, zoo.costs, zoo.kinds, (1, 2, 3)):

        def fits(rule, limit=limit, member=member, name=f"{kind} order {order},"):
            return rule.cost <= limit * (1 + 1e-9) and rule.schedule.members[0] == member and name in rule.name

        most = max((rule.schedule.nfe for rule in every if fits(rule)), default=None)
        assert most == max((rule.schedule.nfe for rule in chosen if fits(rule)), default=None)
    assert chosen_singles(zoo, limits, len(every)) == every
    assert len(chosen_singles(zoo, limits, 5)) == 5


def test_segments_stand_in_the_order_of_the_name():
    zoo = Zoo(budget=4.0)
    cost = zoo.costs
    for rule in small_first(zoo):
        first, last = segments(rule)
        assert cost[first] < cost[last]
    for rule in large_first(zoo):
        first, last = segments(rule)
        assert cost[first] > cost[last]
    forms = {"small_large_small": 0, "large_small_large": 0}
    for rule in sandwich(zoo):
        first, middle, last = segments(rule)
        forms[rule.rule] += 1
        assert first == last and (cost[first] < cost[middle]) == (rule.rule == "small_large_small")
    assert set(forms.values()) == {40}


def test_no_more_large_steps_would_fit():
    zoo = Zoo(budget=2.0)
    for rule in small_first(zoo):
        steps = [step[0] for step in rule.schedule.steps]
        place = next(i for i in range(1, len(steps)) if steps[i] != steps[0])
        if place > 1:
            more = rule.cost + len(rule.schedule.steps[place - 1]) * (zoo.costs[steps[-1]] - zoo.costs[steps[0]])
            assert more > zoo.budget


def test_the_same_again_and_other_draws_for_another_generator():
    zoo = Zoo()
    assert sandwich(zoo) == sandwich(zoo)
    one, again, other = (random_schedules(zoo, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == again and one != other


def test_a_budget_for_nothing_makes_nothing():
    zoo = Zoo(budget=0.01)
    assert all(RULES[name](zoo) == [] for name in RULES)
    assert small_first(replace(zoo, costs={"a": 1.0, "b": 1.0}, budget=9.0)) == []  # neither is the small one


def test_a_search_space_is_such_a_zoo():
    space = ModelScheduleSpace(VP, Zoo().costs, budget=2.0, switch=0.01)
    for rule in (*small_first(space), *random_schedules(space, np.random.default_rng(0))):
        assert space.cost(rule.schedule)["cost"] == pytest.approx(rule.cost)


def test_layouts_have_the_evaluations_they_say():
    zoo = Zoo(kinds=("singlestep", "ddim", "multistep"), slots=10)
    for layout in layouts(zoo, range(1, 40)):
        schedule = layout.with_members(["w16"] * layout.nfe)
        assert schedule.nfe == layout.nfe <= 36
        solver_schedule(schedule, VP, zoo.slots)


def test_no_stitch_has_less_predicted_error_than_the_allocation():
    """The error that the table predicts, for members that differ only near the data; by the same layout."""
    zoo = Zoo(budget=4.0, costs={"small": 0.1, "large": 1.0})
    errors = {"small": lambda x: 0.1 + np.exp(np.clip(x, -20, 2)), "large": lambda x: 0.1 + 0 * x}

    def predicted(rule):
        table = compile_schedule(solver_schedule(rule.schedule, VP, None), VP, basis="noise")
        members = rule.schedule.members
        return sum(w**2 * errors[name](x) for w, x, name in zip(*evaluation_weights(table, VP), members, strict=True))

    def at(rules, nfe):
        return min(predicted(r) for r in rules if r.schedule.nfe == nfe and len(r.schedule.steps) == nfe)

    small, large = small_first(zoo, 1000), large_first(zoo, 1000)
    for nfe in (8, 12):
        analytic = analytic_allocation(replace(zoo, max_evaluations=12), errors, count=1000)
        best = at(analytic, nfe)
        assert best <= min(at(small, nfe), at(large, nfe)) * (1 + 1e-9)
        assert next(r for r in analytic if r.schedule.nfe == nfe).predicted_error == pytest.approx(
            predicted(next(r for r in analytic if r.schedule.nfe == nfe))
        )
