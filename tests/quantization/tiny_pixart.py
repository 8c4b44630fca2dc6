"""A small transformer of diffusers, and its conversion as a calibration does it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from genlight.quantization.balance import Balance, balance_scale
from genlight.quantization.convert import LayerGroup, formats_of_layers, quantize_layer, replace_layers
from genlight.quantization.diffusers_format import marked_quantized
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.observers import InputObserver, layers_by_input
from genlight.quantization.statistics import StatisticsSettings

W4A8 = LayerFormat(WeightFormat(4), ActivationFormat(8))
KEPT = r"pos_embed|adaln_single|caption_projection|^proj_out|norm"
PIXART = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 2,
    "cross_attention_dim": 64,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 32,
    "norm_num_groups": 1,
    "use_additional_conditions": False,
    "interpolation_scale": 1,
}


def pixart() -> diffusers.PixArtTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(**PIXART).eval()


def call(model: nn.Module, timestep: float = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    image, text = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 1, 8, 8), (2, 3, 32)))
    conditions = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model(image, text, timestep=torch.tensor([timestep] * 2), added_cond_kwargs=conditions).sample


def save_altered(model: nn.Module, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Save a quantized network whose config then is changed."""
    with marked_quantized(model, {}):
        model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))


def converted(
    form: LayerFormat = W4A8, balanced: bool = True, model: diffusers.PixArtTransformer2DModel | None = None
) -> diffusers.PixArtTransformer2DModel:
    """As a calibration does it: who shares an input, statistics in one pass, balance by group, rounding."""
    model = model or pixart()
    groups = [LayerGroup(KEPT), LayerGroup(".*", form)]
    forms = {name: found for name, found in formats_of_layers(model, groups).items() if found is not None}
    observer = InputObserver(model, list(forms), StatisticsSettings(hessian=torch.float32))
    with observer:
        call(model)
    layers: dict[str, nn.Module] = {}
    for index, names in enumerate(layers_by_input(model, list(forms), lambda: call(model))):
        weights = [model.get_submodule(name).weight for name in names]
        statistics = observer.statistics[names[0]]
        scale = balance_scale(statistics.absmax[0, 0], weights, 0.3)
        rotation = random_rotation(weights[0].shape[1], "full", index)
        balance = Balance(scale, rotation) if balanced else Balance()
        for name in names:
            layer = model.get_submodule(name)
            layers[name] = quantize_layer(layer, form, balance=balance, hessian=statistics.hessian)
    replace_layers(model, layers)
    return model
