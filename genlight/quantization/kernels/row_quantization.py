"""Quantization of rows in one pass over memory, with all that comes before it: norm, modulation, GELU, scale, rotation.

A program holds one row, in float32. The rotation is the fast Walsh-Hadamard transform in its form of constant geometry
(Pease 1968): neighbours go in, their sums become the first half and their differences the second, as many times as
the order is a power of two.
"""

# kernels are not typed, nor is what compiles them
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from genlight.quantization.uniform import FLOAT8, FLOAT8_MAX, code_range

# A row must fit the registers of one program, and its rotation the shared memory of a small GPU
WIDEST_ROW = 16384

# 1.5 · 2^23: what is added to it keeps no fraction, and is rounded half to even
_ROUNDER = tl.constexpr(12582912.0)
# the least normal float32
_TINY = tl.constexpr(1.1754943508222875e-38)
_FLOAT8_MAX = tl.constexpr(FLOAT8_MAX)


@triton.jit
def _normalized(x, inside, column, width, eps, weight, bias, CENTRED: tl.constexpr):
    """LayerNorm, or without CENTRED RMSNorm."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x) / width, 0.0)
    x = x / tl.sqrt_rn(tl.sum(x * x) / width + eps)
    if weight is not None:
        x = x * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x = x + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _rotated(x, BLOCK: tl.constexpr, ORDER: tl.constexpr, POWER: tl.constexpr):
    """x (I ⊗ H) of a row [BLOCK], with H of order ORDER = 2^POWER."""
    x = tl.reshape(x, [BLOCK // ORDER, ORDER])
    for _ in tl.static_range(POWER):
        first, second = tl.split(tl.reshape(x, [BLOCK // ORDER, ORDER // 2, 2]))
        halves = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
        x = tl.reshape(halves, [BLOCK // ORDER, ORDER])
    return tl.reshape(x, [BLOCK])


@triton.jit
def _gelu(x, FORM: tl.constexpr):
    if FORM == "tanh":
        # 1 + tanh(u) = 2 sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _grid(x, SYMMETRIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Scale and zero point as `uniform.grid_from_range` has them, both float32; padding with zeros changes neither."""
    if SYMMETRIC:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x)), HIGH * 1.0), _TINY)
        zero = 0.0
    else:
        least, greatest = tl.minimum(tl.min(x), 0.0), tl.maximum(tl.max(x), 0.0)
        levels = (HIGH - LOW) * 1.0
        scale = tl.maximum(tl.div_rn(greatest, levels) - tl.div_rn(least, levels), _TINY)
        zero = (tl.div_rn(-least, scale) + _ROUNDER) - _ROUNDER + LOW
        zero = tl.minimum(tl.maximum(zero, LOW * 1.0), HIGH * 1.0)
    return scale, zero


@triton.jit
def _rounded_to_float8(x):
    """The nearest numbers of e4m3, ties to even, in float32: Triton's interpreter loses carries when it converts."""
    bits = x.to(tl.int32, bitcast=True)
    # 20 of 23 bits of the mantissa are dropped; a carry goes into the exponent as it should
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # 1.5 · 2^14, whose neighbours are 2^-9 away as those of numbers below the least normal one are
    small = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit
def _rows_kernel(
    values, codes, scales, zeros, sums, kept, norm_weight, norm_bias, modulation_scale, modulation_shift, input_scale,
    signs, width, eps, rows_of_sample,
    NORM: tl.constexpr, GELU: tl.constexpr, ORDER: tl.constexpr, POWER: tl.constexpr, FLOAT8: tl.constexpr,
    SYMMETRIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    place = row.to(tl.int64) * width + column
    x = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    if NORM != "none":
        x = _normalized(x, inside, column, width, eps, norm_weight, norm_bias, NORM == "layer")
    if modulation_scale is not None:
        of_sample = (row // rows_of_sample) * width + column
        x = x * (1.0 + tl.load(modulation_scale + of_sample, mask=inside, other=0.0).to(tl.float32))
        x = x + tl.load(modulation_shift + of_sample, mask=inside, other=0.0).to(tl.float32)
    if GELU != "none":
        x = _gelu(x, GELU)
    if input_scale is not None:
        x = tl.div_rn(x, tl.load(input_scale + column, mask=inside, other=1.0))
    if signs is not None:
        x = x * tl.load(signs + column, mask=inside, other=0).to(tl.float32)
        x = _rotated(x, BLOCK, ORDER, POWER) * (ORDER**-0.5)
    if kept is not None:
        tl.store(kept + place, x, mask=inside)
    if FLOAT8:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x)), _FLOAT8_MAX), _TINY)
    else:
        scale, zero = _grid(x, SYMMETRIC, LOW, HIGH)
    # the largest of numbers forgets a NaN among them
    scale = tl.where(tl.max((x != x).to(tl.int32)) > 0, float("nan"), scale)
    tl.store(scales + row, scale)
    levels = tl.div_rn(x, scale + tl.zeros_like(x))
    if FLOAT8:
        q = _rounded_to_float8(tl.minimum(tl.maximum(levels, -_FLOAT8_MAX), _FLOAT8_MAX)).to(tl.float8e4nv)
    else:
        rounded = (levels + _ROUNDER) - _ROUNDER + zero
        q = tl.minimum(tl.maximum(rounded, LOW * 1.0), HIGH * 1.0).to(tl.int8)
        tl.store(sums + row, tl.sum(tl.where(inside, q.to(tl.int32), 0)))
        if not SYMMETRIC:
            tl.store(zeros + row, zero.to(tl.int8))
    tl.store(codes + place, q, mask=inside)


