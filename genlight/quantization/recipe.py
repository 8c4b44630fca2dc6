"""From a calibration to quantized layers: balances, bits of each layer, and the way back to plain layers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from genlight.quantization.activations import activation_grid
from genlight.quantization.balance import (
    Balance,
    balance_sample,
    balance_scale,
    reduce_absmax,
    search_alpha,
)
from genlight.quantization.constant_tokens import ConstantTokenLinear
from genlight.quantization.convert import quantize_layer
from genlight.quantization.formats import FLOAT_BITS, ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.layers import QuantizedLayer
from genlight.quantization.special_inputs import same_tokens
from genlight.quantization.statistics import InputStatistics
from genlight.quantization.uniform import fake_quantize

BALANCES = ("none", "scale", "rotation", "static_dynamic")
BalanceKind = Literal["none", "scale", "rotation", "static_dynamic"]


@dataclass(frozen=True)
class BalanceSettings:
    """How inputs are balanced.

    Attributes:
        kind: nothing, the static scale alone (SmoothQuant), the rotation alone (QuaRot), or scale and rotation.
        alpha: exponent of the input in the scale; None searches it on `alpha_grid`, for each input.
        alpha_grid: what is tried.
        reduce: which steps of the calibration the scale is for: "max", "first" or "mean".
        hadamard: "block" rotates blocks of the largest power of two that divides the width, "full" all of it.
        seed: of the signs of the rotations.

    Raises:
        ValueError: a value outside what is said here.
    """

    kind: BalanceKind = "static_dynamic"
    alpha: float | None = None
    alpha_grid: tuple[float, ...] = (0.01, 0.1, 0.2, 0.3, 0.5, 0.7)
    reduce: Literal["max", "first", "mean"] = "max"
    hadamard: Literal["full", "block"] = "block"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"kind": BALANCES, "reduce": ("max", "first", "mean"), "hadamard": ("full", "block")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                word = "balance" if name == "kind" else name
                raise ValueError(f"{word} = {getattr(self, name)!r} must be one of {', '.join(known)}")
        for value in (*self.alpha_grid, *(() if self.alpha is None else (self.alpha,))):
            if not 0 <= value <= 1:
                raise ValueError(f"alpha = {value!r} must lie in [0, 1]")
        if not self.alpha_grid:
            raise ValueError("alpha_grid must hold at least one value")

    @property
    def scales(self) -> bool:
        """Whether there is a static scale."""
        return self.kind in ("scale", "static_dynamic")

    @property
    def rotates(self) -> bool:
        """Whether there is a rotation."""
        return self.kind in ("rotation", "static_dynamic")


@dataclass(frozen=True, eq=False)
class CalibratedNetwork:
    """What a calibration knows of a network.

    Attributes:
        layers: the plain layers to quantize, by name.
        groups: names of layers that read the same input, which share statistics and balance.
        statistics: of the input of each group, by the group's first name; Hessians may lie on another device.
    """

    layers: Mapping[str, nn.Linear | nn.Conv2d]
    groups: tuple[tuple[str, ...], ...]
    statistics: Mapping[str, InputStatistics]

    def group_of(self, name: str) -> int:
        """The number of the group that a layer is in."""
        return next(index for index, names in enumerate(self.groups) if name in names)


@dataclass(frozen=True, eq=False)
class BalancedInput:
    """The balance of a group, and the α that its scale was made with; None without a scale."""

    balance: Balance = field(default_factory=Balance)
    alpha: float | None = None


def balanced_input(
    network: CalibratedNetwork, group: int, form: LayerFormat, settings: BalanceSettings
) -> BalancedInput:
    """The balance of one group of layers that are quantized to a format.

    Raises:
        ValueError: the width cannot be rotated, or statistics that are not finite.
    """
    names = network.groups[group]
    statistics = network.statistics[names[0]]
    weights = [network.layers[name].weight.detach().flatten(1) for name in names]
    width = statistics.absmax.shape[-1]
    rotation = random_rotation(width, settings.hadamard, settings.seed + group) if settings.rotates else None
    if not settings.scales:
        return BalancedInput(Balance(None, rotation))
    absmax, alpha = reduce_absmax(statistics.absmax, settings.reduce), settings.alpha
    if alpha is None:
        # rounding and clipping cost much and hardly move the best exponent
        quick = replace(form, weight=replace(form.weight, rounding="nearest", clip="none"))
        sample = _sample_of(statistics)
        wide = [weight.to(sample.dtype) for weight in weights]
        alpha, _ = search_alpha(wide, sample, absmax, quick, rotation=rotation, grid=settings.alpha_grid)
    return BalancedInput(Balance(balance_scale(absmax, weights, alpha), rotation), alpha)


def quantized_layer(
    network: CalibratedNetwork,
    name: str,
    form: LayerFormat,
    balance: Balance,
    rank: int = 0,
    ranges: Tensor | None = None,
) -> QuantizedLayer:
    """One layer in a format.

    Static activations have `ranges`, or, where nothing is balanced, one range for all steps and branches.

    Raises:
        ValueError: static activations of a balanced input without their ranges.
    """
    statistics = network.statistics[network.groups[network.group_of(name)][0]]
    if form.activation.mode != "static" or form.activation.bits == FLOAT_BITS:
        ranges = None
    elif ranges is None and balance.channels is not None:
        raise ValueError("static activations of a balanced input need its ranges")
    elif ranges is None:
        ranges = overall_range(statistics)
    plain, hessian = network.layers[name], statistics.hessian
    if hessian is not None and form.weight.needs_hessian:
        hessian = hessian.to(plain.weight.device)  # those of all layers together may not fit there
    return quantize_layer(plain, form, balance=balance, rank=rank, hessian=hessian, activation_range=ranges)


def overall_range(statistics: InputStatistics) -> Tensor:
    """Minimum and maximum over all steps and branches, float32 [1, 1, 2]."""
    return step_ranges(statistics, [0] * statistics.minimum.shape[1])


def step_ranges(statistics: InputStatistics, places: Sequence[int]) -> Tensor:
    """Minimum and maximum over all branches, and over the steps at one place, float32 [1, places, 2].

    Args:
        statistics: of an input.
        places: of each step of the calibration, from 0; steps of one timestep share theirs.

    Raises:
        ValueError: a place at which the layer never ran. At some of its steps or branches it may not have: a call for
            guidance can leave out blocks or have fewer branches than others.
    """
    place = torch.tensor(places)
    here = [place == one for one in range(max(places) + 1)]
    least = torch.stack([statistics.minimum[:, own].min() for own in here])
    if bool(torch.isinf(least).any()):
        number = int(torch.isinf(least).int().argmax())
        raise ValueError(f"the calibration ran no input at timestep {number + 1} of {len(here)}: no range is known")
    return torch.stack([least, torch.stack([statistics.maximum[:, own].max() for own in here])], dim=-1)[None]


def shared_range(ranges: Tensor) -> Tensor:
    """One range for all steps, [parts, 1, 2] or [parts, 1, 2, channels], of those for each [parts, steps, …]."""
    return torch.stack([ranges[:, :, 0].amin(dim=1), ranges[:, :, 1].amax(dim=1)], dim=1)[:, None]


def layer_noise(network: CalibratedNetwork, name: str, layer: QuantizedLayer) -> float:
    """Noise-to-signal ratio of a quantized layer's output on the rows that the calibration kept.

    A proxy for what the layer does to the whole network: it runs nothing but the layer.
    """
    sample = _sample_of(network.statistics[network.groups[network.group_of(name)][0]])
    if isinstance(layer, ConstantTokenLinear):
        known = layer.constant_inputs.to(sample.dtype)[:, None]
        sample = sample[~same_tokens(sample, known).any(dim=0).squeeze(-1)]
    expected = sample @ network.layers[name].weight.detach().flatten(1).t().to(sample.dtype)
    inputs = balance_sample(sample, layer.balance)
    # of a convolution, each patch gets the scale that its sample would have; a static range may be that of a channel,
    # and is that of all steps, as the rows are
    ranges = layer.activation_range
    channels = inputs.shape[-1] if ranges is None or ranges.ndim == 3 else ranges.shape[-1]
    image = inputs.reshape(len(inputs), channels, -1, 1) if channels < inputs.shape[-1] else inputs
    if ranges is None:
        rounded = layer.rounded(image)
    else:
        rounded = fake_quantize(image, activation_grid(image, layer.form.activation, shared_range(ranges)))
    rounded = rounded.reshape(inputs.shape)
    found = rounded @ layer.weight_matrix.t().to(sample.dtype)
    if layer.up is not None and layer.down is not None:
        found = found + inputs @ layer.down.t().to(sample.dtype) @ layer.up.t().to(sample.dtype)
    return float((found - expected).square().sum() / expected.square().sum().clamp(min=torch.finfo(found.dtype).tiny))


def weight_error(plain: nn.Linear | nn.Conv2d, layer: QuantizedLayer) -> float:
    """Mean squared error of the weight as plain inputs see it."""
    matrix = plain.weight.detach().flatten(1)
    return float((layer.effective_weight() - matrix).square().mean())


def dequantized_layer(plain: nn.Linear | nn.Conv2d, layer: QuantizedLayer) -> nn.Linear | nn.Conv2d:
    """A plain layer with the weight that the quantized one has: no scale, no rotation, inputs not rounded."""
    made = copy.deepcopy(plain)
    with torch.no_grad():
        made.weight.copy_(layer.effective_weight().reshape(made.weight.shape))
    return made


def with_bits(form: LayerFormat, weight_bits: int | None = None, activation_bits: int | None = None) -> LayerFormat:
    """The format with other bits; None leaves them."""
    weight: WeightFormat = form.weight if weight_bits is None else replace(form.weight, bits=weight_bits)
    activation: ActivationFormat = (
        form.activation if activation_bits is None else replace(form.activation, bits=activation_bits)
    )
    return LayerFormat(weight, activation)


def _sample_of(statistics: InputStatistics) -> Tensor:
    if statistics.sample is None or not len(statistics.sample):
        raise ValueError("the calibration kept no rows of the inputs: sample_rows must be 1 or more")
    return statistics.sample
