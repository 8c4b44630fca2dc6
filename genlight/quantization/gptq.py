"""GPTQ: rounding column by column, each column's error made up for by the columns that are still to be rounded.

Frantar et al. 2022 (arXiv:2210.17323), algorithm 1: with the Cholesky factor H⁻¹ = Uᵀ U, the error of column i over
U_ii is spread along row i of U, at once within a block of columns and once per block over the rest. Grids are fixed
beforehand, so that groups keep their scales in any order of columns.
"""

from dataclasses import replace

import torch
from torch import Tensor

from genlight.quantization.uniform import FLOAT8, Grid, dequantize, quantize


def gptq_codes(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
) -> Tensor:
    """Codes [rows, columns] of a weight matrix. Row by row, never worse than rounding to nearest.

    The rows of a layer are independent problems, and the greedy order loses some of them to the nearest levels; those
    rows are rounded to nearest.

    Args:
        weight: [rows, columns].
        hessian: H = Σ x xᵀ over inputs of the layer, [columns, columns], of any scale. Worked on in its own type,
            float32 at least.
        grid: scale and zero point, [1 | rows, 1 | columns].
        damping: share of the mean of H's diagonal that is added to it; ten times as much, up to all of it, where H is
            still singular.
        act_order: columns with the largest H_ii first.
        block_size: columns of a block; changes the speed only.

    Raises:
        ValueError: a Hessian with numbers that are not finite, or one that is not positive semidefinite.
    """
    wide = torch.promote_types(hessian.dtype, torch.float32)
    hessian = hessian.to(weight.device, wide)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("hessian holds numbers that are not finite")
    nearest = quantize(weight, grid)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    if order is None:
        codes = _spread(weight.to(wide), _inverse_factor(hessian, damping), grid, block_size)
    else:
        ordered = _columns(grid, order)
        factor = _inverse_factor(hessian[order][:, order], damping)
        codes = _spread(weight[:, order].to(wide), factor, ordered, block_size)[:, order.argsort()]
    worse = row_errors(weight, dequantize(codes, grid), hessian) >= row_errors(
        weight, dequantize(nearest, grid), hessian
    )
    return torch.where(worse.unsqueeze(1), nearest, codes)


def row_errors(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """Squared output error of each row over the inputs that H sums up: (w - ŵ)ᵀ H (w - ŵ), float64 [rows]."""
    difference = (weight.double() - quantized.double()).to(hessian.device)
    return ((difference @ hessian.double()) * difference).sum(dim=1)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper U with (H + damping · mean(diag H) · I)⁻¹ = Uᵀ U."""
    mean = hessian.diagonal().mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    # without any damping the first try is H itself
    shares = [damping, *(share for share in (1e-3, 1e-2, 1e-1, 1.0) if share > damping)]
    for share in shares:
        lower, failed = torch.linalg.cholesky_ex(hessian + share * mean * identity)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
    raise ValueError("hessian must be positive semidefinite, as second moments are; this one is not")


def _spread(weight: Tensor, factor: Tensor, grid: Grid, block_size: int) -> Tensor:
    """Algorithm 1 on a copy of `weight`, columns in their order."""
    rest = weight.clone()
    columns = rest.shape[1]
    codes = torch.empty(rest.shape, dtype=FLOAT8 if grid.numbers == "float8" else torch.int8, device=rest.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, inner = rest[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            column = _columns(grid, slice(start + i, start + i + 1))
            codes[:, start + i : start + i + 1] = quantize(block[:, i : i + 1], column)
            levels = dequantize(codes[:, start + i : start + i + 1], column)
            errors[:, i] = (block[:, i] - levels[:, 0]) / inner[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] * inner[i, i + 1 :]
        rest[:, end:] -= errors @ factor[start:end, end:]
    return codes


def _columns(grid: Grid, columns: Tensor | slice) -> Grid:
    """The grid of some columns; one that is the same for all columns is returned as it is."""
    if grid.scale.shape[1] == 1:
        return grid
    zero_point = grid.zero_point
    chosen = None if zero_point is None else zero_point[:, columns]
    return replace(grid, scale=grid.scale[:, columns], zero_point=chosen)
