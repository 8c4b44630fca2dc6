"""Quantized linear layers as tensors of torchao, which plain diffusers loads with no genlight.

torchao's `Int8Tensor` holds eight-bit weights with a scale for each output and no zero point, a factor for each channel
of the input, and says that the input is rounded on the range of each token. That is what can be written so.
"""

# neither diffusers nor torchao, which need not be installed, gives types
# mypy: disable-error-code="no-untyped-call,import-not-found,attr-defined"

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from genlight.quantization.convert import replace_layers
from genlight.quantization.formats import FLOAT_BITS, LayerFormat
from genlight.quantization.layers import QuantizedLayer, QuantizedLinear

_CONVOLUTION = "convolutions in eight bits: leave them out by keep"


def check_for_torchao(network: nn.Module, forms: Mapping[str, LayerFormat]) -> None:
    """That a network could be written so.

    Raises:
        ValueError: torchao is not installed, or a layer is a convolution or gets a format that it cannot hold.
    """
    _check_installed()
    for name, form in forms.items():
        problem = what_torchao_cannot_hold(form)
        if not isinstance(network.get_submodule(name), nn.Linear):
            problem = _CONVOLUTION
        if problem:
            raise ValueError(f"torchao has no place for {problem} ({name})")


def _check_installed() -> None:
    if find_spec("torchao") is None:
        raise ValueError("torchao is not installed: pip install 'torchao>=0.17'")


def what_torchao_cannot_hold(form: LayerFormat) -> str | None:
    """The first thing of a format that its tensors have no place for, and what would do; None if all has one."""
    weight, activation = form.weight, form.activation
    if weight.numbers != "integer" or weight.bits != 8:
        return "weights in other than eight bits of integers: weight_bits=8 numbers=integer"
    if not weight.symmetric or weight.granularity != "channel":
        settings = "weight_symmetric=true weight_group_size=null"
        return f"weights without a scale for each output, or with a zero point: {settings}"
    if activation.bits == FLOAT_BITS:
        return None
    if activation.bits != 8 or not activation.symmetric:
        return "inputs in other than 8 bits, or with a zero point: activation_bits=8 activation_symmetric=true"
    if (activation.mode, activation.granularity) != ("dynamic", "token"):
        return "inputs with ranges that are not those of each token"
    return None


def torchao_linear(layer: QuantizedLayer, dtype: torch.dtype) -> nn.Linear:
    """A linear layer of torch with a weight of torchao.

    Inputs are rounded on 255 levels of half a step less than ours, as torchao does, so that outputs agree but for
    rounding.

    Args:
        layer: quantized.
        dtype: of the network.

    Raises:
        ValueError: a convolution, or a layer that `Int8Tensor` cannot hold.
    """
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    if not isinstance(layer, QuantizedLinear):
        raise ValueError(f"torchao has no place for {_CONVOLUTION}")
    problem = what_torchao_cannot_hold(layer.form)
    if layer.rotation_signs is not None or layer.up is not None:
        problem = "a rotation or a low-rank branch: balance=scale rank=0"
    if problem:
        raise ValueError(f"torchao has no place for {problem}")
    weight = layer.quantized_weight
    assert weight is not None
    codes, factor = weight.unpacked(), layer.input_scale
    rounded = layer.form.activation.bits != FLOAT_BITS
    tensor = Int8Tensor(
        codes,
        weight.grid.scale.float(),
        [1, codes.shape[1]],
        dtype,
        zero_point=torch.zeros_like(weight.grid.scale, dtype=torch.int8),
        act_pre_scale=None if factor is None else (1 / factor).to(dtype),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()) if rounded else None,
    )
    made = nn.Linear(layer.columns, layer.outputs, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(tensor, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return made


@contextmanager
def as_torchao(network: Any, layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """In the block the network has layers of torchao, and `save_pretrained`, of it or of a pipeline, writes them so.

    Args:
        network: of diffusers.
        layers: those that are quantized, by name.

    Raises:
        ValueError: torchao is not installed, or a layer that it cannot hold; the message names the layer.
    """
    _check_installed()
    from diffusers import TorchAoConfig
    from diffusers.quantizers.torchao import TorchAoHfQuantizer
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        try:
            made[name] = torchao_linear(layer, network.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    kept = [name for name, one in network.named_modules() if isinstance(one, nn.Linear) and name not in made]
    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept)
    plain, before = {name: network.get_submodule(name) for name in made}, network.config
    try:
        replace_layers(network, made)
        network.register_to_config(quantization_config=config)
        network.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
        network.hf_quantizer.validate_environment()  # sets what saving reads
        yield
    finally:
        replace_layers(network, plain)
        network._internal_dict = before
        if hasattr(network, "hf_quantizer"):
            del network.hf_quantizer
