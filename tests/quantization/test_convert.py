"""Conversion of whole models by patterns: the layers it must find, and what it leaves of their output."""

import re
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.quantizers.quantization_config import QuantoConfig
from quantization.tiny_pixart import KEPT, PIXART, W4A8, call, converted, pixart
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.pytorch_utils import Conv1D

from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_settings import KEPT as DEFAULT
from genlight.loops.quantization_settings import GroupSettings, formats_by_layer
from genlight.quantization.convert import (
    GROUPED,
    LayerGroup,
    formats_of_layers,
    layers_left_out,
    quantizable_layers,
    quantize_layer,
    quantize_split,
    quantized_layers,
    replace_layers,
    set_execution,
)
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.observers import layers_by_input


def test_known_models_have_the_layers_they_should() -> None:
    """PixArt 28 blocks of 10, DiT-XL 28 of 6, and of SDXL's U-Net all 743 linear layers and 51 convolutions."""
    groups = [LayerGroup(KEPT), LayerGroup(r"attn|ff", W4A8)]
    with torch.device("meta"):
        large = diffusers.PixArtTransformer2DModel(**{**PIXART, "num_layers": 28})
        dit = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=28, sample_size=8)
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[2, 4, 8],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=8,
        )
    for model, number in ((large, 280), (dit, 168)):
        chosen = [name for name, form in formats_of_layers(model, groups).items() if form is not None]
        assert len(chosen) == number and not any("pos_embed" in name for name in chosen)
    layers = quantizable_layers(unet)
    assert len(layers) == 794 and sum(isinstance(layer, nn.Conv2d) for layer in layers.values()) == 51
    content = [LayerGroup(r"\.attn2\.|\.ff\.", W4A8), LayerGroup(".*")]
    assert sum(form is not None for form in formats_of_layers(unet, content).values()) == 420


# of published models, by the classes' own defaults where nothing is said: blocks of each kind, and what is quantized
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "FLUX.1": ("FluxTransformer2DModel", {}, 19 * 12 + 38 * 5),
    # the last block makes no text
    "SD3 medium": ("SD3Transformer2DModel", {"num_layers": 24}, 23 * 12 + 9),
    "CogVideoX-2b": ("CogVideoXTransformer3DModel", {}, 30 * 6),
    "Latte-1": (
        "LatteTransformer3DModel",
        {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
         "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 64, "patch_size": 2,
         "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "video_length": 16},
        28 * 10 + 28 * 6,
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, 60 * 12),
    # both refiners have two blocks
    "Z-Image": ("ZImageTransformer2DModel", {}, 34 * 7),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_transformers_have_the_layers_that_were_counted(name: str) -> None:
    """Attention and feed-forward layers of every block, and nothing else."""
    kind, settings, number = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**settings)
    forms = formats_of_layers(model, [LayerGroup(DEFAULT), LayerGroup(".*", W4A8)])
    chosen = [layer for layer, form in forms.items() if form is not None]
    blocks = [layer for layer in chosen if re.match(r"(\w+_)?(transformer_)?blocks|layers|\w+_refiner", layer)]
    assert len(chosen) == number == len(blocks)


def test_patterns_that_do_not_fit_are_refused() -> None:
    model = nn.ModuleDict({"buffer": nn.Linear(4, 4), "ff": nn.Linear(4, 4)})
    assert formats_of_layers(model, [LayerGroup("^ff", W4A8), LayerGroup(".*")]) == {"buffer": None, "ff": W4A8}
    for patterns in (["ff", "absent", ".*"], ["^ff"], ["("], []):
        with pytest.raises(ValueError, match="groups"):
            formats_of_layers(model, [LayerGroup(pattern) for pattern in patterns])
    with pytest.raises(ValueError, match="no linear"):
        quantizable_layers(nn.ReLU())
    with pytest.raises(ValueError, match="'absent' is no layer"):
        replace_layers(model, {"ff": nn.Identity(), "absent": nn.Identity()})
    assert isinstance(model["ff"], nn.Linear)
    with pytest.raises(ValueError, match="execution"):
        set_execution(nn.Sequential(quantize_layer(nn.Linear(4, 4), W4A8)), "slow")


def test_layers_that_compute_otherwise_are_left_out() -> None:
    """torch's attention reads the weight of its output layer and never calls it."""
    assert list(quantizable_layers(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)))) == ["1"]


def test_layers_that_are_left_out_have_a_reason() -> None:
    """All that has a weight, however it is kept; not norms and biases."""
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Conv3d(1, 1, 1), nn.Conv1d(1, 1, 1),
        Conv1D(8, 8), nn.Embedding(4, 8), nn.LayerNorm(8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    )  # fmt: skip
    otherwise = "a subclass, which may compute otherwise"
    assert layers_left_out(model, {"0"}) == {
        "1": ("Linear", "a pattern keeps it"),
        "2": ("MultiheadAttention", "no quantized form"),
        "2.out_proj": ("NonDynamicallyQuantizableLinear", otherwise),
        "3": ("Conv3d", "no quantized form"),
        "4": ("Conv1d", "no quantized form"),
        "5": ("Conv1D", "no quantized form"),
        "6": ("Embedding", "no quantized form"),
        "8": ("ParametrizedLinear", otherwise),
    }


