"""Hadamard matrices and rotations."""

import math

import pytest
import torch

from genlight.quantization.hadamard import (
    hadamard_factors,
    hadamard_matrix,
    random_rotation,
    rotate,
    rotate_back,
)

# Widths of the linear layers of PixArt, DiT, Latte, Flux, SD3.5 and Wan
WIDTHS = [1152, 4608, 1536, 3072, 3840, 5120, 6144, 8960, 12288, 13824]


@pytest.mark.parametrize("order", [1, 2, 4, 64, 12, 20, 24, 28, 36, 44, 60, 76, 84, 108, 140])
def test_rows_are_signs_and_orthogonal(order: int) -> None:
    matrix = hadamard_matrix(order).long()
    assert matrix.shape == (order, order) and bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.long))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_of_the_known_models_has_a_full_rotation(width: int) -> None:
    factors = hadamard_factors(width)
    assert factors is not None and math.prod(factors) == width
    rotation = random_rotation(width, "full", 3)
    one_hot = torch.zeros(2, width, dtype=torch.float64)
    one_hot[0, 5] = one_hot[1, -1] = 1.0
    spread = rotate(one_hot, rotation)
    assert torch.allclose(spread.abs(), torch.full_like(spread, width**-0.5), rtol=1e-12)
    assert torch.allclose(rotate_back(spread, rotation), one_hot, atol=1e-12)


@pytest.mark.parametrize(("width", "block"), [(1152, 128), (1536, 512), (64, 64), (10, 2), (36, 4)])
def test_blocks_are_the_largest_power_of_two(width: int, block: int) -> None:
    rotation = random_rotation(width, "block", 0)
    assert math.prod(rotation.factors) == block
    matrix = rotate(torch.eye(width, dtype=torch.float64), rotation)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64), atol=1e-12)
    outside = torch.ones(width, width).bool()
    for start in range(0, width, block):
        outside[start : start + block, start : start + block] = False
    assert not bool(matrix[outside].any()) and bool((matrix[~outside].abs() - block**-0.5 < 1e-12).all())


@pytest.mark.parametrize("width", [12, 20, 28, 36, 60, 108, 140, 144, 1152])
def test_a_rotation_is_the_dense_matrix_of_its_definition(width: int) -> None:
    rotation = random_rotation(width, "full", 7)
    dense = torch.ones(1, 1, dtype=torch.float64)
    for order in rotation.factors:
        dense = torch.kron(dense, hadamard_matrix(order).double())
    dense = rotation.signs.double()[:, None] * dense / width**0.5
    values = torch.randn(3, 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate(values, rotation), values @ dense, atol=1e-10)
    assert torch.allclose(rotate_back(values, rotation), values @ dense.t(), atol=1e-10)
    moved = rotate(values.movedim(-1, 1), rotation, dim=1)
    assert torch.allclose(moved, (values @ dense).movedim(-1, 1), atol=1e-10)


def test_signs_depend_on_the_seed_alone() -> None:
    first = random_rotation(96, "full", 11)
    torch.rand(5)
    assert torch.equal(random_rotation(96, "full", 11).signs, first.signs)
    assert not torch.equal(random_rotation(96, "full", 12).signs, first.signs)


def test_half_precision_is_rotated_in_single() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation = random_rotation(64, "full", 0)
    assert torch.equal(rotate(values, rotation), rotate(values.float(), rotation))


def test_widths_without_a_matrix_are_refused() -> None:
    assert hadamard_factors(18) is None and hadamard_factors(7) is None
    with pytest.raises(ValueError, match="use 'block'"):
        random_rotation(18, "full", 0)
    with pytest.raises(ValueError, match="no power of two"):
        random_rotation(9, "block", 0)
    with pytest.raises(ValueError, match="order = 18"):
        hadamard_matrix(18)
    with pytest.raises(ValueError, match="hadamard = 'half'"):
        random_rotation(16, "half", 0)  # type: ignore[arg-type]


def test_a_rotation_made_under_inference_mode_serves_passes_with_gradients() -> None:
    rotation = random_rotation(12 * 52, "block", 0)
    with torch.inference_mode():
        rotate(torch.ones(1, 624), rotation)
    values = torch.ones(1, 624, requires_grad=True)
    rotate(values, rotation).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
