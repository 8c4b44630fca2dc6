"""The allocation is the exact optimum, found by trying everything, and its weights are those of the formulas."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.diffusion.model_schedule import ModelSchedule, solver_schedule
from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.solver.compile import compile_schedule
from genlight.search.spaces.model_allocation import (
    _some_layouts,
    allocate,
    analytic_allocation,
    evaluation_weights,
)
from genlight.search.spaces.model_rules import layouts

VP = VPSchedule()


@dataclass(frozen=True)
class Zoo:
    costs: dict = field(default_factory=lambda: {"small": 0.1, "middle": 0.4, "large": 1.0})
    budget: float | None = 3.0
    switch: float = 0.0
    kinds: tuple = ("singlestep",)
    max_evaluations: int = 12
    max_order: int = 3
    slots: int = 100
    noise_schedule: VPSchedule = VP


# members differ only where λ > 0
ERRORS = {
    "small": lambda x: 0.1 + 0.5 / (1 + np.exp(-4 * x)),
    "middle": lambda x: 0.1 + 0.2 / (1 + np.exp(-4 * x)),
    "large": lambda x: 0.1 + 0.0 * x,
}


def brute_force(errors, costs, budget, switch):
    """(error, cost) of everything that fits, the best first."""
    found = []
    for members in itertools.product(range(errors.shape[1]), repeat=len(errors)):
        cost = sum(costs[m] for m in members) + switch * sum(a != b for a, b in itertools.pairwise(members))
        if cost <= budget * (1 + 1e-9):
            found.append((sum(errors[e, m] for e, m in enumerate(members)), cost, members))
    return sorted(found)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.0, 0.0, 0.15]))
def test_the_optimum_of_trying_everything(seed, size, count, switch):
    rng = np.random.default_rng(seed)
    errors, costs = rng.lognormal(0, 2, (size, count)), rng.uniform(0.05, 1.0, count)
    budget = float(rng.uniform(0.5, 1.0) * size * costs.mean() + switch)
    wanted = brute_force(errors, costs, budget, switch)
    found = allocate(errors, costs, budget, switch=switch, best=3)
    assert len(found) == min(3, len(wanted))
    assert len({each.members for each in found}) == len(found)
    for mine, (error, _, _) in zip(found, wanted, strict=False):
        assert mine.error == pytest.approx(error, rel=1e-7, abs=1e-7 * errors.max())


def test_equal_errors_take_the_cheapest_and_a_full_budget_fits():
    errors = np.array([[0.0, 0.0, 0.0], [3.0, 2.0, 1.0]])
    assert allocate(errors, np.array([0.3, 0.2, 0.6]), 5.0)[0].members == (1, 2)
    assert allocate(np.array([[1.0, 0.0]] * 3), np.array([0.1, 1 / 3]), 1.0)[0].members == (1, 1, 1)
    assert allocate(np.ones((3, 1)), np.array([0.34]), 1.0) == []


def test_a_switch_that_costs_makes_segments():
    errors = np.array([[1.0, 0.0], [0.0, 1.0]] * 3)
    costs = np.array([0.1, 0.1])
    assert allocate(errors, costs, 1.2, switch=0.1)[0].error == 0.0
    assert len(list(itertools.groupby(allocate(errors, costs, 0.9, switch=0.1)[0].members))) == 4


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        allocate(np.array([[bad]]), np.ones(1), 1.0)
    with pytest.raises(ValueError, match="shapes"):
        allocate(np.ones((2, 3)), np.ones(2), 1.0)


def test_weights_are_those_of_the_formulas():
    schedule = solver_schedule(ModelSchedule("singlestep", (("a",) * 2, ("a",) * 3)), VP, None)
    table = compile_schedule(schedule, VP, basis="noise")
    end = VP.half_log_snr(VP.t_min)
    knots = np.linspace(VP.half_log_snr(VP.t_max), end, 3)

    def sigma(x):
        return 1 / math.sqrt(1 + math.exp(2 * x))

    def alpha(x):
        return sigma(-x)

    h = knots[1] - knots[0]
    carried = alpha(knots[2]) / alpha(knots[1])
    second = -sigma(knots[1]) * math.expm1(h) * carried
    e2 = -sigma(knots[2]) * math.expm1(h) / h
    last = -1.5 * sigma(knots[2]) * (math.expm1(h) / h - 1)
    first = -sigma(knots[2]) * math.expm1(h) - last
    weights, half_log_snrs = evaluation_weights(table, VP)
    assert half_log_snrs == pytest.approx([knots[0], knots[0] + h / 2, *(knots[1] + h * np.arange(3) / 3)], abs=1e-9)
    # midpoint steps do not weigh the first output, nor do steps of order 3 the second
    assert weights == pytest.approx([0.0, second, first, 0.0, last], rel=1e-9, abs=1e-9 * abs(e2))


def test_an_error_of_an_output_moves_the_result_by_its_weight():
    schedule = ModelSchedule("singlestep", (("a",), ("a",) * 2, ("a",) * 3))
    table = compile_schedule(solver_schedule(schedule, VP, None), VP, basis="noise")

    def result(moved):
        outputs = torch.zeros(table.nfe + 1, dtype=torch.float64)
        outputs[1 + moved] = 1.0
        return float(table.weights[-1] @ outputs)

    assert [result(j) for j in range(table.nfe)] == pytest.approx(evaluation_weights(table, VP)[0].tolist())
    # one step from noise to data: written as data or as noise, the same error
    step = solver_schedule(ModelSchedule("singlestep", (("a",),)), VP, None)
    noise, data = (evaluation_weights(compile_schedule(step, VP, basis=basis), VP)[0] for basis in ("noise", "data"))
    assert np.abs(noise) == pytest.approx(np.abs(data))


def test_half_steps_are_small_and_large_members_stand_where_they_differ():
    found = analytic_allocation(Zoo(), ERRORS)
    assert all(each.cost <= 3.0 + 1e-9 for each in found)
    assert len({each.schedule for each in found}) == len(found)
    second = [each for each in found if each.schedule.nfe == 8 and {len(s) for s in each.schedule.steps} == {2}]
    for step in second[0].schedule.steps:
        assert step[0] == "small"  # its weight is zero
    plain = next(each for each in found if each.schedule.nfe == 10 and len(each.schedule.steps) == 10)
    places = [list(Zoo().costs).index(name) for name in plain.schedule.members]
    assert places[0] == 0 and max(places) == 2 and places.index(2) >= 4


@pytest.mark.parametrize("kinds", [("singlestep",), ("ddim",), ("multistep",), ("singlestep", "ddim", "multistep")])
@pytest.mark.parametrize("budget", [0.1, 1.0, 8.0])
def test_budget_and_count_hold_for_every_kind(kinds, budget):
    zoo = Zoo(budget=budget, kinds=kinds, switch=0.02)
    found = analytic_allocation(zoo, ERRORS, count=24, best=2)
    assert 0 < len(found) <= 24
    for each in found:
        members = each.schedule.members
        changes = sum(a != b for a, b in itertools.pairwise(members))
        assert each.cost == pytest.approx(sum(zoo.costs[name] for name in members) + 0.02 * changes)
        assert each.cost <= budget * (1 + 1e-9) and each.schedule.nfe <= zoo.max_evaluations
        assert each.schedule.kind in kinds


@pytest.mark.parametrize("kinds", [("singlestep",), ("singlestep", "ddim", "multistep")])
@pytest.mark.parametrize("count", [12, 18, 24, 30])
def test_every_kind_and_order_has_its_share_and_one_of_few_evaluations(count, kinds):
    for most in range(4, 37):
        zoo = Zoo(max_evaluations=most, kinds=kinds)
        there = Counter((each.kind, each.order) for each in layouts(zoo, range(1, most + 1)))
        chosen = _some_layouts(zoo, most, count)
        found = Counter((each.kind, each.order) for each in chosen)
        assert len(set(chosen)) == len(chosen) == min(count, sum(there.values()))
        # none has fewer than another unless there are no more of it
        assert all(found[group] >= min(there[group], max(found.values()) - 1) for group in there)
        assert {(each.kind, each.order) for each in chosen if each.nfe <= 6} == set(there)
        assert max(each.nfe for each in chosen) == most


def test_numbers_of_evaluations_are_in_equal_ratios():
    chosen = _some_layouts(Zoo(max_evaluations=36), 36, 18)
    assert [each.nfe for each in chosen if each.order == 1] == [1, 2, 4, 9, 18, 36]
    assert [each.nfe for each in chosen if each.order == 3] == [3, 5, 8, 13, 22, 36]
    assert [each.nfe for each in _some_layouts(Zoo(max_evaluations=36), 36, 3)] == [6, 8, 10]


@pytest.mark.parametrize("schedule", [FlowSchedule(), VPSchedule(rescale_zero_terminal_snr=True), EDMSchedule()])
def test_schedules_with_infinite_ends_have_finite_errors(schedule):
    found = analytic_allocation(Zoo(noise_schedule=schedule, kinds=("singlestep", "multistep")), ERRORS, count=20)
    assert len(found) > 10 and all(0 < each.predicted_error < math.inf for each in found)


def test_sixty_at_most_by_default_and_more_budget_is_never_worse():
    best = {}
    for budget in (1.0, 2.0, 4.0):
        found = analytic_allocation(Zoo(budget=budget, max_evaluations=36), ERRORS)
        assert 40 <= len(found) <= 60 if budget > 1 else found
        best[budget] = {(each.schedule.nfe, each.schedule.steps[0].__len__()): each.predicted_error for each in found}
    shared = set(best[2.0]) & set(best[4.0])
    assert shared and all(best[4.0][key] <= best[2.0][key] + 1e-12 for key in shared)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="none for large"):
        analytic_allocation(Zoo(), {k: v for k, v in ERRORS.items() if k != "large"})
    with pytest.raises(ValueError, match="budget"):
        analytic_allocation(Zoo(budget=None), ERRORS)
    assert analytic_allocation(Zoo(budget=0.05), ERRORS) == []
