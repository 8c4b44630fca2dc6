"""Balance: exact in floating point, and better than its parts where something stands out."""

import pytest
import torch

from genlight.quantization.activations import dynamic_grid
from genlight.quantization.balance import (
    Balance,
    balance_hessian,
    balance_input,
    balance_sample,
    balance_scale,
    balance_weight,
    low_rank_split,
    reduce_absmax,
    search_alpha,
    unbalance_weight,
)
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.uniform import fake_quantize
from genlight.quantization.weights import quantize_weight


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def balances(channels: int, scale: torch.Tensor) -> list[Balance]:
    rotation = random_rotation(channels, "full", 1)
    return [Balance(), Balance(scale), Balance(None, rotation), Balance(scale, rotation)]


@pytest.mark.parametrize("kernel", [1, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_output_is_the_same_without_rounding(kernel: int, dtype: torch.dtype, tolerance: float) -> None:
    channels = 24
    weight, inputs = randn(8, channels * kernel, dtype=dtype), randn(50, channels * kernel, seed=1, dtype=dtype)
    expected = inputs @ weight.t()
    for balance in balances(channels, randn(channels, seed=2).exp()):
        found = balance_sample(inputs, balance) @ balance_weight(weight, balance).t()
        assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
        back = unbalance_weight(balance_weight(weight, balance), balance)
        assert float((back - weight).abs().max()) < tolerance * 10


def test_inputs_of_convolutions_are_balanced_along_their_channels() -> None:
    balance = balances(24, randn(24, seed=2).exp())[-1]
    values = randn(2, 24, 5, 5, seed=3)
    found = balance_input(values, balance, dim=1)
    assert torch.allclose(found.movedim(1, -1), balance_input(values.movedim(1, -1), balance), atol=1e-6)


def test_second_moments_are_those_of_the_balanced_inputs() -> None:
    for kernel in (1, 4):
        inputs = randn(60, 12 * kernel, dtype=torch.float64)
        for balance in balances(12, randn(12, seed=2).exp()):
            balanced = balance_sample(inputs, balance)
            found = balance_hessian(inputs.t() @ inputs, balance)
            assert torch.allclose(found, balanced.t() @ balanced, atol=1e-9)


def test_ends_of_alpha_flatten_the_input_or_the_weight() -> None:
    inputs, weights = randn(100, 16) * torch.logspace(-2, 2, 16), [randn(6, 16, seed=1), randn(9, 16, seed=2)]
    absmax = inputs.abs().amax(0)
    flat_input = inputs / balance_scale(absmax, weights, 1.0)
    assert torch.allclose(flat_input.abs().amax(0), torch.ones(16))
    flat_weight = torch.cat(weights) * balance_scale(absmax, weights, 0.0)
    assert torch.allclose(flat_weight.abs().amax(0), torch.ones(16))


def test_dead_channels_have_a_finite_scale() -> None:
    absmax, weight = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[1.0, 0.0, 3.0]])
    for alpha in (0.0, 0.3, 1.0):
        scale = balance_scale(absmax, [weight], alpha)
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert bool((balance_scale(torch.zeros(3), [torch.zeros(2, 3)], 0.5) == 1).all())


def test_reductions_over_steps() -> None:
    table = torch.tensor([[[1.0, 0], [5, 2]], [[3, 1], [0, 9]]])
    assert reduce_absmax(table).tolist() == [5, 9]
    assert reduce_absmax(table, "first").tolist() == [3, 1]
    assert reduce_absmax(table, "mean").tolist() == [4, 5]
    # a step and a branch that were not seen
    table = torch.cat([table, torch.zeros(2, 1, 2), torch.tensor([[[1.0, 2]], [[0, 0]]])], dim=1)
    assert reduce_absmax(table, "mean").tolist() == [3, 4]
    with pytest.raises(ValueError, match="reduce"):
        reduce_absmax(table, "median")  # type: ignore[arg-type]


