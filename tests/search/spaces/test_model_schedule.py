"""The space of model schedules: every candidate is legal and within the budget, keys tell samples apart."""

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genlight.diffusion.error_curves import ErrorCurve
from genlight.diffusion.model_schedule import ModelSchedule, solver_schedule
from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.levels import half_log_snrs_of
from genlight.errors import UserError
from genlight.search.codec import CandidateCodec
from genlight.search.records import Problem
from genlight.search.spaces.model_allocation import evaluation_weights
from genlight.search.spaces.model_sampler import ModelScheduleSampler
from genlight.search.spaces.model_schedule import ModelScheduleSpace
from genlight.search.spaces.model_schedule_edits import Draft, Limits, lighten

VP, EDM, FLOW = VPSchedule(), EDMSchedule(), FlowSchedule()
COSTS = {"tiny": 0.5, "small": 1.0, "large": 7.25}
KINDS = ("singlestep", "ddim", "multistep")
SPACES: dict[str, Any] = {
    "paper": ModelScheduleSpace(VP, COSTS, 20.0),
    "switch": ModelScheduleSpace(EDM, COSTS, 20.0, switch=2.5, max_evaluations=12),
    "ddim": ModelScheduleSpace(VP, COSTS, 15.0, kinds=("ddim",), slots=20, max_evaluations=8),
    "multistep": ModelScheduleSpace(FLOW, COSTS, 30.0, kinds=("multistep",), max_order=2),
    "all": ModelScheduleSpace(VP, COSTS, 14.0, kinds=KINDS, slots=10, max_evaluations=9, switch=0.1),
    "tight": ModelScheduleSpace(VP, COSTS, 0.5, kinds=KINDS, switch=1.0),
    "without": ModelScheduleSpace(VP, COSTS, None, kinds=KINDS, max_order=1, max_evaluations=5),
    "one member": ModelScheduleSpace(VP, {"only": 2.0}, 11.0, max_order=2),
}


def price(space: ModelScheduleSpace, candidate: ModelSchedule) -> float:
    """The cost, counted anew."""
    members = candidate.members
    changes = sum(members[i] != members[i - 1] for i in range(1, len(members)))
    return math.fsum(space.costs[name] for name in members) + space.switch * changes