@torch.library.custom_op("genlight::row_codes", mutates_args=())
def row_codes(
    values: Tensor,
    bits: int,
    symmetric: bool,
    numbers: str,
    norm: str,
    eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    modulation_scale: Tensor | None,
    modulation_shift: Tensor | None,
    gelu: str,
    input_scale: Tensor | None,
    signs: Tensor | None,
    order: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows to codes, each on the grid over its own range, after what is asked for, in this order.

    Args:
        values: [rows, width], the rows of a sample next to each other.
        bits: 2 to 8.
        symmetric: whether zero has code 0.
        numbers: what codes are, "integer" or "float8".
        norm: "layer", "rms" or "none".
        eps: of the norm.
        norm_weight: [width].
        norm_bias: [width].
        modulation_scale: [samples, width]; rows are multiplied by 1 + it.
        modulation_shift: [samples, width], added then; given with the scale.
        gelu: the form of GELU that follows, "exact" or "tanh", or "none".
        input_scale: s, float32 [width], a divisor.
        signs: ±1, int8 [width], of a rotation.
        order: of its Hadamard matrix, a power of two that divides the width; 1 without a rotation.
        keep: whether the numbers before rounding are returned.

    Returns:
        Codes int8 or float8 [rows, width]; scale float32 [rows, 1]; zero point int8 [rows, 1], [0, 1] where symmetric;
        sums of the codes int32 [rows], [0] in float8; numbers before rounding float32 [rows, width], [0, width]
        without `keep`.

    Raises:
        ValueError: no rows, a row wider than `WIDEST_ROW`, an order that does not fit, samples that do not divide the
            rows, or an unknown word.
    """
    (rows, width), samples = values.shape, 1 if modulation_scale is None else len(modulation_scale)
    _check(rows, width, samples, order, {"norm": norm, "gelu": gelu, "numbers": numbers})
    codes, scale, zero, sums, kept = outputs = _empty(values, symmetric, numbers, keep)
    (low, high), block = code_range(bits), triton.next_power_of_2(width)
    # the device of the values need not be the current one
    with torch.cuda.device_of(values):
        _rows_kernel[(rows,)](
            values.contiguous(), codes, scale, zero, sums, kept if keep else None,
            dense(norm_weight), dense(norm_bias), dense(modulation_scale), dense(modulation_shift),
            dense(input_scale), dense(signs), width, eps, rows // samples,
            NORM=norm, GELU=gelu, ORDER=order, POWER=order.bit_length() - 1, FLOAT8=numbers == "float8",
            SYMMETRIC=symmetric, LOW=low, HIGH=high, BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )  # fmt: skip
    return outputs


@row_codes.register_fake
def _(
    values: Tensor, bits: int, symmetric: bool, numbers: str, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(values, symmetric, numbers, bool(rest[-1]))


def dense(part: Tensor | None) -> Tensor | None:
    """A tensor as kernels read it, in one piece; None stays."""
    return None if part is None else part.contiguous()


def _empty(values: Tensor, symmetric: bool, numbers: str, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = values.shape
    float8 = numbers == "float8"
    return (
        values.new_empty(rows, width, dtype=FLOAT8 if float8 else torch.int8),
        values.new_empty(rows, 1, dtype=torch.float32),
        values.new_empty(0 if symmetric or float8 else rows, 1, dtype=torch.int8),
        values.new_empty(0 if float8 else rows, dtype=torch.int32),
        values.new_empty(rows if keep else 0, width, dtype=torch.float32),
    )


_WORDS = {"norm": ("layer", "rms", "none"), "gelu": ("exact", "tanh", "none"), "numbers": ("integer", "float8")}


def _check(rows: int, width: int, samples: int, order: int, words: Mapping[str, str]) -> None:
    if rows == 0 or rows % samples:
        raise ValueError(f"values of {rows} rows must hold at least one, and equally many for {samples} samples")
    if not 0 < width <= WIDEST_ROW:
        raise ValueError(f"values of {width} columns must have 1 to {WIDEST_ROW}")
    if order < 1 or order & (order - 1) or width % order:
        raise ValueError(f"order = {order} must be a power of two that divides the {width} columns")
    for name, word in words.items():
        if word not in _WORDS[name]:
            raise ValueError(f"{name} = {word!r} must be one of {', '.join(_WORDS[name])}")
