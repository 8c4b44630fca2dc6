"""The kernel that multiplies codes, against exact sums in 64 bits, and the layers that use it."""

import itertools
from typing import Any

import pytest
import torch
from quantization.kernels.kernel_device import DEVICE, INTERPRETED, MARKS
from torch import Tensor, nn
from triton import Config

from genlight.quantization.balance import Balance
from genlight.quantization.convert import quantize_layer
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.integer import integer_is_valid, integer_linear
from genlight.quantization.kernels import integer_product as integer_product_module
from genlight.quantization.kernels.integer_product import LARGEST_RANK, integer_product
from genlight.quantization.packing import pack_codes
from genlight.quantization.uniform import Grid, code_range
from genlight.quantization.weights import QuantizedWeight

pytestmark = MARKS

# no multiple of a tile, one of everything, exactly a tile, odd columns
SIZES = [(1, 1, 1), (3, 40, 5), (32, 64, 32), (33, 129, 70), (17, 1152, 24)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    low, high = code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)


def grid_of(count: int, bits: int, symmetric: bool, seed: int) -> Grid:
    scale = randn(count, 1, seed=seed).exp()
    zero = None if symmetric else random_codes(count, 1, bits, seed + 1)
    return Grid(scale.to(DEVICE), None if zero is None else zero.to(DEVICE), bits)


def weight_of(codes: Tensor, grid: Grid) -> QuantizedWeight:
    return QuantizedWeight(pack_codes(codes, grid.bits).to(DEVICE), grid, codes.shape[1])


def exact(codes: Tensor, grid: Grid, matrix: Tensor, weight: Grid) -> Tensor:
    """float64, whose products and sums of codes are whole numbers and hold exactly."""

    def centred(part: Tensor, where: Grid) -> Tensor:
        return part.double() if where.zero_point is None else part.double() - where.zero_point.cpu().double()

    total = centred(codes, grid) @ centred(matrix, weight).t()
    return total * grid.scale.cpu().double() * weight.scale.cpu().double().t()


@pytest.mark.parametrize(("rows", "columns", "outputs"), SIZES)
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
def test_sums_are_exact(rows: int, columns: int, outputs: int, bits: int) -> None:
    """With scales of 1 the output is the sum itself, rounded to float32 once."""
    codes, matrix = random_codes(rows, columns, 8, rows), random_codes(outputs, columns, bits, columns)
    one = Grid(torch.ones(1, 1, device=DEVICE), None, 8)
    weight = weight_of(matrix, Grid(torch.ones(1, 1, device=DEVICE), None, bits))
    assert integer_is_valid(rows, weight)
    found = integer_linear(codes.to(DEVICE), one, weight)
    assert torch.equal(found.cpu(), (codes.long() @ matrix.long().t()).float())


@pytest.mark.parametrize(("input_symmetric", "weight_symmetric"), itertools.product([True, False], repeat=2))
@pytest.mark.parametrize(("rows", "columns", "outputs"), SIZES)
@pytest.mark.parametrize(("per_row", "per_output"), [(True, True), (False, True), (True, False)])
def test_zero_points_are_taken_out_exactly(
    rows: int, columns: int, outputs: int, per_row: bool, per_output: bool, input_symmetric: bool,
    weight_symmetric: bool,
) -> None:  # fmt: skip
    for bits in (8, 4):
        codes, matrix = random_codes(rows, columns, 8, 1), random_codes(outputs, columns, bits, 2)
        grid = grid_of(rows if per_row else 1, 8, input_symmetric, 3)
        weight = weight_of(matrix, grid_of(outputs if per_output else 1, bits, weight_symmetric, 5))
        found = integer_linear(codes.to(DEVICE), grid, weight).cpu().double()
        expected = exact(codes, grid, matrix, weight.grid)
        # the sum, and each of two products with it, are rounded once
        assert bool(((found - expected).abs() <= 3 * 2**-24 * expected.abs()).all())


