"""Tables of β for variance-preserving schedules, rounded to float32 where diffusers rounds them.

The float32 products of 1 - β are the process that diffusers networks are trained on and its samplers run; a more exact
table would be another process (for the cosine schedule, by 3e-4 of the first σ and 7e-6 of the last α).
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


def betas_of(beta_schedule: str, beta_start: float, beta_end: float, count: int) -> Tensor:
    """β [count] in float32: rounded where diffusers rounds, so that the products of 1 - β are equal to the bit."""
    if beta_schedule == "squaredcos_cap_v2":
        signal = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(signal)])
    if beta_schedule not in ("linear", "scaled_linear"):
        raise ValueError(
            f"noise_schedule.beta_schedule = {beta_schedule!r}; known are linear, scaled_linear, squaredcos_cap_v2"
        )
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"noise_schedule: 0 < beta_start <= beta_end < 1 is needed, not {beta_start} and {beta_end}")
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, count, dtype=torch.float32)
    return torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float32) ** 2


def with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """β after an affine map of √ᾱ that keeps the first and sends the last to 0 (Lin et al. 2024, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
