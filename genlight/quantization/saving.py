"""Quantized layers in one safetensors file: tensors by the names of `state_dict`, and a plan that says what they are.

The plan stands in the file's metadata as JSON. A float model of the same architecture takes the layers back, with no
calibration and no second rounding.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from genlight.io import CorruptFileError, load_tensors, parse_json, save_tensors
from genlight.quantization.balance import Balance
from genlight.quantization.constant_tokens import ConstantRows, ConstantTokenLinear, Mismatch
from genlight.quantization.conv import Geometry, QuantizedConv2d
from genlight.quantization.convert import quantized_layers, replace_layers
from genlight.quantization.formats import LayerFormat
from genlight.quantization.hadamard import Rotation
from genlight.quantization.layers import LayerParts, QuantizedLayer, QuantizedLinear
from genlight.quantization.uniform import Grid
from genlight.quantization.weights import QuantizedWeight

_FORMAT, _VERSION = "genlight.quantized", "1"
# A plan is some hundred bytes a layer
_MAX_PLAN_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class LayerPlan:
    """What the tensors of a layer do not say.

    Attributes:
        form: bits and granularities.
        columns: inputs of one output.
        rotation_factors: of its Hadamard matrix, () without a rotation.
        geometry: of a convolution; None for a linear layer.
        constant_positions: of tokens whose outputs are kept; () for none.
        mismatch: what is done with other tokens there.
    """

    form: LayerFormat
    columns: int
    rotation_factors: tuple[int, ...] = ()
    geometry: Geometry | None = None
    constant_positions: tuple[int, ...] = ()
    mismatch: Mismatch = "warn"


_PLANS: TypeAdapter[dict[str, LayerPlan]] = TypeAdapter(dict[str, LayerPlan])


def plans_of(model: nn.Module) -> dict[str, LayerPlan]:
    """The plans of the quantized layers of a model by name."""
    return {
        name: LayerPlan(
            layer.form,
            layer.columns,
            layer.rotation_factors,
            layer.geometry if isinstance(layer, QuantizedConv2d) else None,
            *((layer.positions, layer.mismatch) if isinstance(layer, ConstantTokenLinear) else ()),
        )
        for name, layer in quantized_layers(model).items()
    }


def layer_from(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> QuantizedLayer:
    """The layer that a plan and the entries of its `state_dict` describe.

    Raises:
        ValueError: an entry is missing, is unknown, or does not fit the plan.
    """
    rest = dict(tensors)
    codes, scale, zero_point = (rest.pop(name, None) for name in ("weight_codes", "weight_scale", "weight_zero_point"))
    kept, bias, signs = (rest.pop(name, None) for name in ("float_weight", "bias", "rotation_signs"))
    up, down = rest.pop("up", None), rest.pop("down", None)
    scale_of_input, ranges = rest.pop("input_scale", None), rest.pop("activation_range", None)
    constant = (rest.pop("constant_inputs", None), rest.pop("constant_outputs", None))
    form, weight = plan.form.weight, kept
    if codes is not None and scale is not None:
        grid = Grid(scale, zero_point, form.bits, form.numbers)
        quantized: QuantizedWeight | Tensor = QuantizedWeight(codes, grid, plan.columns, form.group_size)
    elif weight is not None:
        quantized = weight
    else:
        raise ValueError(f"the weight is missing; there are {', '.join(sorted(tensors)) or 'no tensors'}")
    unfit = rest or (constant[0] is None) != (plan.constant_positions == ())
    if unfit or (signs is None) != (plan.rotation_factors == ()) or (up is None) != (down is None):
        raise ValueError(f"the tensors {', '.join(sorted(tensors))} do not fit the plan {plan}")
    rotation = None if signs is None else Rotation(signs, plan.rotation_factors)
    low_rank = None if up is None or down is None else (up, down)
    parts = LayerParts(bias, Balance(scale_of_input, rotation), low_rank, ranges)
    if plan.geometry is not None:
        return QuantizedConv2d(plan.form, quantized, parts, plan.geometry)
    if constant[0] is not None and constant[1] is not None:
        rows = ConstantRows(plan.constant_positions, constant[0], constant[1], plan.mismatch)
        return ConstantTokenLinear(plan.form, quantized, parts, rows)
    return QuantizedLinear(plan.form, quantized, parts)


def save_quantized(path: str | Path, model: nn.Module) -> None:
    """Write the whole model, quantized layers and all others, atomically and with a checksum.

    Raises:
        ValueError: the model has no quantized layer, or one with ranges by step, whose timesteps no file holds.
    """
    plans = plans_of(model)
    if not plans:
        raise ValueError("the model has no quantized layer: save it as what it is")
    if any(layer.has_steps for layer in quantized_layers(model).values()):
        raise ValueError("ranges by step have no place here: save_pretrained writes them with their timesteps")
    plan = _PLANS.dump_json(plans).decode()
    save_tensors(path, model.state_dict(), {"format": _FORMAT, "version": _VERSION, "plan": plan})


def load_quantized(path: str | Path, model: nn.Module) -> None:
    """Read a file of `save_quantized` into a model of the same architecture; its layers are replaced in place.

    Args:
        path: the file.
        model: with layers of torch; its device is kept, its weights are not.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: altered, or not written by `save_quantized`.
        ValueError: of another model; the message names the layer or the tensor.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise CorruptFileError(f"{path} is not a quantized model of version {_VERSION}")
    plans = _parse_plans(metadata.get("plan", ""), path)
    layers = {}
    for name, plan in plans.items():
        own = {key.removeprefix(f"{name}."): part for key, part in tensors.items() if key.startswith(f"{name}.")}
        try:
            layers[name] = layer_from(plan, own)
        except ValueError as error:
            raise CorruptFileError(f"{path}: {name}: {error}") from None
        device = next((part.device for part in _tensors_of(model, name)), None)
        layers[name].to(device)
    replace_layers(model, layers)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise ValueError(f"{path} is of another model: {[*missing, *unexpected][0]!r} is on one side only")


def _parse_plans(text: str, path: str | Path) -> dict[str, LayerPlan]:
    plain: Any = parse_json(text, f"{path} (plan)", max_bytes=_MAX_PLAN_BYTES, max_entries=_MAX_PLAN_BYTES)
    try:
        return _PLANS.validate_json(json.dumps(plain), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptFileError(f"{path}: the plan does not hold: {where}: {first['msg']}") from None


def _tensors_of(model: nn.Module, name: str) -> list[Tensor]:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return []
    return [*layer.parameters(), *layer.buffers()]
