"""Which times a training step looks at.

All samplers draw with one uniform number per sample in float64 on the generator's device (the CPU without a
generator), so that the times are the same whatever device they are wanted on.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule


class TimestepSampler(ABC):
    """Draws training times.

    Args:
        discrete: only integer times. None: yes for variance-preserving schedules, whose diffusers networks are trained
            and sampled at integer timesteps; True is refused for the others.
    """

    def __init__(self, discrete: bool | None = None) -> None:
        self.discrete = discrete

    def sample(
        self,
        schedule: NoiseSchedule,
        n: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """`n` independent times of `schedule`, float64 [n] on `device`."""
        discrete = schedule.family == "vp" if self.discrete is None else self.discrete
        if discrete and schedule.family != "vp":
            raise ValueError(f"timestep_sampler.discrete = True needs a VPSchedule, not {schedule!r}")
        source = generator.device if generator is not None else torch.device("cpu")
        uniform = torch.rand(n, generator=generator, dtype=torch.float64, device=source)
        return self._times(schedule, uniform, discrete).to(device)

    @abstractmethod
    def _times(self, schedule: NoiseSchedule, uniform: Tensor, discrete: bool) -> Tensor:
        """Times for uniform numbers in [0, 1)."""


class UniformTimesteps(TimestepSampler):
    """Evenly spread in the network's time: index (vp), ln σ (edm), t before the shift (flow)."""

    def _times(self, schedule: NoiseSchedule, uniform: Tensor, discrete: bool) -> Tensor:
        if discrete:
            return torch.floor(uniform * (schedule.t_max + 1)).clamp(max=schedule.t_max)
        return schedule.t_of_fraction(uniform)


class LogNormalTimesteps(TimestepSampler):
    """ln(σ/α) ~ N(mean, std²), restricted to the schedule's range (Karras et al. 2022, table 1: P_mean, P_std).

    Args:
        mean, std: of ln(σ/α).
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, discrete: bool | None = None) -> None:
        super().__init__(discrete)
        self.mean, self.std = float(mean), _positive_std(std)

    def _times(self, schedule: NoiseSchedule, uniform: Tensor, discrete: bool) -> Tensor:
        # -λ is what is normal; its cumulative probabilities at the two ends bound the uniform number
        lower, upper = -schedule.half_log_snr(schedule.t_min), -schedule.half_log_snr(schedule.t_max)
        ends = torch.special.ndtr((torch.tensor([lower, upper], dtype=torch.float64) - self.mean) / self.std)
        if not ends[1] - ends[0] > 1e-6:
            raise ValueError(
                f"timestep_sampler: ln(sigma/alpha) ~ N({self.mean}, {self.std}²) hardly ever falls in "
                f"[{lower:g}, {upper:g}], the range of {schedule!r}"
            )
        ends = ends.to(uniform.device)
        normal = torch.special.ndtri(ends[0] + uniform * (ends[1] - ends[0]))
        half_log_snr = -(self.mean + self.std * normal).clamp(lower, upper)
        times = schedule.t_of_half_log_snr(half_log_snr)
        return times.round() if discrete else times


class LogitNormalTimesteps(TimestepSampler):
    """Fraction u of the way with ln(u/(1-u)) ~ N(mean, std²) (Esser et al. 2024, equation 19), then the shift.

    Args:
        mean, std: of ln(u/(1-u)).
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, discrete: bool | None = None) -> None:
        super().__init__(discrete)
        self.mean, self.std = float(mean), _positive_std(std)

    def _times(self, schedule: NoiseSchedule, uniform: Tensor, discrete: bool) -> Tensor:
        fraction = torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform))
        times = schedule.t_of_fraction(fraction)
        return times.round() if discrete else times


def _positive_std(std: float) -> float:
    if not 0 < std < math.inf:
        raise ValueError(f"timestep_sampler.std = {std} must be positive")
    return float(std)
