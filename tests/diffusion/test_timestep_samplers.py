"""Training times: their distributions against scipy, their reproducibility."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.timestep_samplers import (
    LogitNormalTimesteps,
    LogNormalTimesteps,
    TimestepSampler,
    UniformTimesteps,
)

SCHEDULES = [
    VPSchedule(),
    VPSchedule("squaredcos_cap_v2", rescale_zero_terminal_snr=True),
    EDMSchedule(),
    FlowSchedule(shift=3.0),
]
SAMPLERS = [UniformTimesteps(), LogNormalTimesteps(), LogitNormalTimesteps()]
N = 20_000


def _draw(sampler: TimestepSampler, schedule: NoiseSchedule, n: int = N) -> torch.Tensor:
    return sampler.sample(schedule, n, torch.Generator().manual_seed(7))


def _fits(values: torch.Tensor, distribution: object) -> bool:
    return stats.kstest(values.numpy(), distribution.cdf).pvalue > 1e-3


def test_uniform_on_vp_is_uniform_over_integers() -> None:
    t = _draw(UniformTimesteps(), VPSchedule(num_train_timesteps=50, beta_start=0.002, beta_end=0.3))
    assert torch.equal(t, t.round())
    counts = torch.bincount(t.long(), minlength=50)
    assert len(counts) == 50 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_uniform_in_what_the_network_sees() -> None:
    continuous = UniformTimesteps(discrete=False)
    assert _fits(_draw(continuous, VPSchedule()), stats.uniform(0, 999))
    edm = EDMSchedule()
    assert _fits(_draw(continuous, edm).log(), stats.uniform(math.log(0.002), math.log(80 / 0.002)))
    assert _fits(_draw(continuous, FlowSchedule()), stats.uniform(0, 1))
    shifted = _draw(continuous, FlowSchedule(shift=3.0))
    assert _fits(shifted / (3 - 2 * shifted), stats.uniform(0, 1))  # the shift undone


@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (0.5, 2.0), (4.0, 1.0)])
def test_log_normal_is_truncated_to_the_range(mean: float, std: float) -> None:
    schedule = EDMSchedule(sigma_min=0.05, sigma_max=20.0)
    t = _draw(LogNormalTimesteps(mean, std), schedule)
    ends = (np.log([0.05, 20.0]) - mean) / std
    assert _fits(t.log(), stats.truncnorm(*ends, loc=mean, scale=std))
    assert t.min() >= 0.05 and t.max() <= 20.0


def test_log_normal_is_of_the_noise_level_on_every_schedule() -> None:
    for schedule in (FlowSchedule(), VPSchedule()):
        t = _draw(LogNormalTimesteps(-0.5, 0.8, discrete=False), schedule)
        assert _fits(schedule.noise_level(t).log(), stats.norm(-0.5, 0.8))


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.7, 0.5)])
def test_logit_normal(mean: float, std: float) -> None:
    t = _draw(LogitNormalTimesteps(mean, std), FlowSchedule())
    assert _fits(torch.logit(t), stats.norm(mean, std))
    # a shift by s moves the logit by ln s
    t = _draw(LogitNormalTimesteps(mean, std), FlowSchedule(shift=3.0))
    assert _fits(torch.logit(t), stats.norm(mean + math.log(3.0), std))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_draws_are_reproducible_and_in_range(sampler: TimestepSampler, schedule: NoiseSchedule) -> None:
    t = _draw(sampler, schedule)
    assert t.dtype == torch.float64 and t.shape == (N,)
    assert torch.equal(t, _draw(sampler, schedule))
    assert not torch.equal(t, sampler.sample(schedule, N, torch.Generator().manual_seed(8)))
    assert t.min() >= schedule.t_min and t.max() <= schedule.t_max
    assert torch.equal(t, t.round()) == (schedule.family == "vp")
    assert schedule.alpha(t).isfinite().all()
    torch.manual_seed(3)
    first = sampler.sample(schedule, 5)
    torch.manual_seed(3)
    assert torch.equal(first, sampler.sample(schedule, 5))
    assert sampler.sample(schedule, 0).shape == (0,)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"timestep_sampler.discrete = True needs a VPSchedule, not FlowSchedule"):
        UniformTimesteps(discrete=True).sample(FlowSchedule(), 2)
    with pytest.raises(ValueError, match=r"timestep_sampler.std = 0 must be positive"):
        LogNormalTimesteps(std=0)
    with pytest.raises(ValueError, match=r"timestep_sampler.std = -1 must be positive"):
        LogitNormalTimesteps(std=-1)
    with pytest.raises(ValueError, match=r"ln\(sigma/alpha\) ~ N\(30.0, 1.0²\) hardly ever falls in \[-6.2"):
        LogNormalTimesteps(mean=30.0, std=1.0).sample(EDMSchedule(), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_the_device_makes_no_difference(sampler: TimestepSampler, schedule: NoiseSchedule) -> None:
    t = sampler.sample(schedule, 100, torch.Generator().manual_seed(1), device="cuda")
    assert t.device.type == "cuda"
    assert torch.equal(t.cpu(), sampler.sample(schedule, 100, torch.Generator().manual_seed(1)))
