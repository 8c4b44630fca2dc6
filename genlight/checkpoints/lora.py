"""Combinations of LoRA checkpoints: of the products B A, not of the factors.

Σ α_i B_i A_i is not (Σ α_i B_i)(Σ α_i A_i). The factors side by side, [α_1 B_1 … α_K B_K] and [A_1; …; A_K], are the
sum exactly, with rank K r; a singular value decomposition cuts it back to rank r, which is the nearest there is. Where
there are more columns than a layer has rows, the products themselves are smaller: those of the basis are held instead.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from genlight.checkpoints.bases import Array, Basis, Coordinates, Raw, group_of_names
from genlight.checkpoints.mixing import Checkpoints, Mixer, WeightMixer, as_rows, check_names, member_rows

# what the down factor A is called, and the up factor B beside it: peft, and both spellings of diffusers and others
_DOWN = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up", "lora_embedding_A": "lora_embedding_B"}
# of the decomposition of a whole product: columns beyond the rank, and passes that sharpen them
_OVERSAMPLED, _ITERATIONS = 16, 2
_PATTERN = re.compile("|".join(rf"(?<![A-Za-z_]){re.escape(down)}(?![A-Za-z_])" for down in _DOWN))


@dataclass(frozen=True, eq=False)
class LowRank:
    """A product of two factors.

    Attributes:
        down: A [r, in].
        up: B [out, r].
        error: Frobenius norm of what was cut off, relative to the norm of the whole.
    """

    down: Tensor
    up: Tensor
    error: float


@dataclass(frozen=True, eq=False)
class FactorStack:
    """Factors of K members side by side, orthogonalised once, so that each combination is a small decomposition.

    Attributes:
        up_basis, up_parts: Q [out, m] and R [m, K r] of the up factors, float64.
        down_basis, down_parts: the same of the transposed down factors, [in, n] and [n, K r].
        rank: r.
    """

    up_basis: Tensor
    up_parts: Tensor
    down_basis: Tensor
    down_parts: Tensor
    rank: int

    @classmethod
    def of(cls, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> "FactorStack":
        """Of down factors A_i [r, in, …] and up factors B_i [out, r, …].

        Raises:
            ValueError: no factors, or a pair whose ranks differ.
        """
        if not downs or len(downs) != len(ups):
            raise ValueError(f"{len(downs)} down and {len(ups)} up factors: there must be as many of each, one or more")
        for down, up in zip(downs, ups, strict=True):
            if up.numel() != up.shape[0] * len(down):
                raise ValueError(f"factors {list(down.shape)} and {list(up.shape)} must be [r, in] and [out, r]")
        down = torch.cat([down.double().reshape(len(down), -1) for down in downs])
        up = torch.cat([up.double().reshape(len(up), -1) for up in ups], dim=1)
        up_basis, up_parts = torch.linalg.qr(up)
        down_basis, down_parts = torch.linalg.qr(down.T)
        return cls(up_basis, up_parts, down_basis, down_parts, len(downs[0]))

    def combine(self, weights: Array, rank: int | None = None) -> LowRank:
        """The product nearest to Σ α_i B_i A_i for weights α [K], at `rank`; at that of the first member if None.

        Raises:
            ValueError: another number of weights, or a rank below 1.
        """
        rank = self.rank if rank is None else rank
        each, left = divmod(self.up_parts.shape[1], max(1, len(weights)))
        if left or rank < 1:
            raise ValueError(f"{len(weights)} weights at rank {rank} do not fit {self.up_parts.shape[1]} columns")
        scale = torch.from_numpy(np.asarray(weights, dtype=np.float64)).to(self.up_parts.device)
        core = (self.up_parts * scale.repeat_interleave(each)) @ self.down_parts.T
        u, values, vh = torch.linalg.svd(core, full_matrices=False)
        whole = float(values.square().sum().sqrt())
        error = float(values[rank:].square().sum().sqrt()) / whole if whole else 0.0
        root = values[:rank].sqrt()
        up = self.up_basis @ (u[:, :rank] * root)
        down = (root[:, None] * vh[:rank]) @ self.down_basis.T
        return _padded(down, up, error, rank)


@dataclass(frozen=True, eq=False)
class DenseStack:
    """Products of the basis vectors less that of the newest member, which is held too; float32.

    Attributes:
        newest: B A of the newest member [out, in].
        differences: [M - 1, out, in].
        rank: r.
    """

    newest: Tensor
    differences: Tensor
    rank: int

    @classmethod
    def of(cls, factors: Callable[[int], tuple[Tensor, Tensor]], basis: Array) -> Self:
        """Of the down and up factor of each member, read one member at a time.

        Args:
            factors: A_i [r, in, …] and B_i [out, r, …] of member i.
            basis: weights of the basis vectors over members [M, K], the newest member by itself last.
        """
        down, up = factors(basis.shape[1] - 1)
        newest = _product(down, up)
        differences = newest.new_zeros(len(basis) - 1, *newest.shape)
        for index, column in enumerate(basis[:-1, :-1].T):
            difference = _product(*factors(index)) - newest
            for row in np.flatnonzero(column).tolist():
                differences[row].add_(difference, alpha=float(column[row]))
        return cls(newest, differences, len(down))

    def combine(self, coefficients: Array) -> LowRank:
        """The product nearest to newest + Σ α_j difference_j, nearly; see `cut_back`."""
        alpha = torch.from_numpy(coefficients).to(self.newest.device, torch.float32)
        return cut_back(self.newest + torch.tensordot(alpha, self.differences, dims=1), self.rank)


def cut_back(whole: Tensor, rank: int) -> LowRank:
    """The product of this rank that is nearly the nearest to a matrix [out, in], by subspace iterations.

    Halko, Martinsson & Tropp 2011, algorithm 4.4; the same product at each call.
    """
    size = min(*whole.shape, rank + _OVERSAMPLED)
    sketch = torch.randn(whole.shape[1], size, generator=torch.Generator().manual_seed(0)).to(whole)
    basis = torch.linalg.qr(whole @ sketch)[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(whole @ torch.linalg.qr(whole.T @ basis)[0])[0]
    u, values, vh = torch.linalg.svd(basis.T @ whole, full_matrices=False)
    root = values[:rank].sqrt()
    down, up = root[:, None] * vh[:rank], basis @ (u[:, :rank] * root)
    norm = float(whole.norm())
    return _padded(down, up, float((whole - up @ down).norm()) / norm if norm else 0.0, rank)


def _padded(down: Tensor, up: Tensor, error: float, rank: int) -> LowRank:
    """Factors with zeros up to the rank, in a layer that is smaller than it."""
    short = rank - len(down)
    if short > 0:
        up = torch.cat([up, up.new_zeros(len(up), short)], dim=1)
        down = torch.cat([down, down.new_zeros(short, down.shape[1])])
    return LowRank(down, up, error)


def _product(down: Tensor, up: Tensor) -> Tensor:
    return up.float().reshape(len(up), -1) @ down.float().reshape(len(down), -1)


def combine_factors(downs: Sequence[Tensor], ups: Sequence[Tensor], weights: Array, rank: int | None = None) -> LowRank:
    """`FactorStack.of(downs, ups).combine(weights, rank)`, float64."""
    return FactorStack.of(downs, ups).combine(weights, rank)


def holds_adapters(names: Sequence[str]) -> bool:
    """Whether both factors of an adapted layer are among the names."""
    known = set(names)
    return any(_PATTERN.search(name) and _up_of(name) in known for name in names)


def _up_of(down: str) -> str:
    return _PATTERN.sub(lambda found: _DOWN[found.group()], down)


def lora_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Names of the down and the up factor of each adapted layer.

    Raises:
        ValueError: a factor without the other one.
    """
    known, pairs = set(names), []
    for name in names:
        if _PATTERN.search(name):
            up = _up_of(name)
            if up not in known:
                raise ValueError(f"the LoRA factor {name!r} has no {up!r} beside it")
            pairs.append((name, up))
    paired = {name for pair in pairs for name in pair}
    ups = re.compile("|".join(re.escape(up) for up in _DOWN.values()))
    alone = next((name for name in names if name not in paired and ups.search(name)), None)
    if alone is not None:
        raise ValueError(f"the LoRA factor {alone!r} has no down factor beside it")
    return pairs


