"""The kernel that quantizes rows, against the same in torch and in float64."""

import itertools
import math
from typing import Literal

import pytest
import torch
from quantization.kernels.kernel_device import DEVICE, INTERPRETED, MARKS
from torch import Tensor

from genlight.quantization.activations import dynamic_grid
from genlight.quantization.balance import Balance
from genlight.quantization.formats import ActivationFormat
from genlight.quantization.hadamard import hadamard_matrix, random_rotation
from genlight.quantization.kernels.available import triton_runs_on
from genlight.quantization.rows import Before, Norm, RowCodes, apply_before, quantize_rows
from genlight.quantization.uniform import code_range, dequantize, grid_from_range, quantize

pytestmark = MARKS


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_kernel(values: Tensor, form: ActivationFormat, before: Before | None = None, **rest: object) -> RowCodes:
    """On the device and back; the kernel must be what runs."""
    assert triton_runs_on(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
    return quantize_rows(values.to(DEVICE), form, before=before, **rest)  # type: ignore[arg-type]


def on_device(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (7, 64), (5, 129), (2, 1152)])
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product([8, 4, 2], [True, False]))
def test_codes_are_those_of_the_reference(
    rows: int, width: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    values = ((randn(rows, width, seed=width) + 0.3) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    found = by_kernel(values, ActivationFormat(bits, symmetric))
    low, high = values.float().amin(1, keepdim=True), values.float().amax(1, keepdim=True)
    grid = grid_from_range(low, high, bits, symmetric=symmetric)
    assert torch.equal(found.grid.scale.cpu(), grid.scale)
    assert torch.equal(found.codes.cpu(), quantize(values, grid))
    assert (found.grid.zero_point is None) == symmetric
    if found.grid.zero_point is not None and grid.zero_point is not None:
        assert torch.equal(found.grid.zero_point.cpu(), grid.zero_point)
    assert found.sums is not None and found.sums.dtype == torch.int32 and found.inputs is None
    assert torch.equal(found.sums.cpu().long(), found.codes.cpu().long().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_in_float8_are_those_of_the_reference(dtype: torch.dtype) -> None:
    values = (randn(6, 129) * torch.logspace(-3, 3, 6)[:, None]).to(dtype)
    values[0], values[1, 3] = 0.0, torch.nan
    # halfway between neighbours, and below the least normal number, 2^-6
    values[2, :4], values[2, 4:] = torch.tensor([448.0, 17.0, 19.0, -17.0]), 2.0**-10 * torch.arange(125)
    found = by_kernel(values, ActivationFormat(8, numbers="float8"))
    expected = dynamic_grid(values, ActivationFormat(8, numbers="float8"))
    assert found.sums is None and found.grid.zero_point is None and found.codes.dtype == torch.float8_e4m3fn
    assert torch.equal(found.grid.scale.cpu()[[0, 2, 3, 4, 5]], expected.scale[[0, 2, 3, 4, 5]])
    codes, reference = found.codes.cpu().float(), quantize(values, expected).float()
    assert torch.equal(codes[2:], reference[2:]) and not bool(codes[0].any())
    assert bool(dequantize(found.codes, found.grid)[1].isnan().all())


def test_the_kernel_runs_on_the_device_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    on, real = list[Tensor](), torch.cuda.device_of
    monkeypatch.setattr("torch.cuda.device_of", lambda tensor: on.append(tensor) or real(tensor))
    values = randn(3, 5).to(DEVICE)
    by_kernel(values, ActivationFormat(8))
    assert len(on) == 1 and on[0].data_ptr() == values.data_ptr()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_ends_ties_and_what_is_not_finite(symmetric: bool) -> None:
    form, (low, high) = ActivationFormat(8, symmetric), code_range(8)
    rows = torch.zeros(6, 40)
    rows[1] = torch.linspace(-high + 1, high - 1, 40).round() + 0.5
    rows[1, 0] = -high
    rows[1, 1] = high
    rows[2], rows[3] = 3.0, -3.0
    rows[4, 7], rows[5, 9] = torch.nan, torch.inf
    found = by_kernel(rows, form)
    codes, numbers = found.codes.cpu(), dequantize(found.codes, found.grid).cpu()
    assert bool((numbers[0] == 0).all()) and float(found.grid.scale[0]) > 0
    assert torch.allclose(numbers[2:4], rows[2:4])
    assert not bool(torch.isfinite(numbers[4:]).all(dim=1).any())
    assert int(codes[3].min()) == (-high if symmetric else low) and int(codes[2].max()) == high
    if symmetric:
        assert torch.equal(codes[1].float(), rows[1].round().clamp(low, high))
    # neighbours do not matter
    assert torch.equal(codes[1:4], by_kernel(rows[1:4], form).codes.cpu())


def exact(values: Tensor, before: Before, balance: Balance, samples: int) -> Tensor:
    """The numbers before rounding, in float64 and formula by formula."""
    x = values.double()
    if before.norm is not None:
        if before.norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + before.norm.eps).sqrt()
        x = x if before.norm.weight is None else x * before.norm.weight.double()
        x = x if before.norm.bias is None else x + before.norm.bias.double()
    if before.modulation is not None:
        scale, shift = (part.double().reshape(samples, 1, -1) for part in before.modulation)
        x = (x.reshape(samples, -1, x.shape[-1]) * (1 + scale) + shift).reshape(x.shape)
    if before.gelu == "exact":
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    elif before.gelu == "tanh":
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    x = x if balance.scale is None else x / balance.scale.double()
    if balance.rotation is not None:
        order = math.prod(balance.rotation.factors)
        blocks = (x * balance.rotation.signs).unflatten(-1, (-1, order))
        x = (blocks @ hadamard_matrix(order).double() / order**0.5).flatten(-2)
    return x


WIDTH = 96
NORMS = [
    None,
    Norm("layer"),
    Norm("layer", 1e-5, randn(WIDTH, seed=1), randn(WIDTH, seed=2)),
    Norm("rms", 1e-6, randn(WIDTH, seed=3)),
]
Gelu = Literal["exact", "tanh"] | None
GELUS: tuple[Gelu, ...] = (None, "exact", "tanh")
BALANCES = [
    Balance(),
    Balance(randn(WIDTH, seed=4).exp()),
    Balance(randn(WIDTH, seed=4).exp(), random_rotation(WIDTH, "block", 3)),
]


@pytest.mark.parametrize(("norm", "modulated", "gelu"), itertools.product(range(4), [False, True], GELUS))
@pytest.mark.parametrize(("balance", "symmetric"), [(0, True), (1, False), (2, True)])
def test_fused_codes_differ_at_ties_only(norm: int, modulated: bool, gelu: Gelu, balance: int, symmetric: bool) -> None:
    modulation = (randn(2, WIDTH, seed=5), randn(2, WIDTH, seed=6)) if modulated else None
    before, chosen = Before(NORMS[norm], modulation, gelu), BALANCES[balance]
    values = 2 * randn(2, 5, WIDTH, seed=7) + 0.5
    expected = exact(values, before, chosen, 2).reshape(10, WIDTH)
    found = by_kernel(values, ActivationFormat(8, symmetric), moved(before), balance=moved_balance(chosen), keep=True)
    assert found.inputs is not None
    largest = expected.abs().amax(1, keepdim=True)
    assert bool(((found.inputs.cpu() - expected).abs() <= 1e-6 * largest).all())
    reference = quantize_rows(values.double(), ActivationFormat(8, symmetric), before=before, balance=chosen, keep=True)
    assert reference.inputs is not None and torch.allclose(reference.inputs, expected, rtol=1e-9, atol=1e-9)
    levels = expected / reference.grid.scale
    from_tie = ((levels - levels.floor()) - 0.5).abs()
    differ = found.codes.cpu() != reference.codes
    assert bool((from_tie[differ] < 1e-3).all())
    assert int((found.codes.cpu().int() - reference.codes.int()).abs().max()) <= 1


def moved(before: Before) -> Before:
    norm, modulation = before.norm, before.modulation
    return Before(
        None if norm is None else Norm(norm.kind, norm.eps, on_device(norm.weight), on_device(norm.bias)),
        None if modulation is None else (modulation[0].to(DEVICE), modulation[1].to(DEVICE)),
        before.gelu,
    )


def moved_balance(balance: Balance) -> Balance:
    rotation = balance.rotation
    if rotation is not None:
        rotation = type(rotation)(rotation.signs.to(DEVICE), rotation.factors)
    return Balance(on_device(balance.scale), rotation)


@pytest.mark.parametrize("width", [2, 64, 1152, 4608])
def test_blocks_of_every_order_are_rotated(width: int) -> None:
    balance = Balance(None, random_rotation(width, "block", 1))
    values = randn(3, width)
    found = by_kernel(values, ActivationFormat(8), balance=moved_balance(balance), keep=True)
    expected = exact(values, Before(), balance, 1)
    assert found.inputs is not None
    assert float((found.inputs.cpu() - expected).abs().max() / expected.abs().max()) < 1e-6


def test_other_orders_and_types_take_the_way_of_torch() -> None:
    full = Balance(None, random_rotation(24, "full", 1))
    found = quantize_rows(randn(3, 24).to(DEVICE), ActivationFormat(8), balance=moved_balance(full), keep=True)
    assert found.inputs is not None
    assert torch.allclose(found.inputs.cpu().double(), exact_full(randn(3, 24), full), atol=1e-5)
    double = quantize_rows(randn(3, 24).double().to(DEVICE), ActivationFormat(8), keep=True)
    assert double.inputs is not None and double.inputs.dtype == torch.float64


def exact_full(values: Tensor, balance: Balance) -> Tensor:
    from genlight.quantization.hadamard import rotate

    assert balance.rotation is not None
    return rotate(values.double(), balance.rotation)


def test_what_cannot_be_quantized_is_refused() -> None:
    from genlight.quantization.kernels.row_quantization import WIDEST_ROW, row_codes

    with pytest.raises(ValueError, match="at least one token"):
        by_kernel(torch.zeros(0, 8), ActivationFormat(8))
    with pytest.raises(ValueError, match="dynamic per token"):
        by_kernel(torch.zeros(2, 8), ActivationFormat(8, granularity="sample"))

    def codes(values: Tensor, norm: str = "none", order: int = 1, scale: Tensor | None = None) -> None:
        rest = (norm, 0.0, None, None, scale, scale, "none", None, None, order, False)
        row_codes(values.to(DEVICE), 8, True, "integer", *rest)

    for values, rest, word in (
        (torch.zeros(0, 8), {}, "at least one"),
        (torch.zeros(3, 8), {"scale": torch.zeros(2, 8)}, "2 samples"),
        (torch.zeros(1, WIDEST_ROW + 1), {}, "columns"),
        (torch.zeros(1, 24), {"order": 16}, "power of two that divides"),
        (torch.zeros(1, 24), {"order": 12}, "power of two that divides"),
        (torch.zeros(1, 24), {"norm": "group"}, "layer, rms, none"),
    ):
        with pytest.raises(ValueError, match=word):
            codes(values, **rest)  # type: ignore[arg-type]


def test_the_operator_is_declared_as_it_behaves() -> None:
    from genlight.quantization.kernels.row_quantization import row_codes

    vector, signs = torch.ones(16, device=DEVICE), torch.ones(16, dtype=torch.int8, device=DEVICE)
    for symmetric, numbers, keep in ((True, "integer", True), (False, "integer", False), (True, "float8", True)):
        arguments = (randn(4, 16).to(DEVICE), 8, symmetric, numbers, "layer", 1e-6, vector, None)
        rest = (vector[None], vector[None], "tanh", vector, signs, 16, keep)
        torch.library.opcheck(row_codes, (*arguments, *rest))


@pytest.mark.skipif(not INTERPRETED, reason="compares two ways on one device")
def test_without_a_kernel_torch_does_the_same() -> None:
    before, balance = Before(NORMS[2], (randn(2, WIDTH), randn(2, WIDTH)), "tanh"), BALANCES[2]
    values = randn(2, 5, WIDTH)
    inputs = apply_before(values.double(), before)
    assert torch.allclose(inputs, exact(values, before, Balance(), 2), atol=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genlight.quantization.rows.triton_runs_on", lambda device: False)
        by_torch = quantize_rows(values, ActivationFormat(8), before=before, balance=balance)
    kernel = by_kernel(values, ActivationFormat(8), before, balance=balance)
    assert int((by_torch.codes.int() - kernel.codes.int()).abs().max()) <= 1
    assert float((by_torch.codes != kernel.codes).float().mean()) < 1e-2