def test_convolutions_in_groups_of_channels_are_left_out_where_they_cannot_be_balanced() -> None:
    model = nn.ModuleDict({"stem": nn.Conv2d(4, 8, 1), "depth": nn.Conv2d(8, 8, 3, groups=8), "ff": nn.Linear(8, 8)})
    nearest, gptq = WeightFormat(4), WeightFormat(4, rounding="gptq")
    chosen = {}
    for key, weight, whole in (("plain", nearest, False), ("balanced", nearest, True), ("gptq", gptq, False)):
        form = LayerFormat(weight, ActivationFormat(8))
        forms, groups = formats_by_layer(model, form, "^stem", [GroupSettings()], whole=whole)
        chosen[key] = list(forms)
        assert forms.keys() == groups.keys()
    assert chosen == {"plain": ["depth", "ff"], "balanced": ["ff"], "gptq": ["ff"]}
    reasons = layers_left_out(model, ["ff"], "^stem")
    assert reasons == {"stem": ("Conv2d", "a pattern keeps it"), "depth": ("Conv2d", GROUPED)}
    ways = {"balance": "none", "rounding": "nearest", "rivals": False}
    assert not QuantizationCalibration(**ways).balances
    for change in ({"rank": 1}, {"balance": "rotation"}, {"rivals": True}):
        assert QuantizationCalibration(**{**ways, **change}).balances


def test_what_another_library_quantized_is_refused() -> None:
    """torchao keeps the class of a layer and changes its weight; others leave a mark where diffusers loaded them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(TwoTensor(torch.zeros(4, 4), torch.zeros(4, 4)), requires_grad=False)
    with pytest.raises(ValueError, match="quantized or split already: the weight of '1' is a TwoTensor"):
        quantizable_layers(model)
    marked: Any = nn.Sequential(nn.Linear(4, 4))
    marked.hf_quantizer = SimpleNamespace(quantization_config=QuantoConfig())
    with pytest.raises(ValueError, match="quantized already: by quanto"):
        quantizable_layers(marked)


def sqnr(found: Tensor, expected: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


def test_query_key_and_value_share_their_input() -> None:
    model = pixart()
    names = [name for name in quantizable_layers(model) if "transformer_blocks.0.attn" in name]
    groups = layers_by_input(model, names, lambda: call(model))
    assert {tuple(name.removeprefix("transformer_blocks.0.") for name in group) for group in groups} == {
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn1.to_out.0",),
        ("attn2.to_q",),
        ("attn2.to_k", "attn2.to_v"),
        ("attn2.to_out.0",),
    }


def test_a_converted_transformer_stays_near_and_gptq_brings_it_nearer() -> None:
    expected = call(pixart())
    w8, w4 = (LayerFormat(WeightFormat(bits), ActivationFormat(8)) for bits in (8, 4))
    gptq = LayerFormat(WeightFormat(4, rounding="gptq"), ActivationFormat(8))
    eight, four, four_gptq = (sqnr(call(converted(form)), expected) for form in (w8, w4, gptq))
    assert eight > 30 and eight > four + 10 and four_gptq > four + 2
    untouched = LayerFormat(WeightFormat(16), ActivationFormat(16))
    assert sqnr(call(converted(untouched)), expected) > 100
    model = converted(w8)
    assert len(quantized_layers(model)) == 20
    integer = call(model)
    set_execution(model, "fake")
    assert sqnr(integer, call(model)) > 60
    with pytest.raises(ValueError, match="quantized already"):
        quantizable_layers(model)


def two_maps() -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(3)
    conv, values = nn.Conv2d(6, 5, 3, padding=1), torch.randn(2, 6, 7, 7)
    with torch.no_grad():
        conv.weight[:, 4:] *= 50
    values[:, 4:] *= 0.02
    return conv, values


def halves(conv: nn.Conv2d) -> list[nn.Conv2d]:
    """Two convolutions of torch, the first with the bias."""
    parts = [nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(2, 5, 3, padding=1, bias=False)]
    with torch.no_grad():
        parts[0].weight.copy_(conv.weight[:, :4])
        parts[1].weight.copy_(conv.weight[:, 4:])
        parts[0].bias.copy_(conv.bias)
    return parts


def test_a_split_convolution_is_two_convolutions_and_one_bias() -> None:
    conv, values = two_maps()
    form = LayerFormat(WeightFormat(4), ActivationFormat(4, False, "static", "tensor"))
    maps = [values[:, :4], values[:, 4:]]
    ranges = torch.stack([torch.stack(one.aminmax()) for one in maps])
    split = quantize_split(conv, form, 4, ranges)
    apart = [
        quantize_layer(part, form, activation_range=bounds[None, None])
        for part, bounds in zip(halves(conv), ranges, strict=True)
    ]
    set_execution(nn.ModuleList([split, *apart]), "fake")
    expected = sum(part(one) for part, one in zip(apart, maps, strict=True))
    assert torch.allclose(split(values), expected, rtol=1e-5, atol=1e-5)
    whole = quantize_layer(conv, form, activation_range=torch.stack(values.aminmax()).reshape(1, 1, 2))
    errors = [(layer(values) - conv(values)).square().mean() for layer in (split, whole)]
    assert errors[0] < 0.5 * errors[1]


def test_a_split_in_floating_point_is_the_convolution() -> None:
    conv, values = two_maps()
    split = quantize_split(conv, LayerFormat(WeightFormat(16), ActivationFormat(16)), 4)
    assert torch.allclose(split(values), conv(values), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="channels = 6 must lie between 0 and the 6"):
        quantize_split(conv, LayerFormat(WeightFormat(8), ActivationFormat(16)), 6)


def test_a_split_with_one_scale_for_both_maps_is_refused() -> None:
    """As a range that is measured as inputs come would be."""
    conv, _ = two_maps()
    for granularity in ("sample", "tensor"):
        form = LayerFormat(WeightFormat(4), ActivationFormat(8, granularity=granularity))
        with pytest.raises(ValueError, match="mode = 'dynamic' must be 'static'"):
            quantize_split(conv, form, 4, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="split_shortcuts needs activation_mode = 'static'"):
        QuantizationCalibration(split_shortcuts=True, rounding="nearest")
