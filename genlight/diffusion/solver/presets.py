"""The known solvers as named points of the space of `decisions`.

| names                                        | source                                                            |
|----------------------------------------------|-------------------------------------------------------------------|
| ddim, flow_euler                             | Song et al. 2021; both are the step of order 1                    |
| dpm_2m, dpm_2m_heun, dpm_3m, dpm_3m_exact    | DPM-Solver, multistep, noise (Lu et al. 2022a)                    |
| dpmpp_2m, dpmpp_2m_heun, dpmpp_3m, …_exact   | DPM-Solver++, multistep, data (Lu et al. 2022b)                   |
| dpm_2s, dpm_3s, dpmpp_2s, dpmpp_3s, …        | the same, singlestep                                              |
| deis_2, deis_3; deis_tab_2, deis_tab_3       | DEIS with polynomials in λ (ρAB) and in t (tAB; Zhang & Chen 2023)|
| unip_…, unipc_{1,2,3}_{bh1,bh2,exact}[_noise]| UniPC and its predictor alone (Zhao et al. 2023)                  |
| heun, flow_heun                              | Karras et al. 2022, algorithm 1; the trapezoid rule in flow's σ   |
| sa_solver, sa_solver_predictor               | SA-Solver with τ = 0, order 2 (Xue et al. 2023)                   |
| ipndm_2, ipndm_3, ipndm_4                    | Adams-Bashforth weights, begun with lower orders                  |
| plms, pndm                                   | PNDM (Liu et al. 2022), begun with one Heun step, with Runge-Kutta|

Third order: in the multistep diffusers gives D_2 half its factor (c_2 = ½) and so is of second order; "exact" names
have c_2 = 1. In the singlestep the method's own middle stage has c_1 = 1 (…_3s), that of diffusers has bh2
(…_3s_midpoint); …_3s_heun uses both inner points at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver import adams
from genlight.diffusion.solver.decisions import (
    Corrector,
    PredictionSpace,
    Scale,
    SolverSchedule,
    StepDecision,
    nearest_points,
)
from genlight.diffusion.solver.spacings import End, Times, are_integers, grid, on_integers

Steps = list[StepDecision]


def preset(
    name: str,
    noise_schedule: NoiseSchedule,
    times: Times,
    *,
    lower_order_final: bool = True,
    integer_times: bool = False,
) -> SolverSchedule:
    """The solver `name` on given times of the noise schedule (domain "time"; the last may be None, the clean image).

    Args:
        lower_order_final: end with falling orders …, 3, 2, 1, as diffusers does by default for few steps. The step to a
            clean image is of order 1 in any case.
        integer_times: times are rounded, for networks that look them up.

    Raises ValueError for an unknown name, or times that the solver cannot have.
    """
    if name not in PRESETS:
        raise ValueError(f"solver = {name!r}; known are {', '.join(PRESETS)}")
    if len(times) < 2:
        raise ValueError(f"times = {times}: at least two are needed")
    times = on_integers(times) if integer_times else times
    clean = times[-1] is None or (noise_schedule.family == "flow" and times[-1] == 0)
    orders = Orders(len(times) - 1, lower_order_final, clean)
    times, steps = PRESETS[name](times, noise_schedule, orders)
    if integer_times and not are_integers(times):
        raise ValueError(f"solver = {name!r} evaluates between integer times")
    return SolverSchedule(times, tuple(steps), time_domain="time")


def named_schedule(
    name: str,
    noise_schedule: NoiseSchedule,
    nfe: int,
    *,
    spacing: str = "log_snr",
    end: End = "t_min",
    lower_order_final: bool = True,
    integer_times: bool = False,
) -> SolverSchedule:
    """The solver `name` with exactly `nfe` network evaluations on a hand-made grid (see `spacings.grid`).

    Other arguments are those of `preset`. Raises ValueError if the solver has no form with that number of evaluations.
    """
    possible = []
    for steps in range(nfe, 0, -1):
        times = grid(noise_schedule, steps, spacing, end)
        try:
            schedule = preset(name, noise_schedule, times, lower_order_final=lower_order_final)
        except _TooFewSteps:
            continue
        possible.append(schedule.nfe)
        if schedule.nfe == nfe:
            if not integer_times:
                return schedule
            return preset(name, noise_schedule, times, lower_order_final=lower_order_final, integer_times=True)
    raise ValueError(
        f"nfe = {nfe}: {name} has no form with so many evaluations; fewer steps give {sorted(possible)[-3:]}"
    )


class _TooFewSteps(ValueError):
    """The solver needs more steps to begin."""


@dataclass(frozen=True)
class Orders:
    """The order of each step of a multistep method: as the history grows and, if wanted, as the end comes near."""

    steps: int
    lower_order_final: bool
    clean: bool

    def __call__(self, order: int) -> list[int]:
        orders = [min(order, i + 1, self.steps - i if self.lower_order_final else order) for i in range(self.steps)]
        return [*orders[:-1], 1 if self.clean else orders[-1]]


def _multistep(
    times: Times, _: NoiseSchedule, orders: Orders, *, order: int, prediction: PredictionSpace, scales: dict[int, Any]
) -> tuple[Times, Steps]:
    """Steps from the latest point with the nearest points before it; `scales` by order."""
    return times, [
        StepDecision(prediction, n, points=nearest_points(n), scales=scales.get(n, ())) for n in orders(order)
    ]


def _unipc(
    times: Times, _: NoiseSchedule, orders: Orders, *, order: int, prediction: PredictionSpace, scale: Scale
) -> tuple[Times, Steps]:
    """B(h) shows only where one difference is weighed with ½: order 2, and the corrector after a step of order 1."""
    steps: Steps = []
    for index, n in enumerate(orders(order)):
        corrector = Corrector(scales=(scale,) if n == 1 else ()) if index < len(times) - 2 else None
        scales = (scale,) if n == 2 else ()
        steps.append(StepDecision(prediction, n, points=nearest_points(n), scales=scales, corrector=corrector))
    return times, steps


def _sa_solver(times: Times, _: NoiseSchedule, orders: Orders) -> tuple[Times, Steps]:
    steps: Steps = []
    for index, n in enumerate(orders(2)):
        corrector = Corrector(scales=("bh1",), points=((),)) if index < len(times) - 2 else None
        scales: tuple[Scale, ...] = ("bh1",) if n == 2 else ()
        steps.append(StepDecision("data", n, points=nearest_points(n), scales=scales, corrector=corrector))
    return times, steps


def _singlestep(
    times: Times,
    _: NoiseSchedule,
    orders: Orders,
    *,
    order: int,
    prediction: PredictionSpace,
    second: tuple[Scale, ...],
    third: tuple[tuple[tuple[int, ...], ...], tuple[Scale, ...]] = ((), ()),
) -> tuple[Times, Steps]:
    """Groups of 1, 2 or 3 steps from one source; `third` holds points and scales of a group's third step."""
    steps: Steps = []
    for n in _groups(orders.steps, order, orders.lower_order_final, orders.clean):
        steps.append(StepDecision(prediction))
        if n >= 2:
            steps.append(StepDecision(prediction, 2, source=-2, points=((-1,),), scales=second))
        if n == 3:
            points, scales = third
            steps.append(StepDecision(prediction, len(points) + 1, source=-3, points=points, scales=scales))
    return times, steps


