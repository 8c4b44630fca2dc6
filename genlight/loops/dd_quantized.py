"""A finished student of Distilled Decoding in few bits: its layers are rounded as they are, with no calibration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from genlight.loops.dd_variants import Variant
from genlight.nets.dd_student import ImageGPTStudent, Student
from genlight.nets.few_step import Decoded
from genlight.quantization.accounting import tensor_bytes
from genlight.quantization.convert import (
    LayerGroup,
    formats_of_layers,
    quantizable_layers,
    quantize_layer,
    replace_layers,
)
from genlight.quantization.formats import FLOAT_BITS, ActivationFormat, LayerFormat, WeightFormat

if TYPE_CHECKING:
    from genlight.modules.distilled_decoding import DistilledDecodingModule

# what `sample.py` reads: weights are symmetric, inputs are rounded per token as they come
FORMATS = {
    "w8": LayerFormat(WeightFormat(8), ActivationFormat(FLOAT_BITS)),
    "w8a8": LayerFormat(WeightFormat(8), ActivationFormat(8)),
    "w4": LayerFormat(WeightFormat(4, granularity="group", group_size=32, clip="mse"), ActivationFormat(FLOAT_BITS)),
}
# all between the embeddings and the heads, but the modulation of a VAR
_QUANTIZED = r"\.blocks\.|^layer_state"


def quantized_student(student: Student, form: LayerFormat) -> Student:
    """A copy of the student whose linear layers between embeddings and heads are in a format.

    Raises:
        ValueError: the student of an ImageGPT, whose layers are none of torch.
    """
    if isinstance(student, ImageGPTStudent):
        raise ValueError("quantized must be []: the layers of an ImageGPT are those of transformers, not linear ones")
    made = copy.deepcopy(student)
    forms = formats_of_layers(made, [LayerGroup(_QUANTIZED, form), LayerGroup(".*")])
    plain = quantizable_layers(made)
    replace_layers(made, {name: quantize_layer(plain[name], own) for name, own in forms.items() if own is not None})
    return made


def quantized_variants(module: DistilledDecodingModule, students: Mapping[str, Student]) -> list[Variant]:
    """One step of each student, by the names of `FORMATS`."""
    return [
        Variant(quantized_name(name), "quantized", 1, _one_step(module, student), tensor_bytes(student) / 1e6)
        for name, student in students.items()
    ]


def quantized_name(name: str) -> str:
    """The row of a format."""
    return f"student, 1 step, {name}"


def save_with_quantized(module: DistilledDecodingModule, students: Mapping[str, Student], folder: Path) -> None:
    """The module's folder, and below it one of the same kind for each quantized student, by its name."""
    module.save_pretrained(folder)
    for name, student in students.items():
        with module.with_student(student):
            module.save_pretrained(folder / name)


def _one_step(module: DistilledDecodingModule, student: Student) -> Callable[[Tensor, Tensor], Decoded]:
    groups = len(student.group_sizes)

    def run(noise: Tensor, label: Tensor) -> Decoded:
        with module.with_student(student):
            return module.decode_noise(noise, label, timesteps=(0,), split_timestep=groups)

    return run
