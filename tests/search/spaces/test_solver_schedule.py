"""The space of solver schedules: every edit is valid and cheap to undo, keys and features say what they should."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import network

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule, StepDecision
from genlight.diffusion.solver.levels import levels_of
from genlight.diffusion.solver.presets import PRESETS, named_schedule
from genlight.errors import UserError
from genlight.search.codec import CandidateCodec
from genlight.search.protocols import VectorView
from genlight.search.spaces.solver_genes import EDITS, TimeRange
from genlight.search.spaces.solver_plan import PLAIN_SPACINGS, baselines
from genlight.search.spaces.solver_schedule import ALL_GENES, SolverScheduleSpace, TableSampler, schedule_key

VP, EDM, FLOW = VPSchedule(), EDMSchedule(), FlowSchedule(shift=3.0)
ZERO_SNR = VPSchedule(rescale_zero_terminal_snr=True)
SPACES: dict[str, tuple[Any, dict[str, Any]]] = {
    "vp": (VP, {}),
    "vp-clean": (VP, {"end": "clean"}),
    "vp-free-ends": (VP, {"start_slack": 0.5, "end_slack": 1.0}),
    "vp-integers": (VP, {"integer_times": True}),
    "vp-short-integers": (VPSchedule(num_train_timesteps=12), {"integer_times": True}),
    "vp-zero-snr": (ZERO_SNR, {"integer_times": True, "end": "clean"}),
    "edm": (EDM, {}),
    "flow": (FLOW, {}),
}


def hand_made(noise_schedule: Any, nfe: int, end: str = "t_min") -> list[SolverSchedule]:
    """Presets, in their own time domain, that the noise schedule can have."""
    result = []
    for name in PRESETS:
        for spacing in ("uniform", "log_snr"):
            try:
                schedule = named_schedule(name, noise_schedule, nfe, spacing=spacing, end=end)  # type: ignore[arg-type]
                compile_schedule(schedule, noise_schedule)
            except ValueError:
                continue
            result.append(schedule)
    return result


@pytest.mark.parametrize("name", SPACES)
def test_ten_thousand_random_edits_validate(name: str) -> None:
    """Pitfall 10: 1250 edits and crossings here, 10,000 over all spaces; each compiles, no parent changes."""
    noise_schedule, options = SPACES[name]
    space = SolverScheduleSpace(noise_schedule, 6, genes=tuple(EDITS), max_order=4, **options)
    rng = np.random.default_rng(0)
    pool = hand_made(noise_schedule, 6, space.end) if name != "vp-short-integers" else []
    pool += [space.sample(rng) for _ in range(10)]
    codec = CandidateCodec(space.candidate_type)
    for trial in range(1250):
        first, second = (pool[int(i)] for i in rng.integers(len(pool), size=2))
        before = copy.deepcopy((first, second))
        if rng.random() < 0.6:
            child = space.mutate(first, rng, size=float(rng.uniform(0.05, 1.0)))
        else:
            child = space.crossover(first, second, rng)
        assert (first, second) == before
        assert child.nfe == 6 == compile_schedule(child, noise_schedule).nfe
        if trial % 10 == 0:
            assert codec.from_plain(codec.to_plain(child)) == child
            assert bool(space.encode(child).isfinite().all()) and space.encode(child).shape[0] == len(child.steps)
        if space.integer_times and child.time_domain == "time":
            assert all(time is None or time == round(time) for time in child.times) or child.times == first.times
        if rng.random() < 0.3:
            pool[int(rng.integers(len(pool)))] = child


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_only_genes_change(name: str) -> None:
    noise_schedule, _ = SPACES[name]
    rng = np.random.default_rng(1)
    parents = [s for s in hand_made(noise_schedule, 5) if len(s.steps) == 5]
    times = SolverScheduleSpace(noise_schedule, 5, genes=("times",))
    types = SolverScheduleSpace(noise_schedule, 5, genes=("type", "order", "corrector"))
    for _ in range(100):
        a, b = (parents[int(i)] for i in rng.integers(len(parents), size=2))
        for child in (times.mutate(a, rng, size=0.3), times.crossover(a, b, rng)):
            assert child.steps == a.steps
        for child in (types.mutate(a, rng), types.crossover(a, b, rng)):
            assert [x.half_log_snr for x in levels_of(child, noise_schedule)] == pytest.approx(
                [x.half_log_snr for x in levels_of(a, noise_schedule)]
            )
            assert all(step.source == -1 for step in child.steps) or any(s.source != -1 for s in (*a.steps, *b.steps))


def test_size_scales_the_edits_of_times() -> None:
    space = SolverScheduleSpace(VP, 5, genes=("times",))
    parent = space.sample(np.random.default_rng(0))

    def spread(size: float) -> float:
        rng = np.random.default_rng(1)
        children = [np.array(space.mutate(parent, rng, size=size).times, dtype=float) for _ in range(300)]
        return float(np.std(np.array(children) - np.array(parent.times, dtype=float)))

    assert 5 < spread(0.2) / spread(0.02) < 15


def test_times_settle_within_their_bounds_and_gaps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        count = int(rng.integers(2, 12))
        bounds = TimeRange(-5.0, 4.0, 0.0, 0.0, -5.0, 4.0, 0.05)
        lambdas = np.concatenate([[-5.0], rng.normal(scale=5, size=count - 1), [4.0]])
        settled = bounds.settle(lambdas)
        assert settled[0] == -5 and settled[-1] == 4 and np.diff(settled).min() >= 0.05 - 1e-12
        far_apart = np.diff(np.sort(lambdas)).min() >= 0.05 and np.abs(lambdas[1:-1]).max() < 3.9
        if far_apart and (lambdas[1:-1] > -4.9).all():
            assert np.array_equal(settled, np.sort(lambdas))


def test_keys_ignore_what_makes_no_difference() -> None:
    schedule = named_schedule("ddim", VP, 4)
    other = replace(schedule, steps=(StepDecision("noise"), *schedule.steps[1:]))
    assert schedule_key(schedule, VP) == schedule_key(other, VP)
    tables = [compile_schedule(s, VP).weights for s in (schedule, other)]
    torch.testing.assert_close(*tables, rtol=1e-12, atol=1e-12)
    # a type does matter from a corrected source
    corrected = named_schedule("unipc_2_bh1", VP, 4)
    changed = replace(corrected, steps=(*corrected.steps[:3], replace(corrected.steps[3], prediction="noise")))
    assert schedule_key(corrected, VP) != schedule_key(changed, VP)
    space = SolverScheduleSpace(VP, 4)
    assert space.key(schedule) == schedule_key(schedule, VP)
    assert space.cost(named_schedule("heun", VP, 5)) == {"nfe": 5.0}


def test_features_tell_schedules_apart() -> None:
    """Schedules with different keys have different features."""
    space = SolverScheduleSpace(VP, 5)
    rng = np.random.default_rng(0)
    seen: dict[str, bytes] = {}
    for _ in range(300):
        candidate = space.sample(rng)
        seen[space.key(candidate)] = space.encode(candidate).numpy().tobytes()
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("name", ["vp", "vp-clean", "edm", "flow"])
def test_vector_view_is_an_inverse(name: str) -> None:
    noise_schedule, options = SPACES[name]
    space = SolverScheduleSpace(noise_schedule, 6, **options)
    assert isinstance(space, VectorView)
    rng = np.random.default_rng(0)
    for _ in range(50):
        vector = rng.normal(size=len(space.vector_bounds))
        candidate = space.from_vector(vector)
        compile_schedule(candidate, noise_schedule)
        again = space.from_vector(space.to_vector(candidate))
        assert space.key(again) == space.key(candidate)
    for schedule in hand_made(noise_schedule, 6, space.end):
        compile_schedule(space.from_vector(space.to_vector(schedule)), noise_schedule)
    assert space.from_vector(np.full(len(space.vector_bounds), 500.0)).nfe == 6


@pytest.mark.parametrize("noise_schedule", [VP, EDM, FLOW], ids=lambda s: s.family)
@pytest.mark.parametrize("nfe", [4, 5, 6])
def test_baselines_are_many_different_and_right(noise_schedule: Any, nfe: int) -> None:
    found = baselines(noise_schedule, nfe, spacings=PLAIN_SPACINGS)
    assert len(found) >= 100
    assert all(schedule.nfe == nfe for _, schedule in found)
    assert len({name for name, _ in found}) == len({schedule_key(s, noise_schedule) for _, s in found}) == len(found)
    by_name = dict(found)
    assert by_name["dpmpp_2m/log_snr"] == named_schedule("dpmpp_2m", noise_schedule, nfe)


def test_a_target_gets_the_compiled_table() -> None:
    class Target:
        sampler: Any = None

        def set_sampler(self, sampler: Any) -> None:
            self.sampler = sampler

    space, target, prediction = SolverScheduleSpace(VP, 4), Target(), Prediction("epsilon", VP)
    candidate = space.sample(np.random.default_rng(0))
    space.apply(target, candidate)
    assert isinstance(target.sampler, TableSampler) and target.sampler.schedule is candidate
    noise = torch.randn(3, 1, dtype=torch.float64)
    assert target.sampler(network(prediction), noise, prediction).shape == (3, 1)
    with pytest.raises(UserError, match="SettableSampler"):
        space.apply(object(), candidate)


def test_fingerprints_differ_with_every_option() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"nfe": 6},
        {"noise_schedule": VPSchedule("scaled_linear")},
        {"genes": ("times",)},
        {"end": "clean"},
        {"max_order": 2},
        {"min_gap": 0.1},
        {"start_slack": 0.1},
        {"end_slack": 0.1},
        {"integer_times": True},
        {"template": named_schedule("ddim", VP, 5)},
    ]
    spaces = [SolverScheduleSpace(**{"noise_schedule": VP, "nfe": 5, **change}) for change in changes]
    assert len({space.fingerprint() for space in spaces}) == len(spaces)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": ("time",)}, "space.genes"),
        ({"genes": ()}, "space.genes"),
        ({"nfe": 0}, "space.nfe"),
        ({"max_order": 5}, "space.max_order"),
        ({"end": "sigma"}, "space.end"),
        ({"noise_schedule": FLOW, "end_slack": 0.5}, "end_slack.*infinite"),
        ({"noise_schedule": EDM, "integer_times": True}, "integer_times"),
        ({"template": named_schedule("ddim", VP, 3)}, "template makes 3"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolverScheduleSpace(**{"noise_schedule": VP, "nfe": 5, **options})
    assert "times" in ALL_GENES
