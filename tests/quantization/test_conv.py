"""Quantized convolutions, also at their borders."""

import pytest
import torch
from torch import nn

from genlight.quantization.balance import Balance
from genlight.quantization.conv import Geometry, QuantizedConv2d
from genlight.quantization.convert import quantize_layer
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation

FLOAT = LayerFormat(WeightFormat(16), ActivationFormat(16))
LAYERS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 2), "padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
]


def conv(options: dict[str, object]) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 6, **options)  # type: ignore[arg-type]


def image(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, 9, 11, generator=torch.Generator().manual_seed(3)) + 1.0


def balance() -> Balance:
    scale = torch.randn(8, generator=torch.Generator().manual_seed(1)).exp()
    return Balance(scale, random_rotation(8, "full", 0))


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("rank", [0, 3])
def test_without_rounding_the_output_is_that_of_the_layer(options: dict[str, object], rank: int) -> None:
    layer = conv(options)
    expected, found = layer(image()), quantize_layer(layer, FLOAT, balance=balance(), rank=rank)(image())
    assert found.shape == expected.shape
    error = (found - expected).detach().abs().max() / expected.detach().abs().max()
    assert float(error) < 1e-5


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize(
    "activation",
    [
        ActivationFormat(8, False, granularity="sample"),
        ActivationFormat(8, True, granularity="tensor"),
        ActivationFormat(6, False, "static", "tensor"),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_and_numbers_give_the_same_up_to_the_border(
    options: dict[str, object], activation: ActivationFormat, symmetric: bool
) -> None:
    ranges = torch.tensor([[[-2.0, 4.5]]]) if activation.mode == "static" else None
    form = LayerFormat(WeightFormat(8, symmetric), activation)
    layer = quantize_layer(conv(options), form, balance=balance(), activation_range=ranges)
    for values in (image(), torch.full((2, 8, 5, 5), 0.7)):
        layer.execution = "integer"
        integer = layer(values)
        layer.execution = "fake"
        assert torch.allclose(integer, layer(values), atol=2e-5)


def test_an_integer_convolution_does_multiply_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantize_layer(conv({"kernel_size": 3}), LayerFormat(activation=ActivationFormat(granularity="sample")))
    monkeypatch.setattr(nn.functional, "conv2d", None)
    assert layer(image()).shape == (3, 6, 7, 9)


def test_geometry_is_that_of_torch() -> None:
    for options in LAYERS:
        layer = conv(options)
        where, values = Geometry.of(layer), image()
        expected = layer(values)
        assert where.output_size(9, 11) == expected.shape[2:]
        product = where.patches(where.pad(values)) @ layer.weight.flatten(1).t()
        made = product.unflatten(0, (len(values), *expected.shape[2:])).permute(0, 3, 1, 2)
        bias = 0 if layer.bias is None else layer.bias[:, None, None]
        assert torch.allclose(made + bias, expected, atol=1e-5)


def test_samples_do_not_see_each_other() -> None:
    form = LayerFormat(WeightFormat(4), ActivationFormat(8, False, granularity="sample"))
    layer = quantize_layer(conv({"kernel_size": 3, "padding": 1}), form)
    values = image() * torch.tensor([0.1, 1, 30])[:, None, None, None]
    assert torch.allclose(layer(values), torch.cat([layer(part) for part in values.split(1)]), rtol=1e-5, atol=1e-6)


def test_groups_are_rounded_but_not_balanced() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=4)
    form = LayerFormat(WeightFormat(8), ActivationFormat(8, granularity="sample"))
    quantized = quantize_layer(layer, form)
    assert isinstance(quantized, QuantizedConv2d)
    assert torch.allclose(quantized(image()), layer(image()), atol=0.05)
    for parts in ({"balance": balance()}, {"rank": 1}):
        with pytest.raises(ValueError, match="groups = 4"):
            quantize_layer(layer, form, **parts)  # type: ignore[arg-type]
    gptq = LayerFormat(WeightFormat(8, rounding="gptq"), ActivationFormat(8, granularity="sample"))
    with pytest.raises(ValueError, match="groups = 4"):
        quantize_layer(layer, gptq, hessian=torch.eye(18))


def test_one_scale_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="sums over pixels"):
        quantize_layer(conv({"kernel_size": 1}), LayerFormat())