def _groups(count: int, order: int, lower: bool, clean: bool) -> list[int]:
    """Sizes of the groups of `count` steps, as in diffusers: with `lower` no group of full size ends the schedule."""
    full, rest = divmod(count, order)
    if rest == 0 and (lower or clean):
        return [order] * (full - 1) + [order - 1, 1]
    if rest == 2 and clean:
        return [order] * full + [1, 1]
    return [order] * full + ([rest] if rest else [])


def _heun(times: Times, _: NoiseSchedule, orders: Orders) -> tuple[Times, Steps]:
    corrected = StepDecision("noise", corrector=Corrector("implicit", scales=("bh2",)))
    return times, [corrected] * (len(times) - 2) + [StepDecision("noise")]


def _flow_heun(times: Times, noise_schedule: NoiseSchedule, orders: Orders) -> tuple[Times, Steps]:
    """The mean of two velocities, written as weights of x̂_0: the new one weighs σ_s/(2σ_t)."""
    if noise_schedule.family != "flow":
        raise ValueError(f"solver = 'flow_heun' is made for flow matching, not {noise_schedule!r}; use heun")
    steps: Steps = []
    for source, target in pairwise(times[:-1]):
        if source is None or target is None:
            raise ValueError("solver = 'flow_heun' needs finite times")
        new = source / (2 * target)
        steps.append(StepDecision("data", corrector=Corrector("implicit", weights=(1 - new, new))))
    return times, [*steps, StepDecision("data")]


def _adams(times: Times, _: NoiseSchedule, orders: Orders, *, order: int) -> tuple[Times, Steps]:
    return times, [adams.adams_step(min(order, i + 1)) for i in range(len(times) - 1)]