def grouped_pairs(names: Sequence[str], groups: Sequence[str]) -> list[tuple[str, str]]:
    """As `lora_pairs`, for parameters in groups that have coefficients of their own.

    Raises:
        ValueError: a factor without the other one, or in another group than it, where its coefficients would be lost.
    """
    group = dict(zip(names, group_of_names(names, groups), strict=True))
    pairs = lora_pairs(names)
    for down, up in pairs:
        if group[down] != group[up]:
            raise ValueError(
                f"groups = {list(groups)} part the LoRA factors {down!r} and {up!r}: a pattern must fit both of them"
            )
    return pairs


class LoraMixer:
    """Combines a trajectory with LoRA factors in place; parameters that are no factors are combined one by one.

    Attributes:
        truncation: by name of the down factor, the relative error of the last combination; see `LowRank.error`.
    """

    def __init__(
        self,
        trajectory: Checkpoints,
        live: nn.Module | Mapping[str, Tensor],
        *,
        basis: Basis | None = None,
        groups: Sequence[str] = (".*",),
    ) -> None:
        """Arguments and errors are those of `WeightMixer`, and those of `grouped_pairs`. All factors are read."""
        self.trajectory = trajectory
        self.coordinates = Coordinates.of(basis or Raw(), [member.count for member in trajectory.members])
        self.num_groups = len(groups)
        self.truncation: dict[str, float] = {}
        self._group = dict(zip(trajectory.names, group_of_names(trajectory.names, groups), strict=True))
        self._pairs = grouped_pairs(trajectory.names, groups)
        paired = {name for pair in self._pairs for name in pair}
        self._plain = [name for name in trajectory.names if name not in paired]
        self._members = range(len(trajectory.members))
        self.attach(live)
        with torch.inference_mode(False), torch.no_grad():
            self._original = {name: tensor.detach().clone() for name, tensor in self._live.items()}
            device = self._live[trajectory.names[0]].device
            self._stacks = {down: self._stack(down, up, device) for down, up in self._pairs}

    def _stack(self, down: str, up: str, device: torch.device) -> FactorStack | DenseStack:
        """What combinations of a layer are made of: whichever is smaller, the factors or the products of the basis."""

        def factors(index: int) -> tuple[Tensor, Tensor]:
            one, other = (self.trajectory.read(index, name).to(device) for name in (down, up))
            return one, other

        shapes = self.trajectory.shapes
        rank, rows, columns = shapes[down][0], shapes[up][0], math.prod(shapes[down][1:])
        parts = len(self._members) * rank
        if parts <= min(rows, columns) or self.coordinates.size * rows * columns > 2 * parts * (rows + columns):
            return FactorStack.of(*zip(*map(factors, self._members), strict=True))
        return DenseStack.of(factors, self.coordinates.basis)

    def attach(self, live: nn.Module | Mapping[str, Tensor]) -> None:
        """Write into these weights from now on. ValueError where they do not fit the trajectory."""
        found = dict(live.named_parameters()) if isinstance(live, nn.Module) else dict(live)
        check_names(self.trajectory, found)
        self._live = {name: found[name] for name in self.trajectory.names}

    def mix(self, coefficients: Array) -> None:
        """Write the combination with coefficients [G, M - 1] or [M - 1]. ValueError as in `WeightMixer.mix`."""
        self.mix_members(self.coordinates.to_members(as_rows(coefficients, self.num_groups, self.coordinates.size)))

    def mix_members(self, weights: Array) -> None:
        """Write the combination with weights [G, K] or [K] over members. ValueError as in `WeightMixer.mix_members`."""
        rows = member_rows(weights, self.num_groups, len(self._members))
        free = self.coordinates.from_members(rows) if self.coordinates.holds(rows) else None
        with torch.inference_mode(False), torch.no_grad():
            for down, up in self._pairs:
                row = rows[self._group[down]]
                if np.count_nonzero(row) == 1:
                    # one member by itself: its own factors, to the bit
                    index = int(np.flatnonzero(row)[0])
                    self._write(down, self.trajectory.read(index, down))
                    self._write(up, self.trajectory.read(index, up))
                    self.truncation[down] = 0.0
                    continue
                mixed = self._combined(down, up, row, None if free is None else free[self._group[down]])
                self._write(down, mixed.down)
                self._write(up, mixed.up)
                self.truncation[down] = mixed.error
            for name in self._plain:
                row = rows[self._group[name]]
                total = self.trajectory.read(self._members[-1], name).clone()
                for index in np.flatnonzero(row[:-1]).tolist():
                    total.add_(self.trajectory.read_difference(index, name), alpha=float(row[index]))
                self._write(name, total)

    def _combined(self, down: str, up: str, row: Array, free: Array | None) -> LowRank:
        """A layer with weights over members, and the coefficients that they are in the basis if it holds them."""
        stack = self._stacks[down]
        if isinstance(stack, FactorStack):
            return stack.combine(row)
        if free is not None:
            return stack.combine(free)
        whole = stack.newest.clone()
        for index in np.flatnonzero(row[:-1]).tolist():
            factors = (self.trajectory.read(index, name).to(whole.device) for name in (down, up))
            whole.add_(_product(*factors) - stack.newest, alpha=float(row[index]))
        return cut_back(whole, stack.rank)

    def restore(self) -> None:
        """Put the weights back, bit for bit, that were there when the mixer was made."""
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._original.items():
                self._write(name, tensor)

    def _write(self, name: str, value: Tensor) -> None:
        self._live[name].detach().copy_(value.reshape(self._live[name].shape))


def mixer_of(
    trajectory: Checkpoints,
    live: nn.Module | Mapping[str, Tensor],
    *,
    basis: Basis | None = None,
    groups: Sequence[str] = (".*",),
    device_bytes: int | None = None,
) -> Mixer:
    """A `LoraMixer` where the trajectory holds LoRA factors, else a `WeightMixer`; arguments and errors are theirs."""
    if lora_pairs(trajectory.names):
        return LoraMixer(trajectory, live, basis=basis, groups=groups)
    return WeightMixer(trajectory, live, basis=basis, groups=groups, device_bytes=device_bytes)
