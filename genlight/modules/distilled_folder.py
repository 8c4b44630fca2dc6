"""Folders of distilled students: safetensors and JSON, with a program beside them that needs torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from genlight import io
from genlight.modules import exported_student
from genlight.modules.artifact_kind import STUDENT
from genlight.modules.exported_student import CONFIG, WEIGHTS
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer
from genlight.quantization.convert import quantized_layers

if TYPE_CHECKING:
    from genlight.modules.distilled_decoding import DistilledDecodingModule

PROGRAM = "sample.py"


def save_student(module: DistilledDecodingModule, folder: Path) -> None:
    """Write ``student.safetensors``, ``config.json`` and ``sample.py``: all that samples, the decoder included.

    Layers of a student in few bits keep their codes and scales.
    """
    tokenizer, quantizer = module.teacher.tokenizer, module.teacher.model.quantizer
    parts: dict[str, nn.Module] = {"student": module.student}
    if isinstance(tokenizer, VQTokenizer):
        parts |= {"decoder": tokenizer.decoder, "post_quant_conv": tokenizer.post_quant_conv}
    described: dict[str, Any] = {"class": type(quantizer).__name__}
    if isinstance(quantizer, ResidualQuantizer):
        parts["quantizer.phi"] = quantizer.phi
        described |= {"phi_of_scale": list(quantizer.phi_of_scale), "phi_ratio": quantizer.phi_ratio}
    weights = {f"{part}.{key}": value for part, of in parts.items() for key, value in of.state_dict().items()}
    weights["codebook"] = quantizer.codebook
    io.save_tensors(folder / WEIGHTS, {key: value.detach().cpu().contiguous() for key, value in weights.items()})
    io.atomic_write_json(folder / CONFIG, {**_record(module), "quantizer": described})
    io.atomic_write_bytes(folder / PROGRAM, Path(exported_student.__file__).read_bytes())


def _record(module: DistilledDecodingModule) -> dict[str, Any]:
    groups, tokenizer = len(module.student.group_sizes), module.teacher.tokenizer
    record: dict[str, Any] = {
        "kind": STUDENT,
        "version": 1,
        **module.description(),
        "timesteps": list(module.sampling_timesteps()),
        "trained_timesteps": list(module.timesteps),
        "split_timestep": groups if module.split_timestep is None else module.split_timestep,
        "norm_num_groups": tokenizer.config.get("norm_num_groups"),
        "image_shape": list(module.image_shape),
        # what samples have unless the student can be told another: see student.guidance_range
        "guidance_scale": module.settings.guidance_scale,
    }
    layers = list(quantized_layers(module.student).values())
    if layers:
        # what their tensors do not say; all have the same format
        weight, activation = layers[0].form.weight, layers[0].form.activation
        bits = {"weight_bits": weight.bits, "activation_bits": activation.bits}
        record["quantization"] = {**bits, "group_size": weight.group_size}
    return record
