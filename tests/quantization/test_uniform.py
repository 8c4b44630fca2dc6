"""The uniform quantizer against its closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.quantization.uniform import (
    BITS,
    Grid,
    code_range,
    dequantize,
    fake_quantize,
    grid_from_range,
    quantize,
)


def grid_of(values: torch.Tensor, bits: int, symmetric: bool) -> Grid:
    return grid_from_range(values.min(), values.max(), bits, symmetric=symmetric)


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_an_asymmetric_grid_use_all_levels_and_hit_both_ends(bits: int) -> None:
    values = torch.linspace(-1.0, 3.0, 4001)
    grid = grid_of(values, bits, False)
    codes = quantize(values, grid).long()
    assert (int(codes.min()), int(codes.max())) == code_range(bits)
    assert len(codes.unique()) == 2**bits
    assert float(grid.scale) == pytest.approx(4.0 / (2**bits - 1))


@pytest.mark.parametrize("bits", BITS)
def test_the_greatest_magnitude_of_a_symmetric_grid_has_the_code_of_the_definition(bits: int) -> None:
    for seed in range(50):
        values = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        grid = grid_from_range(-values.abs().max(), values.abs().max(), bits, symmetric=True)
        index = values.abs().argmax()
        assert int(quantize(values, grid)[index]) == math.copysign(2 ** (bits - 1) - 1, float(values[index]))
        assert int(quantize(torch.zeros(1), grid)) == 0


def test_a_symmetric_grid_of_two_bits_has_three_levels() -> None:
    levels = fake_quantize(torch.linspace(-2, 2, 101), grid_of(torch.tensor([-2.0, 2.0]), 2, True))
    assert sorted(set(levels.tolist())) == [-2.0, 0.0, 2.0]


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(list(BITS)),
    symmetric=st.booleans(),
    seed=st.integers(0, 10_000),
    spread=st.floats(-30, 30),
    shift=st.floats(-3, 3),
)
def test_codes_and_levels_agree_and_come_back(
    bits: int, symmetric: bool, seed: int, spread: float, shift: float
) -> None:
    values = (torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) + shift) * 10.0**spread
    least, greatest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    grid = grid_from_range(least, greatest, bits, symmetric=symmetric)
    codes = quantize(values, grid)
    levels = dequantize(codes, grid)
    assert torch.equal(levels, fake_quantize(values, grid))
    assert torch.equal(quantize(levels, grid), codes)
    assert torch.equal(fake_quantize(levels, grid), levels)
    # no number inside the range moves by more than half a step
    assert bool(((levels - values).abs() <= grid.scale * (0.5 + 1e-4)).all())
    assert torch.equal(fake_quantize(torch.zeros(5, 1), grid), torch.zeros(5, 1))


def test_ranges_widen_to_hold_zero() -> None:
    grid = grid_from_range(torch.tensor(2.0), torch.tensor(6.0), 8, symmetric=False)
    assert float(grid.scale) == pytest.approx(6 / 255)
    assert grid.zero_point is not None and int(grid.zero_point) == -128
    grid = grid_from_range(torch.tensor(-6.0), torch.tensor(-2.0), 8, symmetric=False)
    assert grid.zero_point is not None and int(grid.zero_point) == 127


def test_one_range_gives_the_grids_of_all_widths() -> None:
    """Δ_8 · 255 = Δ_4 · 15 = Δ_2 · 3."""
    low, high = torch.tensor(-0.7), torch.tensor(2.9)
    spans = [float(grid_from_range(low, high, b, symmetric=False).scale) * (2**b - 1) for b in BITS]
    assert spans == pytest.approx([3.6] * len(spans))


@pytest.mark.parametrize("bits", [3, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_uniform_numbers_have_an_error_of_a_twelfth_of_a_step_squared(bits: int, symmetric: bool) -> None:
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    grid = grid_from_range(torch.tensor(-1.0), torch.tensor(1.0), bits, symmetric=symmetric)
    error = float((fake_quantize(values, grid) - values).square().mean())
    assert error == pytest.approx(float(grid.scale) ** 2 / 12, rel=0.02)


def test_a_bit_halves_the_error() -> None:
    """6.02 dB a bit: exactly in Δ, closely in the noise of numbers that fill the range."""
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(2))
    errors = [
        float((fake_quantize(values, grid_of(values, b, False)) - values).square().mean()) * (1 - 2.0**-b) ** 2
        for b in BITS
    ]
    steps = [10 * math.log10(a / b) for a, b in pairwise(errors)]
    assert steps == pytest.approx([20 * math.log10(2)] * len(steps), abs=0.12)


def test_a_dead_row_leaves_its_neighbours_alone() -> None:
    values = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    alone = grid_from_range(values.amin(1), values.amax(1), 8, symmetric=False)
    with_dead = torch.cat([values, torch.zeros(1, 16)])
    grid = grid_from_range(with_dead.amin(1, keepdim=True), with_dead.amax(1, keepdim=True), 8, symmetric=False)
    assert torch.equal(grid.scale[:3, 0], alone.scale)
    assert torch.equal(fake_quantize(with_dead, grid)[3], torch.zeros(16))


def test_scales_of_half_precision_and_of_the_widest_range_are_sound() -> None:
    values = torch.tensor([-60000.0, 60000.0], dtype=torch.float16)
    grid = grid_of(values, 8, False)
    assert grid.scale.dtype == torch.float32 and float(grid.scale) == pytest.approx(120000 / 255)
    widest = torch.tensor([-3e38, 3e38])
    for symmetric in (True, False):
        assert torch.allclose(fake_quantize(widest, grid_of(widest, 8, symmetric)), widest, rtol=0.01)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        grid_from_range(torch.tensor(0.0), torch.tensor(1.0), bits, symmetric=True)