def check(space: ModelScheduleSpace, candidate: ModelSchedule) -> None:
    assert candidate.kind in space.kinds and 1 <= candidate.nfe <= space.max_evaluations
    assert set(candidate.members) <= set(space.costs)
    assert max(map(len, candidate.steps)) <= space.max_order and max(candidate.orders, default=1) <= space.max_order
    assert all(slot < space.slots for slot in candidate.slots)
    assert space.cost(candidate) == {"cost": pytest.approx(price(space, candidate)), "nfe": candidate.nfe}
    if space.budget is not None:
        assert space.cost(candidate)["cost"] <= space.budget * (1 + 1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_ten_thousand_random_edits_stay_legal_and_within_the_budget(name: str) -> None:
    space, rng = SPACES[name], np.random.default_rng(0)
    population = [space.sample(rng) for _ in range(30)]
    for candidate in population:
        check(space, candidate)
    for _ in range(10_000 // len(SPACES) + 1):
        a, b = (population[int(i)] for i in rng.integers(len(population), size=2))
        child = (
            space.crossover(a, b, rng) if rng.random() < 0.2 else space.mutate(a, rng, size=float(rng.uniform(0.1, 1)))
        )
        check(space, child)
        population[int(rng.integers(len(population)))] = child
    codec = CandidateCodec(ModelSchedule)
    assert [codec.from_plain(codec.to_plain(each)) for each in population] == population
    # and of parents that exceed it
    richer = space.with_budget(None)
    for _ in range(100):
        a, b = richer.sample(rng), richer.sample(rng)
        check(space, space.mutate(a, rng))
        check(space, space.crossover(a, b, rng))


@pytest.mark.parametrize("name", ["paper", "switch", "ddim", "multistep", "all"])
def test_draws_populate_all_costs_up_to_the_budget(name: str) -> None:
    space, rng = SPACES[name], np.random.default_rng(1)
    drawn = [space.sample(rng) for _ in range(400)]
    costs = np.log([space.cost(each)["cost"] for each in drawn])
    edges = np.linspace(math.log(min(space.costs.values())) - 1e-9, math.log(space.budget) + 1e-9, 5)
    counts = np.histogram(costs, edges)[0]
    assert counts.min() >= 0.08 * len(drawn), counts
    # the Dirichlet draw makes some candidates of one member, and some of all
    assert {len(set(each.members)) for each in drawn} == {1, 2, 3}
    assert len({space.key(each) for each in drawn}) > 100


def test_draws_without_a_budget_are_those_of_the_paper() -> None:
    """Each position is kept with probability 0.2; the share of a member is that of the Dirichlet distribution."""
    space, rng = ModelScheduleSpace(VP, COSTS, max_evaluations=60), np.random.default_rng(2)
    drawn = [space.sample(rng) for _ in range(2000)]
    assert np.mean([each.nfe for each in drawn]) == pytest.approx(12, abs=0.3)
    share = np.array([each.members.count("tiny") / each.nfe for each in drawn])
    # variance of a share: (1/3)(2/3)/(3 · 0.4 + 1), and what counting twelve adds to it
    spread = 2 / 9 / 2.2
    assert share.mean() == pytest.approx(1 / 3, abs=0.03)
    assert share.var() == pytest.approx(spread + (2 / 9 - spread) * np.mean([1 / each.nfe for each in drawn]), rel=0.1)


def test_lightening_ends_at_the_cheapest_schedule_or_says_so() -> None:
    limits, rng = Limits((1.0, 3.0, 2.0), 5.0, 9, 3, 10), np.random.default_rng(0)
    for _ in range(200):
        draft = Draft("singlestep", [[int(m) for m in rng.integers(3, size=3)] for _ in range(3)])
        lighten(draft, rng, limits, 1.0)
        assert draft.steps == [[0]]
    with pytest.raises(ValueError, match="cheapest schedule costs 1"):
        lighten(Draft("singlestep", [[1, 2]]), rng, limits, 0.9)
    with pytest.raises(ValueError, match=r"space.budget = 0.4: the cheapest schedule costs 0.5"):
        ModelScheduleSpace(VP, COSTS, 0.4)
    with pytest.raises(ValueError, match="budget"):
        SPACES["paper"].with_budget(0.1)


def test_keys_are_equal_exactly_where_samples_are() -> None:
    space, rng = SPACES["all"], np.random.default_rng(3)
    members = {
        name: lambda x, t, s=s: torch.sin(s * x + 0.2) + s * (t / 1000)[:, None]
        for name, s in zip(COSTS, (0.3, 0.8, 1.4))
    }
    noise = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = ModelScheduleSpace(VP, COSTS, 3.0, kinds=KINDS, slots=4, max_evaluations=3)
    drawn = [s.sample(rng) for s in (space, small) for _ in range(120)]
    # forms that differ and sample alike
    drawn += [
        ModelSchedule("multistep", (("tiny",), ("small",)), orders=(1, 1)),
        ModelSchedule("singlestep", (("tiny",), ("small",))),
        ModelSchedule("ddim", (("tiny",),), slots=(9,)),
        ModelSchedule("multistep", (("tiny",),), orders=(3,)),
        ModelSchedule("singlestep", (("tiny",),)),
    ]
    results: list[Tensor] = []
    for each in drawn:
        names = iter(each.members)
        prediction = Prediction("epsilon", VP)
        results.append(space.sampler(each)(lambda x, t: members[next(names)](x, t), noise, prediction))  # noqa: B023
    keys = [space.key(each) for each in drawn]
    assert keys[-5] == keys[-4] and keys[-3] == keys[-2] == keys[-1]
    for i, j in combinations(range(len(drawn)), 2):
        alike = torch.allclose(results[i], results[j], rtol=1e-9, atol=0)
        assert (keys[i] == keys[j]) == alike, (drawn[i], drawn[j])


@pytest.mark.parametrize("name", SPACES)
def test_features_hold_the_times_of_the_solver(name: str) -> None:
    """λ of every evaluation is that of the compiled schedule, one width for all, no two keys with equal features."""
    space, rng = SPACES[name], np.random.default_rng(4)
    seen: dict[bytes, str] = {}
    for candidate in [space.sample(rng) for _ in range(60)]:
        features = space.encode(candidate)
        assert features.dtype == torch.float32 and features.isfinite().all()
        assert features.shape == (candidate.nfe, space.encode(space.sample(rng)).shape[1])
        times = half_log_snrs_of(solver_schedule(candidate, space.noise_schedule, space.slots), space.noise_schedule)
        finite = [i for i, time in enumerate(times[:-1]) if math.isfinite(time)]
        wanted = torch.tensor([times[i] for i in finite])
        torch.testing.assert_close(features[finite, 0], wanted.clamp(features[:, 1].min()), rtol=1e-5, atol=1e-5)
        key = (candidate.kind, space.key(candidate))
        assert seen.setdefault(features.numpy().tobytes(), str(key)) == str(key)
        # in any space of the same members and size
        assert torch.equal(features, space.with_budget(None).encode(candidate))


def test_known_errors_of_members_are_a_feature() -> None:
    """Half the logarithm of w² MSE of the member that answers, in the place before the last."""
    curves = {name: ErrorCurve((-4.0, 4.0), (0.5 / (1 + place), 0.1)) for place, name in enumerate(COSTS)}
    for name in ("paper", "all"):
        plain, rng = SPACES[name], np.random.default_rng(6)
        space = replace(plain, curves=curves)
        for candidate in [space.sample(rng) for _ in range(20)]:
            table = compile_schedule(solver_schedule(candidate, VP, space.slots), VP, basis="noise")
            weights, places = evaluation_weights(table, VP)
            errors = [w**2 * float(curves[m]([x])[0]) for w, x, m in zip(weights, places, candidate.members)]
            found, known = space.encode(candidate), plain.encode(candidate)
            wanted = 0.5 * torch.tensor(errors).clamp(min=1e-6).log()
            torch.testing.assert_close(found[:, -2], wanted.float(), rtol=1e-5, atol=1e-5)
            assert torch.equal(torch.cat([found[:, :-2], found[:, -1:]], dim=1), known)


class Target:
    """What can be sampled with several networks."""

    def __init__(self) -> None:
        self.sampler: Any = None
        self.members: Any = None

    def set_sampler(self, sampler: Any) -> None:
        self.sampler = sampler

    def set_members(self, timesteps: Any, names: Any) -> None:
        self.members = list(zip(timesteps, names, strict=True))


def test_applying_hands_over_the_sampler_and_who_answers_when() -> None:
    space, target = SPACES["paper"], Target()
    candidate = ModelSchedule("singlestep", (("tiny", "large"), ("small",)))
    space.apply(target, candidate)
    assert isinstance(target.sampler, ModelScheduleSampler) and target.sampler.schedule == candidate
    asked: list[float] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return 0.1 * x

    result = target.sampler(model, torch.ones(2, 3, dtype=torch.float64), Prediction("epsilon", VP))
    assert result.shape == (2, 3)
    assert target.members == [(pytest.approx(t), name) for t, name in zip(asked, candidate.members)]
    assert asked[0] == 999.0
    for missing in ("set_sampler", "set_members"):
        other = {"set_sampler", "set_members"} - {missing}
        lacking = type("Lacking", (), {name: getattr(Target, name) for name in other})()
        with pytest.raises(UserError, match="SettableSampler" if missing == "set_sampler" else "ScheduledMembers"):
            space.apply(lacking, candidate)
    with pytest.raises(ValueError, match=r"'huge' is not in space\.costs: tiny, small, large"):
        space.apply(target, ModelSchedule("singlestep", (("huge",),)))


def test_small_edits_are_single_edits() -> None:
    space, rng = ModelScheduleSpace(VP, COSTS, 60.0), np.random.default_rng(5)
    for _ in range(200):
        parent = space.sample(rng)
        child = space.mutate(parent, rng, size=0.1)
        assert child != parent and abs(child.nfe - parent.nfe) <= 1 and abs(len(child.steps) - len(parent.steps)) <= 1


def one_edit(a: ModelSchedule, b: ModelSchedule) -> str:
    """The edit that makes one schedule of order 1 to 3 of another; "" where one is not enough."""
    first, second, sizes = a.members, b.members, [list(map(len, each.steps)) for each in (a, b)]
    if len(first) == len(second):
        places = [i for i, pair in enumerate(zip(first, second)) if pair[0] != pair[1]]
        if not places:
            return "grouping" if abs(len(sizes[0]) - len(sizes[1])) == 1 else ""
        if sizes[0] != sizes[1] or len(places) > 2:
            return ""
        if len(places) == 1:
            return "member"
        i, j = places
        return "exchange" if (first[i], first[j]) == (second[j], second[i]) else ""
    longer, shorter = sorted((first, second), key=len, reverse=True)
    return "number" if any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer))) else ""


