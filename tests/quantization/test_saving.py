"""A quantized model on disk."""

from pathlib import Path

import pytest
import torch
from quantization.tiny_pixart import W4A8, call, converted, pixart
from torch import nn

from genlight.io import CorruptFileError, load_tensors, save_tensors
from genlight.quantization.balance import Balance
from genlight.quantization.convert import quantize_layer, replace_layers
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.saving import load_quantized, plans_of, save_quantized


@pytest.mark.parametrize(
    "form",
    [
        W4A8,
        LayerFormat(WeightFormat(2, False, "group", 24), ActivationFormat(8, False, granularity="tensor")),
        LayerFormat(WeightFormat(16), ActivationFormat(6)),
    ],
)
def test_a_saved_model_comes_back_bit_for_bit(form: LayerFormat, tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", converted(form)
    save_quantized(path, model)
    torch.rand(3)
    other = pixart()
    load_quantized(path, other)
    assert torch.equal(call(other), call(model))
    assert plans_of(other) == plans_of(model)
    state = other.state_dict()
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())


def test_convolutions_and_branches_come_back(tmp_path: Path) -> None:
    path, static = tmp_path / "model.safetensors", ActivationFormat(8, False, "static", "tensor")
    plain = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(96, 4))
    layers = {
        "0": quantize_layer(
            plain[0], LayerFormat(WeightFormat(4), static), rank=2, activation_range=torch.tensor([[[-3.0, 3]]])
        ),
        "2": quantize_layer(plain[2], W4A8, balance=Balance(None, random_rotation(96, "block", 0))),
    }
    model = nn.Sequential(*plain)
    replace_layers(model, layers)
    save_quantized(path, model)
    other = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    load_quantized(path, other)
    values = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(values), model(values))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", converted()
    with pytest.raises(ValueError, match="no quantized layer"):
        save_quantized(path, pixart())
    save_quantized(path, model)
    with pytest.raises(ValueError, match="no layer inside the model"):
        load_quantized(path, nn.Linear(3, 3))
    tensors, metadata = load_tensors(path)
    name = next(name for name in tensors if name.endswith("weight_codes"))
    save_tensors(path, {key: part for key, part in tensors.items() if key != name}, metadata)
    with pytest.raises(CorruptFileError, match="weight is missing"):
        load_quantized(path, pixart())
    save_tensors(path, tensors, {**metadata, "plan": metadata["plan"].replace('"bits":4', '"bits":40')})
    with pytest.raises(CorruptFileError, match="plan"):
        load_quantized(path, pixart())
    save_tensors(path, tensors, {})
    with pytest.raises(CorruptFileError, match="not a quantized model"):
        load_quantized(path, pixart())
