"""Named schedules against the installed diffusers schedulers, step by step, with random network outputs.

diffusers keeps its sigmas in float32. Each scheduler is run as it is, to 3e-5 of the size of x, and with its sigmas
replaced by uneven ones in float32 (to 3e-5) and in float64 (to 1e-10). With AVX-512 it rounds up to 1.6e-5 away.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import IPNDMScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep
from torch import Tensor

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.presets import preset
from genlight.diffusion.solver.sample import sample

VP, VP_SD = VPSchedule(), VPSchedule("scaled_linear", 0.00085, 0.012)
ZERO_SNR = VPSchedule(rescale_zero_terminal_snr=True)
FLOW, SHIFTED = FlowSchedule(), FlowSchedule(shift=3.0)
SHAPE = (2, 3, 4)
# of diffusers in float32, as a share of the size of x
FLOAT32 = 3e-5
DPM, SINGLE, UNIPC = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
DEIS, SA = "DEISMultistepScheduler", "SASolverScheduler"


def _dpm(order: int, algorithm: str, solver: str, **options: Any) -> dict[str, Any]:
    return {"solver_order": order, "algorithm_type": algorithm, "solver_type": solver, **options}


def _unipc(order: int, kind: str, predict_x0: bool = True) -> dict[str, Any]:
    return {"solver_order": order, "solver_type": kind, "predict_x0": predict_x0}


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("dpmpp_2m", DPM, _dpm(2, "dpmsolver++", "midpoint")),
    ("dpmpp_2m_heun", DPM, _dpm(2, "dpmsolver++", "heun")),
    ("dpmpp_3m", DPM, _dpm(3, "dpmsolver++", "midpoint")),
    ("dpm_2m", DPM, _dpm(2, "dpmsolver", "midpoint")),
    ("dpm_2m_heun", DPM, _dpm(2, "dpmsolver", "heun")),
    ("dpm_3m", DPM, _dpm(3, "dpmsolver", "midpoint")),
    ("dpmpp_2s", SINGLE, _dpm(2, "dpmsolver++", "midpoint")),
    ("dpmpp_2s_heun", SINGLE, _dpm(2, "dpmsolver++", "heun")),
    ("dpmpp_3s_midpoint", SINGLE, _dpm(3, "dpmsolver++", "midpoint")),
    ("dpmpp_3s_heun", SINGLE, _dpm(3, "dpmsolver++", "heun")),
    ("dpm_2s", SINGLE, _dpm(2, "dpmsolver", "midpoint")),
    ("dpm_3s_midpoint", SINGLE, _dpm(3, "dpmsolver", "midpoint")),
    ("dpm_3s_heun", SINGLE, _dpm(3, "dpmsolver", "heun")),
    ("deis_2", DEIS, {"solver_order": 2}),
    ("deis_3", DEIS, {"solver_order": 3}),
    *[(f"unipc_{n}_{kind}", UNIPC, _unipc(n, kind)) for n in (1, 2, 3) for kind in ("bh1", "bh2")],
    *[(f"unipc_{n}_{kind}_noise", UNIPC, _unipc(n, kind, False)) for n in (1, 2, 3) for kind in ("bh1", "bh2")],
    *[(f"unip_{n}_bh2", UNIPC, {**_unipc(n, "bh2"), "disable_corrector": list(range(30))}) for n in (2, 3)],
    ("sa_solver", SA, {"predictor_order": 2, "corrector_order": 2, "tau_func": lambda t: 0.0}),
]
NAMES = [case[0] for case in CASES]


def _outputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def _replay(outputs: list[Tensor], seen: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that says the given outputs in turn and notes the points it was asked at."""
    said: Iterator[Tensor] = iter(outputs)

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(x)
        return next(said).to(x.dtype)

    return model