def test_children_of_a_full_schedule_stay_near_it() -> None:
    """A child beyond the budget is made again and not lightened at random; exchanges move along the boundary."""
    parent = ModelSchedule("singlestep", (("tiny", "large"), ("small",), ("tiny", "small", "large"), ("large",)))
    open_space, rng = ModelScheduleSpace(VP, COSTS), np.random.default_rng(7)
    full = open_space.cost(parent)["cost"]
    space = open_space.with_budget(full)
    edits = [one_edit(parent, space.mutate(parent, rng, size=0.1)) for _ in range(500)]
    assert sum(map(bool, edits)) >= 0.8 * len(edits)
    assert edits.count("exchange") >= 0.1 * len(edits) and {"member", "number", "grouping"} <= set(edits)
    # and of larger edits, and of two full parents, most use what there is
    children = [space.mutate(parent, rng, size=0.3) for _ in range(300)]
    other = ModelSchedule("singlestep", (("large", "large"), ("large", "tiny"), ("small", "small"), ("tiny",)))
    assert open_space.cost(other)["cost"] == full
    crossed = [space.crossover(parent, other, rng) for _ in range(100)]
    for found in (children, crossed):
        assert np.median([open_space.cost(each)["cost"] for each in found]) >= 0.7 * full
    assert all(tuple(each.steps[:1]) in (parent.steps[:1], other.steps[:1]) for each in crossed)


