"""Noise schedules: how much signal and how much noise there is at every time.

Everything here speaks of the Gaussian path x_t = α(t) x_0 + σ(t) ε, ε ~ N(0, I). One object answers α, σ, the
signal-to-noise ratio and the inverses; solvers, losses and samplers ask it and know no formula of their own.

Conventions, the same for every schedule:

- time runs from clean (`t_min`) to noisy (`t_max`), in the schedule's own unit: the diffusers timestep index for
  variance-preserving schedules, σ for EDM, the fraction of noise in [0, 1] for flow matching;
- `half_log_snr` is λ = ln(α/σ), the λ of DPM-Solver (Lu et al. 2022, section 3) and of UniPC; `log_snr` is
  ln(α²/σ²) = 2λ, the log-SNR of Kingma et al. 2021 ("Variational Diffusion Models"); both fall as t rises;
- `noise_level` is σ/α = exp(-λ), the "sigma" of Karras et al. 2022 and of diffusers' `scheduler.sigmas` for
  variance-preserving and EDM schedules. For flow matching diffusers' `scheduler.sigmas` is our σ itself;
- the clean image (α = 1, σ = 0) is a time of the flow schedule only; for the others it lies beyond `t_min`;
- every method maps elementwise: a Python number gives a float, a tensor of any shape and device gives a float64
  tensor of that shape on that device. A value out of range raises `ValueError` with the range.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from genlight.diffusion.betas import BetaSchedule, betas_of, with_zero_terminal_snr

Value = TypeVar("Value", float, Tensor)
Family = Literal["vp", "edm", "flow"]

# float32 timesteps and sigmas of other libraries miss a bound by a few rounding errors; they are clamped to it
_SLACK = 1e-6


def expand(values: float | Tensor, like: Tensor) -> Tensor:
    """Per-sample values [B], or anything that broadcasts, shaped to multiply `like` [B, ...], in its float type."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    result = torch.as_tensor(values, dtype=torch.float64).to(device=like.device, dtype=dtype)
    return result.reshape(-1, *[1] * (like.ndim - 1)) if result.ndim == 1 and like.ndim > 1 else result


