"""Products of int8 inputs and packed integer weights, with all that follows them in one kernel.

Codes are summed in 32 bits, and what is added and multiplied afterwards never leaves the registers: see `integer` for
the formula. Weights of two and four bits are read packed and unpacked in the kernel, so that they take a quarter and
half of the bandwidth of int8; they are multiplied as int8.
"""

# kernels are not typed, nor is what compiles them
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genlight.quantization.kernels.available import INTERPRETED
from genlight.quantization.kernels.row_quantization import dense
from genlight.quantization.packing import packed_width, storage_bits

# Above it, the factors of a low-rank branch do not fit beside the tiles
LARGEST_RANK = 128

# rows, outputs, columns of a tile, warps, stages: large tiles for images, small ones for few tokens
_TILES = (
    (128, 256, 128, 8, 3),
    (128, 128, 128, 8, 3),
    (64, 128, 128, 4, 4),
    (64, 64, 128, 4, 4),
    (16, 64, 256, 4, 4),
)


def _configs() -> list[Any]:
    if INTERPRETED:
        return [triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2})]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in _TILES
    ]


@triton.jit
def _unpacked(fields, FIELD: tl.constexpr):
    """int8 codes [n, k] of bytes [n, k · FIELD / 8], the lowest bits first; see `packing`."""
    if FIELD == 8:
        codes = fields
    elif FIELD == 4:
        codes = tl.interleave((fields << 4) >> 4, fields >> 4)
    else:
        even = tl.interleave((fields << 6) >> 6, (fields << 2) >> 6)
        odd = tl.interleave((fields << 4) >> 6, fields >> 6)
        codes = tl.interleave(even, odd)
    return codes


@triton.jit
def _dequantized(
    total, m, n, columns, row_scale, row_zero, row_sums, row_step, column_scale, column_zero, column_sums, column_step
):
    """Sums of codes as numbers: Δ Λ (Σ q p - v Σ q - z Σ p + K z v); int32 [m, n] to float32."""
    if column_zero is not None:
        zero = tl.load(column_zero + n * column_step).to(tl.int32)
        total -= tl.load(row_sums + m)[:, None] * zero[None, :]
    if row_zero is not None:
        zero = tl.load(row_zero + m * row_step).to(tl.int32)
        total -= zero[:, None] * tl.load(column_sums + n)[None, :]
        if column_zero is not None:
            other = tl.load(column_zero + n * column_step).to(tl.int32)
            total += columns * zero[:, None] * other[None, :]
    scaled = total.to(tl.float32) * tl.load(row_scale + m * row_step)[:, None]
    return scaled * tl.load(column_scale + n * column_step)[None, :]


@triton.jit
def _low_rank(inner, up, m, n, rank, RANK: tl.constexpr):
    """inner upᵀ, float32 [m, n]."""
    r = tl.arange(0, RANK)
    left = tl.load(inner + m.to(tl.int64)[:, None] * rank + r[None, :], mask=r[None, :] < rank, other=0.0)
    right = tl.load(up + n[:, None] * rank + r[None, :], mask=r[None, :] < rank, other=0.0)
    return tl.dot(left, tl.trans(right), input_precision="ieee")