def _plms(times: Times, _: NoiseSchedule, orders: Orders) -> tuple[Times, Steps]:
    """PNDM as Stable Diffusion uses it: the first step is corrected by the mean of both its ends."""
    steps = [adams.adams_step(min(4, i + 1)) for i in range(len(times) - 1)]
    if len(steps) > 1:
        steps[0] = StepDecision("noise", corrector=Corrector("implicit", weights=(0.5, 0.5)))
    return times, steps


def _pndm(times: Times, _: NoiseSchedule, orders: Orders) -> tuple[Times, Steps]:
    """Three Runge-Kutta steps, then Adams-Bashforth of order 4."""
    if len(times) < 5:
        raise _TooFewSteps(f"times: pndm needs at least 4 steps, of which 3 are Runge-Kutta, not {len(times) - 1}")
    return adams.runge_kutta_start(times, 3)


def _tab(times: Times, noise_schedule: NoiseSchedule, orders: Orders, *, order: int) -> tuple[Times, Steps]:
    steps: Steps = []
    for index, n in enumerate(orders(order)):
        known = [time for time in times[max(0, index + 1 - n) : index + 2] if time is not None]
        steps.append(adams.polynomial_step(noise_schedule, known) if n > 1 else StepDecision("noise"))
    return times, steps


Build = Callable[[Times, NoiseSchedule, Orders], tuple[Times, Steps]]


def _dpm(prefix: str, prediction: PredictionSpace) -> dict[str, Build]:
    multistep = partial(_multistep, prediction=prediction)
    singlestep = partial(_singlestep, prediction=prediction)
    last, both = ((-1,),), ((-1, -2), (-1, -2))
    return {
        f"{prefix}_2m": partial(multistep, order=2, scales={2: ("bh2",)}),
        f"{prefix}_2m_heun": partial(multistep, order=2, scales={}),
        f"{prefix}_3m": partial(multistep, order=3, scales={2: ("bh2",), 3: (1.0, 0.5)}),
        f"{prefix}_3m_exact": partial(multistep, order=3, scales={2: ("bh2",)}),
        f"{prefix}_2s": partial(singlestep, order=2, second=("bh2",)),
        f"{prefix}_2s_heun": partial(singlestep, order=2, second=()),
        f"{prefix}_3s": partial(singlestep, order=3, second=(), third=(last, ())),
        f"{prefix}_3s_midpoint": partial(singlestep, order=3, second=("bh2",), third=(last, ())),
        f"{prefix}_3s_heun": partial(singlestep, order=3, second=(), third=(both, ())),
    }


def _unipc_family() -> dict[str, Build]:
    result: dict[str, Build] = {}
    spaces: dict[str, PredictionSpace] = {"": "data", "_noise": "noise"}
    scales: dict[str, Scale] = {"bh1": "bh1", "bh2": "bh2", "exact": 1.0}
    for suffix, prediction in spaces.items():
        for order in (1, 2, 3):
            for kind, scale in scales.items():
                result[f"unipc_{order}_{kind}{suffix}"] = partial(
                    _unipc, order=order, prediction=prediction, scale=scale
                )
        for order in (2, 3):
            for kind, scale in scales.items():
                result[f"unip_{order}_{kind}{suffix}"] = partial(
                    _multistep, order=order, prediction=prediction, scales={2: (scale,)}
                )
    return result


_FIRST_ORDER = partial(_multistep, order=1, prediction="data", scales={})
PRESETS: dict[str, Build] = {
    "ddim": _FIRST_ORDER,
    "flow_euler": _FIRST_ORDER,
    **_dpm("dpm", "noise"),
    **_dpm("dpmpp", "data"),
    "deis_2": partial(_multistep, order=2, prediction="noise", scales={}),
    "deis_3": partial(_multistep, order=3, prediction="noise", scales={}),
    "deis_tab_2": partial(_tab, order=2),
    "deis_tab_3": partial(_tab, order=3),
    **_unipc_family(),
    "heun": _heun,
    "flow_heun": _flow_heun,
    "sa_solver": _sa_solver,
    "sa_solver_predictor": partial(_multistep, order=2, prediction="data", scales={2: ("bh1",)}),
    "ipndm_2": partial(_adams, order=2),
    "ipndm_3": partial(_adams, order=3),
    "ipndm_4": partial(_adams, order=4),
    "plms": _plms,
    "pndm": _pndm,
}
