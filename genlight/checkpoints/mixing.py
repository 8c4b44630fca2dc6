"""Combinations of checkpoints, written in place into the weights that a network reads.

θ(α) = θ_newest + Σ_i α_i (θ_i - θ_newest): differences to the newest checkpoint are small, so that rounding is, and
α = 0 is the newest checkpoint itself. Only the parameters that the trajectory holds are written: frozen parameters,
buffers and with them the statistics of batch norms stay as they are.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from genlight.checkpoints.bases import Array, Basis, Coordinates, Raw, group_of_names
from genlight.checkpoints.cgroup import bytes_left
from genlight.errors import UserError

# Columns of 16-bit differences that are widened at once: on a CPU the widened block should stay in its cache
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 15, 1 << 20
_SMALL_ON_CPU = 1 << 28  # bytes


class Checkpoints(Protocol):
    """What is read of a trajectory: its members from oldest to newest, all with the same parameters."""

    @property
    def members(self) -> Sequence[Any]:
        """Each with `count`, `first_step` and `last_step`."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Names of the parameters."""
        ...

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Their shapes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs for other trajectories."""
        ...

    def read(self, index: int, name: str, /) -> Tensor:
        """A parameter of a member, float32 on the CPU."""
        ...

    def read_difference(self, index: int, name: str, /) -> Tensor:
        """A parameter of a member minus that of the newest member, float32 on the CPU."""
        ...


class Mixer(Protocol):
    """Writes combinations into live weights."""

    def attach(self, live: nn.Module | Mapping[str, Tensor]) -> None:
        """Write into these weights from now on."""
        ...

    def mix(self, coefficients: Array) -> None:
        """Write the combination with these coefficients in the basis."""
        ...

    def mix_members(self, weights: Array) -> None:
        """Write the combination with these weights over members."""
        ...

    def restore(self) -> None:
        """Put back what was there before the first combination."""
        ...


class WeightMixer:
    """Combines the members of a trajectory in place, in float32; the result is cast to the type of the live weights.

    Differences of the basis vectors to the newest member are held as one matrix [M - 1, P] on the device of the
    weights where it fits; else, and for weights over members outside the basis, members are read file by file, one
    parameter at a time. For the latter a GPU with room for it holds the members themselves too, from the first such
    combination on, and a CPU those of a small network: reading each parameter of each member would take longer than
    what is then measured.

    Attributes:
        resident: whether the differences are held on the device.
    """

    def __init__(
        self,
        trajectory: Checkpoints,
        live: nn.Module | Mapping[str, Tensor],
        *,
        basis: Basis | None = None,
        groups: Sequence[str] = (".*",),
        device_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            trajectory: K members, read here if the differences fit.
            live: the module, or its weights by name; those that the trajectory does not hold are left alone.
            basis: M basis vectors; every member by itself if None.
            groups: G patterns; parameters of a group share coefficients.
            device_bytes: most bytes for the differences; half of the free memory of the device if None.
            dtype: of the held differences; a 16-bit type halves them and is summed in float32 all the same.

        Raises:
            ValueError: a parameter of the trajectory is missing in `live` or has another shape (it is named), or the
                groups do not fit.
        """
        self.trajectory = trajectory
        self.coordinates = Coordinates.of(basis or Raw(), [member.count for member in trajectory.members])
        self.num_groups = len(groups)
        groups_found = group_of_names(trajectory.names, groups)
        # group by group, so that each group is one slice of the flat buffer
        order = sorted(range(len(groups_found)), key=lambda i: (groups_found[i], i))
        self._names = [trajectory.names[i] for i in order]
        self._group = [groups_found[i] for i in order]
        sizes = [math.prod(trajectory.shapes[name]) for name in self._names]
        self._ends = np.cumsum(sizes).tolist()
        self._starts = [end - size for end, size in zip(self._ends, sizes, strict=True)]
        self._slices = [
            (
                min(start for start, g in zip(self._starts, self._group, strict=True) if g == group),
                max(end for end, g in zip(self._ends, self._group, strict=True) if g == group),
            )
            for group in range(self.num_groups)
        ]
        self.attach(live)
        with torch.inference_mode(False), torch.no_grad():
            self._original = {name: self._live[name].detach().clone() for name in self._names}
            self.device = self._live[self._names[0]].device
            needed = self.coordinates.size * self._ends[-1] * dtype.itemsize
            allowed = free_bytes(self.device) // 2 if device_bytes is None else device_bytes
            self.resident = needed <= allowed
            self._room_for_members = allowed - needed
            self._newest = self._read_newest()
            self._flat = torch.empty_like(self._newest)
            self._differences = self._read_differences(dtype) if self.resident else None

    def attach(self, live: nn.Module | Mapping[str, Tensor]) -> None:
        """Write into these weights from now on; the same parameters, possibly other tensors.

        Raises:
            ValueError: a parameter of the trajectory is missing or has another shape.
        """
        found = dict(live.named_parameters()) if isinstance(live, nn.Module) else dict(live)
        check_names(self.trajectory, found)
        self._live = {name: found[name] for name in self._names}

    def mix(self, coefficients: Array) -> None:
        """Write the combination with coefficients [G, M - 1] or, for all groups alike, [M - 1].

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        rows = as_rows(coefficients, self.num_groups, self.coordinates.size)
        if self._differences is None:
            self._mix_from_files(self.coordinates.to_members(rows))
            return
        with torch.inference_mode(False), torch.no_grad():
            self._mix_held(self._differences, rows)

    def mix_members(self, weights: Array) -> None:
        """Write the combination with weights [G, K] or [K] over members, also one that the basis does not hold.

        Raises:
            ValueError: another shape, numbers that are not finite, or weights that do not sum to one.
        """
        rows = member_rows(weights, self.num_groups, len(self.trajectory.members))
        if self._differences is not None and self.coordinates.holds(rows):
            self.mix(self.coordinates.from_members(rows))
        elif (held := self._member_differences) is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._mix_held(held, rows[:, :-1])
        else:
            self._mix_from_files(rows)

    def restore(self) -> None:
        """Put the weights back, bit for bit, that were there when the mixer was made."""
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._original.items():
                self._live[name].detach().copy_(tensor)

    def gradient(self, gradients: Mapping[str, Tensor]) -> Array:
        """Gradient on the coefficients, float64 [G, M - 1]: dF/dα_i = ⟨dF/dθ, θ_i - θ_newest⟩.

        Args:
            gradients: dF/dθ by name, on any device; names that the trajectory does not hold are passed over.

        Raises:
            ValueError: the gradient of a parameter is missing.
        """
        missing = next((name for name in self._names if name not in gradients), None)
        if missing is not None:
            raise ValueError(f"the gradient of {missing!r} is missing: the loss does not depend on it")
        result = np.zeros((self.num_groups, self.coordinates.size))
        with torch.inference_mode(False), torch.no_grad():
            if self._differences is None:
                return self._gradient_from_files(gradients)
            flat = torch.cat([gradients[name].detach().to(self.device).reshape(-1).float() for name in self._names])
            for group, (start, end) in enumerate(self._slices):
                for a, b in self._blocks(start, end):
                    block = torch.mv(self._differences[:, a:b].float(), flat[a:b])
                    result[group] += block.double().cpu().numpy()
        return result

    def effective_rank(self) -> float:
        """How many directions the differences to the newest member span: exp of the entropy of their shares of Σ ‖·‖².

        Roy & Vetterli 2007, on the squared singular values. Near 1, the members lie on a line, as they do once the
        learning rate has decayed; 0 where all are equal.
        """
        gram = np.zeros((self.coordinates.size, self.coordinates.size))
        with torch.inference_mode(False), torch.no_grad():
            for name, start, end in zip(self._names, self._starts, self._ends, strict=True):
                held = self._differences
                rows = (self._basis_rows(name) if held is None else held[:, start:end]).double()
                gram += (rows @ rows.T).cpu().numpy()
        values = np.linalg.eigvalsh(gram).clip(min=0)
        if not values.sum():
            return 0.0
        shares = values[values > 0] / values.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @cached_property
    def _member_differences(self) -> Tensor | None:
        """Differences of all members to the newest [K - 1, P], where there is room for them; else None."""
        if self._differences is None:
            return None
        rows, kind = len(self.trajectory.members) - 1, self._differences.dtype
        needed = rows * self._ends[-1] * kind.itemsize
        if needed > min(self._room_for_members, self._most_members_on(self.device)):
            return None
        with torch.inference_mode(False), torch.no_grad():
            matrix = torch.empty(rows, self._ends[-1], dtype=kind, device=self.device)
            for name, start, end in zip(self._names, self._starts, self._ends, strict=True):
                every = [self.trajectory.read_difference(index, name).reshape(-1) for index in range(rows)]
                matrix[:, start:end] = torch.stack(every).to(self.device)
        return matrix

    @staticmethod
    def _most_members_on(device: torch.device) -> float:
        # a CPU reads larger ones from the cache of files
        return _SMALL_ON_CPU if device.type == "cpu" else math.inf

    def _mix_held(self, differences: Tensor, rows: Array) -> None:
        """Write newest + rows [G, N] × differences [N, P]."""
        for group, (start, end) in enumerate(self._slices):
            self._combine(differences, rows[group], start, end)
        self._write()

    def _combine(self, differences: Tensor, coefficients: Array, start: int, end: int) -> None:
        """Combine columns `start` to `end` into the flat buffer."""
        if not coefficients.any():
            # adding zeros would turn -0.0 to 0.0
            self._flat[start:end] = self._newest[start:end]
            return
        alpha = torch.from_numpy(coefficients).to(self.device, torch.float32)
        for a, b in self._blocks(start, end):
            rows = differences[:, a:b].float()
            torch.addmv(self._newest[a:b], rows.t(), alpha, out=self._flat[a:b])

    def _blocks(self, start: int, end: int) -> list[tuple[int, int]]:
        assert self._differences is not None
        step = max(1, end - start)
        if self._differences.dtype.itemsize < 4:
            step = _CPU_BLOCK if self.device.type == "cpu" else _DEVICE_BLOCK
        return [(a, min(a + step, end)) for a in range(start, end, step)]

    def _write(self) -> None:
        views = [
            self._flat[start:end].view(self._live[name].shape)
            for name, start, end in zip(self._names, self._starts, self._ends, strict=True)
        ]
        torch._foreach_copy_([self._live[name].detach() for name in self._names], views)

    def _mix_from_files(self, weights: Array) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, group, start, end in zip(self._names, self._group, self._starts, self._ends, strict=True):
                total = self._newest[start:end].clone()
                for index in np.flatnonzero(weights[group, :-1]).tolist():
                    difference = self.trajectory.read_difference(index, name).reshape(-1)
                    total.add_(difference.to(self.device), alpha=float(weights[group, index]))
                self._live[name].detach().copy_(total.view(self._live[name].shape))

    def _gradient_from_files(self, gradients: Mapping[str, Tensor]) -> Array:
        members = np.zeros((self.num_groups, len(self.trajectory.members)))
        for name, group in zip(self._names, self._group, strict=True):
            gradient = gradients[name].detach().cpu().reshape(-1).float()
            for index in range(members.shape[1] - 1):
                difference = self.trajectory.read_difference(index, name).reshape(-1)
                members[group, index] += float(torch.dot(difference, gradient))
        return members @ self.coordinates.basis[:-1].T

    def _read_newest(self) -> Tensor:
        newest = len(self.trajectory.members) - 1
        flat = torch.cat([self.trajectory.read(newest, name).reshape(-1).float() for name in self._names])
        return flat.to(self.device)

    def _read_differences(self, dtype: torch.dtype) -> Tensor:
        matrix = torch.empty(self.coordinates.size, self._ends[-1], dtype=dtype, device=self.device)
        for name, start, end in zip(self._names, self._starts, self._ends, strict=True):
            matrix[:, start:end] = self._basis_rows(name).to(self.device)
        return matrix

    def _basis_rows(self, name: str) -> Tensor:
        """Differences of the basis vectors to the newest member in one parameter, float32 [M - 1, size]."""
        basis = self.coordinates.basis[:-1]
        rows = torch.zeros(len(basis), math.prod(self.trajectory.shapes[name]))
        for index in range(basis.shape[1] - 1):
            difference = self.trajectory.read_difference(index, name).reshape(-1)
            for row in np.flatnonzero(basis[:, index]).tolist():
                rows[row].add_(difference, alpha=float(basis[row, index]))
        return rows


def check_names(trajectory: Checkpoints, live: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first parameter of the trajectory that `live` lacks or has in another shape."""
    for name in trajectory.names:
        if name not in live:
            raise ValueError(f"the trajectory holds {name!r}, which is no parameter of the module to be mixed")
        held, wanted = tuple(trajectory.shapes[name]), tuple(live[name].shape)
        if held != wanted:
            raise ValueError(f"{name!r} has shape {list(held)} in the trajectory and {list(wanted)} in the module")


