"""From a model with layers of torch to the same model with quantized ones, by patterns of names and in place."""

import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from genlight.checkpoints.bases import group_of_names
from genlight.quantization.balance import Balance, balance_hessian, balance_weight, low_rank_split
from genlight.quantization.conv import Geometry, QuantizedConv2d
from genlight.quantization.formats import FLOAT_BITS, LayerFormat
from genlight.quantization.layers import LayerParts, QuantizedLayer, QuantizedLinear
from genlight.quantization.weights import QuantizedWeight, quantize_weight

# why convolutions are left out that could be rounded by themselves
GROUPED = "in groups of channels, which no balance, low-rank branch or Hessian fits"


@dataclass(frozen=True)
class LayerGroup:
    """Layers by name.

    Attributes:
        pattern: a regular expression that is searched for in the name.
        form: what they are quantized to; None leaves them as they are.
    """

    pattern: str
    form: LayerFormat | None = None


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear and 2-D convolution layers of a model by name; subclasses, which may compute otherwise, are left out.

    Raises:
        ValueError: the model has quantized layers already, of genlight or another library, or none that can be
            quantized.
    """
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            raise ValueError(f"the model is quantized already: {name!r} is a {type(module).__name__}")
        if isinstance(module, nn.Linear | nn.Conv2d) and type(module) in (nn.Linear, nn.Conv2d):
            if is_traceable_wrapper_subclass(module.weight):
                kind = type(module.weight).__name__
                raise ValueError(f"the model is quantized or split already: the weight of {name!r} is a {kind}")
            layers[name] = module
    if (other := getattr(model, "hf_quantizer", None)) is not None:
        raise ValueError(f"the model is quantized already: by {other.quantization_config.quant_method.value}")
    if not layers:
        raise ValueError("the model has no linear or 2-D convolution layer to quantize")
    return layers


def is_grouped(layer: nn.Module) -> bool:
    """Whether outputs read other channels than one another, so that they share no balance, branch or Hessian."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1


def layers_left_out(model: nn.Module, chosen: Collection[str], keep: str | None = None) -> dict[str, tuple[str, str]]:
    """Layers with a weight of two dimensions or more that are not among the chosen: type and reason, by name.

    Args:
        model: not changed.
        chosen: names of layers.
        keep: the pattern of those that were not to be chosen; None: that is said of all that could be.
    """
    found = {}
    for name, module in model.named_modules():
        tensors = {"weight": getattr(module, "weight", None), **dict(module.named_parameters(recurse=False))}
        weights = [value for key, value in tensors.items() if "weight" in key and isinstance(value, Tensor)]
        if name in chosen or all(weight.ndim < 2 for weight in weights):
            continue
        if is_grouped(module) and keep is not None and not re.search(keep, name):
            reason = GROUPED
        elif type(module) in (nn.Linear, nn.Conv2d):
            reason = "a pattern keeps it"
        elif isinstance(module, nn.Linear | nn.Conv2d):
            reason = "a subclass, which may compute otherwise"
        else:
            reason = "no quantized form"
        found[name] = (type(module).__name__, reason)
    return found


def formats_of_layers(model: nn.Module, groups: Sequence[LayerGroup]) -> dict[str, LayerFormat | None]:
    """The format of every linear and convolution layer: that of the first group whose pattern is found in its name.

    Raises:
        ValueError: a layer in no group, a group that is the first of no layer, or what `quantizable_layers` refuses.
    """
    names = list(quantizable_layers(model))
    found = group_of_names(names, [group.pattern for group in groups])
    return {name: groups[index].form for name, index in zip(names, found, strict=True)}


def quantize_layer(
    layer: nn.Linear | nn.Conv2d,
    form: LayerFormat,
    *,
    balance: Balance | None = None,
    rank: int = 0,
    hessian: Tensor | None = None,
    activation_range: Tensor | None = None,
) -> QuantizedLayer:
    """The layer in a format: balanced, its low-rank branch split off, and rounded once.

    Args:
        layer: not changed.
        form: of its weight and its input.
        balance: of its input, shared by all layers that have it.
        rank: of the branch that stays in floating point; 0 for none.
        hessian: Σ x xᵀ of its inputs as they are [columns, columns]; balanced here.
        activation_range: of its balanced inputs, float32 [branches, steps, 2], or of each channel of a convolution's.

    Raises:
        ValueError: what the format needs is missing, or does not fit the layer.
    """
    balance = balance or Balance()
    _check(layer, form, balance, rank)
    matrix = balance_weight(layer.weight.detach().flatten(1), balance)
    low_rank = None
    if rank:
        # the rest is that of the branch as it is stored, so that its own rounding is made up for
        up, down = (part.to(layer.weight.dtype) for part in low_rank_split(matrix.float(), rank))
        low_rank, matrix = (up, down), matrix - up.to(matrix.dtype) @ down.to(matrix.dtype)
    weight: QuantizedWeight | Tensor = matrix.to(layer.weight.dtype)
    if form.weight.bits != FLOAT_BITS:
        moments = balance_hessian(hessian, balance) if hessian is not None and form.weight.needs_hessian else None
        weight = quantize_weight(matrix, form.weight, moments)
    parts = LayerParts(layer.bias, balance, low_rank, activation_range)
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(form, weight, parts, Geometry.of(layer))
    return QuantizedLinear(form, weight, parts)


