"""Which layers are quantized to what, and what decides among bits: parts of the section `method` of a calibration."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from genlight.checkpoints.bases import group_of_names
from genlight.errors import UserError, in_config
from genlight.quantization.convert import LayerGroup, formats_of_layers, is_grouped
from genlight.quantization.formats import FLOAT_BITS, LayerFormat
from genlight.quantization.recipe import with_bits
from genlight.quantization.uniform import BITS

METRICS = ("sqnr", "psnr", "ssim", "motion")
# embedders, modulation, and the layers at both ends: little work, and all else rests on them
KEPT = (
    "embed|norm|adaln|caption_projection|^proj_out|^proj_in|time_proj|^conv_in|^conv_out|modulation|"
    "img_mod|txt_mod|^img_in|^txt_in|final_layer"
)
# the denoising network of a pipeline
_NETWORKS = ("transformer", "unet", "prior")


@dataclass(frozen=True)
class GroupSettings:
    """Layers that share what their quality is judged by.

    Attributes:
        pattern: a regular expression that is searched for in the names of layers; the first of the list decides.
        metric: what chooses among bits within the group: "sqnr" of the network's predictions, "psnr" or "ssim" of the
            images, or "motion" of videos, against those of full precision; or what `validate` logs, such as
            "val/clip_score", by how far it moves from that of full precision.
        weight_bits: instead of the method's; None: as there. With mixed bits, one or several of its choices, among
            which the weights of the group get theirs; None: all.
        activation_bits: likewise.

    Raises:
        ValueError: another metric, or an empty list of bits.
    """

    pattern: str = ".*"
    metric: str = "sqnr"
    weight_bits: int | Sequence[int] | None = None
    activation_bits: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS and not self.metric.startswith("val/"):
            raise ValueError(f"metric = {self.metric!r} must be one of {', '.join(METRICS)}, or val/<name>")
        for name in ("weight_bits", "activation_bits"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int) and not value:
                raise ValueError(f"{name} = {list(value)} must hold at least one number of bits")


@dataclass(frozen=True)
class MixedBits:
    """Bits chosen layer by layer within a budget; all limits that are given hold together.

    Attributes:
        choices: bits a weight may have, 2 to 8, or 16 for floating point.
        activation_choices: bits an input may have; None: inputs have those of the method, and weights alone are chosen.
        objective: what shares the budget between groups: the sum of noise powers, which errors of layers come to; one
            sum of signal-to-noise ratios in dB ("sum_db"); or, as in the MixDQ paper, `ratios` ("group_budgets").
        average_bits: limit of the mean over the weights of quantized layers.
        average_activation_bits: limit of the mean over the numbers that quantized layers read.
        megabytes: limit of what quantized layers take in memory, in 10⁶ bytes.
        bit_operations: limit of Σ multiplications × bits × bits of one call of the network, as a share of those in
            which every layer has the most bits of the choices.
        milliseconds: limit of the time of one call of the network with a batch of the evaluation on this machine, as
            predicted from the times of its layers, which are measured for it.
        ratios: of the budget of groups judged by images to that of groups judged by predictions, which are tried as
            the MixDQ paper does, with sums of dB or SSIM within each group; (): that rival is left out.
        every_metric: also sample images for layers that are judged by predictions, so that every metric is known of
            every layer.
        samples: of the select draw, on which layers are quantized one at a time.

    Raises:
        ValueError: a value out of range, or no limit.
    """

    choices: Sequence[int] = (4, 8)
    activation_choices: Sequence[int] | None = None
    objective: Literal["noise_power", "sum_db", "group_budgets"] = "noise_power"
    average_bits: float | None = 6.0
    average_activation_bits: float | None = None
    megabytes: float | None = None
    bit_operations: float | None = None
    milliseconds: float | None = None
    ratios: Sequence[float] = ()
    every_metric: bool = False
    samples: int = 8

    def __post_init__(self) -> None:
        if len(set(self.choices)) < 2:
            raise ValueError(f"choices = {list(self.choices)} must hold two or more different bits")
        if self.samples < 1:
            raise ValueError(f"samples = {self.samples} must be 1 or more")
        if self.activation_choices is not None and not self.activation_choices:
            raise ValueError("activation_choices must hold at least one number of bits, or be null")
        for name in ("choices", "activation_choices"):
            for bits in getattr(self, name) or ():
                if type(bits) is not int or bits not in (*BITS, FLOAT_BITS):
                    known = f"whole numbers from {BITS[0]} to {BITS[-1]}, or {FLOAT_BITS} for floating point"
                    raise ValueError(f"{name} = {list(getattr(self, name))} must be {known}, not {bits!r}")
        if self.objective not in ("noise_power", "sum_db", "group_budgets"):
            raise ValueError(f"objective = {self.objective!r} must be noise_power, sum_db or group_budgets")
        if self.objective == "group_budgets" and not self.ratios:
            raise ValueError("objective = 'group_budgets' needs ratios")
        if (self.average_activation_bits is not None or self.ratios) and self.activation_choices is None:
            raise ValueError("average_activation_bits and ratios need activation_choices")
        if self.ratios and (self.average_bits is None or min(self.ratios) <= 0):
            raise ValueError(f"ratios = {list(self.ratios)} must be positive, and need average_bits")
        names = ("average_bits", "average_activation_bits", "megabytes", "bit_operations", "milliseconds")
        limits = {name: getattr(self, name) for name in names}
        if all(limit is None for limit in limits.values()):
            raise ValueError("one of average_bits, megabytes, bit_operations and milliseconds must be given")
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} = {limit} must be positive")
        choices = {"average_bits": self.choices, "average_activation_bits": self.activation_choices or (0,)}
        for name, bits in choices.items():
            limit = limits[name]
            if limit is not None and limit < min(bits):
                raise ValueError(f"{name} = {limit} is below {min(bits)}, the least of its choices")

    def choices_in(self, group: GroupSettings) -> tuple[list[int], list[int] | None]:
        """Bits that weights and inputs of a group may have, ascending; None: bits of inputs are not chosen.

        Raises:
            ValueError: bits of the group that are not among the choices, or of which several are given for inputs
                without activation_choices.
        """
        weights = _within("weight_bits", group.weight_bits, "choices", self.choices)
        if self.activation_choices is None:
            _one("activation_bits", group.activation_bits, "mixed.activation_choices")
            return weights, None
        return weights, _within("activation_bits", group.activation_bits, "activation_choices", self.activation_choices)


def check_metrics(groups: Sequence[GroupSettings], logged: Collection[str]) -> None:
    """UserError if a group is judged by what `validate` does not log."""
    for group in groups:
        if group.metric not in METRICS and group.metric not in logged:
            known = ", ".join((*METRICS, *(name for name in logged if not name.endswith("_std"))))
            raise UserError(f"method.groups: metric={group.metric}: validate does not log it; choose one of {known}")


def check_groups(groups: Sequence[GroupSettings], mixed: MixedBits | None) -> None:
    """That the bits of each group are one number, or within the choices.

    Raises:
        ValueError: they are not.
    """
    for group in groups:
        if mixed is not None:
            mixed.choices_in(group)
        else:
            _one("weight_bits", group.weight_bits, "mixed bits")
            _one("activation_bits", group.activation_bits, "mixed bits")


def _within(name: str, value: int | Sequence[int] | None, known: str, choices: Sequence[int]) -> list[int]:
    given = set(choices) if value is None else {value} if isinstance(value, int) else set(value)
    if not given <= set(choices):
        raise ValueError(f"{name} = {sorted(given)} of a group must be among mixed.{known} = {sorted(choices)}")
    return sorted(given)


def _one(name: str, value: int | Sequence[int] | None, needed: str) -> None:
    if value is not None and not isinstance(value, int):
        raise ValueError(f"{name} = {list(value)} of a group needs {needed}: give one number")


def _number(value: int | Sequence[int] | None) -> int | None:
    return value if isinstance(value, int) else None


def network_of(module: Any) -> Any:
    """The denoising network of a generator, without `torch.compile`.

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
    module.configure_model()
    # compiled code does not see hooks that are added later, and layers are observed by hooks
    if module.net._compiled_call_impl is not None:
        module.net._compiled_call_impl = None
        warnings.warn("module.compile=true is left aside: this method watches each layer by itself", stacklevel=2)
    return module.net


