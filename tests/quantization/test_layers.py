"""Quantized linear layers: one function in floating point, in numbers and in integers."""

import copy

import pytest
import torch
from torch import nn

from genlight.quantization.balance import Balance
from genlight.quantization.context import SamplingContext, sampling_context
from genlight.quantization.convert import quantize_layer
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.layers import LayerParts, QuantizedLinear
from genlight.quantization.weights import quantize_weight

FLOAT = LayerFormat(WeightFormat(16), ActivationFormat(16))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(inputs: int = 24, outputs: int = 10, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs, dtype=dtype)


def static_dynamic(channels: int = 24) -> Balance:
    return Balance(randn(channels, seed=5).exp(), random_rotation(channels, "full", 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("rank", [0, 4])
def test_without_rounding_the_output_is_that_of_the_layer(dtype: torch.dtype, tolerance: float, rank: int) -> None:
    layer, values = linear(dtype=dtype), randn(3, 7, 24, dtype=dtype)
    quantized = quantize_layer(layer, FLOAT, balance=static_dynamic(), rank=rank)
    expected, found = layer(values).detach(), quantized(values)
    assert found.dtype == dtype
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    assert torch.allclose(quantized.effective_weight().to(dtype), layer.weight, atol=1e-4)


def test_without_rounding_and_balance_the_output_is_equal() -> None:
    layer, values = linear(), randn(5, 24)
    assert torch.equal(quantize_layer(layer, FLOAT)(values), nn.functional.linear(values, layer.weight) + layer.bias)


@pytest.mark.parametrize("weight", [WeightFormat(8), WeightFormat(4, False), WeightFormat(2)])
@pytest.mark.parametrize(
    "activation",
    [
        ActivationFormat(8),
        ActivationFormat(4, False),
        ActivationFormat(8, False, granularity="sample"),
        ActivationFormat(8, True, granularity="tensor"),
        ActivationFormat(8, False, "static", "tensor"),
    ],
)
@pytest.mark.parametrize("balance", [Balance(), static_dynamic()])
def test_integers_and_numbers_give_the_same(
    weight: WeightFormat, activation: ActivationFormat, balance: Balance, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, values = linear(), randn(4, 6, 24) + 0.5
    ranges = torch.tensor([[[-3.0, 4.0]]]) if activation.mode == "static" else None
    quantized = quantize_layer(layer, LayerFormat(weight, activation), balance=balance, rank=2, activation_range=ranges)
    assert quantized.uses_integers(24)
    integer = quantized(values)
    monkeypatch.setattr("genlight.quantization.layers._ROWS_OF_A_CORE", 1)  # as many rows as threads at a time
    difference = (quantized(values) - integer).abs()
    # a rotation's last bit depends on how many rows there are, and may move a code
    assert float(difference.mean()) <= (0 if balance.rotation is None else 1e-3)
    quantized.execution = "fake"
    assert not quantized.uses_integers(24)
    assert torch.allclose(integer, quantized(values), atol=2e-5)
    assert torch.isfinite(integer).all()


def test_groups_and_unrounded_inputs_are_multiplied_as_numbers() -> None:
    grouped = LayerFormat(WeightFormat(4, granularity="group", group_size=7), ActivationFormat(8))
    layer = quantize_layer(linear(), grouped)
    assert not layer.uses_integers(64) and layer(randn(64, 24)).shape == (64, 10)
    weight_only = quantize_layer(linear(), LayerFormat(WeightFormat(4), ActivationFormat(16)))
    assert not weight_only.uses_integers(64)
    values = randn(3, 24)
    expected = nn.functional.linear(values, weight_only.effective_weight(), weight_only.bias)
    assert torch.allclose(weight_only(values), expected, atol=1e-6)


@pytest.mark.parametrize("execution", ["integer", "fake"])
def test_samples_and_branches_do_not_see_each_other(execution: str) -> None:
    form = LayerFormat(WeightFormat(4), ActivationFormat(8))
    layer = quantize_layer(linear(), form, balance=static_dynamic())
    layer.execution = execution  # type: ignore[assignment]
    values = randn(4, 6, 24) * torch.tensor([0.01, 1, 100, 3])[:, None, None]
    alone = torch.cat([layer(part) for part in values.split(1)])
    assert torch.allclose(layer(values), alone, rtol=1e-5, atol=1e-6)


def test_balanced_weights_are_rounded_once() -> None:
    layer = quantize_layer(linear(), LayerFormat(WeightFormat(3)), balance=static_dynamic())
    assert max(len(row.unique()) for row in layer.weight_matrix) <= 8


def test_more_rank_leaves_less_to_round() -> None:
    layer, values = linear(64, 64), randn(100, 64)
    layer.weight.data = randn(64, 64) + 3 * randn(64, 8, seed=1) @ randn(8, 64, seed=2)
    expected = layer(values).detach()
    form = LayerFormat(WeightFormat(3), ActivationFormat(16))
    errors = [float((quantize_layer(layer, form, rank=r)(values) - expected).square().sum()) for r in (0, 8, 32)]
    assert errors[0] > 4 * errors[1] > 8 * errors[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_a_model_keeps_its_scales(dtype: torch.dtype) -> None:
    layer = quantize_layer(linear(), LayerFormat(WeightFormat(4)), balance=static_dynamic(), rank=2)
    before = copy.deepcopy(layer)
    model = nn.Sequential(layer).to(dtype)
    assert torch.equal(layer.weight_matrix, before.weight_matrix)
    assert layer.input_scale is not None and layer.input_scale.dtype == torch.float32
    assert layer.bias is not None and layer.bias.dtype == dtype
    found = model(randn(3, 24).to(dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), before(randn(3, 24)), atol=0.1)


def test_weights_take_the_memory_of_their_bits() -> None:
    for bits, bytes_of_a_weight in ((8, 1.0), (4, 0.5), (3, 0.5), (2, 0.25)):
        layer = quantize_layer(linear(256, 512), LayerFormat(WeightFormat(bits)))
        held = sum(part.untyped_storage().nbytes() for part in layer.buffers())
        # codes, a scale a row, a bias
        assert held == 256 * 512 * bytes_of_a_weight + 512 * 4 + 512 * 4


def test_state_is_loaded_into_a_layer_of_the_same_form() -> None:
    form = LayerFormat(WeightFormat(4, False), ActivationFormat(8))
    torch.manual_seed(8)
    other = quantize_layer(nn.Linear(24, 10), form, balance=Balance(torch.ones(24), random_rotation(24, "full", 9)))
    layer = quantize_layer(linear(), form, balance=static_dynamic())
    values = randn(5, 24)
    assert not torch.allclose(other(values), layer(values))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(values), layer(values))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_the_same_in_every_call_is_kept_and_follows_the_weights(bits: int) -> None:
    form = LayerFormat(WeightFormat(bits, False), ActivationFormat(8, False, "static", "tensor"))
    ranges = torch.tensor([[[-3.0, 4.0], [-1.0, 5.0]]])
    layer = quantize_layer(linear(), form, activation_range=ranges)
    torch.manual_seed(8)
    other = quantize_layer(nn.Linear(24, 10), form, activation_range=2 * ranges)
    other.load_state_dict(layer.state_dict())
    other.to(torch.bfloat16)
    weight, names = other.quantized_weight, ("weight_sums", "static_scale", "static_zero_point")
    assert weight is not None and torch.equal(weight.row_sums(), weight.unpacked().long().sum(1).int())
    assert all(getattr(other, name) is not None and name not in layer.state_dict() for name in names)
    with sampling_context(SamplingContext(step=1, num_steps=2)):
        kept = other(randn(5, 24).bfloat16())
        for name in names:
            setattr(other, name, None)
        assert torch.equal(other(randn(5, 24).bfloat16()), kept)


def test_odd_inputs() -> None:
    layer = quantize_layer(linear(), LayerFormat())
    assert layer(randn(24)).shape == (10,)
    assert layer(randn(0, 24)).shape == (0, 10)
    zeros = layer(torch.zeros(2, 24))
    assert torch.equal(zeros, layer.bias.expand(2, 10))  # type: ignore[union-attr]
    assert not bool(torch.isfinite(layer(torch.full((1, 24), torch.nan))).any())


@pytest.mark.parametrize("rank", [0, 4])
def test_what_stays_in_floating_point_keeps_the_type_of_the_layer(rank: int) -> None:
    layer = linear(dtype=torch.bfloat16)
    quantized = quantize_layer(layer, FLOAT, balance=static_dynamic(), rank=rank)
    parts = (quantized.float_weight, quantized.bias, quantized.up, quantized.down)
    assert all(part is None or part.dtype == torch.bfloat16 for part in parts)
    values = randn(5, 24).bfloat16()
    assert torch.allclose(quantized(values).float(), layer(values).float(), atol=0.03)


def test_ranges_must_fit_the_format() -> None:
    weight = quantize_weight(randn(4, 8), WeightFormat(8))
    static = LayerFormat(activation=ActivationFormat(8, mode="static", granularity="tensor"))
    with pytest.raises(ValueError, match="activation_range"):
        QuantizedLinear(static, weight)
    with pytest.raises(ValueError, match="activation_range"):
        QuantizedLinear(LayerFormat(), weight, LayerParts(activation_range=torch.zeros(1, 1, 2)))
    with pytest.raises(ValueError, match="balance is of 5 channels"):
        quantize_layer(linear(), LayerFormat(), balance=Balance(torch.ones(5)))
