"""The space of solver schedules: every edit is valid and cheap to undo, keys and features say what they should."""

import copy
import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import network
from torch import Tensor

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule, StepDecision
from genlight.diffusion.solver.levels import half_log_snrs_of, in_half_log_snr, levels_of
from genlight.diffusion.solver.presets import PRESETS, named_schedule
from genlight.errors import UserError
from genlight.search.codec import CandidateCodec
from genlight.search.protocols import VectorView
from genlight.search.spaces.solver_genes import EDITS, edit_afs
from genlight.search.spaces.solver_plan import PLAIN_SPACINGS, baselines
from genlight.search.spaces.solver_schedule import ALL_GENES, SolverScheduleSpace, TableSampler, schedule_key
from genlight.search.spaces.solver_times import TimeRange

VP, EDM, FLOW = VPSchedule(), EDMSchedule(), FlowSchedule(shift=3.0)
ZERO_SNR = VPSchedule(rescale_zero_terminal_snr=True)
SPACES: dict[str, tuple[Any, dict[str, Any]]] = {
    "vp": (VP, {}),
    "vp-clean": (VP, {"end": "clean"}),
    "vp-free-ends": (VP, {"start_slack": 0.5, "end_slack": 1.0}),
    "vp-integers": (VP, {"integer_times": True}),
    "vp-short-integers": (VPSchedule(num_train_timesteps=12), {"integer_times": True}),
    "vp-zero-snr": (ZERO_SNR, {"integer_times": True, "end": "clean"}),
    "vp-afs": (VP, {"start_slack": 3.0, "mean_first_step": True}),
    "edm": (EDM, {}),
    "edm-free-ends": (EDM, {"start_slack": 4.0, "end_slack": 1.0}),
    "flow": (FLOW, {}),
}
# some λ lie where the rounding of a key turns, and processors of two kinds (AVX2, AVX-512) differ in the last digit
RECORDED_KEYS = (
    {"vp": "26a467ef3237f97c", "edm": "a38e15055b0046e9", "flow": "5af3f09cbe325aaf"},
    {"vp": "a9b9a0c6512067aa", "edm": "a38e15055b0046e9", "flow": "9f03507a5a210297"},
)
RECORDED_CHILDREN = "c74f022770ece5f5"


def all_genes(noise_schedule: Any) -> tuple[str, ...]:
    """Every gene that a space on the noise schedule may have."""
    infinite = noise_schedule.alpha(noise_schedule.t_max) == 0
    return tuple(gene for gene in EDITS if gene != "afs" or not infinite)


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
    """Pitfall 10: 1000 edits and crossings here, 10,000 over all spaces; each compiles, no parent changes."""
    noise_schedule, options = SPACES[name]
    space = SolverScheduleSpace(noise_schedule, 6, genes=all_genes(noise_schedule), max_order=4, **options)
    rng = np.random.default_rng(0)
    pool = hand_made(noise_schedule, 6, space.end) if name != "vp-short-integers" else []
    pool += [space.sample(rng) for _ in range(10)]
    codec = CandidateCodec(space.candidate_type)
    low, high = space.range.start, space.range.end
    first_steps = set()
    for trial in range(1000):
        first, second = (pool[int(i)] for i in rng.integers(len(pool), size=2))
        before = copy.deepcopy((first, second))
        if rng.random() < 0.6:
            child = space.mutate(first, rng, size=float(rng.uniform(0.05, 1.0)))
        else:
            child = space.crossover(first, second, rng)
        assert (first, second) == before
        assert child.nfe == 6 == compile_schedule(child, noise_schedule).nfe
        lambdas = space.draft(child).lambdas
        assert low - 1e-6 <= lambdas[0] <= low + space.start_slack + 1e-6 or child.times[0] == first.times[0]
        assert high + 1e-6 >= lambdas[-1] >= high - space.end_slack - 1e-6 or child.times[-1] == first.times[-1]
        first_steps.add(child.afs)
        if trial % 10 == 0:
            assert codec.from_plain(codec.to_plain(child)) == child
            assert bool(space.encode(child).isfinite().all()) and space.encode(child).shape[0] == len(child.steps)
        if space.integer_times:
            assert child.time_domain == "time" and all(time is None or time == round(time) for time in child.times)
        if rng.random() < 0.3:
            pool[int(rng.integers(len(pool)))] = child
    wanted = [None, *(["zero"] if "afs" in space.genes else []), *(["mean"] if space.mean_first_step else [])]
    assert first_steps == set(wanted)


def test_an_analytical_first_step_is_a_step_more() -> None:
    space = SolverScheduleSpace(VP, 4, genes=("afs",))
    ends = space.range.start, space.range.end
    plain = SolverSchedule((ends[0], -2.0, 1.5, 2.0, ends[1]), named_schedule("dpmpp_2m", VP, 4).steps)
    rng, draft = np.random.default_rng(0), space.draft(plain)
    assert edit_afs(draft, rng, 1.0)
    made = space.finished(draft, plain)
    assert made.afs == "zero" and made.nfe == 4
    assert set(made.times) - set(plain.times) == {-0.25}  # the middle of the widest step
    assert space.encode(made)[:, -2:].unique(dim=0).tolist() == [[1, 0]]
    assert space.encode(plain)[:, -2:].unique(dim=0).tolist() == [[0, 0]]
    assert space.key(made) != space.key(replace(made, afs="mean"))
    seen = {len(space.mutate(made, rng).steps) for _ in range(20)}
    assert 4 in seen and all(space.mutate(made, rng).nfe == 4 for _ in range(20))
    # one evaluation: the analytical step and one more, and back
    single = SolverScheduleSpace(VP, 1, genes=("afs",))
    children = [single.mutate(single.sample(rng), rng) for _ in range(20)]
    assert {(child.afs, len(child.steps)) for child in children} == {(None, 1), ("zero", 2)}