def outlying(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer whose function does not depend on `factor`: two channels carry it, and the weight divides by it."""
    generator = torch.Generator().manual_seed(4)
    spread = torch.exp(0.5 * torch.randn(64, generator=generator))
    spread[[7, 30]] *= factor
    inputs = torch.randn(400, 64, generator=generator) * spread
    # what stands out in some rows only
    inputs[torch.arange(400), torch.randint(0, 64, (400,), generator=generator)] *= 6
    weight = torch.randn(48, 64, generator=generator)
    weight[:, [7, 30]] /= factor
    return inputs, weight


def sqnr(inputs: torch.Tensor, weight: torch.Tensor, balance: Balance, form: LayerFormat) -> float:
    rounded = quantize_weight(balance_weight(weight, balance), form.weight).dequantized()
    balanced = balance_sample(inputs, balance)
    found = fake_quantize(balanced, dynamic_grid(balanced, form.activation)) @ rounded.t()
    expected = inputs @ weight.t()
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


@pytest.mark.parametrize("bits", [(8, 8), (6, 6), (4, 4)])
def test_scale_and_rotation_together_beat_either_alone(bits: tuple[int, int]) -> None:
    form = LayerFormat(WeightFormat(bits[0]), ActivationFormat(bits[1]))
    inputs, weight = outlying(30.0)
    rotation = random_rotation(64, "full", 0)
    absmax = inputs.abs().amax(0)
    alpha, _ = search_alpha([weight], inputs, absmax, form)
    alpha_rotated, errors = search_alpha([weight], inputs, absmax, form, rotation=rotation)
    plain = sqnr(inputs, weight, Balance(), form)
    scaled = sqnr(inputs, weight, Balance(balance_scale(absmax, [weight], alpha)), form)
    rotated = sqnr(inputs, weight, Balance(None, rotation), form)
    both = sqnr(inputs, weight, Balance(balance_scale(absmax, [weight], alpha_rotated), rotation), form)
    assert both > plain + 8 and both > rotated + 3 and both > scaled + 0.8
    # the search measures what is then seen
    assert both == pytest.approx(-10 * torch.log10(torch.tensor(min(errors))).item(), abs=0.01)


def test_the_scale_absorbs_what_stands_out_in_all_rows() -> None:
    form = LayerFormat(WeightFormat(6), ActivationFormat(6))
    rotation = random_rotation(64, "full", 0)
    found = []
    for factor in (10.0, 100.0):
        inputs, weight = outlying(factor)
        found.append(sqnr(inputs, weight, Balance(balance_scale(inputs.abs().amax(0), [weight], 0.3), rotation), form))
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_rounding_twice_costs_more_than_rounding_once() -> None:
    inputs, weight = outlying(30.0)
    rotation = random_rotation(64, "full", 0)
    scale, form = Balance(balance_scale(inputs.abs().amax(0), [weight], 0.3)), WeightFormat(4)
    once = quantize_weight(balance_weight(weight, Balance(scale.scale, rotation)), form).dequantized()
    first = quantize_weight(balance_weight(weight, scale), form).dequantized()
    twice = quantize_weight(balance_weight(first, Balance(None, rotation)), form).dequantized()
    expected = inputs @ weight.t()
    balanced = balance_sample(inputs, Balance(scale.scale, rotation))
    errors = [float((balanced @ w.t() - expected).square().sum()) for w in (once, twice)]
    assert errors[1] > 1.25 * errors[0]
    assert max(len(row.unique()) for row in once) <= 16


def test_the_search_returns_the_alpha_of_the_least_error() -> None:
    inputs, weight = outlying(30.0)
    other = randn(16, 64, seed=9)
    form = LayerFormat(WeightFormat(4, rounding="gptq"), ActivationFormat(16))
    grid = (0.0, 0.2, 0.9)
    hessian = inputs.t() @ inputs
    alpha, errors = search_alpha([weight, other], inputs, inputs.abs().amax(0), form, grid=grid, hessian=hessian)
    assert alpha == grid[errors.index(min(errors))] and len(errors) == 3
    with pytest.raises(ValueError, match="alpha_grid"):
        search_alpha([weight], inputs, inputs.abs().amax(0), form, grid=())
    with pytest.raises(ValueError, match=r"alpha = 1\.5"):
        balance_scale(inputs.abs().amax(0), [weight], 1.5)
    with pytest.raises(ValueError, match="not finite"):
        balance_scale(torch.full((64,), torch.inf), [weight], 0.5)


def test_the_low_rank_branch_is_the_best_approximation() -> None:
    matrix = randn(12, 20)
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 5, 12):
        up, down = low_rank_split(matrix, rank)
        assert up.shape == (12, rank) and down.shape == (rank, 20)
        rest = float((matrix - up @ down).square().sum())
        assert rest == pytest.approx(float(values[rank:].square().sum()), abs=1e-3)
    for rank in (0, 13):
        with pytest.raises(ValueError, match="rank"):
            low_rank_split(matrix, rank)
