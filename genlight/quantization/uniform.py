"""Uniform quantization: a grid from a range, codes from numbers, numbers from codes.

With b bits, codes are the integers -2^(b-1) … 2^(b-1) - 1 and stand for (code - z) Δ. Asymmetric codes are those of the
papers, 0 … 2^b - 1, minus 2^(b-1), with z shifted alike: the same numbers, and every width up to eight bits fits int8.
Scales are float32 whatever the type of the numbers, and rounding is half to even.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = range(2, 9)


@dataclass(frozen=True, eq=False)
class Grid:
    """What codes stand for.

    Attributes:
        scale: Δ, float32, positive; broadcasts against the numbers.
        zero_point: z, int8, the code of zero, shaped as `scale`; None for symmetric grids, where it is 0.
        bits: b, 2 to 8.
    """

    scale: Tensor
    zero_point: Tensor | None
    bits: int


def code_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code of `bits` bits.

    Raises:
        ValueError: bits outside 2 … 8.
    """
    if bits not in BITS:
        raise ValueError(f"bits = {bits!r} must be a whole number from {BITS[0]} to {BITS[-1]}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def grid_from_range(minimum: Tensor, maximum: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The grid over [minimum, maximum], widened to hold zero, which is always a code.

    Symmetric: Δ = max|x| / (2^(b-1) - 1), and with two bits three levels. Asymmetric: Δ = (max - min) / (2^b - 1),
    z = round(-min / Δ) - 2^(b-1). A range of zero width gets the least positive Δ: zeros stay zeros, and neighbours
    keep their own scale.

    Args:
        minimum: any shape.
        maximum: the same shape.
        bits: 2 to 8.
        symmetric: whether zero has code 0.

    Raises:
        ValueError: bits outside 2 … 8.
    """
    low, high = code_range(bits)
    minimum, maximum = minimum.float().clamp(max=0.0), maximum.float().clamp(min=0.0)
    tiny = torch.finfo(torch.float32).tiny
    if symmetric:
        return Grid((torch.maximum(-minimum, maximum) / high).clamp(min=tiny), None, bits)
    # divided before subtracting: the difference of float16-sized extremes is finite, that of float32's need not be
    scale = (maximum / (high - low) - minimum / (high - low)).clamp(min=tiny)
    zero_point = (torch.round(-minimum / scale) + low).clamp(low, high)
    return Grid(scale, zero_point.to(torch.int8), bits)


def quantize(values: Tensor, grid: Grid) -> Tensor:
    """Codes of the nearest levels, int8, of the shape of `values`; numbers outside the grid take its ends."""
    codes = torch.round(values.float() / grid.scale)
    if grid.zero_point is not None:
        codes = codes + grid.zero_point
    return codes.clamp(*code_range(grid.bits)).to(torch.int8)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The numbers (code - z) Δ that codes stand for, float32."""
    centred = codes.float() if grid.zero_point is None else codes.float() - grid.zero_point.float()
    return centred * grid.scale


def fake_quantize(values: Tensor, grid: Grid) -> Tensor:
    """The nearest levels themselves, in the type of `values` if that is float64, else float32: `dequantize(quantize)`
    without a pass through integers, equal bit for bit."""
    low, high = code_range(grid.bits)
    codes = torch.round(values.float() / grid.scale)
    if grid.zero_point is None:
        levels = codes.clamp(low, high) * grid.scale
    else:
        zero_point = grid.zero_point.float()
        levels = (torch.clamp(codes + zero_point, low, high) - zero_point) * grid.scale
    return levels.to(torch.promote_types(values.dtype, torch.float32))