@triton.autotune(configs=_configs(), key=["rows_key", "outputs", "columns", "FIELD", "RANK"])
@triton.jit
def _product_kernel(
    codes, weight, output, row_scale, row_zero, row_sums, column_scale, column_zero, column_sums, bias, inner, up,
    rows, outputs, columns, width, rank, row_step, column_step, rows_key,
    FIELD: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # tiles of GROUP_M rows of tiles follow each other, so that what they share stays in the cache
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    m = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < outputs)[None, :]
    # what lies beyond the edge is multiplied as the first rows are, and not stored
    m, n = m % rows, n % outputs
    k, byte = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K * FIELD // 8)
    left = codes + m.to(tl.int64)[:, None] * columns + k[None, :]
    right = weight + n.to(tl.int64)[:, None] * width + byte[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(0, tl.cdiv(columns, BLOCK_K)):
        a = tl.load(left, mask=k[None, :] < columns - step * BLOCK_K, other=0)
        b = tl.load(right, mask=byte[None, :] < width - step * (BLOCK_K * FIELD // 8), other=0)
        total = tl.dot(a, tl.trans(_unpacked(b, FIELD)), total, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K * FIELD // 8
    result = _dequantized(
        total, m, n, columns, row_scale, row_zero, row_sums, row_step, column_scale, column_zero, column_sums,
        column_step,
    )  # fmt: skip
    if inner is not None:
        result += _low_rank(inner, up, m, n, rank, RANK)
    if bias is not None:
        result += tl.load(bias + n).to(tl.float32)[None, :]
    place = output + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(place, result.to(output.dtype.element_ty), mask=inside)


@torch.library.custom_op("genlight::integer_product", mutates_args=())
def integer_product(
    codes: Tensor,
    weight: Tensor,
    bits: int,
    row_scale: Tensor,
    row_zero: Tensor | None,
    row_sums: Tensor | None,
    column_scale: Tensor,
    column_zero: Tensor | None,
    column_sums: Tensor | None,
    bias: Tensor | None,
    inner: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x Wᵀ + inner upᵀ + b of quantized x and W.

    Args:
        codes: of x, int8 [rows, columns].
        weight: codes of W as `packing.pack_codes` packs them, [outputs, bytes].
        bits: of the weight's codes.
        row_scale: Δ, float32 [1 | rows, 1].
        row_zero: z, int8, shaped alike.
        row_sums: Σ q, int32 [rows], given with `column_zero`.
        column_scale: Λ, float32 [1 | outputs, 1].
        column_zero: v, int8, shaped alike.
        column_sums: Σ p, int32 [outputs], given with `row_zero`.
        bias: b [outputs].
        inner: [rows, rank], rank up to `LARGEST_RANK`.
        up: [outputs, rank], of the type of `inner`.
        dtype: of the output.

    Returns:
        [rows, outputs].

    Raises:
        ValueError: no rows, tensors that do not fit each other, or a part that is missing.
    """
    _check(codes, weight, bits, row_scale, row_zero, row_sums, column_scale, column_zero, column_sums, inner)
    (rows, columns), outputs = codes.shape, len(weight)
    output = torch.empty(rows, outputs, dtype=dtype, device=codes.device)
    rank = 0 if inner is None else inner.shape[1]

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(outputs, meta["BLOCK_N"]),)

    # the device of the codes need not be the current one
    with torch.cuda.device_of(codes):
        _product_kernel[grid](
            codes.contiguous(), weight.contiguous().view(torch.int8), output,
            dense(row_scale), dense(row_zero), dense(row_sums),
            dense(column_scale), dense(column_zero), dense(column_sums), dense(bias), dense(inner), dense(up),
            rows, outputs, columns, weight.shape[1], rank, int(len(row_scale) > 1), int(len(column_scale) > 1),
            # of rows, tiles are chosen anew for other powers of two only
            triton.next_power_of_2(rows),
            FIELD=storage_bits(bits), RANK=max(16, triton.next_power_of_2(rank)),
        )  # fmt: skip
    return output


@integer_product.register_fake
def _(codes: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=rest[-1])


def _check(
    codes: Tensor,
    weight: Tensor,
    bits: int,
    row_scale: Tensor,
    row_zero: Tensor | None,
    row_sums: Tensor | None,
    column_scale: Tensor,
    column_zero: Tensor | None,
    column_sums: Tensor | None,
    inner: Tensor | None,
) -> None:
    (rows, columns), bytes_of_row = codes.shape, weight.shape[1]
    if rows == 0:
        raise ValueError("codes must hold at least one row")
    if bytes_of_row != packed_width(columns, bits):
        expected = packed_width(columns, bits)
        raise ValueError(f"weight of {bytes_of_row} bytes a row must have {expected} for {columns} columns of codes")
    for name, scale, count in (("row_scale", row_scale, rows), ("column_scale", column_scale, len(weight))):
        if scale.numel() not in (1, count):
            raise ValueError(f"{name} of {scale.numel()} numbers must have 1 or {count}")
    if (column_zero is not None and row_sums is None) or (row_zero is not None and column_sums is None):
        raise ValueError("row_sums must be given with column_zero, and column_sums with row_zero")
    if inner is not None and inner.shape[1] > LARGEST_RANK:
        raise ValueError(f"inner of rank {inner.shape[1]} must be of rank {LARGEST_RANK} or less")