def test_a_budget_of_whole_calls_holds_so_many() -> None:
    """Though the sum of eight costs is more than eight times the cost, in the last digit."""
    cost = next(c for c in np.random.default_rng(0).uniform(1, 9, size=100).tolist() if sum([c] * 8) > 8 * c)
    space = ModelScheduleSpace(VP, {"only": cost, "light": 0.1 * cost}, 8 * cost)
    whole = ModelSchedule("singlestep", (("only",),) * 8)
    problem = Problem(space, cost_limits={"cost": 8 * cost})
    assert 1 < space.cost(whole)["cost"] / space.budget <= 1 + 1e-9
    assert problem.within_limits(space.cost(whole))
    assert space.crossover(whole, whole, np.random.default_rng(0)) == whole
    assert not problem.within_limits({"cost": 8 * cost * (1 + 2e-9)}) and not problem.within_limits({"cost": math.nan})
    # the cheapest schedule too
    tenth = sum([cost / 10] * 10)
    assert ModelScheduleSpace(VP, {"only": max(tenth, cost)}, min(tenth, cost)).sample(np.random.default_rng(0))


def test_an_effect_is_that_of_the_evaluations_with_weight() -> None:
    base = ModelSchedule("singlestep", (("tiny", "small"), ("large", "small", "tiny")))
    half = ModelSchedule("singlestep", (("large", "small"), ("large", "tiny", "tiny")))
    whole = ModelSchedule("singlestep", (("tiny", "large"), ("large", "small", "tiny")))
    plain = SPACES["paper"]
    assert plain.effect(base)[0] == plain.effect(half)[0] != plain.effect(whole)[0]
    # λ is known, and large networks are better at high ones only
    curves = {name: ErrorCurve((-6.0, 0.0, 6.0), (0.1, 0.1, 0.9 - 0.1 * place)) for place, name in enumerate(COSTS)}
    space = replace(plain, curves=curves)
    for each in (base, half, whole):
        table = compile_schedule(solver_schedule(each, VP), VP, basis="noise")
        weights, places = evaluation_weights(table, VP)
        errors = [w**2 * float(curves[m]([x])[0]) for w, x, m in zip(weights, places, each.members)]
        form, parts = space.effect(each)
        assert form == space.effect(base)[0]
        np.testing.assert_allclose(parts, np.maximum(errors, 1e-6), rtol=1e-5)
    assert np.array_equal(space.effect(base)[1], space.effect(half)[1])


def test_the_fingerprint_holds_every_option() -> None:
    base: dict[str, Any] = {"noise_schedule": VP, "costs": COSTS, "budget": 9.0, "kinds": ("singlestep", "ddim")}
    changes: list[dict[str, Any]] = [
        {"noise_schedule": EDM}, {"costs": {**COSTS, "large": 7.0}}, {"costs": dict(reversed(COSTS.items()))},
        {"budget": 8.0}, {"budget": None}, {"kinds": ("ddim",)}, {"max_evaluations": 35}, {"slots": 99},
        {"max_order": 2}, {"switch": 1.0}, {"null_probability": 0.7}, {"concentration": 0.5},
    ]  # fmt: skip
    prints = [ModelScheduleSpace(**{**base, **change}).fingerprint() for change in ({}, *changes)]
    assert len(set(prints)) == len(prints)
    assert ModelScheduleSpace(**base).fingerprint() == prints[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"costs": {}}, "space.costs"),
        ({"costs": {"a": 0.0}}, "space.costs"),
        ({"costs": {"a": float("inf")}}, "space.costs"),
        ({"kinds": ()}, "space.kinds"),
        ({"kinds": ("euler",)}, "space.kinds"),
        ({"max_evaluations": 0}, "space.max_evaluations"),
        ({"max_order": 4}, "space.max_order"),
        ({"switch": -1.0}, "space.switch"),
        ({"null_probability": 1.0}, "space.null_probability"),
        ({"concentration": 0.0}, "space.concentration"),
        ({"kinds": ("ddim",), "slots": 2000}, "slots = 2000"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelScheduleSpace(VP, **{"costs": COSTS, **options})