class NoiseSchedule(ABC):
    """α(t), σ(t), log-SNR and inverses of one diffusion process; see the module's conventions.

    Attributes:
        family: "vp", "edm" or "flow"; decides which samplers make sense.
        t_min, t_max: the range of time, both ends included.
        sigma_data: standard deviation of the data in EDM preconditioning, None for the other families.
        init_noise_sigma: factor of standard normal noise at which diffusers starts to sample.
    """

    family: ClassVar[Family]
    t_min: float
    t_max: float
    sigma_data: float | None = None
    init_noise_sigma: float = 1.0

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """The constructor's arguments as plain values: equal definitions mean equal schedules."""

    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """The schedule as constructor arguments of diffusers schedulers of its family."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the definition."""
        text = json.dumps({"family": self.family, **self.definition()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def alpha(self, t: Value) -> Value:
        """Factor of the data in x_t."""
        return self._at_time(self._alpha, t)

    def sigma(self, t: Value) -> Value:
        """Factor of the noise in x_t."""
        return self._at_time(self._sigma, t)

    def half_log_snr(self, t: Value) -> Value:
        """λ(t) = ln(α/σ); ±inf where α or σ is zero."""
        return self._at_time(self._half_log_snr, t)

    def log_snr(self, t: Value) -> Value:
        """ln(α²/σ²) = 2λ(t)."""
        return self._at_time(lambda time: 2 * self._half_log_snr(time), t)

    def noise_level(self, t: Value) -> Value:
        """σ/α, the sigma of the variance-exploding view x/α = x_0 + (σ/α) ε; inf where α is zero."""
        return self._at_time(lambda time: torch.exp(-self._half_log_snr(time)), t)

    def t_of_half_log_snr(self, half_log_snr: Value) -> Value:
        """Inverse of `half_log_snr`."""
        lower, upper = self._half_log_snr_range()
        return self._apply(self._t_of_half_log_snr, half_log_snr, lower, upper, "half_log_snr")

    def t_of_log_snr(self, log_snr: Value) -> Value:
        """Inverse of `log_snr`."""
        lower, upper = self._half_log_snr_range()
        return self._apply(lambda value: self._t_of_half_log_snr(value / 2), log_snr, 2 * lower, 2 * upper, "log_snr")

    def t_of_noise_level(self, noise_level: Value) -> Value:
        """Inverse of `noise_level`: from diffusers' sigmas to time, for variance-preserving and EDM schedules."""
        lower, upper = self._half_log_snr_range()
        return self._apply(
            lambda value: self._t_of_half_log_snr(-torch.log(value)),
            noise_level,
            math.exp(-upper),
            math.exp(-lower),
            "noise_level",
        )

    def t_of_sigma(self, sigma: Value) -> Value:
        """Inverse of `sigma`.

        A variance-preserving σ near 1 hardly depends on time: there float64 holds fewer digits of t
        (about 1e-16 / α² relative); `t_of_noise_level` keeps them all.
        """
        return self._apply(self._t_of_sigma, sigma, self.sigma(self.t_min), self.sigma(self.t_max), "sigma")

    @abstractmethod
    def t_of_fraction(self, fraction: Value) -> Value:
        """The time at a fraction in [0, 1] of the way from `t_min` to `t_max`, even in what the network sees as time.

        Linear in the index (vp), in ln σ (edm), in t before the shift (flow).
        """

    @abstractmethod
    def model_timestep(self, t: Value) -> Value:
        """What a diffusers network of this family is given as its timestep."""

    def input_scale(self, t: Value) -> Value:
        """Factor of x_t at the network's input (c_in of Karras et al. 2022, table 1); 1 except for EDM."""
        return self._at_time(torch.ones_like, t)

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """x_t = α(t) x_0 + σ(t) ε for data and noise [B, ...] and times [B] or one time; float32 or wider."""
        time = torch.as_tensor(t, dtype=torch.float64)
        return expand(self.alpha(time), x0) * x0 + expand(self.sigma(time), x0) * noise

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.definition().items())
        return f"{type(self).__name__}({arguments})"

    @abstractmethod
    def _half_log_snr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _t_of_half_log_snr(self, half_log_snr: Tensor) -> Tensor: ...

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _t_of_sigma(self, sigma: Tensor) -> Tensor: ...

    def _half_log_snr_range(self) -> tuple[float, float]:
        return self.half_log_snr(self.t_max), self.half_log_snr(self.t_min)

    def _at_time(self, function: Callable[[Tensor], Tensor], t: Value) -> Value:
        return self._apply(function, t, self.t_min, self.t_max, "t")

    def _apply(
        self, function: Callable[[Tensor], Tensor], value: Value, lower: float, upper: float, name: str
    ) -> Value:
        """`function` in float64 on `value`, which must lie in [lower, upper] up to float32 rounding."""
        tensor = torch.as_tensor(value, dtype=torch.float64)
        inside = (tensor >= lower - _SLACK * abs(lower)) & (tensor <= upper + _SLACK * abs(upper))
        if not bool(inside.all()):
            worst = tensor[~inside].flatten()[0].item()
            raise ValueError(f"{name} = {worst:g} is outside [{lower:g}, {upper:g}], the range of {self!r}")
        result = function(tensor.clamp(lower, upper))
        return result if isinstance(value, Tensor) else result.item()


class VPSchedule(NoiseSchedule):
    """Variance-preserving schedule (α² + σ² = 1) on diffusers' timestep indices 0 … num_train_timesteps - 1.

    At integer t, α² is `alphas_cumprod[t]` of the diffusers schedulers, bit for bit: their float32 table is the
    process a network is trained on. Between integers λ is linear in t, as in diffusers' conversion of sigmas to
    timesteps.

    Args:
        beta_schedule: "linear" (Ho et al. 2020), "scaled_linear" (latent diffusion: linear in √β),
            "squaredcos_cap_v2" (Nichol & Dhariwal 2021, equation 17; ignores `beta_start` and `beta_end`).
        beta_start, beta_end: first and last β, 0 < beta_start <= beta_end < 1.
        num_train_timesteps: length of the table, at least 2.
        rescale_zero_terminal_snr: shift √ᾱ so that α(t_max) = 0 exactly (Lin et al. 2024, algorithm 1). In the last
            interval α/σ, not its logarithm, is then linear in t. Wants v_prediction or sample.
    """

    family = "vp"

    def __init__(
        self,
        beta_schedule: BetaSchedule = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        rescale_zero_terminal_snr: bool = False,
    ) -> None:
        if num_train_timesteps < 2:
            raise ValueError(f"noise_schedule.num_train_timesteps = {num_train_timesteps}; at least 2 are needed")
        self.beta_schedule = beta_schedule
        self.beta_start, self.beta_end = float(beta_start), float(beta_end)
        self.num_train_timesteps = int(num_train_timesteps)
        self.rescale_zero_terminal_snr = bool(rescale_zero_terminal_snr)
        self.t_min, self.t_max = 0.0, float(num_train_timesteps - 1)

        betas = betas_of(beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        if rescale_zero_terminal_snr:
            betas = with_zero_terminal_snr(betas)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0).double()
        table = 0.5 * (torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod))
        if not bool((table.diff() < 0).all()):
            raise ValueError(f"noise_schedule: the signal-to-noise ratio of {self!r} does not fall at every step")
        self._tables = {torch.device("cpu"): table}

    def definition(self) -> dict[str, Any]:
        return {
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "num_train_timesteps": self.num_train_timesteps,
            "rescale_zero_terminal_snr": self.rescale_zero_terminal_snr,
        }

    def scheduler_config(self) -> dict[str, Any]:
        config = self.definition()
        config["rescale_betas_zero_snr"] = config.pop("rescale_zero_terminal_snr")
        return config

    def t_of_fraction(self, fraction: Value) -> Value:
        return self._apply(lambda value: value * self.t_max, fraction, 0.0, 1.0, "fraction")

    def model_timestep(self, t: Value) -> Value:
        """The index itself, a fraction where t is between two integers."""
        return self._at_time(torch.clone, t)

    def _table(self, device: torch.device) -> Tensor:
        """λ at the integer times [num_train_timesteps], float64."""
        if device not in self._tables:
            with torch.inference_mode(False):  # the copy outlives this call and may meet a gradient later
                self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _half_log_snr(self, t: Tensor) -> Tensor:
        table = self._table(t.device)
        left = t.long().clamp(max=self.num_train_timesteps - 2)
        fraction = t - left
        result = table[left] + fraction * (table[left + 1] - table[left])
        if self.rescale_zero_terminal_snr:
            result = torch.where(t >= self.t_max - 1, table[-2] + torch.log(self.t_max - t), result)
        return result

    def _t_of_half_log_snr(self, half_log_snr: Tensor) -> Tensor:
        table = self._table(half_log_snr.device)
        right = torch.searchsorted(-table, -half_log_snr.contiguous()).clamp(1, self.num_train_timesteps - 1)
        fraction = (half_log_snr - table[right - 1]) / (table[right] - table[right - 1])
        result = right - 1 + fraction
        if self.rescale_zero_terminal_snr:
            result = torch.where(half_log_snr < table[-2], self.t_max - torch.exp(half_log_snr - table[-2]), result)
        return result

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self._half_log_snr(t)).sqrt()

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._half_log_snr(t)).sqrt()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        lower, upper = self._half_log_snr_range()
        half_log_snr = 0.5 * torch.log((1 - sigma) * (1 + sigma)) - torch.log(sigma)
        return self._t_of_half_log_snr(half_log_snr.clamp(lower, upper))


