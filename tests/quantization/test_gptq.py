"""GPTQ against its definition: the optimal update of what is left, column by column."""

import pytest
import torch

from genlight.quantization.formats import WeightFormat
from genlight.quantization.gptq import gptq_codes, row_errors
from genlight.quantization.uniform import Grid, dequantize, quantize
from genlight.quantization.weights import expand_groups, quantize_weight, weight_grid


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.logspace(-0.5, 0.5, columns)
    return torch.randn(rows, columns, generator=generator) @ (mixing * spread)


def by_definition(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """After each column, the rest is solved for anew: the least squares of what the rounded columns leave over."""
    rest, columns = weight.double().clone(), weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = grid.scale.expand(-1, columns)
    for i in range(columns):
        column = Grid(scale[:, i : i + 1], None, grid.bits)
        codes[:, i : i + 1] = quantize(rest[:, i : i + 1], column)
        moved = rest[:, i] - dequantize(codes[:, i : i + 1], column)[:, 0].double()
        if i + 1 < columns:
            left = hessian[i + 1 :, i + 1 :].double()
            rest[:, i + 1 :] += moved[:, None] * torch.linalg.solve(left, hessian[i + 1 :, i].double())
    return codes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group_size", [None, 7])
def test_codes_are_those_of_solving_for_the_rest_after_each_column(seed: int, group_size: int | None) -> None:
    weight = torch.randn(12, 30, generator=torch.Generator().manual_seed(seed))
    inputs = correlated(200, 30, seed).double()
    form = WeightFormat(3, granularity="channel" if group_size is None else "group", group_size=group_size)
    grid = expand_groups(weight_grid(weight, form), group_size, 30)
    hessian = inputs.t() @ inputs
    expected, nearest = by_definition(weight, hessian, grid), quantize(weight, grid)
    found = gptq_codes(weight, hessian, grid, damping=0.0, block_size=8)
    errors = [row_errors(weight, dequantize(codes, grid), hessian) for codes in (expected, nearest)]
    better = errors[0] < errors[1]
    assert int(better.sum()) >= 3
    assert torch.equal(found[better], expected[better])
    assert torch.equal(found[~better], nearest[~better])


def test_blocks_change_nothing() -> None:
    weight = torch.randn(20, 70, generator=torch.Generator().manual_seed(5))
    inputs = correlated(300, 70, 5).double()
    hessian = inputs.t() @ inputs
    grid = weight_grid(weight, WeightFormat(4))
    for act_order in (False, True):
        whole, *others = [
            gptq_codes(weight, hessian, grid, block_size=b, act_order=act_order) for b in (70, 1, 16, 128)
        ]
        assert all(torch.equal(whole, other) for other in others)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3e4])
def test_inputs_without_correlation_round_to_nearest(symmetric: bool, scale: float) -> None:
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    grid = weight_grid(weight, WeightFormat(4, symmetric))
    for act_order in (False, True):
        codes = gptq_codes(weight, torch.eye(40) * scale, grid, act_order=act_order)
        assert torch.equal(codes, quantize(weight, grid))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 16])
def test_never_worse_than_nearest_and_better_on_correlated_inputs(
    bits: int, act_order: bool, group_size: int | None
) -> None:
    granularity = "channel" if group_size is None else "group"
    for seed in range(3):
        weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
        inputs = correlated(160, 40, seed)
        hessian = inputs.t() @ inputs
        errors = {}
        for rounding in ("nearest", "gptq"):
            form = WeightFormat(bits, False, granularity, group_size, rounding, act_order=act_order)  # type: ignore[arg-type]
            levels = quantize_weight(weight, form, hessian).dequantized()
            errors[rounding] = (inputs.double() @ (weight - levels).double().t()).square().sum(dim=0)
        assert bool((errors["gptq"] <= errors["nearest"] * (1 + 1e-6)).all())
        assert float(errors["gptq"].sum()) < (0.5 if act_order else 0.9) * float(errors["nearest"].sum())


def test_singular_and_empty_moments_are_damped() -> None:
    weight = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    grid = weight_grid(weight, WeightFormat(4))
    assert torch.equal(gptq_codes(weight, torch.zeros(20, 20), grid, damping=0.0), quantize(weight, grid))
    few = correlated(3, 20, 1)
    hessian = few.t() @ few
    hessian[4] = hessian[:, 4] = 0
    codes = gptq_codes(weight, hessian, grid, damping=0.0)
    errors = [float(row_errors(weight, dequantize(c, grid), hessian).sum()) for c in (codes, quantize(weight, grid))]
    assert errors[0] < errors[1]
    # a channel that calibration never saw is rounded as it is
    assert torch.equal(codes[:, 4], quantize(weight, grid)[:, 4])


def test_moments_that_are_none_are_refused() -> None:
    weight, grid = torch.ones(2, 3), weight_grid(torch.ones(2, 3), WeightFormat(4))
    with pytest.raises(ValueError, match="positive semidefinite"):
        gptq_codes(weight, torch.tensor([[1.0, 5, 0], [5, 1, 0], [0, 0, 1]]), grid)
    with pytest.raises(ValueError, match="not finite"):
        gptq_codes(weight, torch.full((3, 3), torch.nan), grid)