def fitting_form(layer: nn.Module, form: LayerFormat) -> LayerFormat:
    """The format; a convolution sums over pixels, so that its input has a scale for each sample, not for each pixel."""
    if isinstance(layer, nn.Conv2d) and form.activation.granularity == "token":
        return replace(form, activation=replace(form.activation, granularity="sample"))
    return form


def formats_by_layer(
    network: nn.Module, form: LayerFormat, keep: str, groups: Sequence[GroupSettings], *, whole: bool = False
) -> tuple[dict[str, LayerFormat], dict[str, GroupSettings]]:
    """What each layer that is quantized becomes, and its group, both by name; lists of bits leave those of `form`.

    Args:
        network: not changed.
        form: of all layers, but for the bits of groups.
        keep: pattern of layers that are left in floating point.
        groups: of the others.
        whole: leave convolutions in groups of channels in floating point; so are those that would need a Hessian.

    Raises:
        UserError: patterns that do not fit the network, or a network that is quantized already.
    """
    with in_config("method"):
        patterns = [LayerGroup(keep)]
        patterns += [
            LayerGroup(g.pattern, with_bits(form, _number(g.weight_bits), _number(g.activation_bits))) for g in groups
        ]
        every = formats_of_layers(network, patterns)
        places = group_of_names(list(every), [group.pattern for group in patterns])
    forms = {
        name: fitting_form(network.get_submodule(name), found)
        for name, found in every.items()
        if found is not None and not ((whole or found.weight.needs_hessian) and is_grouped(network.get_submodule(name)))
    }
    return forms, {name: groups[i - 1] for name, i in zip(every, places, strict=True) if name in forms}
