"""Layers as torchao and optimum-quanto quantize them, by their own functions, to be measured beside those made here.

Neither need be installed. What a format takes is the library's own matter: of types, shapes and devices that it does
not know, it raises errors or leaves layers as they are.
"""

# neither library gives types
# mypy: disable-error-code="no-untyped-call,import-not-found,import-untyped,attr-defined"

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from genlight.quantization.formats import FLOAT_BITS

Layers = Mapping[str, nn.Module]
Observe = Callable[[Layers], object]


@dataclass(frozen=True)
class LibraryFormat:
    """One way in which a library quantizes layers.

    Attributes:
        name: in tables.
        weight_bits: nominal.
        activation_bits: of inputs of linear layers; 16 in floating point, as inputs of convolutions always are.
        convert: makes layers out of plain ones, which stay as they are, and a function that samples with what it gets.
        observes: whether it takes ranges of inputs from that sampling.
    """

    name: str
    weight_bits: int
    activation_bits: int
    convert: Callable[[Layers, Observe], Layers]
    observes: bool = False

    def bits(self, layer: nn.Module) -> tuple[int, int]:
        """Nominal bits of weight and input of what a plain layer becomes."""
        return self.weight_bits, self.activation_bits if isinstance(layer, nn.Linear) else FLOAT_BITS


@dataclass(frozen=True)
class Library:
    """A library.

    Attributes:
        name: that it is installed by.
        module: that it is imported by.
        formats: of it.
    """

    name: str
    module: str
    formats: tuple[LibraryFormat, ...]

    @property
    def installed(self) -> bool:
        """Whether it could be imported."""
        try:
            return find_spec(self.module) is not None
        except ModuleNotFoundError:  # of the package that it lies in
            return False


def library_layers(form: LibraryFormat, plain: Layers, observe: Observe) -> dict[str, nn.Module]:
    """Quantized copies of layers by name, without those that the library left in floating point.

    Args:
        form: how.
        plain: linear and convolution layers, not changed.
        observe: samples with these layers in their network.

    Raises:
        ValueError: it left them all.
        Exception: whatever the library raises.
    """
    made = form.convert(plain, observe)
    found = {name: layer for name, layer in made.items() if is_traceable_wrapper_subclass(layer.weight)}
    if not found:
        raise ValueError("no layer has a shape that it takes")
    return found


def _torchao(config: Callable[[Any], Any], plain: Layers, observe: Observe) -> Layers:
    from torchao import quantization

    made = nn.ModuleList()
    for layer in plain.values():
        made.append(copy.deepcopy(layer))
        quantization.quantize_(made[-1:], config(quantization))
    return dict(zip(plain, made, strict=True))


def _quanto(weights: str, activations: str | None, plain: Layers, observe: Observe) -> Layers:
    from optimum import quanto

    made = nn.ModuleList(copy.deepcopy(layer) for layer in plain.values())
    quanto.quantize(made, weights=weights, activations=activations)
    for layer in made:
        layer.forward = partial(_outside_inference_mode, layer.forward)
    if activations is not None:
        with quanto.Calibration():
            observe(dict(zip(plain, made, strict=True)))
    quanto.freeze(made)
    return dict(zip(plain, made, strict=True))


def _outside_inference_mode(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Without gradients, but not in the mode in which optimum-quanto's product with four-bit weights fails."""
    with torch.inference_mode(False), torch.no_grad():
        return forward(inputs)


# what settings of the compiler torchao would change are those of the whole process
def _int8(torchao: Any) -> Any:
    return torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _float8(torchao: Any) -> Any:
    return torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow(), set_inductor_config=False)


def _int4(torchao: Any) -> Any:
    # the format whose kernels torch itself has
    return torchao.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


LIBRARIES = (
    Library(
        "torchao",
        "torchao",
        (
            LibraryFormat("torchao int8", 8, 8, partial(_torchao, _int8)),
            LibraryFormat("torchao float8", 8, 8, partial(_torchao, _float8)),
            LibraryFormat("torchao int4 weights", 4, FLOAT_BITS, partial(_torchao, _int4)),
        ),
    ),
    Library(
        "optimum-quanto",
        "optimum.quanto",
        (
            LibraryFormat("optimum-quanto int8", 8, 8, partial(_quanto, "qint8", "qint8"), observes=True),
            LibraryFormat("optimum-quanto int4 weights", 4, FLOAT_BITS, partial(_quanto, "qint4", None)),
        ),
    ),
)
