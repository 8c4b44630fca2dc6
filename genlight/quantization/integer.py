"""Products of quantized inputs and quantized weights, summed in integers.

Numbers that are summed together must share a scale, so inputs have a scale per row or one in all, and weights one per
row or one in all, not per group. With inputs (q - z) Δ and weights (p - v) Λ:

    y = Δ Λ (Σ q p - v Σ q - z Σ p + K z v)

On a GPU with Triton one kernel does all of it and reads weights of few bits as they are packed; elsewhere
`torch._int_mm` does the sum Σ q p and torch the rest.
"""

import torch
from torch import Tensor
from torch.nn import functional

from genlight.quantization.kernels.available import triton_runs_on
from genlight.quantization.uniform import Grid
from genlight.quantization.weights import QuantizedWeight

# 2^31 over the largest product of two codes, for each of the four sums
_MOST_COLUMNS = 2**31 // (128 * 128 * 4)


def integer_is_valid(rows: int, weight: QuantizedWeight) -> bool:
    """Whether `integer_linear` can multiply `rows` inputs with this weight where it lies.

    The sums must fit 32 bits and a row of the weight must have one scale. On CUDA without Triton, `torch._int_mm` takes
    more than 16 rows, and inputs and outputs in multiples of 8.
    """
    outputs, columns = len(weight.codes), weight.columns
    if weight.group_size is not None or rows == 0 or columns > _MOST_COLUMNS:
        return False
    if triton_runs_on(weight.codes.device):
        return True
    if weight.codes.is_cuda:
        return rows > 16 and columns % 8 == 0 and outputs % 8 == 0
    return weight.codes.device.type == "cpu"


def integer_linear(
    codes: Tensor,
    grid: Grid,
    weight: QuantizedWeight,
    *,
    sums: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x Wᵀ + inner upᵀ + b, [rows, outputs], exact but for the last multiplication with the scales and what is added.

    Args:
        codes: of the inputs, int8 [rows, columns].
        grid: of the inputs, scale [1 | rows, 1].
        weight: `integer_is_valid`.
        sums: of the codes of each row, int32 [rows], where they are known already.
        low_rank: inner [rows, rank] and up [outputs, rank], of one type.
        bias: b [outputs].
        dtype: of the output.
    """
    input_zero, weight_zero = grid.zero_point, weight.grid.zero_point
    if weight_zero is not None and sums is None:
        sums = codes.sum(dim=1, dtype=torch.int32)
    column_sums = None if input_zero is None else weight.row_sums()
    if triton_runs_on(codes.device):
        return _by_kernel(codes, grid, weight, sums, column_sums, low_rank, bias, dtype)
    total = torch._int_mm(codes, weight.unpacked().t())
    if weight_zero is not None and sums is not None:
        total = torch.addr(total, sums, weight_zero.int().flatten().expand(total.shape[1]), alpha=-1)
    if input_zero is not None and column_sums is not None:
        total = total - input_zero.int() * column_sums
        if weight_zero is not None:
            total = total + weight.columns * input_zero.int() * weight_zero.int().t()
    output = total * grid.scale * weight.grid.scale.t()
    if low_rank is not None:
        output = output + functional.linear(*low_rank)
    return (output if bias is None else output + bias).to(dtype)


def _by_kernel(
    codes: Tensor,
    grid: Grid,
    weight: QuantizedWeight,
    sums: Tensor | None,
    column_sums: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from genlight.quantization.kernels.integer_product import LARGEST_RANK, integer_product

    inner, up = low_rank or (None, None)
    fused = inner is None or inner.shape[1] <= LARGEST_RANK
    output: Tensor = integer_product(
        codes,
        weight.codes,
        weight.grid.bits,
        grid.scale,
        grid.zero_point,
        sums if weight.grid.zero_point is not None else None,
        weight.grid.scale,
        weight.grid.zero_point,
        column_sums,
        bias,
        inner if fused else None,
        up if fused else None,
        dtype,
    )
    return output if low_rank is None or fused else (output + functional.linear(*low_rank)).to(dtype)
