"""Consistency models: one network call from any noise level to the image (Song et al. 2023).

A consistency function is f(x, σ) = c_skip x + c_out F(c_in x, c_noise) of a network F, with f(x, sigma_min) = x. It is
trained to give the same image at two neighbouring noise levels of one path: at σ by the student, which learns, and at
the lower σ' by the target, which does not. Objectives differ in how they choose the levels (`Objective.levels`), in
how they get from x at σ to x' at σ' (a step of a teacher, or the noise and image that made x), and in the weight.

The formulas are those of diffusers' CMStochasticIterativeScheduler, which samples what is trained here. Noise levels
are float64 [B] on the CPU, whatever the device of the images.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import expand

# D(x, sigma) -> the clean images that a model sees in x [B, ...] at noise levels sigma [B]
Denoiser = Callable[[Tensor, Tensor], Tensor]


def boundary_scalings(
    sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) at noise levels of any shape, float64 (Song et al. 2023, appendix C).

    c_noise is 250 ln σ. At sigma_min c_skip is 1 and c_out is 0.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    above, radius = sigma - sigma_min, (sigma**2 + sigma_data**2).sqrt()
    return sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data / radius, 1 / radius, 250 * sigma.log()


def consistency_function(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
) -> Tensor:
    """f(x, σ) [B, ...] of a network F(input, timestep [B]); levels below sigma_min count as sigma_min."""
    c_skip, c_out, c_in, c_noise = boundary_scalings(sigma.clamp(min=sigma_min), sigma_data, sigma_min)
    output = network(expand(c_in, x) * x, c_noise.float().to(x.device))
    return expand(c_skip, x) * x + expand(c_out, x) * output


def karras_sigmas(count: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """`count` noise levels from sigma_max down to sigma_min, float64 [count] (Karras et al. 2022, equation 5)."""
    if count < 2:
        raise ValueError(f"a grid of noise levels has at least 2 of them, not {count}")
    fraction = torch.arange(count, dtype=torch.float64) / (count - 1)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (first + fraction * (last - first)) ** rho
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas


def euler_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x [B, ...] at σ moved to sigma_next along dx/dσ = (x - x0)/σ; exact if x0 is the true image."""
    return x + expand((sigma_next - sigma) / sigma, x) * (x - x0)