def quantize_split(layer: nn.Conv2d, form: LayerFormat, channels: int, ranges: Tensor | None = None) -> QuantizedConv2d:
    """A convolution over two feature maps side by side, each with scales of its own for input and weight.

    It computes what two convolutions would whose outputs are summed and whose bias is added once (MixDQ,
    arXiv:2405.17873). Scales of the weight are per output channel and range of channels; where the second range is the
    wider one, it has several.

    Args:
        layer: not changed.
        form: bits of both ranges of channels.
        channels: of the first feature map.
        ranges: minimum and maximum of both feature maps, float32 [2, 2], or [2, steps, 2] with those of each step, for
            inputs that are rounded.

    Raises:
        ValueError: channels that leave no second feature map, inputs rounded with one scale for both, or what
            `quantize_layer` refuses.
    """
    if not 0 < channels < layer.in_channels:
        raise ValueError(f"channels = {channels} must lie between 0 and the {layer.in_channels} that the layer reads")
    rounded = form.activation.bits != FLOAT_BITS
    if rounded and form.activation.mode != "static":
        raise ValueError(
            f"activation.mode = {form.activation.mode!r} must be 'static': a range that is measured as inputs come is "
            "of both feature maps together"
        )
    kernel = layer.weight[0, 0].numel()
    form = replace(form, weight=replace(form.weight, granularity="group", group_size=channels * kernel))
    by_channel = None
    if ranges is not None and rounded:
        widths = [channels, layer.in_channels - channels]
        tables = ranges.reshape(2, -1, 2, 1)
        rows = [table.expand(-1, -1, width) for table, width in zip(tables, widths, strict=True)]
        by_channel = torch.cat(rows, dim=2)[None]
    made = quantize_layer(layer, form, activation_range=by_channel)
    assert isinstance(made, QuantizedConv2d)
    return made


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers in the places of those with their names.

    Raises:
        ValueError: a name that the model does not have; nothing is replaced then.
    """
    known = {name for name, _ in model.named_modules()}
    missing = next((name for name in layers if name not in known or not name), None)
    if missing is not None:
        raise ValueError(f"{missing!r} is no layer inside the model")
    for name, layer in layers.items():
        layer.train(model.get_submodule(name).training)
        model.set_submodule(name, layer)


class _WithoutWeight(nn.Module):
    """Computes what a layer does, and shows no more of it than a quantized one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # no module inside, whose weight would be found
        if isinstance(layer, nn.Linear):
            self.in_features, self.out_features = layer.in_features, layer.out_features
        bias: Any = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self._layer[0](values)
        return found


def check_replaceable(model: nn.Module, names: Collection[str], run: Callable[[], object]) -> None:
    """That nothing but layers themselves asks for their weights, which quantized ones do not have as such.

    Args:
        model: not changed.
        names: of its layers.
        run: calls the model once.

    Raises:
        ValueError: something does; the message says where.
    """
    plain = {name: model.get_submodule(name) for name in names}
    replace_layers(model, {name: _WithoutWeight(layer) for name, layer in plain.items()})
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        places = {module: name for name, module in model.named_modules() if name}
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        where = [places[one] for one in frames if isinstance(one, nn.Module) and one in places]
        raise ValueError(
            f"{where[-1] if where else type(model).__name__} asks for the weights of its layers, which quantized ones "
            f"do not have as such ({error!r}): the pattern must match these layers"
        ) from error
    finally:
        replace_layers(model, plain)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def set_execution(model: nn.Module, execution: str) -> None:
    """How quantized layers multiply: "integer" where that is valid, or always "fake".

    Raises:
        ValueError: another word.
    """
    for layer in quantized_layers(model).values():
        if execution == "integer":
            layer.execution = "integer"
        elif execution == "fake":
            layer.execution = "fake"
        else:
            raise ValueError(f"execution = {execution!r} must be 'integer' or 'fake'")


def _check(layer: nn.Linear | nn.Conv2d, form: LayerFormat, balance: Balance, rank: int) -> None:
    if not isinstance(layer, nn.Conv2d):
        channels = layer.in_features
    else:
        channels = layer.in_channels
        if is_grouped(layer) and (balance.channels is not None or rank or form.weight.needs_hessian):
            raise ValueError(
                f"groups = {layer.groups} must be 1 for a balance, a low-rank branch, GPTQ or clipping by the Hessian: "
                "its outputs do not read the same channels"
            )
    if balance.channels not in (None, channels):
        raise ValueError(f"balance is of {balance.channels} channels, and the layer reads {channels}")
