"""Integer products against exact arithmetic in 64 bits."""

import pytest
import torch

from genlight.quantization.activations import activation_grid
from genlight.quantization.formats import ActivationFormat, WeightFormat
from genlight.quantization.integer import integer_is_valid, integer_linear
from genlight.quantization.uniform import dequantize, quantize
from genlight.quantization.weights import quantize_weight


@pytest.mark.parametrize("weight_symmetric", [True, False])
@pytest.mark.parametrize("input_symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 3, 5), (17, 40, 24), (33, 129, 7)])
def test_products_are_exact(
    weight_symmetric: bool, input_symmetric: bool, granularity: str, rows: int, columns: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, columns, generator=generator) + 0.7
    weight = quantize_weight(
        torch.randn(outputs, columns, generator=generator) - 0.2, WeightFormat(8, weight_symmetric)
    )
    grid = activation_grid(values, ActivationFormat(8, input_symmetric, "dynamic", granularity))  # type: ignore[arg-type]
    codes = quantize(values, grid)
    assert integer_is_valid(rows, weight)
    exact = dequantize(codes, grid).double() @ weight.dequantized().double().t()
    found = integer_linear(codes, grid, weight)
    assert found.dtype == torch.float32
    # the numbers that codes stand for are rounded to float32 themselves
    scale = dequantize(codes, grid).double().abs() @ weight.dequantized().double().abs().t()
    assert bool(((found - exact).abs() <= 1e-6 * scale).all())


def test_sums_of_the_greatest_codes_do_not_overflow() -> None:
    """Where a processor sums pairs in 16 bits, 127 · 127 twice would saturate."""
    for value in (127, -128):
        codes = torch.full((32, 4096), value, dtype=torch.int8)
        other = torch.full((16, 4096), -128, dtype=torch.int8)
        assert bool((torch._int_mm(codes, other.t()).long() == codes.long() @ other.long().t()).all())


def test_random_codes_are_multiplied_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, outputs in ((1, 8, 8), (5, 1152, 33), (64, 77, 64)):
        first = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
        second = torch.randint(-128, 128, (outputs, columns), generator=generator).to(torch.int8)
        assert torch.equal(torch._int_mm(first, second.t()).long(), first.long() @ second.long().t())


def test_groups_and_very_long_sums_are_not_multiplied_in_integers() -> None:
    weight = torch.ones(4, 64)
    assert not integer_is_valid(8, quantize_weight(weight, WeightFormat(8, granularity="group", group_size=16)))
    assert not integer_is_valid(0, quantize_weight(weight, WeightFormat(8)))
    assert not integer_is_valid(8, quantize_weight(torch.ones(1, 40_000), WeightFormat(8)))
