"""The space of combinations of the checkpoints of one training run: coefficients that sum to one, of either sign."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genlight.checkpoints.bases import (
    Array,
    Basis,
    Coordinates,
    GeometricBins,
    ema_profile,
    profile_horizons,
    project_to_simplex,
)
from genlight.checkpoints.lora import mixer_of
from genlight.checkpoints.mixing import Checkpoints, Mixer
from genlight.search.codec import canonical_key
from genlight.search.protocols import LiveWeights, Vector, require_capability

_KEY_DIGITS = 6
_EXTRAPOLATION = (-0.25, 1.25)


@dataclass(frozen=True)
class Combination:
    """Coefficients of checkpoints.

    Attributes:
        coefficients: a row for each group of parameters. In the basis, of all its vectors but the newest member, whose
            coefficient is one minus the others. Over members, of all of them.
        over: what they are coefficients of. Over "members" a combination may lie outside the basis, as some baselines.
    """

    coefficients: tuple[tuple[float, ...], ...]
    over: Literal["basis", "members"] = "basis"


@dataclass(frozen=True, eq=False)
class CheckpointCoefficients:
    """Linear combinations of the checkpoints of a trajectory (Liu et al. 2025); candidates are `Combination`.

    All operators give coefficients in the basis, also of parents over members, which they first bring to the nearest.

    Attributes:
        trajectory: K members.
        basis: how they are gathered to M vectors; `Raw()` for the paper's coefficients of every checkpoint.
        groups: G patterns; parameters belong to the first one found in their name and share coefficients.
        signed: False: no coefficient is negative; candidates are projected (mixing is then averaging only).
        mutation_probability, mutation_sigma: each coordinate changes with this probability, by a Gaussian of this
            standard deviation.
        sample_sigma: standard deviation of random candidates around their centre.
        centre: of random candidates; None: an exponential mean, another for each.
        device_bytes: most bytes for the weights to be mixed, on their device; half of what is free if None.
    """

    trajectory: Checkpoints
    basis: Basis = GeometricBins()  # noqa: RUF009 - frozen
    groups: Sequence[str] = (".*",)
    signed: bool = True
    mutation_probability: float = 0.3
    mutation_sigma: float = 0.02
    sample_sigma: float = 0.2
    centre: Combination | None = field(default=None, repr=False)
    device_bytes: int | None = None
    _mixers: "dict[str, _Applied]" = field(default_factory=dict, init=False, repr=False)

    candidate_type = Combination

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups:
            raise ValueError("space.groups = () must hold a pattern; '.*' puts all parameters together")
        if not 0 < self.mutation_probability <= 1:
            raise ValueError(f"space.mutation_probability = {self.mutation_probability!r} must lie in (0, 1]")
        for name in ("mutation_sigma", "sample_sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"space.{name} = {getattr(self, name)!r} must be positive")
        if len(self.trajectory.members) < 2:
            raise ValueError(f"space.trajectory holds {len(self.trajectory.members)} checkpoints, it needs 2 or more")

    @cached_property
    def counts(self) -> list[int]:
        """Checkpoints of each member, oldest first."""
        return [member.count for member in self.trajectory.members]

    @cached_property
    def coordinates(self) -> Coordinates:
        """The way between coefficients in the basis and weights over members."""
        return Coordinates.of(self.basis, self.counts)

    def sample(self, rng: np.random.Generator) -> Combination:
        """Normal around the centre, or around an exponential mean with a random horizon."""
        if self.centre is not None:
            middle = self.free(self.centre)
        else:
            horizons = profile_horizons(self.counts)
            horizon = math.exp(rng.uniform(math.log(horizons[0]), math.log(horizons[-1])))
            middle = self.free(self.candidate_of(ema_profile(self.counts, horizon)))
        return self.made(middle + self.sample_sigma * rng.normal(size=middle.shape))

    def mutate(self, candidate: Combination, rng: np.random.Generator, *, size: float = 1.0) -> Combination:
        """Each coordinate changes with `mutation_probability`, by a Gaussian of `size` × `mutation_sigma`."""
        free = self.free(candidate)
        changed = rng.random(free.shape) < self.mutation_probability
        return self.made(free + changed * rng.normal(0.0, size * self.mutation_sigma, free.shape))

    def crossover(self, a: Combination, b: Combination, rng: np.random.Generator) -> Combination:
        """Each coordinate of one parent or the other, or λa + (1 - λ)b with λ from -0.25 to 1.25; as often."""
        first, second = self.free(a), self.free(b)
        if rng.random() < 0.5:
            return self.made(np.where(rng.random(first.shape) < 0.5, first, second))
        share = rng.uniform(*_EXTRAPOLATION)
        return self.made(share * first + (1 - share) * second)

    def cost(self, candidate: Combination) -> dict[str, float]:
        """Nothing at inference. "l1" is Σ |weight| over members, of the group with most: how far it extrapolates."""
        return {"l1": float(np.abs(self.weights(candidate)).sum(axis=1).max())}

    def encode(self, candidate: Combination) -> Tensor:
        """Float32 [M, 1 + G]: the mean age of a basis vector from 0 (newest) to 1, and its coefficients."""
        free = self.free(candidate)
        every = np.concatenate([free, 1.0 - free.sum(axis=1, keepdims=True)], axis=1)
        sizes = np.array(self.counts, dtype=np.float64)
        ages = self.coordinates.basis @ (sizes[::-1].cumsum()[::-1] - sizes)
        return torch.from_numpy(np.stack([ages / ages.max(), *every], axis=1)).float()

    def key(self, candidate: Combination) -> str:
        """Sixteen hexadecimal digits of the coefficients, rounded to 1e-6; over members only outside the basis."""
        weights = self.weights(candidate)
        if candidate.over == "basis" or self.coordinates.holds(weights):
            return canonical_key(Combination(_plain(self.free(candidate))), digits=_KEY_DIGITS)
        return canonical_key(candidate, digits=_KEY_DIGITS)

    def fingerprint(self) -> str:
        """The trajectory's fingerprint, the basis, and every option that changes what candidates are or how they vary.

        As JSON.
        """
        options = {
            "space": "checkpoint_coefficients",
            "trajectory": self.trajectory.fingerprint,
            "basis": repr(self.basis),
            "groups": self.groups,
            "signed": self.signed,
            "mutation": [self.mutation_probability, self.mutation_sigma],
            "sample_sigma": self.sample_sigma,
            "centre": None if self.centre is None else self.key(self.centre),
        }
        return json.dumps(options, sort_keys=True)

    def apply(self, target: Any, candidate: Combination) -> None:
        """Write the combination into the target's live weights.

        Raises:
            UserError: the target does not offer its weights.
            ValueError: they do not fit the trajectory, or the candidate the space.
        """
        mixer = self.mixer(target)
        if candidate.over == "members":
            mixer.mix_members(self.weights(candidate))
        else:
            mixer.mix(self.free(candidate))

    def mixer(self, target: Any) -> Mixer:
        """What writes into this target; made where it is first needed, and anew where its device has changed."""
        require_capability(target, LiveWeights, self)
        live = target.live_weights()
        first = self.trajectory.names[0]
        device = live[first].device if first in live else None
        known = self._mixers.get("last")
        if known is not None:
            if known.target is target:
                known.mixer.attach(live)
                if known.device == device:
                    return known.mixer
            # what the next mixer takes for the original weights must be those
            known.mixer.restore()
            # before the next one takes its memory
            self._mixers.clear()
        made = mixer_of(self.trajectory, live, basis=self.basis, groups=self.groups, device_bytes=self.device_bytes)
        self._mixers["last"] = _Applied(target, device, made)
        return made

    def restore(self) -> None:
        """Give the last target its original weights back, bit for bit, and free what was held for it."""
        known = self._mixers.pop("last", None)
        if known is not None:
            known.mixer.attach(known.target.live_weights())
            known.mixer.restore()

    def initial_candidates(self, number: int = 24) -> list[Combination]:
        """The newest member, and exponential means with γ = 1 - 1/h, h from 1.01 to 3K checkpoints, in the basis."""
        profiles = [ema_profile(self.counts, horizon) for horizon in profile_horizons(self.counts, number)]
        newest = np.zeros((len(self.groups), self.coordinates.size))
        free = [self.coordinates.from_members(np.tile(profile, (len(self.groups), 1))) for profile in profiles]
        return [self.made(newest), *(self.made(each) for each in free)]

    def around(self, candidate: Combination) -> "CheckpointCoefficients":
        """The same space with random candidates around this one."""
        other = replace(self, centre=candidate)
        # one copy of the differences, and of the weights that the target had at first
        object.__setattr__(other, "_mixers", self._mixers)
        return other

    def candidate_of(self, weights: Array) -> Combination:
        """The candidate with these weights over members, [K] for all groups or [G, K]; in the basis if it holds them.

        Raises:
            ValueError: another shape.
        """
        rows = np.asarray(weights, dtype=np.float64)
        rows = np.tile(rows, (len(self.groups), 1)) if rows.ndim == 1 else rows
        if rows.shape != (len(self.groups), len(self.counts)):
            raise ValueError(f"weights {list(rows.shape)} must be [{len(self.groups)}, {len(self.counts)}]")
        if self.coordinates.holds(rows):
            return Combination(_plain(self.coordinates.from_members(rows)))
        return Combination(_plain(rows), "members")

    def weights(self, candidate: Combination) -> Array:
        """Weights over members [G, K]. ValueError for a candidate of another space."""
        rows = self._rows(candidate)
        return rows if candidate.over == "members" else self.coordinates.to_members(rows)

    def free(self, candidate: Combination) -> Array:
        """Coefficients in the basis [G, M - 1], the nearest ones for a candidate outside. ValueError as `weights`."""
        rows = self._rows(candidate)
        return self.coordinates.from_members(rows) if candidate.over == "members" else rows

    def made(self, free: Array) -> Combination:
        """The valid candidate at (or nearest to) coefficients in the basis [G, M - 1]."""
        return Combination(_plain(free if self.signed else project_to_simplex(free)))

    @property
    def vector_bounds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """No bounds, float64 [G (M - 1), 2]."""
        return np.tile([-np.inf, np.inf], (len(self.groups) * self.coordinates.size, 1))

    def to_vector(self, candidate: Combination) -> Vector:
        """The coefficients in the basis, group after group."""
        vector: Vector = self.free(candidate).reshape(-1)
        return vector

    def from_vector(self, vector: Vector) -> Combination:
        """The candidate with these coefficients."""
        return self.made(np.asarray(vector, dtype=np.float64).reshape(len(self.groups), -1))

    def _rows(self, candidate: Combination) -> Array:
        size = len(self.counts) if candidate.over == "members" else self.coordinates.size
        if len(candidate.coefficients) != len(self.groups) or {len(row) for row in candidate.coefficients} != {size}:
            raise ValueError(
                f"a candidate with {[len(row) for row in candidate.coefficients]} coefficients over the "
                f"{candidate.over} does not fit {len(self.groups)} groups of {size}"
            )
        return np.array(candidate.coefficients, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Applied:
    """The mixer of a target, and the device it was made for."""

    target: Any
    device: torch.device | None
    mixer: Mixer


def _plain(rows: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in rows)