class EDMSchedule(NoiseSchedule):
    """Variance-exploding schedule of Karras et al. 2022: α = 1, σ = t in [sigma_min, sigma_max].

    Args:
        sigma_min, sigma_max: the range of noise, 0 < sigma_min < sigma_max.
        sigma_data: standard deviation of the data, for the preconditioning of table 1.
    """

    family = "edm"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"noise_schedule: 0 < sigma_min < sigma_max is needed, not {sigma_min} and {sigma_max}")
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"noise_schedule.sigma_data = {sigma_data} must be positive")
        self.t_min, self.t_max, self.sigma_data = float(sigma_min), float(sigma_max), float(sigma_data)
        self.init_noise_sigma = math.sqrt(self.t_max**2 + 1)
        self._data_variance = float(sigma_data) ** 2

    def definition(self) -> dict[str, Any]:
        return {"sigma_min": self.t_min, "sigma_max": self.t_max, "sigma_data": self.sigma_data}

    def scheduler_config(self) -> dict[str, Any]:
        return self.definition()

    def t_of_fraction(self, fraction: Value) -> Value:
        log_min, log_max = math.log(self.t_min), math.log(self.t_max)
        return self._apply(
            lambda value: torch.exp(log_min + value * (log_max - log_min)).clamp(self.t_min, self.t_max),
            fraction,
            0.0,
            1.0,
            "fraction",
        )

    def model_timestep(self, t: Value) -> Value:
        """c_noise = ln(σ)/4."""
        return self._at_time(lambda sigma: torch.log(sigma) / 4, t)

    def input_scale(self, t: Value) -> Value:
        """c_in = 1/√(σ² + sigma_data²)."""
        return self._at_time(lambda sigma: (sigma**2 + self._data_variance).rsqrt(), t)

    def _half_log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(t)

    def _t_of_half_log_snr(self, half_log_snr: Tensor) -> Tensor:
        return torch.exp(-half_log_snr).clamp(self.t_min, self.t_max)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()


class FlowSchedule(NoiseSchedule):
    """Flow matching, rectified flow: α = 1 - t, σ = t in [0, 1] (Lipman et al. 2023; Liu et al. 2023).

    Args:
        num_train_timesteps: the network sees num_train_timesteps · t.
        shift: s of Esser et al. 2024, equation 23: time is spent as t = s u / (1 + (s - 1) u) for even u. It moves the
            points at which training and sampling look (`t_of_fraction`); α(t) and σ(t) do not depend on it.
    """

    family = "flow"
    t_min, t_max = 0.0, 1.0

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"noise_schedule.num_train_timesteps = {num_train_timesteps} must be positive")
        if not 0 < shift < math.inf:
            raise ValueError(f"noise_schedule.shift = {shift} must be positive")
        self.num_train_timesteps, self.shift = int(num_train_timesteps), float(shift)

    def definition(self) -> dict[str, Any]:
        return {"num_train_timesteps": self.num_train_timesteps, "shift": self.shift}

    def scheduler_config(self) -> dict[str, Any]:
        return self.definition()

    def t_of_fraction(self, fraction: Value) -> Value:
        shift = self.shift
        return self._apply(lambda value: shift * value / (1 + (shift - 1) * value), fraction, 0.0, 1.0, "fraction")

    def model_timestep(self, t: Value) -> Value:
        """num_train_timesteps · t."""
        return self._at_time(lambda time: time * self.num_train_timesteps, t)

    def _half_log_snr(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(t)

    def _t_of_half_log_snr(self, half_log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-half_log_snr)

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()
