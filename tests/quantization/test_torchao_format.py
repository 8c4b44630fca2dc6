"""Quantized layers as torchao's tensors, saved and loaded by diffusers alone."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import diffusers
import pytest
import torch
from quantization.tiny_pixart import call, pixart
from safetensors.torch import load_file
from torch import nn

from genlight.quantization.balance import Balance
from genlight.quantization.convert import quantize_layer, quantized_layers, replace_layers
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.torchao_format import as_torchao, check_for_torchao, what_torchao_cannot_hold

W8A8 = LayerFormat(WeightFormat(8, symmetric=True))
W8 = LayerFormat(WeightFormat(8, symmetric=True), ActivationFormat(16))
# the same call as tiny_pixart's, in a process without genlight
PROGRAM = """
import sys
sys.modules["genlight"] = None
import diffusers, torch
from safetensors.torch import save_file
model = diffusers.PixArtTransformer2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
weights = [layer.weight for name, layer in model.named_modules() if name.endswith("ff.net.2")]
assert len(weights) == 2 and all(type(weight).__name__ == "Int8Tensor" for weight in weights), weights
generator = torch.Generator().manual_seed(1)
image, text = (torch.randn(*shape, generator=generator) for shape in ((2, 1, 8, 8), (2, 3, 32)))
sizes = {"resolution": None, "aspect_ratio": None}
with torch.no_grad():
    output = model(image, text, timestep=torch.tensor([7, 7]), added_cond_kwargs=sizes).sample
save_file({"output": output.contiguous()}, sys.argv[1] + "/output.safetensors")
"""
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def scaled(form: LayerFormat) -> nn.Module:
    """A tiny PixArt whose attention and feed-forward layers are quantized, with a scale by channel."""
    model = pixart()
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in n]
    layers = {
        name: quantize_layer(layer, form, balance=Balance(torch.linspace(0.5, 2, layer.in_features)))
        for name, layer in named
    }
    replace_layers(model, layers)
    return model


@needs_torchao
@pytest.mark.parametrize("form", [W8A8, W8], ids=["W8A8", "W8"])
def test_plain_diffusers_computes_what_the_quantized_network_does(form: LayerFormat, tmp_path: Path) -> None:
    model = scaled(form)
    layers = quantized_layers(model)
    with as_torchao(model, layers):
        model.save_pretrained(tmp_path)
    assert quantized_layers(model).keys() == layers.keys() and not hasattr(model, "hf_quantizer")
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], check=True, capture_output=True)
    found, expected = load_file(tmp_path / "output.safetensors")["output"], call(model)
    error = float((found - expected).norm() / expected.norm())
    # both round inputs to 8 bits, one on 254 steps of the range and one on 255
    assert error < (0.02 if form is W8A8 else 1e-5)


@needs_torchao
def test_what_it_cannot_hold_is_named_with_its_layer() -> None:
    model = scaled(LayerFormat(WeightFormat(4, symmetric=True)))
    with (
        pytest.raises(ValueError, match=r"transformer_blocks\.0.*weight_bits=8"),
        as_torchao(model, quantized_layers(model)),
    ):
        pass
    assert isinstance(model, diffusers.PixArtTransformer2DModel) and call(model).isfinite().all()


@pytest.mark.parametrize(
    ("form", "word"),
    [
        (LayerFormat(WeightFormat(8, False)), "weight_symmetric=true"),
        (LayerFormat(WeightFormat(8, True, "group", 24)), "weight_group_size=null"),
        (LayerFormat(WeightFormat(8, True, "tensor")), "scale for each output"),
        (LayerFormat(WeightFormat(8, True), ActivationFormat(8, False)), "activation_symmetric=true"),
        (LayerFormat(WeightFormat(8, True), ActivationFormat(8, True, "static", "tensor")), "each token"),
    ],
)
def test_formats_it_has_no_place_for(form: LayerFormat, word: str) -> None:
    assert word in (what_torchao_cannot_hold(form) or "")


def test_formats_it_has_a_place_for() -> None:
    assert what_torchao_cannot_hold(W8A8) is None and what_torchao_cannot_hold(W8) is None


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_without_torchao_one_line_says_so() -> None:
    with pytest.raises(ValueError, match="pip install 'torchao"):
        check_for_torchao(nn.Linear(2, 2), {})
