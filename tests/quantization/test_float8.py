"""Codes that are numbers in float8: their grid, their product, and layers and files of them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genlight.quantization.activations import dynamic_grid
from genlight.quantization.balance import Balance
from genlight.quantization.convert import quantize_layer
from genlight.quantization.float8 import float8_is_valid, float8_linear, require_float8
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.rows import quantize_rows
from genlight.quantization.saving import load_quantized, save_quantized
from genlight.quantization.uniform import Grid, dequantize, fake_quantize, grid_from_range, quantize
from genlight.quantization.weights import quantize_weight

FLOAT8 = LayerFormat(WeightFormat(numbers="float8"), ActivationFormat(numbers="float8"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels() -> np.ndarray:
    """All finite numbers of e4m3, from its definition: (-1)^s 2^(e - 7) (1 + m / 8), subnormal where e = 0."""
    found = {0.0}
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):
                scale, whole = (2.0 ** (exponent - 7), 1) if exponent else (2.0**-6, 0)
                found |= {scale * (whole + mantissa / 8), -scale * (whole + mantissa / 8)}
    return np.array(sorted(found))


def test_codes_are_the_nearest_numbers() -> None:
    values, known = 300 * randn(20, 50) * randn(20, 50, seed=1), levels()
    values = values.clamp(-460, 460)
    grid = Grid(torch.ones(1, 1), None, 8, "float8")
    found = quantize(values, grid).double().numpy()
    nearest = np.abs(values.numpy()[..., None] - known).min(axis=-1)
    assert np.isin(found, known).all() and np.array_equal(np.abs(values.double().numpy() - found), nearest)
    assert torch.equal(fake_quantize(values, grid).double(), torch.from_numpy(found))


def test_the_largest_number_of_a_row_takes_the_largest_code() -> None:
    values = randn(5, 40) * torch.logspace(-6, 6, 5)[:, None]
    values[2] = 0
    grid = dynamic_grid(values, ActivationFormat(numbers="float8"))
    largest = quantize(values, grid).float().abs().amax(1)
    assert largest.tolist() == [448, 448, 0, 448, 448]
    assert torch.allclose(grid.scale[:, 0], (values.abs().amax(1) / 448).clamp(min=torch.finfo(torch.float32).tiny))
    # half a step of three bits of mantissa, or of the least numbers
    error = (dequantize(quantize(values, grid), grid) - values).abs()
    assert bool((error <= 2.0**-4 * 1.0001 * values.abs() + 2.0**-10 * 1.0001 * grid.scale).all())
    assert bool(fake_quantize(torch.tensor([[1.0, torch.nan]]), grid_from_range(*[torch.ones(1, 1)] * 2, 8,
        symmetric=True, numbers="float8")).isnan().any())  # fmt: skip


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("static", [False, True])
def test_the_product_is_that_of_the_numbers(granularity: str, rank: int, static: bool) -> None:
    """In float64, to the rounding of sums in float32."""
    values = randn(17, 48) + 0.2
    weight = quantize_weight(randn(32, 48, seed=1), WeightFormat(granularity=granularity, numbers="float8"))  # type: ignore[arg-type]
    grid = dynamic_grid(values, ActivationFormat(granularity="tensor" if static else "token", numbers="float8"))
    inner, up, bias = randn(17, rank, seed=2), randn(32, rank, seed=3), randn(32, seed=4)
    codes = quantize(values, grid)
    found = float8_linear(codes, grid, weight, low_rank=(inner, up) if rank else None, bias=bias)
    exact = (
        dequantize(codes, grid).double() @ weight.dequantized().double().t() + bias + inner.double() @ up.double().t()
    )
    assert found.dtype == torch.float32 and float((found - exact).abs().max() / exact.abs().max()) < 1e-6


def test_rows_are_rounded_to_float8() -> None:
    values, balance = randn(2, 3, 24), Balance(randn(24, seed=1).exp(), random_rotation(24, "full", 0))
    found = quantize_rows(values, ActivationFormat(numbers="float8"), balance=balance, keep=True)
    assert found.inputs is not None and found.sums is None and found.codes.dtype == torch.float8_e4m3fn
    assert torch.allclose(dequantize(found.codes, found.grid), found.inputs, rtol=2**-4, atol=1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_layers_lose_what_float8_loses_and_no_more(rounding: str) -> None:
    torch.manual_seed(0)
    layer, values = nn.Linear(64, 32), randn(256, 64)
    form = LayerFormat(WeightFormat(rounding=rounding, numbers="float8"), FLOAT8.activation)  # type: ignore[arg-type]
    balance = Balance(None, random_rotation(64, "full", 0))
    quantized = quantize_layer(layer, form, balance=balance, rank=2, hessian=values.t() @ values)
    expected = layer(values).detach()
    error = float((quantized(values) - expected).square().mean() / expected.var())
    # where numbers spread evenly over a factor of two, a step of 1/8 has (1/8)² / 12 / 2.16 = 6e-4 of their power as
    # noise, in the input and in the weight
    assert 3e-4 < error < 2.5e-3
    assert quantized.weight_codes is not None and quantized.weight_codes.nbytes == 64 * 32


def test_gptq_makes_up_for_errors_in_float8_too() -> None:
    mixing = randn(48, 48, seed=3)
    values, weight = randn(400, 48) @ mixing, randn(16, 48, seed=1)
    hessian = values.t() @ values
    errors = []
    for rounding in ("nearest", "gptq"):
        found = quantize_weight(weight, WeightFormat(rounding=rounding, numbers="float8"), hessian)  # type: ignore[arg-type]
        errors.append(float(((found.dequantized() - weight) @ values.t()).square().sum()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_keeps_codes_and_files_give_the_same_layer(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 16))
    model = nn.Sequential(quantize_layer(plain[0], FLOAT8)).to(dtype)  # type: ignore[arg-type]
    assert model[0].weight_codes.dtype == torch.float8_e4m3fn
    save_quantized(tmp_path / "model.safetensors", model)
    other = copy.deepcopy(plain).to(dtype)
    load_quantized(tmp_path / "model.safetensors", other)
    values = randn(3, 24).to(dtype)
    assert torch.equal(other(values), model(values)) and other[0].form == FLOAT8


def test_what_float8_is_not_is_refused() -> None:
    for bits in (2, 7):
        with pytest.raises(ValueError, match=r"must be 8 where weight\.numbers is 'float8'"):
            WeightFormat(bits, numbers="float8")
    with pytest.raises(ValueError, match=r"activation\.numbers = 'float16'"):
        ActivationFormat(numbers="float16")  # type: ignore[arg-type]


def test_a_gpu_without_float8_is_refused_and_shapes_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(8, 6)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch.version, "hip", None)
    require_float8(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"capability 8\.9 or more, and this one has 8\.6"):
        require_float8(torch.device("cuda", 0))
    capability[0] = (8, 9)
    require_float8(torch.device("cuda", 0))
    # on the CPU the numbers are multiplied
    assert not float8_is_valid(64, quantize_weight(randn(16, 16), FLOAT8.weight))
