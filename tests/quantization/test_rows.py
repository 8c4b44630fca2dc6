"""Rows to codes on the way of torch; the kernel's tests are in kernels/."""

import warnings

import pytest
import torch
from torch import nn

from genlight.quantization.balance import Balance, balance_input
from genlight.quantization.convert import quantize_layer
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.rows import Before, Norm, quantize_rows
from genlight.quantization.uniform import dequantize


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_of_a_transformer_is_quantized_as_its_modules_compute(symmetric: bool) -> None:
    """Norm and modulation by torch's modules, one sample at a time."""
    norm, balance = nn.LayerNorm(24, eps=1e-5), Balance(randn(24, seed=1).exp(), random_rotation(24, "full", 1))
    norm.weight.data, norm.bias.data = randn(24, seed=2), randn(24, seed=3)
    values, scale, shift = 3 * randn(2, 5, 24) + 1, randn(2, 24, seed=4), randn(2, 24, seed=5)
    before = Before(Norm("layer", 1e-5, norm.weight.detach(), norm.bias.detach()), (scale, shift), gelu="tanh")
    found = quantize_rows(values, ActivationFormat(8, symmetric), before=before, balance=balance, keep=True)
    rows = [nn.functional.gelu(norm(v) * (1 + a) + b, approximate="tanh") for v, a, b in zip(values, scale, shift)]
    expected = balance_input(torch.cat(rows), balance).detach()
    assert found.inputs is not None and torch.allclose(found.inputs, expected, atol=1e-5)
    assert bool(((dequantize(found.codes, found.grid) - expected).abs() <= 0.501 * found.grid.scale + 1e-5).all())
    assert found.sums is not None and torch.equal(found.sums.long(), found.codes.long().sum(1))


def test_root_mean_square_norm_has_its_module() -> None:
    norm, values = nn.RMSNorm(16, eps=1e-3), randn(3, 16)
    norm.weight.data = randn(16, seed=2)
    before = Before(Norm("rms", 1e-3, norm.weight.detach(), randn(16, seed=1)))
    found = quantize_rows(values, ActivationFormat(8), before=before, keep=True)
    assert found.inputs is not None
    assert torch.allclose(found.inputs, norm(values).detach() + randn(16, seed=1), atol=1e-6)


def test_what_has_no_row_scale_is_refused() -> None:
    for form in (ActivationFormat(8, granularity="tensor"), ActivationFormat(8, mode="static", granularity="tensor")):
        with pytest.raises(ValueError, match="must be dynamic per token"):
            quantize_rows(randn(2, 8), form)
    with pytest.raises(ValueError, match="at least one token"):
        quantize_rows(randn(0, 8), ActivationFormat(8))


@pytest.mark.parametrize("weight", [WeightFormat(8), WeightFormat(4, False), WeightFormat(4, True, "group", 8)])
def test_compiled_layers_are_one_graph(weight: WeightFormat) -> None:
    layer = nn.Linear(24, 10)
    for rank, symmetric in ((0, True), (4, False)):
        balance = Balance(randn(24, seed=1).exp(), random_rotation(24, "block", 1))
        quantized = quantize_layer(
            layer, LayerFormat(weight, ActivationFormat(8, symmetric)), balance=balance, rank=rank
        )
        # layers of one class share what is compiled, and torch keeps eight variants
        torch.compiler.reset()
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        for values in (randn(4, 6, 24), randn(3, 24)):
            assert torch.allclose(compiled(values), quantized(values), atol=1e-6)


def test_layers_say_once_that_nothing_is_faster() -> None:
    grouped = LayerFormat(WeightFormat(4, granularity="group", group_size=8), ActivationFormat(8))
    layers = [quantize_layer(nn.Linear(24, 10), form) for form in (grouped, grouped, LayerFormat())]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for layer in layers * 2:
            layer(randn(3, 24))
            layer(randn(0, 24))
        for layer in layers[:2]:
            layer.execution = "fake"
            layer(randn(3, 24))
    assert [str(warning.message) for warning in seen if "nothing is faster" in str(warning.message)] != []
    assert sum("nothing is faster" in str(warning.message) for warning in seen) == 1
