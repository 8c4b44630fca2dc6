"""Balance of activations and weights: a scale per channel, a rotation, and what is left to a low-rank branch.

A layer x Wᵀ is rewritten as x'' W''ᵀ with x'' = (x / s) R and W'' = (W s) R, which is the same function as R Rᵀ = I.
The static scale takes what stands out in every step, the rotation spreads what comes and goes (ViDiT-Q,
arXiv:2406.02540, static-dynamic channel balance). Scale first, then rotate, then quantize, once.

Matrices here have a row per output or sample and columns [channels × kernel], channels outermost; a linear layer has a
kernel of 1. Layers that share their input share the balance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from genlight.quantization.activations import dynamic_grid
from genlight.quantization.formats import FLOAT_BITS, ActivationFormat, LayerFormat
from genlight.quantization.hadamard import Rotation, rotate, rotate_back
from genlight.quantization.uniform import fake_quantize
from genlight.quantization.weights import quantize_weight

# Channels below this share of the largest count as that large: a dead one would divide by zero
_LEAST_SHARE = 1e-5


@dataclass(frozen=True, eq=False)
class Balance:
    """What is done to the input of a layer, and undone in its weight.

    Attributes:
        scale: s, float32 [channels], positive; inputs are divided by it. None for ones.
        rotation: R; None for the identity.
    """

    scale: Tensor | None = None
    rotation: Rotation | None = None

    @property
    def channels(self) -> int | None:
        """Of the input; None for the balance that does nothing."""
        if self.scale is not None:
            return len(self.scale)
        return None if self.rotation is None else len(self.rotation.signs)


def balance_scale(input_absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s = max|X|^α / max|W|^(1-α) per channel (SmoothQuant's α): 1 flattens the input, 0 the weights.

    Args:
        input_absmax: largest magnitude of each input channel [channels].
        weights: matrices [outputs, channels × kernel] of all layers that have this input.
        alpha: in [0, 1].

    Returns:
        float32 [channels].

    Raises:
        ValueError: α outside [0, 1], or inputs that are not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha = {alpha!r} must lie in [0, 1]")
    if not bool(torch.isfinite(input_absmax).all()):
        raise ValueError("input_absmax holds numbers that are not finite")
    channels = len(input_absmax)
    columns = torch.stack([_cube(w.detach().abs(), channels).amax(dim=(0, 2)) for w in weights])
    inputs, outputs = _floored(input_absmax), _floored(columns.amax(dim=0).to(input_absmax.device))
    return (inputs**alpha / outputs ** (1 - alpha)).float()


def reduce_absmax(absmax: Tensor, how: Literal["max", "first", "mean"] = "max") -> Tensor:
    """One magnitude per channel [channels] from calibrated ones [branches, steps, channels].

    Args:
        absmax: not negative; zero where a step or a branch was not seen.
        how: over steps: the largest, that of the first step, or the mean of those seen; over branches always the
            largest.

    Raises:
        ValueError: `how` is something else.
    """
    largest = absmax.amax(dim=0)
    if how == "max":
        return largest.amax(dim=0)
    if how == "first":
        return largest[0]
    if how == "mean":
        return largest.sum(dim=0) / largest.any(dim=1).sum().clamp(min=1)
    raise ValueError(f"reduce = {how!r} must be 'max', 'first' or 'mean'")


def balance_input(values: Tensor, balance: Balance, dim: int = -1) -> Tensor:
    """x'' = (x / s) R along the dimension of channels; in float32 or float64 where anything is done."""
    if balance.scale is not None:
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        values = values / _along(balance.scale.to(values.device), values.ndim, dim)
    return values if balance.rotation is None else rotate(values, balance.rotation, dim)


def balance_weight(matrix: Tensor, balance: Balance) -> Tensor:
    """W'' = (W s) R of a matrix [outputs, channels × kernel]."""
    if balance.channels is None:
        return matrix
    cube = _cube(matrix, balance.channels)
    if balance.scale is not None:
        cube = cube * _along(balance.scale.to(matrix.device), 3, 1)
    if balance.rotation is not None:
        cube = rotate(cube, balance.rotation, dim=1)
    return cube.reshape(matrix.shape)


def unbalance_weight(matrix: Tensor, balance: Balance) -> Tensor:
    """W = (W'' Rᵀ) / s: undoes `balance_weight`, e.g. to write a rounded weight for a runtime that knows no balance."""
    if balance.channels is None:
        return matrix
    cube = _cube(matrix, balance.channels)
    if balance.rotation is not None:
        cube = rotate_back(cube, balance.rotation, dim=1)
    if balance.scale is not None:
        cube = cube / _along(balance.scale.to(matrix.device), 3, 1)
    return cube.reshape(matrix.shape)


def balance_sample(matrix: Tensor, balance: Balance) -> Tensor:
    """Inputs of a layer [rows, channels × kernel] as the balanced weight sees them."""
    if balance.channels is None:
        return matrix
    return balance_input(_cube(matrix, balance.channels), balance, dim=1).reshape(matrix.shape)


def balance_hessian(hessian: Tensor, balance: Balance) -> Tensor:
    """Second moments of balanced inputs, Rᵀ diag(1/s) H diag(1/s) R, from those of the inputs [columns, columns]."""
    once = balance_sample(hessian, balance)
    return balance_sample(once.t(), balance).t()


def search_alpha(
    weights: Sequence[Tensor],
    sample: Tensor,
    input_absmax: Tensor,
    form: LayerFormat,
    *,
    rotation: Rotation | None = None,
    grid: Sequence[float] = (0.01, 0.1, 0.2, 0.3, 0.5, 0.7),
    hessian: Tensor | None = None,
) -> tuple[float, list[float]]:
    """The α whose quantized layers come nearest to the outputs of the layers as they are.

    Args:
        weights: matrices [outputs, channels × kernel] of the layers with this input.
        sample: some inputs [rows, channels × kernel].
        input_absmax: [channels].
        form: to quantize to.
        rotation: after the scale.
        grid: values of α that are tried.
        hessian: of the inputs as they are, where the format needs it.

    Returns:
        The best α, the first of equals; and for each α the squared error of each layer's output over its square, summed
        over the layers.

    Raises:
        ValueError: an empty grid, or what `balance_scale` and `quantize_weight` refuse.
    """
    if not grid:
        raise ValueError("alpha_grid must hold at least one value")
    weights = [w.detach() for w in weights]
    outputs = [sample @ w.t() for w in weights]
    errors = []
    for alpha in grid:
        balance = Balance(balance_scale(input_absmax, weights, alpha), rotation)
        inputs = _rounded_input(balance_sample(sample, balance), form.activation)
        moments = None if hessian is None else balance_hessian(hessian, balance)
        error = 0.0
        for weight, output in zip(weights, outputs, strict=True):
            rounded = balance_weight(weight, balance)
            if form.weight.bits != FLOAT_BITS:
                rounded = quantize_weight(rounded, form.weight, moments).dequantized()
            difference = inputs @ rounded.to(inputs.dtype).t() - output
            error += float(difference.square().sum() / output.square().sum().clamp(min=torch.finfo(output.dtype).tiny))
        errors.append(error)
    return grid[errors.index(min(errors))], errors


def low_rank_split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by `rank` (SVDQuant, arXiv:2411.05007, section 4): what rounds badly stays
    in floating point and only the rest is quantized.

    Args:
        matrix: [outputs, columns], balanced.
        rank: 1 to the smaller side.

    Returns:
        up [outputs, rank] and down [rank, columns] with up · down the approximation, in the type of the matrix.

    Raises:
        ValueError: another rank.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank = {rank} must be 1 to {min(matrix.shape)}, the smaller side of the weight")
    left, values, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _rounded_input(sample: Tensor, form: ActivationFormat) -> Tensor:
    if form.bits == FLOAT_BITS:
        return sample
    # rows of a sample are no members of a batch; one range for all stands for static ones and those per member
    one_range = replace(form, mode="dynamic", granularity="token" if form.granularity == "token" else "tensor")
    return fake_quantize(sample, dynamic_grid(sample, one_range))


def _cube(matrix: Tensor, channels: int) -> Tensor:
    """[rows, channels × kernel] as [rows, channels, kernel]."""
    return matrix.reshape(len(matrix), channels, matrix.shape[1] // channels)


def _floored(magnitudes: Tensor) -> Tensor:
    largest = magnitudes.max()
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    return magnitudes.clamp(min=_LEAST_SHARE * largest)


def _along(vector: Tensor, ndim: int, dim: int) -> Tensor:
    shape = [1] * ndim
    shape[dim] = -1
    return vector.reshape(shape)
