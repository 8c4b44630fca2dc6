"""Mixtures of experts in one pass over memory: every weight is read once and every new one written once."""

# kernels are not typed, nor is what compiles them
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sums that a program holds in registers, and the columns that it has at least
_SUMS, _FEWEST_COLUMNS = 8192, 64


@triton.jit
def _mix_kernel(matrix, tensor, mixed, rows, columns, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known, inside = row < rows, column < columns
    factors, weights = matrix + row * EXPERTS, tensor + column
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(EXPERTS):
        factor = tl.load(factors, mask=known, other=0.0)
        weight = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
        total += factor[:, None] * weight[None, :]
        factors += 1
        weights += columns
    place = mixed + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, total.to(mixed.dtype.element_ty), mask=known[:, None] & inside[None, :])


def mix_columns(matrix: Tensor, flat: Tensor) -> Tensor:
    """matrix @ flat, summed in float32 and rounded once: [rows, columns] of the type of `flat`.

    Args:
        matrix: float32 [rows, experts].
        flat: [experts, columns], float32, bfloat16 or float16, on a device on which Triton runs.
    """
    matrix, flat = matrix.contiguous(), flat.contiguous()
    (rows, experts), columns = matrix.shape, flat.shape[1]
    mixed = flat.new_empty(rows, columns)
    padded = triton.next_power_of_2(rows)
    block = max(_FEWEST_COLUMNS, _SUMS // padded)
    # the device of the weights need not be the current one
    with torch.cuda.device_of(flat):
        _mix_kernel[(triton.cdiv(columns, block),)](
            matrix, flat, mixed, rows, columns, EXPERTS=experts, ROWS=padded, BLOCK=block, num_warps=8
        )
    return mixed
