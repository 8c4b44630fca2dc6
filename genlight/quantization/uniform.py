"""Quantization: a grid from a range, codes from numbers, numbers from codes.

With b bits, codes are the integers -2^(b-1) … 2^(b-1) - 1 and stand for (code - z) Δ. Asymmetric codes are those of the
papers, 0 … 2^b - 1, minus 2^(b-1), with z shifted alike: the same numbers, and every width up to eight bits fits int8.
Scales are float32 whatever the type of the numbers, and rounding is half to even.

Codes of eight bits may be numbers in floating point instead, float8 e4m3 (Micikevicius et al. 2022, arXiv:2209.05433):
four bits of exponent and three of mantissa, up to ±448. They stand for code · Δ, and are symmetric.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BITS = range(2, 9)
Numbers = Literal["integer", "float8"]
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max


@dataclass(frozen=True, eq=False)
class Grid:
    """What codes stand for.

    Attributes:
        scale: Δ, float32, positive; broadcasts against the numbers.
        zero_point: z, int8, the code of zero, shaped as `scale`; None for symmetric grids, where it is 0.
        bits: b, 2 to 8.
        numbers: what codes are: integers, or numbers in float8.
    """

    scale: Tensor
    zero_point: Tensor | None
    bits: int
    numbers: Numbers = "integer"

    def of_rows(self, rows: slice) -> "Grid":
        """That of some rows; the grid itself where it is one for all."""
        if len(self.scale) == 1:
            return self
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return Grid(self.scale[rows], zero_point, self.bits, self.numbers)


def code_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code of `bits` bits.

    Raises:
        ValueError: bits outside 2 … 8.
    """
    if bits not in BITS:
        raise ValueError(f"bits = {bits!r} must be a whole number from {BITS[0]} to {BITS[-1]}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def grid_from_range(
    minimum: Tensor, maximum: Tensor, bits: int, *, symmetric: bool, numbers: Numbers = "integer"
) -> Grid:
    """The grid over [minimum, maximum], widened to hold zero, which is always a code.

    Symmetric: Δ = max|x| / (2^(b-1) - 1), and with two bits three levels. Asymmetric: Δ = (max - min) / (2^b - 1),
    z = round(-min / Δ) - 2^(b-1). Float8: Δ = max|x| / 448. A range of zero width gets the least positive Δ: zeros stay
    zeros, and neighbours keep their own scale.

    Args:
        minimum: any shape.
        maximum: the same shape.
        bits: 2 to 8.
        symmetric: whether zero has code 0; in float8 it always has.
        numbers: what codes are.

    Raises:
        ValueError: bits outside 2 … 8.
    """
    low, high = code_range(bits)
    minimum, maximum = minimum.float().clamp(max=0.0), maximum.float().clamp(min=0.0)
    tiny = torch.finfo(torch.float32).tiny
    if numbers == "float8":
        return Grid((torch.maximum(-minimum, maximum) / FLOAT8_MAX).clamp(min=tiny), None, bits, numbers)
    if symmetric:
        return Grid((torch.maximum(-minimum, maximum) / high).clamp(min=tiny), None, bits)
    # divided before subtracting: the difference of float16-sized extremes is finite, that of float32's need not be
    scale = (maximum / (high - low) - minimum / (high - low)).clamp(min=tiny)
    zero_point = (torch.round(-minimum / scale) + low).clamp(low, high)
    return Grid(scale, zero_point.to(torch.int8), bits)


def quantize(values: Tensor, grid: Grid) -> Tensor:
    """Codes of the nearest levels, int8 or float8, of the shape of `values`; numbers outside the grid take its ends."""
    if grid.numbers == "float8":
        return (values.float() / grid.scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    # in place: on a CPU a further matrix costs as much as what is done to it
    codes = (values.float() / grid.scale).round_()
    if grid.zero_point is not None:
        codes += grid.zero_point
    return codes.clamp_(*code_range(grid.bits)).to(torch.int8)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The numbers (code - z) Δ that codes stand for, float32."""
    centred = codes.float() if grid.zero_point is None else codes.float() - grid.zero_point.float()
    return centred * grid.scale


def fake_quantize(values: Tensor, grid: Grid) -> Tensor:
    """The nearest levels themselves, in the type of `values` if that is float64, else float32: `dequantize(quantize)`
    without a pass through integers, equal bit for bit."""
    wide = torch.promote_types(values.dtype, torch.float32)
    if grid.numbers == "float8":
        return dequantize(quantize(values, grid), grid).to(wide)
    low, high = code_range(grid.bits)
    codes = torch.round(values.float() / grid.scale)
    if grid.zero_point is None:
        levels = codes.clamp(low, high) * grid.scale
    else:
        zero_point = grid.zero_point.float()
        levels = (torch.clamp(codes + zero_point, low, high) - zero_point) * grid.scale
    return levels.to(wide)
