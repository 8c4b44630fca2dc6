"""Weights as packed integers: ranges by granularity, the clipping search, rounding, and the numbers they stand for.

A weight is a matrix [rows, columns], a row for each output channel. Its scales are [1, 1] per tensor, [rows, 1] per
channel, [rows, groups] per group of consecutive columns. Where the group size does not divide the columns the last
group is shorter: it is filled up with zeros, which every range holds anyway, and they are dropped again.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genlight.quantization.formats import WeightFormat
from genlight.quantization.gptq import gptq_codes
from genlight.quantization.packing import pack_codes, unpack_codes
from genlight.quantization.uniform import Grid, dequantize, fake_quantize, grid_from_range, quantize

# Shares of the range that the clipping search tries, from all of it
_CLIP_RATIOS = tuple(1.0 - 0.02 * i for i in range(36))


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix in storage.

    Attributes:
        codes: packed, [rows, bytes]: int8 above four bits, else uint8; or float8.
        grid: scale and zero point [1, 1], [rows, 1] or [rows, groups].
        columns: numbers in a row.
        group_size: columns of a group, None where a row has one scale.
        sums: Σ p of each row, int32 [rows], where somebody has kept them.
    """

    codes: Tensor
    grid: Grid
    columns: int
    group_size: int | None = None
    sums: Tensor | None = None

    def unpacked(self) -> Tensor:
        """The codes, int8 or float8 [rows, columns]."""
        return unpack_codes(self.codes, self.grid.bits, self.columns)

    def in_bytes(self) -> "QuantizedWeight":
        """The same numbers with eight bits a code, to be multiplied more than once."""
        return replace(self, codes=self.unpacked(), grid=replace(self.grid, bits=8))

    def row_sums(self) -> Tensor:
        """Σ p of each row, int32 [rows]."""
        return self.unpacked().sum(dim=1, dtype=torch.int32) if self.sums is None else self.sums

    def dequantized(self) -> Tensor:
        """The numbers, float32 [rows, columns]."""
        return dequantize(self.unpacked(), expand_groups(self.grid, self.group_size, self.columns))


def quantize_weight(weight: Tensor, form: WeightFormat, hessian: Tensor | None = None) -> QuantizedWeight:
    """Quantize a weight matrix.

    Args:
        weight: [rows, columns].
        form: bits 2 to 8.
        hessian: second moments Σ x xᵀ of the layer's inputs [columns, columns], of any scale; needed where
            `form.needs_hessian`.

    Raises:
        ValueError: no Hessian where one is needed, one of another shape, or numbers that are not finite.
    """
    weight = weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight holds numbers that are not finite")
    columns = weight.shape[1]
    if form.needs_hessian:
        if hessian is None:
            raise ValueError("hessian must be given: weight.rounding = 'gptq' and weight.clip = 'hessian' need it")
        if tuple(hessian.shape) != (columns, columns):
            raise ValueError(f"hessian of shape {list(hessian.shape)} must be [{columns}, {columns}]")
    importance = hessian.diagonal() if hessian is not None and form.clip == "hessian" else None
    grid = weight_grid(weight, form, importance)
    expanded = expand_groups(grid, form.group_size, columns)
    if form.rounding == "gptq":
        assert hessian is not None
        codes = gptq_codes(weight, hessian, expanded, damping=form.damping, act_order=form.act_order)
    else:
        codes = quantize(weight, expanded)
    return QuantizedWeight(pack_codes(codes, form.bits), grid, columns, form.group_size)


def weight_grid(weight: Tensor, form: WeightFormat, importance: Tensor | None = None) -> Grid:
    """The grid of a weight matrix [rows, columns]; its scale is [1, 1], [rows, 1] or [rows, groups].

    Args:
        weight: [rows, columns].
        form: granularity and clipping.
        importance: with clip "hessian", the weight of each column's squared error [columns].
    """
    groups = _grouped(weight.float(), form)
    minimum, maximum = groups.amin(dim=-1), groups.amax(dim=-1)
    full = grid_from_range(minimum, maximum, form.bits, symmetric=form.symmetric, numbers=form.numbers)
    if form.clip == "none":
        return full
    weights = torch.ones_like(groups)
    if form.clip == "hessian":
        if importance is None:
            raise ValueError("importance must be given where weight.clip is 'hessian'")
        weights = _grouped(importance.float().to(weight.device).expand_as(weight), form)
    best, scale, zero_point = torch.full_like(minimum, torch.inf), full.scale, full.zero_point
    for ratio in _CLIP_RATIOS:
        least, greatest = minimum * ratio, maximum * ratio
        grid = grid_from_range(least, greatest, form.bits, symmetric=form.symmetric, numbers=form.numbers)
        error = (weights * (fake_quantize(groups, _unsqueezed(grid)) - groups).square()).sum(dim=-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, grid.scale, scale)
        if zero_point is not None and grid.zero_point is not None:
            zero_point = torch.where(better, grid.zero_point, zero_point)
    return replace(full, scale=scale, zero_point=zero_point)


def expand_groups(grid: Grid, group_size: int | None, columns: int) -> Grid:
    """A grid per group [rows, groups] as one per column [rows, columns]; any other grid is returned as it is."""
    if group_size is None:
        return grid
    zero_point = grid.zero_point
    return replace(
        grid,
        scale=grid.scale.repeat_interleave(group_size, dim=1)[:, :columns],
        zero_point=None if zero_point is None else zero_point.repeat_interleave(group_size, dim=1)[:, :columns],
    )


def _grouped(weight: Tensor, form: WeightFormat) -> Tensor:
    """The matrix as [scale rows, scale columns, numbers that share a scale]."""
    if form.granularity == "tensor":
        return weight.reshape(1, 1, -1)
    if form.group_size is None:
        return weight.unsqueeze(1)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % form.group_size))
    return padded.reshape(len(weight), -1, form.group_size)


def _unsqueezed(grid: Grid) -> Grid:
    zero_point = grid.zero_point
    unsqueezed = None if zero_point is None else zero_point.unsqueeze(-1)
    return replace(grid, scale=grid.scale.unsqueeze(-1), zero_point=unsqueezed)
