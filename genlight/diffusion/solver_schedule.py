"""A diffusers scheduler that samples with solver schedules found by search, in one file that needs diffusers only.

A solver schedule says where a network is evaluated and how its outputs add up to the next point. It comes compiled to
a lower-triangular table of weights, and `step` is one weighted sum: it knows no solver. One scheduler holds schedules
for several numbers of steps. genlight copies this file beside the scheduler's config in a pipeline folder, which then
loads anywhere with ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.
"""

# diffusers leaves its decorators and some functions without types
# mypy: disable-error-code="attr-defined,no-untyped-call,no-any-return,untyped-decorator,misc"

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from torch import Tensor

logger = logging.get_logger(__name__)

SCHEMA_VERSION = 1
MODULE = "solver_schedule"
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction", "edm")
# weights below this share of the largest of their sum are rounding errors of the table in float64
_NEGLIGIBLE = 1e-11
# a sum is written from the latest point unless that multiplies its rounding errors by more than this
_LARGEST_RATIO = 100.0
_FROM_THE_START = "a searched schedule cannot begin half-way; img2img needs strength = 1, or a scheduler of diffusers"


class _Plan(NamedTuple):
    """One schedule with E evaluations, ready for `step`.

    With b_j = of_x[j] x_j + of_output[j] (output j), the data or the noise of evaluation j, the next point is
    x_{i+1} = own[i] x_i + newest[i] b_i + Σ weight · history over `older[i]`. History 0 is x_0, 1 + j is b_j.
    """

    timesteps: Tensor  # [E], int64 if all are integers of a variance-preserving schedule, else float32
    sigmas: Tensor  # [E + 1] float32: σ/α, for flow matching σ
    init_noise_sigma: float
    input_scale: list[float]
    of_x: list[float]
    of_output: list[float]
    own: list[float]
    newest: list[float]
    older: list[list[tuple[int, float]]]
    kept_until: dict[int, int]  # history entry -> the last step that needs it


