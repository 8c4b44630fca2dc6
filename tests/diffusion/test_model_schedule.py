"""Model schedules: who answers when, and that the solver behind them is the published one."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverSinglestepScheduler
from diffusion.solver.mixture import network
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.gaussian import Gaussian
from torch import Tensor

from genlight.diffusion.model_schedule import (
    ModelSchedule,
    from_slots,
    knots,
    slot_times,
    solver_schedule,
    to_slots,
)
from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.levels import half_log_snrs_of
from genlight.diffusion.solver.presets import preset
from genlight.diffusion.solver.sample import sample
from genlight.search.codec import CandidateCodec

VP, EDM, FLOW = VPSchedule(), EDMSchedule(), FlowSchedule(shift=3.0)
ZERO_SNR = VPSchedule(rescale_zero_terminal_snr=True)
NAMES = ("a", "b", "c")
Member = Callable[[Tensor, Tensor], Tensor]


def run(schedule: ModelSchedule, members: dict[str, Member], noise: Tensor, slots: int | None = None) -> Tensor:
    """Sample with members that predict noise on VP; evaluation i goes to the member that the schedule names."""
    table = compile_schedule(solver_schedule(schedule, VP, slots), VP)
    names = iter(schedule.members)
    result = sample(lambda x, t: members[next(names)](x, t), noise, table, Prediction("epsilon", VP))
    assert next(names, None) is None
    return result


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def nonlinear(shift: float) -> Member:
    return lambda x, t: torch.tanh(shift * x + 0.3) + 0.1 * shift * (t / 1000)[:, None]


MEMBERS = {name: nonlinear(shift) for name, shift in zip(NAMES, (0.4, 0.9, 1.5))}


def schedules() -> st.SearchStrategy[ModelSchedule]:
    step = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(tuple)
    return st.lists(step, min_size=1, max_size=6).map(lambda steps: ModelSchedule("singlestep", tuple(steps)))


def test_the_vector_is_read_from_the_right_end() -> None:
    """Group 0 is at the data end, and in a group the last that is not null is evaluated first."""
    schedule = from_slots([1, 2, 0, 0, 0, 0, 3, 0, 0], NAMES)
    assert schedule == ModelSchedule("singlestep", (("c",), ("b", "a")))
    assert to_slots(schedule, NAMES, 9) == (1, 2, 0, 3, 0, 0, 0, 0, 0)
    called: list[str] = []

    def member(name: str) -> Member:
        def answer(x: Tensor, t: Tensor) -> Tensor:
            called.append(name)
            assert x.isfinite().all() == (name != "a" or called.count("a") == 1)
            return x * (math.nan if name == "a" else 0.1)

        return answer

    # the last evaluation of all is by the member that breaks: what comes before has met finite states
    assert run(schedule, {name: member(name) for name in NAMES}, noise(2, 3)).isnan().all()
    assert called == ["c", "b", "a"]
    ddim = from_slots([2, 0, 0, 1], NAMES, "ddim")
    assert ddim == ModelSchedule("ddim", (("a",), ("b",)), slots=(3, 0)) and to_slots(ddim, NAMES, 4) == (2, 0, 0, 1)


def test_constant_members_show_who_weighs_what() -> None:
    """Order 2 is A x - σ E c of the evaluation made last; order 3 does not see the middle one but through its state."""
    low, high = VP.half_log_snr(VP.t_max), VP.half_log_snr(VP.t_min)
    (alpha, sigma), (alpha_s, sigma_s) = ((VP.alpha(t), VP.sigma(t)) for t in (VP.t_min, VP.t_max))
    x, growth = noise(4, 2), math.expm1(high - low)
    start = x * math.hypot(alpha_s, sigma_s)

    def constant(*values: float) -> dict[str, Member]:
        return {name: lambda x, t, v=value: torch.full_like(x, v) for name, value in zip(NAMES, values)}

    two = ModelSchedule("singlestep", (("a", "b"),))
    for first in (0.2, -7.0):
        expected = alpha / alpha_s * start - sigma * growth * 0.5
        torch.testing.assert_close(run(two, constant(first, 0.5), x), expected, rtol=1e-9, atol=1e-9)
    three = ModelSchedule("singlestep", (("a", "b", "c"),))
    same = run(three, constant(0.3, 0.1, 0.5), x)
    torch.testing.assert_close(run(three, constant(0.3, 9.0, 0.5), x), same, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(run(three, constant(0.3, 0.1, 0.6), x), same)
    assert not torch.allclose(run(three, constant(0.4, 0.1, 0.5), x), same)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("noise_schedule", [EDMSchedule(0.05, 10.0), VPSchedule()], ids=["edm", "vp"])
def test_halving_the_steps_shows_the_order(order: int, noise_schedule: NoiseSchedule) -> None:
    data = Gaussian(torch.tensor([0.4, -0.3]), 0.35)
    prediction = Prediction("epsilon", noise_schedule)
    ends = [(noise_schedule.alpha(t), noise_schedule.sigma(t)) for t in (noise_schedule.t_max, noise_schedule.t_min)]
    x, errors = noise(16, 2), []
    for steps in (16, 32, 64, 128):
        schedule = ModelSchedule("singlestep", (("a",) * order,) * steps)
        table = compile_schedule(solver_schedule(schedule, noise_schedule), noise_schedule)
        exact = data.flow(x * table.initial_scale, *ends[0], *ends[1])
        errors.append((sample(network(prediction, data), x, table, prediction) - exact).square().mean().sqrt().item())
    rates = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert rates == pytest.approx([order] * 3, abs=0.35), rates


def by_formulas(schedule: ModelSchedule, members: dict[str, Member], x: Tensor) -> Tensor:
    """DPM-Solver-1, 2 and 3 as printed (Lu et al. 2022a), with a member for each evaluation."""
    low, high = VP.half_log_snr(VP.t_max), VP.half_log_snr(VP.t_min)
    count = len(schedule.steps)

    def level(value: float) -> tuple[float, float]:
        square = 1 / (1 + math.exp(-2 * value))
        return math.sqrt(square), math.sqrt(1 / (1 + math.exp(2 * value)))

    def eps(name: str, x: Tensor, value: float) -> Tensor:
        t = VP.model_timestep(VP.t_of_half_log_snr(value))
        return members[name](x, torch.full((len(x),), t, dtype=torch.float64))

    for n, step in enumerate(schedule.steps):
        s, t = low + (high - low) * n / count, low + (high - low) * (n + 1) / count
        h, (alpha_s, _), (alpha_t, sigma_t) = t - s, level(s), level(t)
        end = alpha_t / alpha_s * x
        e0 = eps(step[0], x, s)
        if len(step) == 1:
            x = end - sigma_t * math.expm1(h) * e0
            continue
        r1 = 1 / len(step)
        alpha_1, sigma_1 = level(s + r1 * h)
        x1 = alpha_1 / alpha_s * x - sigma_1 * math.expm1(r1 * h) * e0
        e1 = eps(step[1], x1, s + r1 * h)
        if len(step) == 2:
            x = end - sigma_t * math.expm1(h) * e0 - sigma_t * math.expm1(h) / (2 * r1) * (e1 - e0)
            continue
        r2 = 2 / 3
        alpha_2, sigma_2 = level(s + r2 * h)
        x2 = alpha_2 / alpha_s * x - sigma_2 * math.expm1(r2 * h) * e0
        x2 = x2 - r2 / r1 * sigma_2 * (math.expm1(r2 * h) / (r2 * h) - 1) * (e1 - e0)
        e2 = eps(step[2], x2, s + r2 * h)
        x = end - sigma_t * math.expm1(h) * e0 - sigma_t / r2 * (math.expm1(h) / h - 1) * (e2 - e0)
    return x


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_mixed_orders_follow_the_formulas(schedule: ModelSchedule) -> None:
    x = noise(3, 2)
    start = x * math.hypot(VP.alpha(VP.t_max), VP.sigma(VP.t_max))
    expected = by_formulas(schedule, MEMBERS, start)
    torch.testing.assert_close(run(schedule, MEMBERS, x), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("orders", [(3, 3, 3), (2, 2, 2, 2), (1, 1, 1), (1, 3, 2, 3)])
def test_one_member_is_the_singlestep_solver_of_diffusers(orders: tuple[int, ...]) -> None:
    """Its scheduler, made to take our λ and orders; the middle stage of order 3 is "heun" there."""
    schedule = ModelSchedule("singlestep", tuple(("b",) * order for order in orders))
    half_log_snrs = torch.tensor(half_log_snrs_of(solver_schedule(schedule, VP), VP), dtype=torch.float64)
    times = [VP.t_of_half_log_snr(value) for value in half_log_snrs[:-1].tolist()]
    scheduler: Any = DPMSolverSinglestepScheduler(
        beta_schedule="linear", algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=3
    )
    scheduler.set_timesteps(timesteps=list(range(999, 999 - len(times), -1)))
    scheduler.sigmas = torch.exp(-half_log_snrs)
    scheduler.order_list = [place + 1 for order in orders for place in range(order)]
    kinds = ["heun" if (order, place) == (3, 1) else "midpoint" for order in orders for place in range(order)]
    x = start = noise(4, 2)
    x = x * math.hypot(VP.alpha(VP.t_max), VP.sigma(VP.t_max))
    for timestep, time, kind in zip(scheduler.timesteps, times, kinds, strict=True):
        scheduler.config.solver_type = kind
        scheduler.register_to_config(solver_type=kind)
        said = MEMBERS["b"](x, torch.full((4,), VP.model_timestep(time), dtype=torch.float64))
        x = scheduler.step(said, timestep, x).prev_sample
    torch.testing.assert_close(run(schedule, MEMBERS, start), x, rtol=1e-12, atol=1e-12 * float(x.abs().max()))


@settings(max_examples=50, deadline=None)
@given(schedules(), st.integers(0, 8))
def test_empty_groups_carry_no_position(schedule: ModelSchedule, place: int) -> None:
    length = 3 * len(schedule.steps) + 6
    values = to_slots(schedule, NAMES, length)
    assert from_slots(values, NAMES) == schedule
    place = 3 * min(place, len(schedule.steps))
    moved = (*values[:place], 0, 0, 0, *values[place:-3])
    assert from_slots(moved, NAMES) == schedule


def test_ddim_steps_from_slot_to_slot() -> None:
    """The grid is the trailing timesteps of diffusers, each step the published one from the kept slot to the next."""
    grid = slot_times(VP, 100)
    theirs: Any = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(100)
    assert grid == sorted(float(t) for t in theirs.timesteps)
    schedule = ModelSchedule("ddim", (("a",), ("c",), ("b",)), slots=(99, 60, 7))
    x = noise(3, 2) * math.hypot(VP.alpha(999.0), VP.sigma(999.0))
    for (name,), (time, target) in zip(schedule.steps, pairwise([grid[99], grid[60], grid[7], 0.0])):
        said = MEMBERS[name](x, torch.full((3,), time, dtype=torch.float64))
        x = VP.alpha(target) * (x - VP.sigma(time) * said) / VP.alpha(time) + VP.sigma(target) * said
    torch.testing.assert_close(run(schedule, MEMBERS, noise(3, 2), 100), x, rtol=1e-9, atol=1e-9 * float(x.abs().max()))
    later = solver_schedule(ModelSchedule("ddim", (("a",),), slots=(40,)), VP, 100)
    assert later.times == (409.0, 0.0)


def test_multistep_orders_are_clipped_to_the_history() -> None:
    schedule = ModelSchedule("multistep", (("a",),) * 5, orders=(3, 3, 3, 1, 2))
    assert schedule.orders == (1, 2, 3, 1, 2)
    assert schedule == ModelSchedule("multistep", (("a",),) * 5, orders=(1, 2, 3, 1, 2))
    times = tuple(VP.t_of_half_log_snr(value) for value in knots(VP, 4))
    for name, order in (("dpmpp_2m", 2), ("dpmpp_3m_exact", 3)):
        ours = solver_schedule(ModelSchedule("multistep", (("a",),) * 4, orders=(order,) * 4), VP)
        theirs = preset(name, VP, times, lower_order_final=False)
        weights = [compile_schedule(each, VP).weights for each in (ours, theirs)]
        torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-10)
    first = ModelSchedule("multistep", (("a",), ("b",)), orders=(1, 1))
    assert first.canonical() == ModelSchedule("singlestep", (("a",), ("b",)))
    torch.testing.assert_close(run(first, MEMBERS, noise(3, 2)), run(first.canonical(), MEMBERS, noise(3, 2)))


@pytest.mark.parametrize("noise_schedule", [VP, EDM, FLOW, ZERO_SNR], ids=["vp", "edm", "flow", "zero-snr"])
@pytest.mark.parametrize(
    "schedule",
    [
        ModelSchedule("singlestep", (("a", "b"), ("b",), ("a", "a", "b")) * 6),
        ModelSchedule("multistep", (("a",),) * 24, orders=(1, 2, 3, 2) * 6),
        ModelSchedule("ddim", (("a",),) * 40, slots=tuple(range(39, -1, -1))),
    ],
    ids=lambda schedule: schedule.kind,
)
def test_every_family_solves_the_gaussian(noise_schedule: NoiseSchedule, schedule: ModelSchedule) -> None:
    """With the ideal network a few dozen evaluations give the data."""
    data = Gaussian(torch.tensor([0.4, -0.3]), 0.35)
    kind = "flow" if noise_schedule is FLOW else "v_prediction"
    prediction = Prediction(kind, noise_schedule)
    table = compile_schedule(solver_schedule(schedule, noise_schedule, 40), noise_schedule)
    assert table.nfe == schedule.nfe
    x = sample(network(prediction, data), noise(2000, 2), table, prediction)
    assert (x.mean(0) - data.means[0]).abs().max() < 0.05
    assert (x.std(0) - 0.35).abs().max() < 0.05


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "euler", "steps": (("a",),)}, "kind = 'euler'"),
        ({"kind": "singlestep", "steps": ()}, "steps"),
        ({"kind": "singlestep", "steps": (("a",) * 4,)}, r"steps\[0\].* 1 to 3"),
        ({"kind": "singlestep", "steps": (("a",), ())}, r"steps\[1\]"),
        ({"kind": "singlestep", "steps": ((1,),)}, "by name"),
        ({"kind": "multistep", "steps": (("a", "b"),), "orders": (1,)}, r"steps\[0\]"),
        ({"kind": "multistep", "steps": (("a",),)}, "orders"),
        ({"kind": "multistep", "steps": (("a",),), "orders": (4,)}, "orders"),
        ({"kind": "singlestep", "steps": (("a",),), "orders": (1,)}, "orders"),
        ({"kind": "ddim", "steps": (("a",), ("b",)), "slots": (3, 3)}, "slots .* fall"),
        ({"kind": "ddim", "steps": (("a",),), "slots": (-1,)}, "slots"),
        ({"kind": "ddim", "steps": (("a",),)}, "slots"),
    ],
)
def test_invalid_schedules_cannot_be_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSchedule(**fields)


@pytest.mark.parametrize(
    "values, kind, message",
    [
        ([4, 0, 0], "singlestep", "4 is no id"),
        ([0, 1, 0], "singlestep", "zeros come after"),
        ([1, 0, 2], "singlestep", "zeros come after"),
        ([1, 0], "singlestep", "groups"),
        ([0, 0, 0], "singlestep", "steps"),
        ([1, 0, 0], "multistep", "vector form"),
    ],
)
def test_illegal_vectors_are_refused(values: Sequence[int], kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_slots(values, NAMES, kind)


def test_grids_are_checked() -> None:
    schedule = ModelSchedule("ddim", (("a",),), slots=(10,))
    for slots in (None, 10):
        with pytest.raises(ValueError, match="slots"):
            solver_schedule(schedule, VP, slots)
    with pytest.raises(ValueError, match="fewer than the 1000"):
        slot_times(VP, 1000)
    with pytest.raises(ValueError, match="lacks a"):
        to_slots(schedule, ["b"], 20)
    with pytest.raises(ValueError, match="length = 10"):
        to_slots(schedule, NAMES, 10)


@settings(max_examples=20, deadline=None)
@given(schedules())
def test_json_brings_a_schedule_back(schedule: ModelSchedule) -> None:
    codec = CandidateCodec(ModelSchedule)
    assert codec.from_plain(codec.to_plain(schedule)) == schedule
    with pytest.raises(ValueError, match="speed"):
        codec.from_plain({**codec.to_plain(schedule), "speed": 1})
