"""What a quantized model takes: bits a weight, bytes in memory, operations by their width."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from genlight.quantization.formats import FLOAT_BITS
from genlight.quantization.layers import QuantizedLayer


@dataclass(frozen=True)
class LayerCost:
    """Of one linear or convolution layer.

    Attributes:
        weights: numbers in its weight.
        weight_bits: nominal bits of each; 16 in floating point, whatever the type.
        activation_bits: of its input, likewise.
        storage_bytes: that its tensors take, with scales, bias and what the input needs.
        macs: multiplications of one call of the model, or 0 where they were not counted.
    """

    weights: int
    weight_bits: int
    activation_bits: int
    storage_bytes: int
    macs: int = 0

    @property
    def bit_operations(self) -> int:
        """Multiplications × bits of the weight × bits of the input."""
        return self.macs * self.weight_bits * self.activation_bits


@dataclass(frozen=True)
class ModelCost:
    """Of a model.

    Attributes:
        layers: by name, quantized or not.
        total_bytes: of all parameters and buffers, each memory counted once.
    """

    layers: Mapping[str, LayerCost]
    total_bytes: int

    @property
    def average_weight_bits(self) -> float:
        """Σ P_l b_l / Σ P_l over the weights of all these layers, those left in floating point included."""
        weights = sum(layer.weights for layer in self.layers.values())
        return sum(layer.weights * layer.weight_bits for layer in self.layers.values()) / weights

    @property
    def bit_operations(self) -> int:
        """Σ multiplications × bits × bits."""
        return sum(layer.bit_operations for layer in self.layers.values())


def model_cost(
    model: nn.Module, macs: Mapping[str, int] | None = None, bits: Mapping[str, tuple[int, int]] | None = None
) -> ModelCost:
    """The cost of a model, quantized in part, in whole or not at all.

    Args:
        model: anything with linear or 2-D convolution layers.
        macs: of `count_macs`, by layer.
        bits: of weight and input of layers that another library quantized.

    Raises:
        ValueError: there is no such layer.
    """
    macs, bits = macs or {}, bits or {}
    layers = {}
    for name, module in _layers(model).items():
        weight_bits, activation_bits = bits.get(name, (FLOAT_BITS, FLOAT_BITS))
        if isinstance(module, QuantizedLayer):
            weight_bits, activation_bits = module.form.weight.bits, module.form.activation.bits
        layers[name] = LayerCost(
            weights=_outputs(module) * _columns(module),
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            storage_bytes=tensor_bytes(module),
            macs=macs.get(name, 0),
        )
    if not layers:
        raise ValueError("the model has no linear or 2-D convolution layer")
    return ModelCost(layers, tensor_bytes(model))


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; memory that several share is counted once."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for whole in [*module.parameters(), *module.buffers()]
        for tensor in _stored(whole)
        if (storage := tensor.untyped_storage()).nbytes()
    }
    return sum(storages.values())


def file_bytes(module: nn.Module) -> int:
    """Bytes of all tensors in a safetensors file of the module, which holds memory that several share several times."""
    values = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    tensors = [tensor for value in values for tensor in _stored(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that one is kept as, which has no memory of its own if another library quantized it."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))


def count_macs(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Multiplications of each linear and convolution layer, by name, in one call; layers that did not run are left out.

    Args:
        model: with layers of torch or quantized ones.
        run: calls it once.
    """
    counts: dict[str, int] = {}

    def counter(name: str, columns: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            counts[name] = counts.get(name, 0) + output.numel() * columns

        return count

    with ExitStack() as stack, torch.no_grad():
        for name, module in _layers(model).items():
            stack.callback(module.register_forward_hook(counter(name, _columns(module))).remove)
        run()
    return counts


def count_inputs(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Numbers that each linear and convolution layer reads, by name, in one call; see `count_macs`."""
    counts: dict[str, int] = {}

    def counter(name: str) -> Callable[[nn.Module, Any], None]:
        def count(module: nn.Module, inputs: Any) -> None:
            counts[name] = counts.get(name, 0) + inputs[0].numel()

        return count

    with ExitStack() as stack, torch.no_grad():
        for name, module in _layers(model).items():
            stack.callback(module.register_forward_pre_hook(counter(name)).remove)
        run()
    return counts


_Layer = nn.Linear | nn.Conv2d | QuantizedLayer


def _layers(model: nn.Module) -> dict[str, _Layer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _Layer)}


def _outputs(layer: _Layer) -> int:
    return layer.outputs if isinstance(layer, QuantizedLayer) else layer.weight.shape[0]


def _columns(layer: _Layer) -> int:
    return layer.columns if isinstance(layer, QuantizedLayer) else layer.weight.shape[1:].numel()