def as_rows(values: Array, groups: int, size: int) -> Array:
    """Finite numbers float64 [groups, size], from that or from [size] for all groups alike; else ValueError."""
    rows = np.asarray(values, dtype=np.float64)
    rows = np.tile(rows, (groups, 1)) if rows.ndim == 1 else rows
    if rows.shape != (groups, size):
        raise ValueError(f"coefficients of shape {list(np.shape(values))} must be [{groups}, {size}] or [{size}]")
    if not np.isfinite(rows).all():
        raise ValueError("coefficients must be finite numbers")
    return rows


def member_rows(weights: Array, groups: int, members: int) -> Array:
    """The same for weights over members, which must sum to one."""
    rows = as_rows(weights, groups, members)
    worst = float(np.abs(rows.sum(axis=1) - 1.0).max())
    if worst > 1e-6 * max(1.0, float(np.abs(rows).sum(axis=1).max())):
        raise ValueError(f"weights over members must sum to one, the sum is off by {worst:.3g}")
    return rows


def free_bytes(device: torch.device) -> int:
    """Memory that a device has left; on a CPU with what the cache of files would give up, below a container's limit.

    Raises:
        UserError: a device that does not tell.
    """
    if device.type == "cpu":
        # the count of free pages leaves the cache out, which reading a trajectory fills
        meminfo = Path("/proc/meminfo")
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
        free = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(min(free, bytes_left()))
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    raise UserError(f"device_bytes must be given for a device of type {device.type!r}")