def _ours(schedule: SolverSchedule, prediction: Prediction, start: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Evaluation points and result."""
    table, points = compile_schedule(schedule, prediction.schedule), []
    assert table.nfe == len(outputs)
    final = sample(_replay(outputs, points), start / table.initial_scale, table, prediction)
    return [*points, final]


def _theirs(scheduler: Any, start: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    points, x = [], start
    for timestep, output in zip(scheduler.timesteps, outputs):
        points.append(x)
        x = scheduler.step(output.to(x.dtype), timestep, x, return_dict=False)[0]
    return [*points, x]


def _compare(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Equal evaluation points and results, to `tolerance` of their size."""
    for mine, other in zip(ours, theirs, strict=True):
        size = max(1.0, mine.abs().max().item())
        torch.testing.assert_close(mine.double() / size, other.double() / size, rtol=0, atol=tolerance)


def _start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class _WiderTorch:
    """torch, in which float32 means float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _scheduler(name: str, noise_schedule: NoiseSchedule, prediction_type: str, options: dict[str, Any]) -> Any:
    if name == SA:
        options = {**options, "algorithm_type": "data_prediction"}
    if name == SINGLE:
        options = {**options, "lower_order_final": True}
    if options.get("algorithm_type") == "dpmsolver":
        options = {**options, "final_sigmas_type": "sigma_min"}
    return build_scheduler(name, noise_schedule, prediction_type, **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name, scheduler_name, options", CASES, ids=NAMES)
def test_schedulers_as_they_are(name: str, scheduler_name: str, options: dict[str, Any], prediction_type: str) -> None:
    """float32, on the scheduler's own uniform times and, where it can end them at σ = 0, on Karras times."""
    for noise_schedule, steps, karras in ((VP, 8, False), (VP_SD, 7, True)):
        if "noise" in name or "bh1" in name:  # to σ = 0 diffusers refuses these or gives nan
            options = {**options, "final_sigmas_type": "sigma_min"}
        scheduler = _scheduler(
            scheduler_name, noise_schedule, prediction_type, {**options, "use_karras_sigmas": karras}
        )
        scheduler.set_timesteps(steps)
        levels = scheduler.sigmas.double().tolist()
        if levels[-1] == levels[-2]:
            continue
        times = tuple(noise_schedule.t_of_noise_level(level) if level else None for level in levels)
        outputs, start = _outputs(steps), _start().float()
        ours = _ours(preset(name, noise_schedule, times), Prediction(prediction_type, noise_schedule), start, outputs)
        _compare(ours, _theirs(scheduler, start, outputs), FLOAT32)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT32), (torch.float64, 1e-10)], ids=["32", "64"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name, scheduler_name, options", CASES, ids=NAMES)
def test_uneven_times(
    name: str,
    scheduler_name: str,
    options: dict[str, Any],
    prediction_type: str,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pitfalls 1 and 4: the scheduler's sigmas are replaced by uneven ones, in either precision."""
    scheduler = _scheduler(scheduler_name, VP, prediction_type, options)
    scheduler.set_timesteps(7)
    steps = np.random.default_rng(5).uniform(0.6, 1.5, size=7)
    times = tuple(VP.t_of_half_log_snr(value) for value in np.cumsum([-4.4, *steps]).tolist())
    scheduler.sigmas = torch.tensor([VP.noise_level(t) for t in times], dtype=dtype)
    outputs, start = _outputs(7), _start().to(dtype)
    # the multistep DPM-Solver casts its state to torch.float32
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", _WiderTorch())
    theirs = _theirs(scheduler, start, outputs)
    _compare(_ours(preset(name, VP, times), Prediction(prediction_type, VP), start, outputs), theirs, tolerance)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction_type: str) -> None:
    """diffusers starts at α = 2^-12 in place of 0: there the steps are equal, from α = 0 they differ by about that."""
    scheduler = build_scheduler(DPM, ZERO_SNR, prediction_type, solver_order=2)
    scheduler.set_timesteps(8)
    levels = scheduler.sigmas.double().tolist()
    outputs, start = _outputs(8), _start().float()
    theirs = _theirs(scheduler, start, outputs)
    prediction = Prediction(prediction_type, ZERO_SNR)
    times = tuple(ZERO_SNR.t_of_noise_level(level) if level else None for level in levels)
    _compare(_ours(preset("dpmpp_2m", ZERO_SNR, times), prediction, start, outputs), theirs, FLOAT32)
    first = _ours(preset("dpmpp_2m", ZERO_SNR, (ZERO_SNR.t_max, *times[1:])), prediction, start, outputs)
    torch.testing.assert_close(first[1], theirs[1], rtol=0, atol=2e-3)
    assert all(bool(point.isfinite().all()) for point in first)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_flow_euler(shift: float) -> None:
    """Pitfall 7: from σ = 1 exactly to σ = 0 exactly, any shift."""
    noise_schedule = FlowSchedule(shift=shift)
    scheduler = build_scheduler("FlowMatchEulerDiscreteScheduler", noise_schedule, "flow")
    scheduler.set_timesteps(6)
    times = tuple(scheduler.sigmas.double().tolist())
    assert times[0] == 1 and times[-1] == 0
    outputs, start = _outputs(6), _start().float()
    ours = _ours(preset("flow_euler", noise_schedule, times), Prediction("flow", noise_schedule), start, outputs)
    _compare(ours, _theirs(scheduler, start, outputs), FLOAT32)


def test_flow_heun() -> None:
    noise_schedule = FlowSchedule(shift=3.0)
    scheduler = build_scheduler("FlowMatchHeunDiscreteScheduler", noise_schedule, "flow")
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.double().tolist()
    times = (sigmas[0], *sigmas[1:-1:2], sigmas[-1])
    outputs, start = _outputs(len(scheduler.timesteps)), _start().float()
    ours = _ours(preset("flow_heun", noise_schedule, times), Prediction("flow", noise_schedule), start, outputs)
    _compare(ours, _theirs(scheduler, start, outputs), FLOAT32)


FLOW_CASES = [
    ("dpmpp_2m", DPM, _dpm(2, "dpmsolver++", "midpoint")),
    ("dpmpp_3m", DPM, _dpm(3, "dpmsolver++", "midpoint")),
    ("dpmpp_2s", SINGLE, _dpm(2, "dpmsolver++", "midpoint")),
    ("unipc_1_bh2", UNIPC, _unipc(1, "bh2")),
    ("unipc_2_bh2", UNIPC, _unipc(2, "bh2")),
    ("unipc_3_bh2", UNIPC, _unipc(3, "bh2")),
]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["flow", "sample"])
@pytest.mark.parametrize("name, scheduler_name, options", FLOW_CASES, ids=[case[0] for case in FLOW_CASES])
def test_flow_multistep(
    name: str, scheduler_name: str, options: dict[str, Any], prediction_type: str, shift: float
) -> None:
    """Pitfall 7: from UniPC's start σ = 1 - 1e-6 equal to rounding; from σ = 1, whose λ counts as that, to 1e-5."""
    noise_schedule = FlowSchedule(shift=shift)
    scheduler = _scheduler(scheduler_name, noise_schedule, prediction_type, options)
    scheduler.set_timesteps(7)
    own = scheduler.sigmas.double()
    assert own[-1] == 0
    prediction = Prediction(prediction_type, noise_schedule)
    outputs, start = _outputs(7), _start()
    # UniPC's own start, which DPM-Solver does not have; float32 would miss its α by 1 %
    nudged = torch.cat([torch.tensor([1 - 1e-6], dtype=torch.float64), own[1:]])
    scheduler.sigmas = nudged
    theirs = _theirs(scheduler, start, outputs)
    ours = _ours(preset(name, noise_schedule, tuple(nudged.tolist())), prediction, start, outputs)
    _compare(ours, theirs, 1e-6 if scheduler_name == DPM else 1e-10)
    exact = _ours(preset(name, noise_schedule, (1.0, *own[1:].tolist())), prediction, start, outputs)
    _compare(exact, theirs, 1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_edm_multistep(order: int) -> None:
    noise_schedule, prediction = EDMSchedule(), Prediction("edm", EDMSchedule())
    scheduler = build_scheduler("EDMDPMSolverMultistepScheduler", noise_schedule, "edm", solver_order=order)
    scheduler.set_timesteps(8)
    levels = scheduler.sigmas.double().clamp(0, 80).tolist()
    times = tuple(level if level else None for level in levels)
    outputs, start = _outputs(8), (80 * _start()).float()
    name = {1: "ddim", 2: "dpmpp_2m", 3: "dpmpp_3m"}[order]
    schedule, seen = preset(name, noise_schedule, times), []
    table = compile_schedule(schedule, noise_schedule)
    final = sample(_replay(outputs, seen), start / table.initial_scale, table, prediction)
    scales = noise_schedule.input_scale(table.times)
    ours = [*(x / scale for x, scale in zip(seen, scales.tolist())), final]
    _compare(ours, _theirs(scheduler, start, outputs), 1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_heun(prediction_type: str) -> None:
    """diffusers works on x/α; its slopes are those of x/α over σ/α."""
    scheduler = build_scheduler("HeunDiscreteScheduler", VP, prediction_type, timestep_spacing="leading")
    scheduler.set_timesteps(5)
    levels = scheduler.sigmas.double().tolist()
    distinct = [levels[0], *levels[1:-1:2], 0.0]
    times = tuple(VP.t_of_noise_level(level) if level else None for level in distinct)
    assert len(scheduler.timesteps) == 9
    outputs, start = _outputs(9), _start()
    alpha = VP.alpha(times[0])
    ours = _ours(preset("heun", VP, times), Prediction(prediction_type, VP), start, outputs)
    theirs = _theirs(scheduler, start / alpha, outputs)
    alphas = [VP.alpha(time) for time in compile_schedule(preset("heun", VP, times), VP).times.tolist()]
    _compare([x / a for x, a in zip(ours, [*alphas, 1.0])], theirs, 1e-5)


@pytest.mark.parametrize("skip", [True, False], ids=["plms", "runge-kutta"])
def test_pndm(skip: bool) -> None:
    """With epsilon only: of velocities diffusers takes the mean before it makes noise of them, at the latest point."""
    scheduler = build_scheduler("PNDMScheduler", VP, "epsilon", skip_prk_steps=skip)
    scheduler.set_timesteps(10)
    starts = list(dict.fromkeys(scheduler.timesteps.tolist())) if skip else list(range(900, -1, -100))
    outputs, start = _outputs(len(scheduler.timesteps)), _start()
    # diffusers ends at the first ᾱ of its table instead of a clean image: that is t = 0, the last step goes nowhere
    times = tuple(float(t) for t in starts)
    assert times[-1] == 0
    schedule = preset("plms" if skip else "pndm", VP, times)
    ours = _ours(schedule, Prediction("epsilon", VP), start, outputs[: schedule.nfe])
    _compare(ours, _theirs(scheduler, start, outputs)[: schedule.nfe + 1], 1e-6)


def test_ipndm() -> None:
    """Its own noise schedule and prediction type replaced by ours: its step uses σ and α of the table it is given."""
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(6)
    times = tuple(VP.t_of_half_log_snr(value) for value in (-4.0, -2.5, -1.5, -0.2, 1.0, 2.0, 3.1))
    scheduler.betas = torch.tensor([VP.sigma(t) for t in times], dtype=torch.float64)
    scheduler.alphas = torch.tensor([VP.alpha(t) for t in times], dtype=torch.float64)
    outputs, start = _outputs(6), _start()
    # its network predicts the velocity of x = α x_0 + σ ε, and its noise is σ x + α v
    ours = _ours(preset("ipndm_4", VP, times), Prediction("v_prediction", VP), start, outputs)
    _compare(ours, _theirs(scheduler, start, outputs), 1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_at_integer_timesteps(spacing: str) -> None:
    """Pitfall 8: the network is asked at the integers of diffusers, as integers."""
    scheduler = build_scheduler("DDIMScheduler", VP, "epsilon", clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    times = (*(float(t) for t in scheduler.timesteps.tolist()), None)
    schedule, prediction = preset("ddim", VP, times), Prediction("epsilon", VP)
    asked: list[Tensor] = []

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        asked.append(timestep)
        return torch.tanh(x + timestep.reshape(-1, 1, 1) / 1000)

    table, start = compile_schedule(schedule, VP), _start().float()
    final = sample(model, start, table, prediction, integer_timesteps=True)
    assert [t.dtype for t in asked] == [torch.int64] * 10
    assert [t.unique().item() for t in asked] == scheduler.timesteps.tolist()
    x = start
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x + timestep / 1000), timestep, x).prev_sample
    # the final step of diffusers' "leading" goes to a clean image as well: set_alpha_to_one
    torch.testing.assert_close(final, x, rtol=1e-5, atol=1e-5)
    between = preset("ddim", VP, (999.0, 500.5, None))
    with pytest.raises(ValueError, match=r"500\.5 is not an integer"):
        sample(model, start, compile_schedule(between, VP), prediction, integer_timesteps=True)
