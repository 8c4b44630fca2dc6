"""Where solvers put their evaluations: hand-made grids of times.

A grid has N + 1 times in the domain "time" of its noise schedule, from pure noise down. `None` as the last time is the
clean image (σ = 0), as in diffusers' `final_sigmas_type = "zero"`; the other end, "t_min", is the last time the noise
schedule knows.
"""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule

Spacing = Literal["uniform", "quadratic", "log_snr", "edm", "ays_sd15", "ays_sdxl", "ays_svd"]
End = Literal["t_min", "clean"]
Times = tuple[float | None, ...]
SPACINGS: tuple[str, ...] = get_args(Spacing)

# the exponent of Karras et al. 2022, equation 5
_RHO = 7.0
# levels σ/α that stand for infinite ends in grids that need finite ones: the range of Karras et al. 2022, table 1
_NOISE_LEVELS = (0.002, 80.0)
_AYS_LISTS = {
    "ays_sd15": "StableDiffusionSigmas",
    "ays_sdxl": "StableDiffusionXLSigmas",
    "ays_svd": "StableDiffusionVideoSigmas",
}


def grid(noise_schedule: NoiseSchedule, steps: int, spacing: str = "log_snr", end: End = "t_min") -> Times:
    """N + 1 times for N = `steps` steps.

    Args:
        spacing: "uniform" in the network's time (`t_of_fraction`); "quadratic", its square; "log_snr", even in λ;
            "edm", even in (σ/α)^(1/7) (Karras et al. 2022, equation 5); "ays_sd15", "ays_sdxl", "ays_svd", the
            published lists of "Align Your Steps" (Sabour et al. 2024) as diffusers has them, log-linear between for
            other numbers of steps.
        end: "t_min", or "clean" for one more step from there to σ = 0. On a flow schedule both are t = 0.

    Raises ValueError for an unknown spacing or end, or fewer than one step.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing = {spacing!r}; known are {', '.join(SPACINGS)}")
    if end not in get_args(End):
        raise ValueError(f"end = {end!r}; known are t_min and clean")
    if steps < 1:
        raise ValueError(f"steps = {steps}; at least one is needed")
    last = None if end == "clean" and noise_schedule.family != "flow" else noise_schedule.t_min
    # one more step follows the last level of the grid where that is not yet the end
    count = steps if last is None or spacing in _AYS_LISTS else steps + 1
    times = _levels(noise_schedule, count, spacing).tolist()
    times[0] = noise_schedule.t_max
    if count == steps:
        return (*times, last)
    return (*times[:-1], last)


def on_integers(times: Times, *, merged: bool = False) -> Times:
    """The times rounded to integers, for networks that look their timesteps up.

    Times that fall together become one where `merged`; else ValueError.
    """
    rounded = tuple(None if time is None else float(round(time)) for time in times)
    if merged:
        return tuple(dict.fromkeys(rounded))
    if len(set(rounded)) != len(rounded):
        raise ValueError(f"times {times} are not {len(times)} different integers")
    return rounded


def are_integers(times: Times) -> bool:
    """Whether all finite times are integers."""
    return all(time is None or time == round(time) for time in times)


def _levels(noise_schedule: NoiseSchedule, count: int, spacing: str) -> Tensor:
    """`count` falling times from t_max to t_min."""
    falling = torch.linspace(1, 0, count, dtype=torch.float64)
    if spacing == "uniform":
        return noise_schedule.t_of_fraction(falling)
    if spacing == "quadratic":
        return noise_schedule.t_of_fraction(falling**2)
    low, high = _noise_levels(noise_schedule)
    if spacing == "log_snr":
        levels = torch.exp(math.log(low) + falling * (math.log(high) - math.log(low)))
    elif spacing == "edm":
        levels = (low ** (1 / _RHO) + falling * (high ** (1 / _RHO) - low ** (1 / _RHO))) ** _RHO
    else:
        levels = _align_your_steps(spacing, count)
        if count > 1 and levels[1] >= high:
            raise ValueError(
                f"spacing = {spacing!r} starts above the noise of {noise_schedule!r}, sigma/alpha = {high:g}"
            )
    return noise_schedule.t_of_half_log_snr(-torch.log(levels.clamp(low, high)))


def _noise_levels(noise_schedule: NoiseSchedule) -> tuple[float, float]:
    """The range of σ/α, finite."""
    low, high = noise_schedule.noise_level(noise_schedule.t_min), noise_schedule.noise_level(noise_schedule.t_max)
    return (low if low > 0 else _NOISE_LEVELS[0]), (high if high < math.inf else _NOISE_LEVELS[1])


def _align_your_steps(spacing: str, count: int) -> Tensor:
    """`count` levels from the published list of ten and σ = 0, which is left out."""
    from diffusers.schedulers.scheduling_utils import AysSchedules

    lists: Any = AysSchedules
    published = [level for level in lists[_AYS_LISTS[spacing]] if level > 0]
    where = np.linspace(0, 1, count)
    return torch.from_numpy(np.exp(np.interp(where, np.linspace(0, 1, len(published)), np.log(published))))