def heun_step(denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One step of second order from σ to sigma_next > 0 [B] (Karras et al. 2022, algorithm 1)."""
    slope = (x - denoiser(x, sigma)) / expand(sigma, x)
    step = expand(sigma_next - sigma, x)
    euler = x + step * slope
    slope_next = (euler - denoiser(euler, sigma_next)) / expand(sigma_next, x)
    return x + step * (slope + slope_next) / 2


class Objective(ABC):
    """Which noise levels a training step compares, with what weight, and how the target follows the student.

    ``step`` counts optimizer steps from 0 and ``total`` is their number in the whole training.

    Attributes:
        needs_teacher: whether x' comes from a teacher's step; else from the true image and noise.
        distance: name of the distance of the paper, see `genlight.diffusion.distances`.
    """

    needs_teacher = False
    distance = "l2"

    @abstractmethod
    def levels(
        self, count: int, step: int, total: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> tuple[Tensor, Tensor]:
        """`count` pairs σ > σ' of float64 [count]; one uniform or normal number each from torch's generator."""

    def weight(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Weights of the distances [B], float64."""
        return torch.ones_like(sigma)

    def target_decay(self, step: int, total: int) -> float:
        """μ: after the step the target becomes μ target + (1 - μ) student; at 0 the student is its own target."""
        return 0.0

    @property
    def keeps_target(self) -> bool:
        """Whether the target has weights of its own."""
        return False


class ConsistencyTraining(Objective):
    """Neighbours on a Karras grid, without a teacher (Song et al. 2023, algorithm 3).

    Args:
        num_scales: noise levels of the grid; with ``initial_scales`` s_1, those at the end less one.
        initial_scales: None: always ``num_scales`` levels. A number s_0: at step k of K there are
            N(k) = ⌈√(k/K ((s_1 + 1)² - s_0²) + s_0²) - 1⌉ + 1.
        target_decay: μ; with ``initial_scales`` μ_0 of μ(k) = exp(s_0 ln μ_0 / (N(k) - 1)). 0: no separate target.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, num_scales: int = 150, initial_scales: int | None = 2, target_decay: float = 0.9) -> None:
        if num_scales < 2 or (initial_scales is not None and not 2 <= initial_scales <= num_scales):
            raise ValueError(
                f"objective: 2 <= initial_scales <= num_scales is needed, not {initial_scales} and {num_scales}"
            )
        if not 0 <= target_decay < 1:
            raise ValueError(f"objective.target_decay = {target_decay} must be in [0, 1)")
        self.num_scales, self.initial_scales, self.decay = num_scales, initial_scales, float(target_decay)

    def scales(self, step: int, total: int) -> int:
        """N(k), the number of noise levels at a step."""
        if self.initial_scales is None:
            return self.num_scales
        first, last = self.initial_scales**2, (self.num_scales + 1) ** 2
        return max(math.ceil(math.sqrt(min(step / total, 1.0) * (last - first) + first) - 1), 1) + 1

    def levels(
        self, count: int, step: int, total: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> tuple[Tensor, Tensor]:
        sigmas = karras_sigmas(self.scales(step, total), sigma_min, sigma_max, rho)
        index = torch.randint(len(sigmas) - 1, (count,))
        return sigmas[index], sigmas[index + 1]

    def target_decay(self, step: int, total: int) -> float:
        if self.initial_scales is None or self.decay == 0:
            return self.decay
        return math.exp(self.initial_scales * math.log(self.decay) / (self.scales(step, total) - 1))

    @property
    def keeps_target(self) -> bool:
        return self.decay > 0


class ConsistencyDistillation(ConsistencyTraining):
    """The same with a step of a frozen diffusion model by Heun's method (Song et al. 2023, algorithm 2).

    Arguments are those of `ConsistencyTraining`.
    """

    needs_teacher = True

    def __init__(self, num_scales: int = 18, initial_scales: int | None = None, target_decay: float = 0.0) -> None:
        super().__init__(num_scales, initial_scales, target_decay)


class ImprovedConsistencyTraining(Objective):
    """iCT (Song & Dhariwal 2023, sections 3.3 to 3.5): no target, log-normal levels, doubling grids, weight 1/(σ - σ').

    Args:
        initial_scales, final_scales: s_0 and s_1 of N(k) = min(s_0 2^⌊k/K'⌋, s_1) + 1 with
            K' = ⌊K / (log2⌊s_1/s_0⌋ + 1)⌋.
        mean, std: of ln σ, P_mean and P_std.

    Raises:
        ValueError: a value out of range.
    """

    distance = "pseudo_huber"

    def __init__(
        self, initial_scales: int = 10, final_scales: int = 1280, mean: float = -1.1, std: float = 2.0
    ) -> None:
        if not 1 <= initial_scales <= final_scales:
            raise ValueError(
                f"objective: 1 <= initial_scales <= final_scales is needed, not {initial_scales} and {final_scales}"
            )
        if not std > 0:
            raise ValueError(f"objective.std = {std} must be positive")
        self.initial_scales, self.final_scales, self.mean, self.std = initial_scales, final_scales, mean, std

    def scales(self, step: int, total: int) -> int:
        """N(k), the number of noise levels at a step."""
        doublings = math.log2(self.final_scales // self.initial_scales)
        every = max(math.floor(total / (doublings + 1)), 1)
        return int(min(self.initial_scales * 2 ** min(step // every, 64), self.final_scales)) + 1

    def levels(
        self, count: int, step: int, total: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> tuple[Tensor, Tensor]:
        sigmas = karras_sigmas(self.scales(step, total), sigma_min, sigma_max, rho).flip(0)  # increasing
        share = torch.special.erf((sigmas.log() - self.mean) / (math.sqrt(2) * self.std)).diff()
        cumulative = share.cumsum(0)
        uniform = torch.rand(count, dtype=torch.float64) * cumulative[-1]
        index = torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(share) - 1)
        return sigmas[index + 1], sigmas[index]

    def weight(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return 1 / (sigma - sigma_next)


class EasyConsistencyTuning(Objective):
    """ECT (Geng et al. 2024, section 3): from a diffusion model, with σ' that moves from 0 towards σ in stages.

    σ is log-normal and σ' = σ max(1 - n(σ)/q^(stage + 1), 0) with n(σ) = 1 + k sigmoid(-b σ). At σ' = 0 the target is
    the image itself: diffusion training.

    Args:
        q: how much closer σ' comes with each stage.
        num_stages: stages of equal length in the training.
        k, b: of n(σ).
        mean, std: of ln σ.

    Raises:
        ValueError: a value out of range.
    """

    distance = "norm"

    def __init__(
        self,
        q: float = 2.0,
        num_stages: int = 8,
        k: float = 8.0,
        b: float = 1.0,
        mean: float = -1.1,
        std: float = 2.0,
    ) -> None:
        if not q > 1 or num_stages < 1 or k < 0 or not std > 0:
            raise ValueError(
                f"objective: q > 1, num_stages >= 1, k >= 0 and std > 0 are needed, not {q}, {num_stages}, {k}, {std}"
            )
        self.q, self.num_stages, self.k, self.b, self.mean, self.std = q, num_stages, k, b, mean, std

    def stage(self, step: int, total: int) -> int:
        """Number of the stage, from 0."""
        return min(step * self.num_stages // total, self.num_stages - 1)

    def levels(
        self, count: int, step: int, total: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> tuple[Tensor, Tensor]:
        normal = torch.randn(count, dtype=torch.float64)
        sigma = (self.mean + self.std * normal).exp().clamp(sigma_min, sigma_max)
        closeness = (1 + self.k * torch.sigmoid(-self.b * sigma)) / self.q ** (self.stage(step, total) + 1)
        return sigma, sigma * (1 - closeness).clamp(min=0)

    def weight(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return 1 / (sigma - sigma_next)


def latent_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of a latent consistency model at timestep indices t, float64: f = c_skip x + c_out x̂_0.

    Luo et al. 2023, section 4.2, as in diffusers' LCMScheduler. At t = 0 c_skip is 1 and c_out is 0.
    """
    scaled = torch.as_tensor(t, dtype=torch.float64) * timestep_scaling
    variance = scaled**2 + sigma_data**2
    return sigma_data**2 / variance, scaled / variance.sqrt()


def skipping_steps(num_train_timesteps: int, count: int) -> tuple[Tensor, int]:
    """(t, k): the `count` timestep indices k - 1, 2k - 1, … at which latent consistency is trained, and their distance.

    Each is compared with t - k, the first one with 0 (Luo et al. 2023, section 4.3). int64 [count].

    Raises:
        ValueError: more steps than the schedule has.
    """
    if not 1 <= count <= num_train_timesteps:
        raise ValueError(
            f"solver_steps = {count} must be between 1 and {num_train_timesteps}, the schedule's timesteps"
        )
    k = num_train_timesteps // count
    return torch.arange(1, count + 1) * k - 1, k
