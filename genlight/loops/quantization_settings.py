"""Which layers are quantized to what, and what decides among bits: parts of the section `method` of a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from genlight.checkpoints.bases import group_of_names
from genlight.errors import UserError, in_config
from genlight.quantization.convert import LayerGroup, formats_of_layers
from genlight.quantization.formats import LayerFormat
from genlight.quantization.recipe import with_bits

METRICS = ("sqnr", "psnr", "ssim", "motion")
# embedders, modulation, and the layers at both ends: little work, and all else rests on them
KEPT = "embed|norm|adaln|caption_projection|^proj_out|^proj_in|time_proj|^conv_in|^conv_out|modulation"
# the denoising network of a pipeline
_NETWORKS = ("transformer", "unet", "prior")


@dataclass(frozen=True)
class GroupSettings:
    """Layers that share what their quality is judged by.

    Attributes:
        pattern: a regular expression that is searched for in the names of layers; the first of the list decides.
        metric: what chooses among bits within the group: "sqnr" of the network's predictions, "psnr" or "ssim" of the
            images, or "motion" of videos, against those of full precision.
        weight_bits: instead of the method's; None: as there.
        activation_bits: likewise.

    Raises:
        ValueError: another metric.
    """

    pattern: str = ".*"
    metric: Literal["sqnr", "psnr", "ssim", "motion"] = "sqnr"
    weight_bits: int | None = None
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric = {self.metric!r} must be one of {', '.join(METRICS)}")


@dataclass(frozen=True)
class MixedBits:
    """Bits chosen layer by layer within a budget; all limits that are given hold together.

    Attributes:
        choices: bits a weight may have.
        activation_choices: bits an input may have; None: inputs have those of the method, and weights alone are chosen.
        objective: what shares the budget between groups: the sum of noise powers, which errors of layers come to, or
            the sum of signal-to-noise ratios in dB ("sum_db", as in the MixDQ paper).
        average_bits: limit of the mean over the weights of quantized layers.
        average_activation_bits: limit of the mean over the numbers that quantized layers read.
        megabytes: limit of what quantized layers take in memory, in 10⁶ bytes.
        bit_operations: limit of Σ multiplications × bits × bits of one call of the network, as a share of those in
            which every layer has the most bits of the choices.
        ratios: of the budget of groups judged by images to that of groups judged by predictions, which are tried as
            the MixDQ paper does; (): that rival is left out.
        samples: of the select draw, on which layers are quantized one at a time.

    Raises:
        ValueError: a value out of range, or no limit.
    """

    choices: Sequence[int] = (4, 8)
    activation_choices: Sequence[int] | None = None
    objective: Literal["noise_power", "sum_db"] = "noise_power"
    average_bits: float | None = 6.0
    average_activation_bits: float | None = None
    megabytes: float | None = None
    bit_operations: float | None = None
    ratios: Sequence[float] = ()
    samples: int = 8

    def __post_init__(self) -> None:
        if len(set(self.choices)) < 2:
            raise ValueError(f"choices = {list(self.choices)} must hold two or more different bits")
        if self.samples < 1:
            raise ValueError(f"samples = {self.samples} must be 1 or more")
        if self.activation_choices is not None and not self.activation_choices:
            raise ValueError("activation_choices must hold at least one number of bits, or be null")
        if self.objective not in ("noise_power", "sum_db"):
            raise ValueError(f"objective = {self.objective!r} must be noise_power or sum_db")
        if (self.average_activation_bits is not None or self.ratios) and self.activation_choices is None:
            raise ValueError("average_activation_bits and ratios need activation_choices")
        if self.ratios and (self.average_bits is None or min(self.ratios) <= 0):
            raise ValueError(f"ratios = {list(self.ratios)} must be positive, and need average_bits")
        names = ("average_bits", "average_activation_bits", "megabytes", "bit_operations")
        limits = {name: getattr(self, name) for name in names}
        if all(limit is None for limit in limits.values()):
            raise ValueError("one of average_bits, megabytes and bit_operations must be given")
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} = {limit} must be positive")
        choices = {"average_bits": self.choices, "average_activation_bits": self.activation_choices or (0,)}
        for name, bits in choices.items():
            limit = limits[name]
            if limit is not None and limit < min(bits):
                raise ValueError(f"{name} = {limit} is below {min(bits)}, the least of its choices")


def network_of(module: Any) -> Any:
    """The denoising network of a generator.

    Raises:
        UserError: a module that has none, several that take turns, a pipeline that switches between two, or one whose
            networks wait in the memory of the host.
    """
    if getattr(module, "offload", False):
        raise UserError("method: a network is calibrated on the device where it stays: use module.offload=false")
    if getattr(module, "members", None):
        raise UserError("method: several denoisers take turns here, of which none can be quantized: members={}")
    if not hasattr(module, "sample_latents"):
        is_token_student = hasattr(module, "decode_noise")
        known = "method=dd with method.quantized" if is_token_student else "module=diffusion or pipeline"
        raise UserError(f"method: {type(module).__name__} has no network to quantize: use {known}")
    if hasattr(module, "pipe"):
        module.configure_model()
        found = next((module.networks[name] for name in _NETWORKS if name in module.networks), None)
        if found is None:
            raise UserError(f"method: the pipeline has no {', '.join(_NETWORKS)}")
        if "transformer_2" in module.networks:
            raise UserError(
                f"method: {type(module.pipe).__name__} switches between transformer and transformer_2, of which one "
                "alone would be quantized: take a pipeline with one network, such as Wan 2.1"
            )
        return found
    return module.net


def _fitting(layer: nn.Module, form: LayerFormat) -> LayerFormat:
    """The format; a convolution sums over pixels, so that its input has a scale for each sample, not for each pixel."""
    if isinstance(layer, nn.Conv2d) and form.activation.granularity == "token":
        return replace(form, activation=replace(form.activation, granularity="sample"))
    return form


def formats_by_layer(
    network: nn.Module, form: LayerFormat, keep: str, groups: Sequence[GroupSettings]
) -> tuple[dict[str, LayerFormat], dict[str, str]]:
    """What each layer that is quantized becomes, and the metric of its group, both by name.

    Raises:
        UserError: patterns that do not fit the network, or a network that is quantized already.
    """
    with in_config("method"):
        patterns = [LayerGroup(keep)]
        patterns += [LayerGroup(g.pattern, with_bits(form, g.weight_bits, g.activation_bits)) for g in groups]
        every = formats_of_layers(network, patterns)
        places = group_of_names(list(every), [group.pattern for group in patterns])
    forms = {name: _fitting(network.get_submodule(name), found) for name, found in every.items() if found is not None}
    metrics: dict[str, str] = {name: groups[i - 1].metric for name, i in zip(every, places, strict=True) if i}
    return forms, metrics