class SolverScheduleScheduler(SchedulerMixin, ConfigMixin):
    """Sampling by tables of weights: one schedule for each number of steps that was searched for.

    Args:
        family: "vp", "edm" or "flow"; the noise schedule is what the arguments of that family say:
            vp: num_train_timesteps, beta_schedule, beta_start, beta_end, rescale_betas_zero_snr;
            edm: sigma_min, sigma_max, sigma_data; flow: num_train_timesteps, flow_shift.
        prediction_type: "epsilon", "v_prediction", "sample", "flow_prediction", or "edm" (Karras et al. 2022, table 1).
        use_flow_sigmas: true exactly for the family "flow"; pipelines then leave the sigmas to the scheduler.
        schedules: by number of steps, each a mapping with
            timesteps: [E] what the network is given, with repetitions and intermediate times where a solver has them;
            sigmas: [E + 1] σ/α (for flow matching σ) of the evaluations and of the result, None for infinity;
            table: E + 1 rows, row i with 1 + i weights: of the initial noise, then of the outputs 0 … i - 1;
            basis: "data" or "noise", which of the two the table takes for an output;
            initial_scale: factor of standard normal noise that gives what the table starts from;
            other keys, such as the decisions that the table was compiled from, are documentation.
        fingerprint: family, prediction_type, noise_schedule and their sha256: what the schedules were searched for.
        setting: what else they were searched for, such as guidance_scale, resolution or mu; documentation.

    Raises ValueError, in one sentence, for schedules that are not whole or belong to another noise schedule or
    prediction type than the other arguments state.
    """

    order = 1
    _step_index: int | None = None
    _begin_index: int | None = None

    @register_to_config
    def __init__(
        self,
        family: str = "vp",
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        rescale_betas_zero_snr: bool = False,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        schedules: dict[str, dict[str, Any]] | None = None,
        fingerprint: dict[str, Any] | None = None,
        setting: dict[str, Any] | None = None,
        schema_version: int = SCHEMA_VERSION,
    ) -> None:
        _check_config(self.config)
        self._half_log_snr = self._table_of_half_log_snr() if family == "vp" else np.zeros(0)
        self._plans = {int(steps): _plan(int(steps), entry, self) for steps, entry in (schedules or {}).items()}
        # pipelines note where a component is defined: beside its config, in the file that save_pretrained puts there
        self.__module__ = MODULE
        self.num_inference_steps: int | None = None
        self._use(self._plans[max(self._plans)], device=None)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def available_steps(self) -> list[int]:
        """The numbers of steps that it has schedules for."""
        return sorted(self._plans)

    @property
    def step_index(self) -> int | None:
        """Steps made since `set_timesteps`, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """0 once `set_begin_index` has been called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Declare where sampling begins; ValueError unless at the first timestep."""
        if begin_index != 0:
            raise ValueError(f"begin_index = {begin_index}: {_FROM_THE_START}")
        self._begin_index = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Take the schedule with `num_inference_steps` steps and forget all earlier sampling.

        `sigmas` may be the default that flow pipelines pass, 1 … 1/N, and `mu` is ignored: the schedule has its own
        times. Raises ValueError for other sigmas or timesteps, and for a number of steps that no schedule has.
        """
        if sigmas is not None and np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas)), rtol=0, atol=1e-5):
            num_inference_steps, sigmas = num_inference_steps or len(sigmas), None
        if timesteps is not None or sigmas is not None:
            name = "sigmas" if timesteps is None else "timesteps"
            raise ValueError(f"{name}: a searched schedule has its own; pass num_inference_steps alone")
        if num_inference_steps not in self._plans:
            known = ", ".join(str(steps) for steps in self.available_steps)
            raise ValueError(f"num_inference_steps = {num_inference_steps}: there are schedules for {known} only")
        searched_mu = (self.config.setting or {}).get("mu")
        if mu is not None and searched_mu is not None and abs(mu - searched_mu) > 1e-3:
            logger.warning(f"mu = {mu:g} is ignored: the schedules were searched at mu = {searched_mu:g}")
        self.num_inference_steps = num_inference_steps
        self._use(self._plans[num_inference_steps], device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input: x itself, for EDM c_in x."""
        if self.config.family != "edm":
            return sample
        return sample * self._plan.input_scale[self._position(timestep)]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The next point from the current one and the network's output there, both [B, ...] of any rank.

        Sums are formed in float32, or wider for wider samples, and returned in the type of `sample`. An output with
        twice the channels (axis 1) of the sample carries a learned variance, which is dropped. Steps are counted here,
        `timestep` is looked at in the first one only; `generator` is accepted and not used.

        Raises RuntimeError without `set_timesteps` or after the last step, ValueError for an output of another shape or
        a first timestep that is not the schedule's.
        """
        plan, index = self._plan, self._position(timestep)
        if model_output.shape != sample.shape:
            model_output = _without_variance(model_output, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x, output = sample.to(dtype), model_output.to(dtype)
        basis = (x * plan.of_x[index]).add_(output, alpha=plan.of_output[index])
        result = (x * plan.own[index]).add_(basis, alpha=plan.newest[index])
        if index == 0 and 0 in plan.kept_until:
            self._history[0] = x
        for entry, weight in plan.older[index]:
            result.add_(self._history[entry], alpha=weight)
        self._history[index + 1] = basis
        for entry in [entry for entry in self._history if plan.kept_until.get(entry, 0) <= index]:
            del self._history[entry]
        self._step_index = index + 1
        result = result.to(sample.dtype)
        outputs = (result, result) if self._step_index == len(self.timesteps) else (result,)  # the last is also x_0
        return SchedulerOutput(prev_sample=result) if return_dict else outputs

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = α x_0 + σ ε at model timesteps [B] of the noise schedule, for samples [B, ...]."""
        times = torch.as_tensor(timesteps).double().cpu().reshape(-1).numpy()
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (
            torch.from_numpy(values).to(original_samples.dtype).to(original_samples.device).reshape(shape)
            for values in self._alpha_sigma(self._sigma_of(times))
        )
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and with the arguments of flow-matching schedulers."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write scheduler_config.json and, beside it, this file, so that the folder loads without genlight."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{MODULE}.py").write_bytes(Path(__file__).read_bytes())
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _use(self, plan: _Plan, device: str | torch.device | None) -> None:
        """Begin anew with `plan`."""
        self._plan, self.init_noise_sigma = plan, plan.init_noise_sigma
        self.timesteps, self.sigmas = plan.timesteps.to(device), plan.sigmas
        self._step_index = self._begin_index = None
        self._history: dict[int, Tensor] = {}

    def _position(self, timestep: float | Tensor | None) -> int:
        """The index of the current step; counted, because timesteps may repeat."""
        if self.num_inference_steps is None:
            raise RuntimeError("set_timesteps must be called before the first step")
        if self._step_index == self.num_inference_steps:
            raise RuntimeError(f"all {self._step_index} steps are made: call set_timesteps before sampling again")
        if self._step_index is None and self._begin_index is None and timestep is not None:
            given, first = float(torch.as_tensor(timestep).flatten()[0]), float(self._plan.timesteps[0])
            if abs(given - first) > 1e-4 * max(1.0, abs(first)):
                raise ValueError(f"timestep = {given:g} where the first is {first:g}: {_FROM_THE_START}")
        return self._step_index or 0

    def _table_of_half_log_snr(self) -> np.ndarray:
        """λ = ln(α/σ) at the integer timesteps, from the float32 products that networks are trained on."""
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")
        self.alphas_cumprod = DDPMScheduler(**{name: self.config[name] for name in names}).alphas_cumprod
        signal = self.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore"):
            return 0.5 * (np.log(signal) - np.log1p(-signal))

    def _sigma_of(self, timesteps: np.ndarray) -> np.ndarray:
        """`sigmas` at model timesteps, as the noise schedule has them, float64."""
        if self.config.family == "flow":
            return timesteps / self.config.num_train_timesteps
        if self.config.family == "edm":
            return np.exp(4 * timesteps)
        table, last = self._half_log_snr, self.config.num_train_timesteps - 1
        if timesteps.min() < 0 or timesteps.max() > last:
            raise ValueError(f"timesteps: {timesteps.min():g} … {timesteps.max():g} are not all in 0 … {last}")
        if not self.config.rescale_betas_zero_snr:
            return np.exp(-np.interp(timesteps, np.arange(last + 1), table))
        inside = np.interp(timesteps, np.arange(last), table[:-1])
        with np.errstate(divide="ignore"):  # in the last interval α/σ is linear, down to 0
            return np.exp(-inside) / np.clip(last - timesteps, 0, 1)

    def _alpha_sigma(self, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """α and σ at values of `sigmas`."""
        if self.config.family == "flow":
            return 1 - sigmas, sigmas
        if self.config.family == "edm":
            return np.ones_like(sigmas), sigmas
        return 1 / np.hypot(sigmas, 1), 1 / np.hypot(1 / np.maximum(sigmas, 1e-300), 1)


def _plan(steps: int, entry: Mapping[str, Any], scheduler: SolverScheduleScheduler) -> _Plan:
    """One schedule of the config, checked against the noise schedule and turned into the sums of `step`."""
    family = scheduler.config.family
    times = np.array(entry["timesteps"], dtype=np.float64)
    sigmas = np.array([math.inf if sigma is None else sigma for sigma in entry["sigmas"]], dtype=np.float64)
    rows = entry["table"]
    if len(times) != steps or len(sigmas) != steps + 1 or [len(row) for row in rows] != list(range(1, steps + 2)):
        raise ValueError(f"schedules.{steps}: it needs {steps} timesteps, {steps + 1} sigmas and rows of the table")
    weights = np.array([[*row, *[0.0] * (steps + 1 - len(row))] for row in rows], dtype=np.float64)
    start = weights[0, 0]
    if not (np.isfinite(weights).all() and np.isfinite(times).all() and start != 0):
        raise ValueError(f"schedules.{steps}: weights and times must be finite, and the first weight not zero")
    expected = scheduler._sigma_of(times)
    off = ~np.isclose(sigmas[:-1], expected, rtol=1e-4, atol=1e-7)
    if off.any():
        raise ValueError(
            f"schedules.{steps}: at timestep {times[off][0]:g} it was made for sigma = {sigmas[:-1][off][0]:g}, "
            f"but the noise schedule of this config has {expected[off][0]:g}"
        )
    weights[:, 0] /= start
    own, newest, older = _sums(weights)
    alpha, sigma = scheduler._alpha_sigma(sigmas[:-1])
    of_x, of_output = _conversion(steps, entry["basis"], scheduler.config, alpha, sigma)
    whole = family == "vp" and bool((times == times.round()).all())
    scale = 1 / np.hypot(sigmas[:-1], scheduler.config.sigma_data) if family == "edm" else np.ones(steps)
    return _Plan(
        timesteps=torch.tensor(times.tolist(), dtype=torch.int64 if whole else torch.float32),
        sigmas=torch.tensor(sigmas.tolist(), dtype=torch.float32),
        init_noise_sigma=float(entry["initial_scale"] * start),
        input_scale=scale.tolist(),
        of_x=of_x.tolist(),
        of_output=of_output.tolist(),
        own=own,
        newest=newest,
        older=older,
        kept_until={key: index for index, terms in enumerate(older) for key, _ in terms},
    )


def _sums(weights: np.ndarray) -> tuple[list[float], list[float], list[list[tuple[int, float]]]]:
    """Each row of the table, written from the point before it: the factors of that point, of its output, of the rest.

    Exact, and few terms are left: those of the solver that was compiled. Edits of the latents between steps, by
    callbacks or masks, then act as with the schedulers of diffusers.
    """
    own, newest, older = [], [], []
    for index, (row, following) in enumerate(pairwise(weights)):
        ratio = following[0] / row[0] if abs(following[0]) <= _LARGEST_RATIO * abs(row[0]) and row[0] != 0 else 0.0
        rest = following - ratio * row
        rest[abs(rest) <= _NEGLIGIBLE * max(1.0, abs(following).max())] = 0.0
        own.append(float(ratio))
        newest.append(float(rest[index + 1]))
        older.append([(int(key), float(rest[key])) for key in np.flatnonzero(rest[: index + 1])])
    return own, newest, older


def _conversion(
    steps: int, basis: str, config: Any, alpha: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The factors of x and of the network's output m = a x_0 + b ε in the data or in the noise that the two imply."""
    kind, zero, one = config.prediction_type, np.zeros_like(alpha), np.ones_like(alpha)
    if (basis, kind) in (("data", "sample"), ("noise", "epsilon")):
        return zero, one
    radius, mixed = np.hypot(alpha, sigma), np.hypot(alpha * config.sigma_data, sigma)
    a, b = {
        "epsilon": (zero, one),
        "sample": (one, zero),
        "flow_prediction": (-one, one),
        "v_prediction": (-sigma / radius, alpha / radius),
        "edm": (sigma / (config.sigma_data * mixed), -config.sigma_data * alpha / mixed),
    }[kind]
    determinant = alpha * b - sigma * a
    if basis not in ("data", "noise") or not determinant.all():
        raise ValueError(f"schedules.{steps}: {kind} does not determine the {basis} at alpha = {alpha.min():g}")
    return (b / determinant, -sigma / determinant) if basis == "data" else (-a / determinant, alpha / determinant)


def _without_variance(output: Tensor, sample: Tensor) -> Tensor:
    """The first half of an output with twice the channels."""
    channels = sample.shape[1] if sample.ndim > 1 else 0
    if output.shape != (sample.shape[0], 2 * channels, *sample.shape[2:]):
        raise ValueError(f"model_output has shape {tuple(output.shape)}, which does not fit {tuple(sample.shape)}")
    return output[:, :channels]


def definition(config: Any) -> dict[str, Any]:
    """The noise schedule that a config states: the arguments of its family."""
    if config.family == "flow":
        return {"num_train_timesteps": config.num_train_timesteps, "shift": float(config.flow_shift)}
    if config.family == "edm":
        return {name: float(config[name]) for name in ("sigma_min", "sigma_max", "sigma_data")}
    betas = {name: float(config[name]) for name in ("beta_start", "beta_end")}
    same = {name: config[name] for name in ("beta_schedule", "num_train_timesteps")}
    return {**betas, **same, "rescale_zero_terminal_snr": config.rescale_betas_zero_snr}


def _check_config(config: Any) -> None:
    """Refuse unknown kinds, and schedules that were searched for something else than the config says now."""
    if config.schema_version != SCHEMA_VERSION:
        raise ValueError(f"schema_version = {config.schema_version}: this file reads version {SCHEMA_VERSION}")
    if not config.schedules:
        raise ValueError("schedules: this config holds none; load the folder of a scheduler written by genlight")
    if config.family not in ("vp", "edm", "flow") or config.prediction_type not in _PREDICTION_TYPES:
        raise ValueError(f"family = {config.family!r} or prediction_type = {config.prediction_type!r} is not known")
    searched = config.fingerprint or {}
    stated = {"family": config.family, "prediction_type": config.prediction_type, "noise_schedule": definition(config)}
    for name, value in (stated | {"sha256": fingerprint_of(config)}).items():
        if searched.get(name) != value:
            raise ValueError(
                f"the schedules were searched for {name} = {searched.get(name)!r}, but this config says {value!r}"
            )


def fingerprint_of(config: Any) -> str:
    """SHA-256 (hex) of the noise schedule and prediction type, equal to that of genlight's solver banks."""
    text = json.dumps({"family": config.family, **definition(config)}, sort_keys=True)
    kind = "flow" if config.prediction_type == "flow_prediction" else config.prediction_type
    return hashlib.sha256(f"{hashlib.sha256(text.encode()).hexdigest()}/{kind}".encode()).hexdigest()
