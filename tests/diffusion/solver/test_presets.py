"""Every named schedule on every grid: valid, counted, and the special cases they are."""

from itertools import pairwise, product

import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.solver.adams import polynomial_step
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.presets import PRESETS, named_schedule, preset
from genlight.diffusion.solver.spacings import SPACINGS, are_integers, grid, on_integers

VP, SD, EDM, FLOW = VPSchedule(), VPSchedule("scaled_linear", 0.00085, 0.012), EDMSchedule(), FlowSchedule(shift=3.0)
# these use noise above order 1 in the very first step, which has no value where α = 0
NOT_FROM_PURE_NOISE = [
    name
    for name in PRESETS
    if name.startswith(("dpm_2s", "dpm_3s", "heun", "plms", "pndm"))
    or (name.startswith("unipc") and name.endswith("noise"))
]


@pytest.mark.parametrize("noise_schedule", [VP, SD, EDM, FLOW], ids=["vp", "sd", "edm", "flow"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_compile_with_the_evaluations_asked_for(name: str, noise_schedule: NoiseSchedule) -> None:
    flow = noise_schedule.family == "flow"
    if name == "flow_heun" and not flow:
        with pytest.raises(ValueError, match="made for flow matching"):
            named_schedule(name, noise_schedule, 13)
        return
    for spacing, end in product(("log_snr", "edm", "uniform"), ("t_min", "clean")):
        schedule = named_schedule(name, noise_schedule, 13, spacing=spacing, end=end)
        assert schedule.nfe == 13
        if flow and name in NOT_FROM_PURE_NOISE:
            with pytest.raises(ValueError, match="from pure noise"):
                compile_schedule(schedule, noise_schedule)
            continue
        table = compile_schedule(schedule, noise_schedule)
        # an image that the network always predicts, without noise, stays: rows weigh it with their α
        alphas = noise_schedule.alpha(table.times)
        found = table.weights[:-1, 0] * alphas[0] + table.weights[:-1, 1:].sum(1)
        torch.testing.assert_close(found, alphas, rtol=1e-8, atol=1e-8)


def test_numbers_of_evaluations_that_a_solver_cannot_make() -> None:
    with pytest.raises(ValueError, match="nfe = 6: heun has no form"):
        named_schedule("heun", VP, 6)
    with pytest.raises(ValueError, match="nfe = 5: pndm has no form"):
        named_schedule("pndm", VP, 5)
    with pytest.raises(ValueError, match="solver = 'rk45'; known are"):
        preset("rk45", VP, (999.0, 0.0))
    with pytest.raises(ValueError, match="at least two"):
        preset("ddim", VP, (999.0,))


def test_known_identities() -> None:
    """UniP of order 2 with bh2 is DPM-Solver++(2M) midpoint, with c = 1 its heun form, SA-Solver's predictor bh1."""
    pairs = [
        ("unip_2_bh2", "dpmpp_2m"),
        ("unip_2_exact", "dpmpp_2m_heun"),
        ("unip_2_bh1", "sa_solver_predictor"),
        ("deis_2", "dpm_2m_heun"),
        ("ddim", "flow_euler"),
        ("unip_3_bh2", "dpmpp_3m_exact"),
    ]
    for first, second in pairs:
        tables = [compile_schedule(named_schedule(name, VP, 6, spacing="edm"), VP) for name in (first, second)]
        torch.testing.assert_close(tables[0].weights, tables[1].weights, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("noise_schedule", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
def test_deis_in_time_is_exact_for_polynomials_in_time(noise_schedule: NoiseSchedule) -> None:
    """Noise that is quadratic in t is integrated against σ/α to rounding, checked by fine trapezoids."""
    nodes, target = [0.8, 0.55, 0.35], 0.2
    if noise_schedule.family == "vp":
        nodes, target = [800.0, 550.0, 350.0], 200.0
    step = polynomial_step(noise_schedule, [*nodes, target])
    assert step.weights is not None and sum(step.weights) == pytest.approx(1.0, abs=1e-11)
    noise = torch.tensor(nodes[::-1]).double() / nodes[0]
    values = 0.3 + 0.7 * noise - 1.1 * noise**2
    found = sum(w * v for w, v in zip(step.weights, values.tolist()))
    t = torch.linspace(nodes[-1], target, 200_001, dtype=torch.float64)
    level = noise_schedule.noise_level(t)
    u = t / nodes[0]
    exact = torch.trapezoid(0.3 + 0.7 * u - 1.1 * u**2, level) / (level[-1] - level[0])
    assert found == pytest.approx(exact.item(), rel=1e-7)


@pytest.mark.parametrize("noise_schedule", [VP, SD, EDM, FLOW], ids=["vp", "sd", "edm", "flow"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_fall_from_noise_to_the_end(spacing: str, noise_schedule: NoiseSchedule) -> None:
    if spacing == "ays_svd":  # a list for a model of more noise than these have
        with pytest.raises(ValueError, match="starts above the noise"):
            grid(noise_schedule, 20, spacing)
        return
    for steps in (2, 5, 10, 20):
        for end in ("t_min", "clean"):
            times = grid(noise_schedule, steps, spacing, end)
            assert len(times) == steps + 1 and times[0] == noise_schedule.t_max
            flow = noise_schedule.family == "flow"
            assert times[-1] == (None if end == "clean" and not flow else noise_schedule.t_min)
            finite = [time for time in times if time is not None]
            assert all(a > b for a, b in pairwise(finite))


def test_grids_are_what_they_say() -> None:
    lam = VP.half_log_snr(torch.tensor(grid(VP, 6, "log_snr"), dtype=torch.float64))
    torch.testing.assert_close(lam.diff(), lam.diff()[:1].expand(6), rtol=1e-8, atol=1e-8)
    roots = torch.tensor(grid(EDM, 6, "edm"), dtype=torch.float64) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(6), rtol=1e-9, atol=1e-9)
    assert grid(VP, 3, "uniform") == pytest.approx((999.0, 666.0, 333.0, 0.0))
    assert grid(VP, 2, "quadratic") == pytest.approx((999.0, 249.75, 0.0))
    assert on_integers((999.0, 249.75, None)) == (999.0, 250.0, None)
    with pytest.raises(ValueError, match="different integers"):
        on_integers((2.0, 1.4, 1.2))
    assert on_integers((2.0, 1.4, 1.2, None), merged=True) == (2.0, 1.0, None)
    for bad in ({"spacing": "cosine"}, {"end": "zero"}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            grid(VP, **{"steps": 4, **bad})


def test_whole_times_are_those_of_the_grid_rounded() -> None:
    """Weights too are those at the rounded times; a solver that evaluates between them has no such form."""
    for name, nfe, steps in (("dpmpp_2m", 4, 4), ("deis_tab_3", 4, 4), ("heun", 5, 3)):
        made = named_schedule(name, VP, nfe, integer_times=True)
        assert made == preset(name, VP, on_integers(grid(VP, steps))) and are_integers(made.times)
        assert not are_integers(named_schedule(name, VP, nfe).times)
    with pytest.raises(ValueError, match="'pndm' evaluates between integer times"):
        preset("pndm", VP, (999.0, 500.0, 11.0, 4.0, 1.0, 0.0), integer_times=True)
    with pytest.raises(ValueError, match="different integers"):
        named_schedule("ddim", VP, 80, integer_times=True)


def test_published_lists_are_used_as_they_are() -> None:
    published = AysSchedules["StableDiffusionSigmas"]
    times = grid(SD, 10, "ays_sd15", "clean")
    levels = [SD.noise_level(time) for time in times[:-1]]
    assert times[-1] is None and levels[1:] == pytest.approx(published[1:-1], rel=1e-9)
    assert levels[0] == pytest.approx(published[0], rel=1e-4)
    # the published timesteps are these levels, rounded
    assert [round(time) for time in times[:-1]] == pytest.approx(AysSchedules["StableDiffusionTimesteps"], abs=1)
