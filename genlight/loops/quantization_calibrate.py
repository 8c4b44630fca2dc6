"""ViDiT-Q and MixDQ: a generator's network in few bits, after one calibration and without training.

Zhao et al. 2025, "ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers" (arXiv:2406.02540): weights
per output channel, inputs per token as they come, a static scale and a rotation that balance the input, and bits chosen
layer by layer by what each layer controls. Zhao et al. 2024, "MixDQ: Memory-Efficient Few-Step Text-to-Image Diffusion
Models with Metric-Decoupled Mixed Precision Quantization" (arXiv:2405.17873): one calibrated range for each input,
outputs kept for text tokens that never change, shortcuts with scales of their own, bits of inputs chosen too. Added
here: GPTQ rounding, α searched for each input, allocation by integer programming, sums of noise powers instead of dB,
all rivals in the same table, and true numbers of bits and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from genlight.callbacks.begun import has_begun
from genlight.loops.cost import announced, first_validation
from genlight.loops.evaluation import measured
from genlight.loops.quantization_bits import check_budget
from genlight.loops.quantization_cost import calibrated_cost, quantization_cost
from genlight.loops.quantization_report import FULL, quantization_result
from genlight.loops.quantization_samples import check_samples
from genlight.loops.quantization_settings import KEPT, GroupSettings, MixedBits, check_groups, check_metrics
from genlight.loops.quantization_work import checked_work
from genlight.loops.result import MethodResult
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.recipe import BalanceKind, BalanceSettings
from genlight.quantization.torchao_format import what_torchao_cannot_hold
from genlight.quantization.uniform import Numbers
from genlight.reports.cost import CostEstimate


@dataclass(frozen=True)
class QuantizationCalibration:
    """The methods `viditq` and `mixdq`: the module's network with quantized linear and convolution layers.

    Attributes:
        title: name of the method in the table, and of its rivals: MixDQ's if inputs have parts of their own, which
            `split_shortcuts` and `constant_tokens` say, else ViDiT-Q's.
        weight_bits, activation_bits: 2 to 8, or 16 for floating point.
        numbers: what codes are: "integer"; or "float8" (e4m3) in eight bits, for GPUs from compute capability 8.9.
        weight_symmetric, activation_symmetric: whether zero has code 0.
        activation_mode: "dynamic" measures the range of each token as it comes, "static" takes that of each input from
            the calibration.
        activation_ranges: static ones: "shared", one for all steps of the sampling; or "step", one for each timestep of
            the calibration, of which a call of the network takes the nearest.
        split_shortcuts: convolutions that read two feature maps side by side have scales for each, from the
            calibration.
        constant_tokens: keep outputs of cross-attention's keys and values for text tokens that never change: "off";
            "warn" and multiply where such a token is another one; "raise" an error there.
        constant_ratio: how many times the largest magnitude of other tokens such a token must have; 0 keeps them all.
        weight_group_size: inputs that share a scale; None: all inputs of an output channel.
        rounding: of weights: "nearest", or "gptq".
        clip: range of weights that is kept: "none" clips nothing; "mse", "hessian".
        balance: of inputs: "none", "scale", "rotation" or "static_dynamic", which is both.
        alpha: exponent of the input in the scale; None: searched on `alpha_grid`, for each input.
        alpha_grid: what is tried.
        reduce: steps of the calibration that the scale is for: "max", "first", "mean".
        hadamard: "block" or "full".
        rank: of a branch that stays in floating point; 0: none.
        keep: pattern of layers that are left in floating point.
        groups: of the other layers, by pattern; the first that matches decides.
        mixed: bits chosen layer by layer; None: those above for all.
        samples: of the search draw, on which inputs are observed.
        trajectory: samples of the report draw on which predictions and images are compared with full precision.
        rivals: also measure what the method is compared with, torchao and optimum-quanto too where they are installed.
        statistics: a calibration.safetensors of the same network to use; None: calibrate.
        compiled: on a GPU, also time both networks compiled by `torch.compile`.
        dequantized: also write the network in floating point, for programs that know no quantized one.
        torchao: also write the network with tensors of torchao, which diffusers loads without genlight.
        samples_out: also write the report draw of full precision and of the quantized network as files.
        seed: of rotations and of the rows that are kept.

    Raises:
        ValueError: a value out of range.
    """

    title: str = "ViDiT-Q"
    weight_bits: int = 8
    activation_bits: int = 8
    numbers: Numbers = "integer"
    weight_symmetric: bool = False
    activation_symmetric: bool = True
    activation_mode: Literal["dynamic", "static"] = "dynamic"
    activation_ranges: Literal["shared", "step"] = "shared"
    split_shortcuts: bool = False
    constant_tokens: Literal["off", "warn", "raise"] = "off"
    constant_ratio: float = 4.0
    weight_group_size: int | None = None
    rounding: Literal["nearest", "gptq"] = "gptq"
    clip: Literal["none", "mse", "hessian"] = "none"
    balance: BalanceKind = "static_dynamic"
    alpha: float | None = None
    alpha_grid: Sequence[float] = (0.01, 0.1, 0.2, 0.3, 0.5, 0.7)
    reduce: Literal["max", "first", "mean"] = "max"
    hadamard: Literal["block", "full"] = "block"
    rank: int = 0
    keep: str = KEPT
    groups: Sequence[GroupSettings] = field(default_factory=lambda: (GroupSettings(),))
    mixed: MixedBits | None = None
    samples: int = 64
    trajectory: int = 32
    rivals: bool = True
    statistics: str | None = None
    compiled: bool = True
    dequantized: bool = True
    torchao: bool = False
    samples_out: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.trajectory < 1 or self.rank < 0:
            raise ValueError(
                f"samples = {self.samples} and trajectory = {self.trajectory} must be 1 or more, rank = {self.rank} "
                "not negative"
            )
        if self.constant_tokens not in ("off", "warn", "raise"):
            raise ValueError(f"constant_tokens = {self.constant_tokens!r} must be off, warn or raise")
        if self.split_shortcuts and self.form.weight.needs_hessian:
            raise ValueError("split_shortcuts needs rounding = 'nearest' and a clip other than 'hessian'")
        if self.split_shortcuts and self.activation_mode == "dynamic":
            raise ValueError("split_shortcuts needs activation_mode = 'static', which has a range for each feature map")
        if self.activation_ranges not in ("shared", "step"):
            raise ValueError(f"activation_ranges = {self.activation_ranges!r} must be shared or step")
        if self.activation_ranges == "step" and self.activation_mode == "dynamic":
            raise ValueError("activation_ranges = 'step' needs activation_mode = 'static'")
        check_groups(self.groups, self.mixed)
        if self.numbers == "float8" and self.mixed is not None:
            raise ValueError("numbers = 'float8' has eight bits only: mixed must be null")
        if self.torchao and (self.balance not in ("none", "scale") or self.rank or self.mixed is not None):
            raise ValueError(
                "torchao has no place for rotations, low-rank branches and bits by layer: balance=scale rank=0 "
                "mixed=null"
            )
        if self.torchao and (problem := what_torchao_cannot_hold(self.form)):
            raise ValueError(f"torchao has no place for {problem}")
        self.form  # noqa: B018 - its parts check themselves
        self.balancing  # noqa: B018

    @property
    def special(self) -> bool:
        """Whether inputs have parts of their own."""
        return self.split_shortcuts or self.constant_tokens != "off"

    @property
    def by_step(self) -> bool:
        """Whether inputs have a range for each timestep of the calibration."""
        return self.activation_ranges == "step"

    @property
    def parts_in_words(self) -> str:
        """What decides which ranges and tokens inputs have, for fingerprints."""
        words = f"{self.constant_tokens} {self.constant_ratio} {self.split_shortcuts}"
        return f"{words} by step" if self.by_step else words

    @property
    def balances(self) -> bool:
        """Whether some row of the table balances inputs or splits weights; convolutions in groups allow neither."""
        return self.balance != "none" or self.rank > 0 or (self.rivals and not self.special)

    @property
    def predicts_cost(self) -> bool:
        """That `run` says beforehand what all of it will cost."""
        return True

    @cached_property
    def form(self) -> LayerFormat:
        """What layers are quantized to."""
        group = self.weight_group_size
        weight = WeightFormat(
            self.weight_bits, self.weight_symmetric, "channel" if group is None else "group", group,
            self.rounding, self.clip, numbers=self.numbers,
        )  # fmt: skip
        granularity: Literal["tensor", "token"] = "tensor" if self.activation_mode == "static" else "token"
        mode, symmetric = self.activation_mode, self.activation_symmetric
        activation = ActivationFormat(self.activation_bits, symmetric, mode, granularity, self.numbers)
        return LayerFormat(weight, activation)

    @cached_property
    def balancing(self) -> BalanceSettings:
        """How inputs are balanced."""
        grid = tuple(self.alpha_grid)
        return BalanceSettings(self.balance, self.alpha, grid, self.reduce, self.hadamard, self.seed)

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Measure full precision, calibrate, quantize, and report beside all rivals on the report draw.

        Raises:
            UserError: patterns that match nothing, a calibration of another network, a budget that cannot be kept, a
                module without a network to quantize, or a strategy that splits the weights.
        """
        work = checked_work(self, trainer, module, datamodule)
        first = first_validation(trainer, module, datamodule)
        own = first.logged
        check_metrics(self.groups, own)
        if work.evaluations.shares > 1:  # together they add up in another order than one, and each saw a part only
            with work.evaluations.display.phase(FULL):
                own = measured(work.evaluations, module, datamodule, "report", datamodule.num_samples)
        if hasattr(module.metrics, "keep_reference"):
            module.metrics.keep_reference()  # the videos of full precision
        if self.samples_out:
            check_samples(work)
        if self.mixed is not None:
            check_budget(work, self.mixed)
        has_begun(trainer)  # the calibration is kept as it goes
        work.calibrated  # noqa: B018 - before anything is quantized, and so that layers can be made and timed
        predicted = announced(trainer, lambda: calibrated_cost(work, first))
        return quantization_result(work, own, predicted)

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """Calibrate on a few samples, quantize a few layers, and multiply."""
        return quantization_cost(self, trainer, module, datamodule)
