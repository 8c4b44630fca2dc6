"""The times of a solver schedule as levels of signal and noise on one noise schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.decisions import SolverSchedule, check_clean_end
from genlight.diffusion.solver.phi import Scalar, number

# λ that pure noise (α = 0) counts as in finite differences and φ functions: that of σ = 1 - 1e-6 in flow matching,
# where diffusers starts its multistep solvers
PURE_NOISE_HALF_LOG_SNR = math.log(1e-6) - math.log1p(-1e-6)
# levels that a noise schedule was asked for are kept: children of a search share most of their times with their parents
_KEPT = 4096
# up to this λ there is noise in float64 for every family
_FINITE_HALF_LOG_SNR = 30.0


@dataclass(frozen=True)
class Level:
    """One time: x_t = α x_0 + σ ε, λ = ln(α/σ) in [-inf, inf]; `time` is None for a clean image beyond the schedule."""

    time: Scalar | None
    half_log_snr: Scalar
    alpha: Scalar
    sigma: Scalar

    @property
    def finite_half_log_snr(self) -> Scalar:
        """λ, of pure noise the value that stands for it in expansions."""
        return PURE_NOISE_HALF_LOG_SNR if self.half_log_snr == -math.inf else self.half_log_snr

    @property
    def signal_share(self) -> Scalar:
        """α/(α + σ), which is 1 - σ in flow matching: from 0 for pure noise to 1 for a clean image."""
        return self.alpha / (self.alpha + self.sigma)

    @property
    def noise_share(self) -> Scalar:
        """σ/(α + σ) = 1 - signal_share."""
        return self.sigma / (self.alpha + self.sigma)


def levels_of(schedule: SolverSchedule, noise_schedule: NoiseSchedule, times: Tensor | None = None) -> list[Level]:
    """The N + 1 levels of a solver schedule.

    Args:
        times: float64 [N + 1] in the schedule's time domain, to take the place of `schedule.times` and carry gradients;
            infinite ends keep what the schedule says. Levels are then tensors.

    Raises ValueError for times outside the noise schedule, infinite ends that it lacks, levels that do not rise.
    """
    if times is None:
        finite = [time for time in schedule.times if time is not None]
        levels = _kept_levels(finite, schedule.time_domain == "half_log_snr", noise_schedule)
    else:
        if times.shape != (len(schedule.times),) or times.dtype != torch.float64:
            raise ValueError(
                f"times: a float64 tensor [{len(schedule.times)}] is needed, not {times.dtype} {times.shape}"
            )
        values = times[[index for index, time in enumerate(schedule.times) if time is not None]]
        time = noise_schedule.t_of_half_log_snr(values) if schedule.time_domain == "half_log_snr" else values
        levels = [Level(*row) for row in zip(*_columns(time, noise_schedule))]
        levels = [_constant(level) if math.isinf(number(level.half_log_snr)) else level for level in levels]
    if schedule.times[0] is None:
        levels.insert(0, _pure_noise(noise_schedule))
    if schedule.times[-1] is None:
        levels.append(Level(None, math.inf, 1.0, 0.0))
    _check(schedule, levels)
    return levels


def half_log_snrs_of(schedule: SolverSchedule, noise_schedule: NoiseSchedule) -> list[float]:
    """λ of the N + 1 times, infinite at infinite ends; errors are those of `levels_of`."""
    if schedule.time_domain == "half_log_snr":
        low, high = _range_of(noise_schedule)
        # inside the range `levels_of` could find nothing but steps below rounding, and it takes ten times as long
        lower, upper = max(low, PURE_NOISE_HALF_LOG_SNR), min(high, _FINITE_HALF_LOG_SNR)
        times = schedule.times
        inside = all(lower <= time <= upper for time in times if time is not None)
        if inside and (times[0] is not None or low == -math.inf):
            return [(math.inf if index else -math.inf) if time is None else time for index, time in enumerate(times)]
    return [number(level.half_log_snr) for level in levels_of(schedule, noise_schedule)]


def in_half_log_snr(schedule: SolverSchedule, noise_schedule: NoiseSchedule) -> SolverSchedule:
    """The same schedule with its times as λ, infinite ends as None."""
    times = [level.half_log_snr for level in levels_of(schedule, noise_schedule)]
    finite = tuple(None if math.isinf(time) else time for time in times)
    return replace(schedule, times=finite, time_domain="half_log_snr")


def _columns(time: Tensor, noise_schedule: NoiseSchedule) -> list[Tensor]:
    return [time, noise_schedule.half_log_snr(time), noise_schedule.alpha(time), noise_schedule.sigma(time)]


_ranges: "WeakKeyDictionary[NoiseSchedule, tuple[float, float]]" = WeakKeyDictionary()
_levels: "WeakKeyDictionary[NoiseSchedule, dict[tuple[bool, float], Level]]" = WeakKeyDictionary()


def _range_of(noise_schedule: NoiseSchedule) -> tuple[float, float]:
    """Lowest and highest λ."""
    found = _ranges.get(noise_schedule)
    if found is None:
        found = noise_schedule.half_log_snr(noise_schedule.t_max), noise_schedule.half_log_snr(noise_schedule.t_min)
        _ranges[noise_schedule] = found
    return found


def _kept_levels(times: Sequence[float], as_half_log_snr: bool, noise_schedule: NoiseSchedule) -> list[Level]:
    """The levels of finite times, given as λ or not, as plain numbers."""
    kept = _levels.setdefault(noise_schedule, {})
    if len(kept) > _KEPT:
        kept.clear()
    found = {time: kept.get((as_half_log_snr, time)) for time in times}
    new = [time for time, level in found.items() if level is None]
    if new:
        values = torch.tensor(new, dtype=torch.float64)
        time = noise_schedule.t_of_half_log_snr(values) if as_half_log_snr else values
        # a time that missed the range by rounding has been clamped to it; α, σ and λ then belong to the clamped one
        time = time.clamp(noise_schedule.t_min, noise_schedule.t_max)
        rows = zip(*(column.tolist() for column in _columns(time, noise_schedule)))
        made = {given: Level(*row) for given, row in zip(new, rows)}
        found |= made
        kept.update({(as_half_log_snr, given): level for given, level in made.items()})
    return [level for given in times if (level := found[given]) is not None]


def _constant(level: Level) -> Level:
    """An infinite end without gradients, which are not defined there."""
    values: tuple[Any, ...] = (level.time, level.half_log_snr, level.alpha, level.sigma)
    return Level(*(number(value) for value in values))


def _pure_noise(noise_schedule: NoiseSchedule) -> Level:
    if noise_schedule.alpha(noise_schedule.t_max) != 0:
        raise ValueError(
            f"times[0] = null asks for pure noise, which {noise_schedule!r} does not reach: "
            f"use half_log_snr = {noise_schedule.half_log_snr(noise_schedule.t_max):.6g}"
        )
    return Level(noise_schedule.t_max, -math.inf, 0.0, noise_schedule.sigma(noise_schedule.t_max))


def _check(schedule: SolverSchedule, levels: list[Level]) -> None:
    for index, step in enumerate(schedule.steps):
        source, latest, target = levels[index + 1 + step.source], levels[index], levels[index + 1]
        # of the finite λ, so that no level lies between pure noise and the λ that stands for it
        start, end = number(source.finite_half_log_snr), number(target.finite_half_log_snr)
        if end <= start or target.half_log_snr < latest.half_log_snr:
            raise ValueError(
                f"times[{index + 1}] = {schedule.times[index + 1]}: the step from "
                f"{schedule.times[index + 1 + step.source]} has λ from {start:.9g} to {end:.9g}, which does not rise"
            )
    if levels[-1].sigma == 0:
        check_clean_end(schedule.steps[-1], len(schedule.steps) - 1)
    if any(level.sigma == 0 for level in levels[:-1]):
        raise ValueError("times: the network cannot be evaluated at sigma = 0; only the last time may be there")
