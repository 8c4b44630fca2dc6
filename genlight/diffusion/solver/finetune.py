"""Fine-tuning of solver tables: the result of a few evaluations is drawn to that of a teacher with many.

A table is a handful of numbers and its result a smooth function of them, so that gradients finish what a search began:
coefficients of a non-stationary solver (Shaul et al. 2024, "Bespoke Non-Stationary Solvers") and its times are fitted
to the teacher's samples on fixed noise. The loss is the paired RMS distance; what is kept is the best on other noise.

Parameters are the weights below the first row, as differences to where they start in units of the noise level of
their row, and the inner times, as gaps in λ = ln(α/σ) that stay positive. A multistep solver of N evaluations has
N (N + 3)/2 weights and N - 1 times: 17, 24, 32 parameters for N = 4, 5, 6.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.fitting import Adam, LevenbergMarquardt, Progress, TuningRecord, fit
from genlight.diffusion.solver.jacobian import detached, weight_units
from genlight.diffusion.solver.levels import PURE_NOISE_HALF_LOG_SNR, levels_of
from genlight.diffusion.solver.teacher import TuningProblem


@torch.inference_mode(False)
def finetune(
    problem: TuningProblem,
    start: SolverSchedule | SolverTable,
    method: LevenbergMarquardt | Adam | None = None,
    *,
    weights: bool = True,
    times: bool = True,
    first_time: bool = False,
    progress: Progress | None = None,
) -> tuple[SolverTable, TuningRecord]:
    """A table nearer to the teacher than `start`, and how it was found. The same call gives the same table.

    Args:
        start: a schedule, whose weights then follow its times until their own differences are added; or a table, whose
            weights stay when times move.
        method: Levenberg-Marquardt where None.
        weights, times: what is tuned. Mean weights of an analytical first step, the first and the last time of a
            schedule, the first of a table and times that coincide with a neighbour or with the end of the noise
            schedule stay as they are.
        first_time: let the first time of a schedule move too, on variance-preserving noise schedules, where noise is
            a state at every time; elsewhere it stays.

    Raises ValueError if the start has no finite RMS, or if nothing is left to tune.
    """
    if times and problem.integer_timesteps:
        raise ValueError("times: a network with integer timesteps has no gradients in time; tune the weights only")
    space = _TableSpace(start, problem.prediction.schedule, weights, times, first_time)
    raw, record = fit(problem, space.table, space.start, method, progress)
    return detached(space.table(raw)), record


class MonotoneTimes:
    """Rising λ_0 … λ_n as a function of free numbers, one for each inner time.

    Gaps are softplus of the numbers, scaled to sum up to λ_n - λ_0; the last gap is not free. Gaps of zero stay zero.
    """

    def __init__(self, values: Tensor) -> None:
        """From values [n + 1], n >= 1: the ends stay, the inner ones are free."""
        gaps = values.diff()
        if bool((gaps < 0).any()) or not bool(values.isfinite().all()):
            raise ValueError(f"times: λ = {values.tolist()} must be finite and rise")
        self.first, self.length = values[0], values[-1] - values[0]
        unit = gaps / self.length * len(gaps)
        self.open = unit > 0
        # softplus is inverted as x + ln(1 - e^-x)
        raw = torch.where(self.open, unit + torch.log(-torch.expm1(-unit)), 0.0)
        free = self.open.nonzero().flatten()[:-1]
        self.free, self.fixed, self.start = free, raw, raw[free]

    def __call__(self, raw: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """λ [n + 1]; `shift` moves λ_0, and the others in proportion."""
        gaps = softplus(self.fixed.index_put((self.free,), raw)) * self.open
        rising = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
        return self.first + shift + (self.length - shift) * (rising / rising[-1])


def schedule_times(
    schedule: SolverSchedule, noise_schedule: NoiseSchedule
) -> tuple[MonotoneTimes, Callable[..., Tensor]]:
    """The inner times of a schedule as free numbers, and the map from those to `times` of `compile_schedule`.

    The map also takes by how much λ_0 is moved, where that is finite.
    """
    levels = levels_of(schedule, noise_schedule)
    end = float(levels[-1].half_log_snr)
    inner = [float(level.half_log_snr) for level in levels[1:-1]]
    if math.isinf(end):
        end = _highest(noise_schedule, inner[-1] if inner else PURE_NOISE_HALF_LOG_SNR)
    values = [float(levels[0].finite_half_log_snr), *inner, end]
    monotone = MonotoneTimes(torch.tensor(values, dtype=torch.float64))
    ends = [0.0 if time is None else time for time in (schedule.times[0], schedule.times[-1])]

    def times(raw: Tensor, shift: Tensor | None = None) -> Tensor:
        moved = monotone(raw, 0.0 if shift is None else shift)[:-1]
        if schedule.time_domain == "time":
            moved = noise_schedule.t_of_half_log_snr(moved)
        first = moved.new_tensor(ends[:1]) if shift is None else moved[:1]
        return torch.cat([first, moved[1:], moved.new_tensor(ends[1:])])

    return monotone, times


class _TableSpace:
    """Tables as a function of one vector of parameters: differences of weights, numbers of the inner times, the shift
    of λ_0."""

    def __init__(
        self,
        start: SolverSchedule | SolverTable,
        noise_schedule: NoiseSchedule,
        weights: bool,
        times: bool,
        first_time: bool = False,
    ) -> None:
        self.origin, self.noise_schedule = start, noise_schedule
        self.base = start if isinstance(start, SolverTable) else compile_schedule(start, noise_schedule)
        self.base = detached(self.base)
        size = self.base.nfe + 1
        at_noise = self.base.weights[0, 0] == 1 and not bool(self.base.mean_weights[0])
        mask = torch.ones(size, size, dtype=torch.bool).tril() if weights else torch.zeros(size, size).bool()
        mask[0] &= not at_noise
        self.mask, self.units = mask, weight_units(self.base, noise_schedule)
        if isinstance(start, SolverSchedule):
            self.monotone, self.times = schedule_times(start, noise_schedule)
        else:
            self.monotone, self.times = self._table_times()
        count = len(self.monotone.start) if times else 0
        movable = isinstance(start, SolverSchedule) and noise_schedule.family == "vp" and start.times[0] is not None
        self.moves_first = first_time and times and at_noise and movable
        self.lowest = noise_schedule.half_log_snr(noise_schedule.t_max) - self.monotone.first
        zeros = [torch.zeros(number, dtype=torch.float64) for number in (int(mask.sum()), int(self.moves_first))]
        self.start = torch.cat([zeros[0], self.monotone.start[:count], zeros[1]])

    def _table_times(self) -> tuple[MonotoneTimes, Callable[..., Tensor]]:
        values = self.noise_schedule.half_log_snr(self.base.times).clamp(min=PURE_NOISE_HALF_LOG_SNR)
        end = _highest(self.noise_schedule, values[-1].item())
        monotone = MonotoneTimes(torch.cat([values, values.new_tensor([end])]))

        def times(raw: Tensor) -> Tensor:
            return torch.cat([self.base.times[:1], self.noise_schedule.t_of_half_log_snr(monotone(raw)[1:-1])])

        return monotone, times

    def table(self, raw: Tensor) -> SolverTable:
        """The table, with gradients of `raw`."""
        count = int(self.mask.sum())
        base = self.base
        if len(raw) > count:
            inner = raw[count : len(raw) - self.moves_first]
            times = self.times(inner, raw[-1].clamp(min=self.lowest)) if self.moves_first else self.times(inner)
            if isinstance(self.origin, SolverSchedule):
                base = compile_schedule(self.origin, self.noise_schedule, times=times)
            else:
                base = replace(base, times=times)
        added = torch.zeros_like(self.units).masked_scatter(self.mask, raw[:count]) * self.units
        return replace(base, weights=base.weights + added)


def _highest(noise_schedule: NoiseSchedule, last: float) -> float:
    """λ at the clean end of a noise schedule, or beyond `last` where that is infinite."""
    end = noise_schedule.half_log_snr(noise_schedule.t_min)
    return end if math.isfinite(end) else max(-PURE_NOISE_HALF_LOG_SNR, last + 1)