def test_free_ends_are_drawn_and_inherited() -> None:
    space = SolverScheduleSpace(VP, 5, genes=("times",), start_slack=3.0, end_slack=1.0)
    low, high = space.range.start, space.range.end
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(400)]
    starts, ends = (np.array([schedule.times[end] for schedule in drawn], dtype=float) for end in (0, -1))
    for rises in ((starts - low) / 3.0, high - ends):  # uniform on [0, 1]: mean 1/2, variance 1/12
        assert rises.min() >= 0 and rises.max() <= 1
        assert rises.mean() == pytest.approx(0.5, abs=0.06) and rises.var() == pytest.approx(1 / 12, abs=0.02)
    a, b = drawn[:2]
    children = [space.crossover(a, b, rng) for _ in range(50)]
    assert {child.times[0] for child in children} == {a.times[0], b.times[0]}
    assert {child.times[-1] for child in children} == {a.times[-1], b.times[-1]}
    assert len({space.mutate(a, rng, size=0.3).times[0] for _ in range(50)}) > 5


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


def test_keys_keep_their_values() -> None:
    """Archives are resumed by key: hand-made schedules in both domains of time, and children of recorded draws."""

    def digest(schedules: list[SolverSchedule], noise_schedule: Any) -> str:
        keys = [schedule_key(schedule, noise_schedule) for schedule in schedules]
        keys += [schedule_key(in_half_log_snr(schedule, noise_schedule), noise_schedule) for schedule in schedules]
        assert keys[: len(schedules)] == keys[len(schedules) :]
        return hashlib.sha256("".join(keys).encode()).hexdigest()[:16]

    found = {name: digest(hand_made(SPACES[name][0], 5), SPACES[name][0]) for name in ("vp", "edm", "flow")}
    assert found in RECORDED_KEYS
    space, rng = SolverScheduleSpace(VP, 5), np.random.default_rng(0)
    children = [space.sample(rng)]
    for _ in range(60):
        children.append(space.mutate(children[-1], rng, size=0.3))
        children.append(space.crossover(children[-1], children[0], rng))
    assert digest(children, VP) == RECORDED_CHILDREN


@pytest.mark.parametrize("noise_schedule", [VP, ZERO_SNR, EDM, FLOW], ids=repr)
def test_levels_are_those_of_the_noise_schedule(noise_schedule: Any) -> None:
    """Kept levels, levels with gradients and λ alone agree, on first and on second sight."""
    for schedule in hand_made(noise_schedule, 5):
        for form in (schedule, in_half_log_snr(schedule, noise_schedule)):
            times = torch.tensor([0.0 if time is None else time for time in form.times], dtype=torch.float64)
            wanted = levels_of(form, noise_schedule, times)
            for _ in range(2):
                for level, other in zip(levels_of(form, noise_schedule), wanted, strict=True):
                    numbers = [level.half_log_snr, level.alpha, level.sigma]
                    expected = [other.half_log_snr, other.alpha, other.sigma]
                    assert numbers == pytest.approx([float(value) for value in expected], rel=1e-12, abs=1e-12)
                    assert (level.time is None) == (other.time is None)
                    assert level.time is None or float(level.time) == float(other.time)
            found = half_log_snrs_of(form, noise_schedule)
            assert found == pytest.approx([float(level.half_log_snr) for level in wanted], rel=1e-12, abs=1e-12)
    if noise_schedule in (VP, EDM):
        beyond = [SolverSchedule(times, (StepDecision(),)) for times in ((-40.0, 0.0), (0.0, 40.0))]
        for wrong in (*beyond, SolverSchedule((None, 0.0), (StepDecision(),))):
            for function in (levels_of, half_log_snrs_of):
                with pytest.raises(ValueError, match=r"outside|pure noise"):
                    function(wrong, noise_schedule)


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
    types = []

    def looking_up(x: Tensor, timestep: Tensor) -> Tensor:
        types.append(timestep.dtype)
        return network(prediction)(x, timestep)

    for whole in (False, True):
        own = replace(space, integer_times=whole)
        own.apply(target, own.sample(np.random.default_rng(0)))
        target.sampler(looking_up, noise, prediction)
    assert types == [torch.float64] * 4 + [torch.int64] * 4


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
        {"genes": (*ALL_GENES, "afs")},
        {"genes": (*ALL_GENES, "afs"), "mean_first_step": True},
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
        ({"genes": ("afs",), "noise_schedule": FLOW}, "'afs' on FlowSchedule.*diffusers"),
        ({"genes": ("afs",), "noise_schedule": ZERO_SNR}, "'afs' on VPSchedule.*diffusers"),
        ({"mean_first_step": True}, "mean_first_step needs the gene 'afs'"),
        ({"start_slack": 8.0, "end_slack": 3.0}, "must leave some of the 9"),
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
