"""Rows of numbers to codes with a scale for each row, together with what a network does right before.

On a GPU with Triton it is one pass over memory; elsewhere the same in torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from genlight.quantization.activations import dynamic_grid
from genlight.quantization.balance import Balance, balance_input
from genlight.quantization.float8 import require_float8
from genlight.quantization.formats import ActivationFormat
from genlight.quantization.kernels.available import triton_runs_on
from genlight.quantization.uniform import Grid, quantize


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the features of a token.

    Attributes:
        kind: "layer" or "rms".
        eps: added to the variance or the mean of squares.
        weight: [features].
        bias: [features].
    """

    kind: Literal["layer", "rms"]
    eps: float = 1e-6
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Before:
    """What happens to an input [batch, tokens, features] before it is balanced and rounded, in this order.

    Attributes:
        norm: over the features.
        modulation: scale and shift, each [batch, features]: x (1 + scale) + shift.
        gelu: "exact", by the error function, or in its form with "tanh"; None: no GELU.
    """

    norm: Norm | None = None
    modulation: tuple[Tensor, Tensor] | None = None
    gelu: Literal["exact", "tanh"] | None = None


@dataclass(frozen=True, eq=False)
class RowCodes:
    """Quantized rows.

    Attributes:
        codes: int8 or float8 [rows, features].
        grid: scale, and zero point if there is one, [rows, 1].
        sums: of the codes of each row, int32 [rows]; None in float8, where nothing needs them.
        inputs: the numbers before rounding [rows, features], where they were asked for.
    """

    codes: Tensor
    grid: Grid
    sums: Tensor | None
    inputs: Tensor | None


def quantize_rows(
    values: Tensor,
    form: ActivationFormat,
    *,
    before: Before | None = None,
    balance: Balance | None = None,
    keep: bool = False,
) -> RowCodes:
    """Quantize each token on the grid over its own range.

    Args:
        values: [batch, …, features], with at least one token.
        form: dynamic, per token, bits 2 to 8.
        before: done first.
        balance: done next.
        keep: whether to return the numbers before rounding.

    Raises:
        ValueError: a format that is not dynamic and per token, or no values.
    """
    before, balance = before or Before(), balance or Balance()
    if form.mode != "dynamic" or form.granularity != "token":
        raise ValueError(f"activation is {form.mode} per {form.granularity} and must be dynamic per token")
    if values.numel() == 0:
        raise ValueError("values must hold at least one token")
    if _fits_kernel(values, form, balance):
        return _by_kernel(values, form, before, balance, keep)
    inputs = balance_input(apply_before(values, before), balance).reshape(-1, values.shape[-1])
    grid = dynamic_grid(inputs, form)
    codes = quantize(inputs, grid)
    sums = None if form.numbers == "float8" else codes.sum(dim=1, dtype=torch.int32)
    return RowCodes(codes, grid, sums, inputs if keep else None)


def apply_before(values: Tensor, before: Before) -> Tensor:
    """Norm, modulation and GELU by torch; in float32 or float64 where any is asked for."""
    if before.norm is None and before.modulation is None and before.gelu is None:
        return values
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if before.norm is not None:
        norm, features = before.norm, values.shape[-1:]
        weight, bias = (None if part is None else part.to(values.dtype) for part in (norm.weight, norm.bias))
        if norm.kind == "layer":
            values = functional.layer_norm(values, features, weight, bias, norm.eps)
        else:
            values = functional.rms_norm(values, features, weight, norm.eps)
            values = values if bias is None else values + bias
    if before.modulation is not None:
        samples = (len(values), *[1] * (values.ndim - 2), -1)
        scale, shift = (part.to(values.dtype).reshape(samples) for part in before.modulation)
        values = values * (1 + scale) + shift
    if before.gelu is None:
        return values
    return functional.gelu(values, approximate="tanh" if before.gelu == "tanh" else "none")


def _fits_kernel(values: Tensor, form: ActivationFormat, balance: Balance) -> bool:
    if values.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not triton_runs_on(values.device):
        return False
    from genlight.quantization.kernels.row_quantization import WIDEST_ROW

    if form.numbers == "float8":
        require_float8(values.device)
    order = 1 if balance.rotation is None else math.prod(balance.rotation.factors)
    return order & (order - 1) == 0 and values.shape[-1] <= WIDEST_ROW


def _by_kernel(values: Tensor, form: ActivationFormat, before: Before, balance: Balance, keep: bool) -> RowCodes:
    from genlight.quantization.kernels.row_quantization import row_codes

    norm, rotation = before.norm, balance.rotation
    scale, shift = before.modulation or (None, None)
    codes, steps, zero, sums, kept = row_codes(
        values.reshape(-1, values.shape[-1]),
        form.bits,
        form.symmetric,
        form.numbers,
        "none" if norm is None else norm.kind,
        0.0 if norm is None else norm.eps,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        scale,
        shift,
        before.gelu or "none",
        balance.scale,
        None if rotation is None else rotation.signs,
        1 if rotation is None else math.prod(rotation.factors),
        keep,
    )
    float8 = form.numbers == "float8"
    grid = Grid(steps, None if form.symmetric or float8 else zero, form.bits, form.numbers)
    return RowCodes(codes, grid, None if float8 else sums, kept if keep else None)