def test_the_greatest_sums_do_not_overflow() -> None:
    columns = 2**31 // (128 * 128 * 4)
    for value, zero in itertools.product((127, -128), repeat=2):
        codes = torch.full((2, columns), value, dtype=torch.int8)
        matrix = torch.full((3, columns), -128, dtype=torch.int8)
        place = torch.full((1, 1), zero, dtype=torch.int8, device=DEVICE)
        grid, other = (Grid(torch.ones(1, 1, device=DEVICE), place, 8) for _ in range(2))
        found = integer_linear(codes.to(DEVICE), grid, weight_of(matrix, other))
        assert torch.equal(found.cpu().double(), exact(codes, grid, matrix, other).float().double())


def test_rows_of_zeros_give_the_bias() -> None:
    weight = weight_of(random_codes(6, 40, 4, 0), grid_of(6, 4, False, 1))
    codes, bias = torch.zeros(3, 40, dtype=torch.int8, device=DEVICE), randn(6).to(DEVICE)
    grid = Grid(torch.full((3, 1), torch.finfo(torch.float32).tiny, device=DEVICE), None, 8)
    assert torch.equal(integer_linear(codes, grid, weight, bias=bias), bias.expand(3, 6))


@pytest.mark.parametrize("rank", [1, 16, 33, LARGEST_RANK, LARGEST_RANK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_rank_branch_and_bias_are_added(rank: int, dtype: torch.dtype) -> None:
    rows, columns, outputs = 19, 48, 37
    codes, matrix = random_codes(rows, columns, 8, 1), random_codes(outputs, columns, 8, 2)
    scale = 1e-2 * torch.ones(1, 1, device=DEVICE)
    grid, weight = Grid(scale, None, 8), weight_of(matrix, Grid(scale, None, 8))
    inner, up, bias = randn(rows, rank, seed=3).to(dtype), randn(outputs, rank, seed=4).to(dtype), randn(outputs)
    parts = {"low_rank": (inner.to(DEVICE), up.to(DEVICE)), "bias": bias.to(DEVICE), "dtype": dtype}
    found = integer_linear(codes.to(DEVICE), grid, weight, **parts)  # type: ignore[arg-type]
    assert found.dtype == dtype
    expected = exact(codes, grid, matrix, weight.grid) + inner.double() @ up.double().t() + bias.double()
    tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((found.cpu().double() - expected).abs().max()) < tolerance


def test_what_does_not_fit_is_refused() -> None:
    one = torch.ones(1, 1, device=DEVICE)
    zero = torch.zeros(1, 1, dtype=torch.int8, device=DEVICE)

    def product(rows: int, width: int, **parts: Tensor) -> None:
        codes, weight = (torch.zeros(n, k, dtype=torch.int8, device=DEVICE) for n, k in ((rows, 8), (4, width)))
        names = ("row_zero", "row_sums", "column_scale", "column_zero", "column_sums", "bias", "inner", "up")
        given = [parts.get(name, one if name == "column_scale" else None) for name in names]
        integer_product(codes, weight, 8, parts.get("row_scale", one), *given, torch.float32)

    wide = torch.zeros(3, LARGEST_RANK + 1, device=DEVICE)
    for rows, width, parts, word in (
        (0, 8, {}, "at least one row"),
        (3, 7, {}, "7 bytes a row must have 8"),
        (3, 8, {"row_scale": one.expand(2, 1)}, "row_scale of 2"),
        (3, 8, {"column_scale": one.expand(3, 1)}, "column_scale of 3"),
        (3, 8, {"column_zero": zero}, "row_sums"),
        (3, 8, {"row_zero": zero}, "column_sums"),
        (3, 8, {"inner": wide, "up": wide}, "rank"),
    ):
        with pytest.raises(ValueError, match=word):
            product(rows, width, **parts)


def test_the_operator_is_declared_as_it_behaves() -> None:
    codes, matrix = random_codes(5, 9, 8, 0).to(DEVICE), pack_codes(random_codes(7, 9, 4, 1), 4).to(DEVICE)
    row, column = grid_of(5, 8, False, 2), grid_of(7, 4, False, 4)
    sums, columns = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (5, 7))
    rest = (column.scale, column.zero_point, columns, randn(7).to(DEVICE))
    arguments = (codes, matrix, 4, row.scale, row.zero_point, sums, *rest, None, None, torch.bfloat16)
    torch.library.opcheck(integer_product, arguments)


FORMATS = [
    LayerFormat(),
    LayerFormat(WeightFormat(4, False), ActivationFormat(8, False)),
    LayerFormat(WeightFormat(2), ActivationFormat(4)),
    LayerFormat(WeightFormat(8), ActivationFormat(8, False, granularity="sample")),
]


def layer_of(form: LayerFormat, rank: int, kind: str) -> nn.Module:
    torch.manual_seed(1)
    balance = Balance(randn(24, seed=5).exp(), random_rotation(24, "block", 2))
    layer = nn.Linear(24, 10)
    return quantize_layer(layer, form, balance=balance if kind == "balanced" else Balance(), rank=rank).to(DEVICE)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rank", "kind"), itertools.product([0, 4], ["plain", "balanced"]))
def test_layers_give_what_their_numbers_give(form: LayerFormat, rank: int, kind: str) -> None:
    layer, values = layer_of(form, rank, kind), (randn(4, 6, 24) + 0.5).to(DEVICE)
    assert layer.uses_integers(1) and layer(values[0, 0]).shape == (10,)  # type: ignore[operator]
    by_kernel = layer(values)
    layer.execution = "fake"  # type: ignore[assignment]
    difference = (by_kernel - layer(values)).abs().amax(-1)
    # one code that fell to the other side of a tie moves a whole row
    assert float((difference > 2e-5 * float(by_kernel.abs().max())).float().mean()) < 0.05


def test_a_branch_in_the_type_of_autocast_is_added() -> None:
    """In float16, since the interpreter multiplies bfloat16 as if it were integers."""
    torch.manual_seed(1)
    layer, values = quantize_layer(nn.Linear(64, 32), LayerFormat(), rank=4).to(DEVICE), randn(6, 64).to(DEVICE)
    expected = layer(values)
    with torch.autocast(DEVICE, torch.float16):
        found = layer(values)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert float((found - expected).abs().max()) < 4 * torch.finfo(torch.float16).eps * float(expected.abs().max())


def test_the_kernel_runs_on_the_device_of_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    on, real = list[Tensor](), torch.cuda.device_of
    monkeypatch.setattr("torch.cuda.device_of", lambda tensor: on.append(tensor) or real(tensor))
    codes, weight = random_codes(3, 9, 8, 0).to(DEVICE), weight_of(random_codes(7, 9, 4, 1), grid_of(7, 4, True, 2))
    integer_linear(codes, grid_of(3, 8, True, 4), weight)
    assert len(on) == 1 and on[0].data_ptr() == codes.data_ptr()


@pytest.mark.skipif(not INTERPRETED, reason="tiles are not timed here")
def test_tiles_are_chosen_for_each_width_of_codes_and_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner: Any = integer_product_module._product_kernel
    monkeypatch.setattr(tuner, "configs", [*tuner.configs, Config({**tuner.configs[0].kwargs, "GROUP_M": 1})])
    monkeypatch.setattr(tuner, "cache", {})
    monkeypatch.setattr(tuner, "_bench", lambda *_, **__: 1.0)
    for bits, rank in itertools.product((8, 4), (0, 20, 64)):
        weight = weight_of(random_codes(7, 24, bits, 1), grid_of(7, bits, True, 2))
        low_rank = (randn(3, rank), randn(7, rank)) if rank else None
        integer_linear(random_codes(3, 24, 8, 0), grid_of(3, 8, True, 4), weight, low_rank=low_rank)
    assert len(tuner.cache) == 6


@pytest.mark.skipif(not INTERPRETED, reason="the compiler for GPUs takes long")
def test_compiled_layers_are_one_graph() -> None:
    for rank in (0, 4):
        layer, values = layer_of(FORMATS[1], rank, "balanced"), randn(4, 6, 24)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(values), layer(values))
