"""Rotations by random signs and Hadamard matrices: x R with R = diag(ε) H / √n, so that R Rᵀ = I.

A rotation spreads each channel over all channels of its block, and with it what makes one channel stand out. Orders
that are no power of two come from Paley's two constructions over prime fields (Paley 1933) and Kronecker products:
1152 = 12 · 12 · 8, 28 = 2 (13 + 1).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

# Above it, a power of two is applied in more than one factor
_LARGEST_POWER = 128


@dataclass(frozen=True, eq=False)
class Rotation:
    """R = diag(ε) (I ⊗ H) / √n, with H the Kronecker product of Hadamard matrices, of order n.

    Attributes:
        signs: ε, ±1, int8 [width].
        factors: orders of the Hadamard matrices; their product n is the block that is rotated, and divides the width.
    """

    signs: Tensor
    factors: tuple[int, ...]


def random_rotation(width: int, kind: Literal["full", "block"], seed: int) -> Rotation:
    """A rotation of `width` channels whose signs are a function of the seed alone.

    Args:
        width: channels.
        kind: "full" mixes all channels; "block" mixes blocks of the largest power of two that divides the width, which
            is cheaper and needs no special matrix.
        seed: of the signs.

    Raises:
        ValueError: no Hadamard matrix of that order is known here, or the width is odd.
    """
    if kind not in ("full", "block"):
        raise ValueError(f"hadamard = {kind!r} must be 'full' or 'block'")
    factors = hadamard_factors(width if kind == "full" else width & -width)
    if factors is None:
        raise ValueError(f"hadamard = 'full': no Hadamard matrix of order {width} is known here; use 'block'")
    if not factors:
        raise ValueError(f"hadamard = {kind!r}: {width} channels cannot be rotated, as no power of two divides them")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return Rotation(signs.to(torch.int8), factors)


def rotate(values: Tensor, rotation: Rotation, dim: int = -1) -> Tensor:
    """x R along one dimension, in float32 or, for float64 values, float64."""
    moved = _widened(values).movedim(dim, -1)
    signed = moved * rotation.signs.to(moved.device, moved.dtype)
    return _multiply(signed, rotation.factors, transposed=False).movedim(-1, dim)


def rotate_back(values: Tensor, rotation: Rotation, dim: int = -1) -> Tensor:
    """x Rᵀ along one dimension: undoes `rotate`."""
    moved = _multiply(_widened(values).movedim(dim, -1), rotation.factors, transposed=True)
    return (moved * rotation.signs.to(moved.device, moved.dtype)).movedim(-1, dim)


@lru_cache(maxsize=1024)
def hadamard_factors(order: int) -> tuple[int, ...] | None:
    """Orders of Hadamard matrices whose Kronecker product has this order, the cheapest such; () for 1, None if none."""
    if order & (order - 1) == 0:
        powers = order.bit_length() - 1
        step = _LARGEST_POWER.bit_length() - 1
        parts = -(-powers // step)
        return tuple(2 ** (powers // parts + (i < powers % parts)) for i in range(parts))
    best: tuple[int, ...] | None = None
    for base in range(12, order + 1, 4):
        if order % base or base & (base - 1) == 0 or _paley_prime(base) is None:
            continue
        rest = hadamard_factors(order // base)
        if rest is not None and (best is None or base + sum(rest) < sum(best)):
            best = (base, *rest)
    return best


@lru_cache(maxsize=256)
def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix, int8 [order, order] of ±1 with H Hᵀ = order · I: Sylvester's, or one of Paley's.

    Raises:
        ValueError: neither a power of two nor an order of Paley's over a prime field.
    """
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.int8)
        pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        while len(matrix) < order:
            matrix = torch.kron(matrix, pair)
        return matrix
    prime = _paley_prime(order)
    if prime is None:
        raise ValueError(f"order = {order} must be a power of two, or q + 1 or 2 (q + 1) of Paley's with a prime q")
    residues = {i * i % prime for i in range(1, prime)}
    symbol = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, prime)], dtype=torch.int8)
    index = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.int8)
    core[0, 1:] = 1
    core[1:, 0] = -1 if prime % 4 == 3 else 1
    core[1:, 1:] = symbol[(index[:, None] - index[None]) % prime]
    identity = torch.eye(prime + 1, dtype=torch.int8)
    if prime % 4 == 3:
        return identity + core
    first = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    second = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, first) + torch.kron(identity, second)


def _paley_prime(order: int) -> int | None:
    """The prime q = 3 mod 4 with order q + 1, or q = 1 mod 4 with order 2 (q + 1)."""
    for prime, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        is_prime = prime > 2 and all(prime % d for d in range(2, math.isqrt(prime) + 1))
        if order % 4 == 0 and is_prime and prime % 4 == remainder:
            return prime
    return None


def _multiply(values: Tensor, factors: tuple[int, ...], *, transposed: bool) -> Tensor:
    """The last dimension, block by block, times (H_1 ⊗ H_2 ⊗ …) / √n or its transpose; a factor at a time."""
    shape, block = values.shape, math.prod(factors)
    inner = block
    for order in factors:
        inner //= order
        matrix = _device_matrix(order, values.device, values.dtype)
        if inner == 1:
            values = values.reshape(-1, order) @ (matrix.t() if transposed else matrix)
        else:
            values = (matrix if transposed else matrix.t()) @ values.reshape(-1, order, inner)
    result: Tensor = values.reshape(shape) * block**-0.5
    return result


@lru_cache(maxsize=256)
def _device_matrix(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # kept for later passes, which may need gradients where this one does not
    with torch.inference_mode(False):
        return hadamard_matrix(order).to(device, dtype)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
