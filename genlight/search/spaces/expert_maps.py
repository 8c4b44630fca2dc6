"""The space of expert maps: which experts the layers of a language model keep, and how they are mixed.

Liu et al. 2024, "Efficient Expert Pruning for Sparse Mixture-of-Experts Language Models" (EEP, arXiv:2407.00945): of E
experts E' are left; pruning chooses them, merging searches two real matrices [E', E] for each group of layers, W_EM for
the experts and W_RM for the router. Here a pruning candidate is a set, so that no order of rows is measured twice.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genlight.experts.maps import LayerMaps, chosen_rows, selection_maps
from genlight.search.codec import canonical_key
from genlight.search.protocols import ReadableExperts, require_capability
from genlight.search.spaces.expert_map_edits import (
    Array,
    Kept,
    crossed_kept,
    crossed_rows,
    disturbed,
    exchanged,
    kept_by,
    normalised_rows,
    random_kept,
)

Matrix = tuple[tuple[float, ...], ...]
# decimals of an entry: all of them count, in the key too
_DIGITS = 6
# of the fingerprint: 2 has keys of merged candidates by the bytes of their matrices
_VERSION = 2
_TRIES = 100


@dataclass(frozen=True)
class ExpertMaps:
    """An edit of all layers, with one entry for each group of layers, or for each layer.

    Attributes:
        kept: of a model that is only pruned: the kept experts, ascending; empty where experts are merged.
        expert_maps, router_maps: W_EM and W_RM, a row for each new expert; empty where experts are only pruned.
        neuron_orders: name of the orders in which neurons of merged experts are aligned; "": as they are.
    """

    kept: tuple[Kept, ...] = ()
    expert_maps: tuple[Matrix, ...] = ()
    router_maps: tuple[Matrix, ...] = ()
    neuron_orders: str = ""

    @property
    def prunes(self) -> bool:
        """Whether experts are chosen and none is mixed."""
        return bool(self.kept)


@dataclass(frozen=True, eq=False)
class ExpertMapSpace:
    """Expert maps of one model; candidates are `ExpertMaps`.

    Layers are shared out to groups evenly by depth. A candidate with an entry for each layer may lie outside the
    groups, as baselines do; operators first bring their parents into them: the experts that most of a group's layers
    keep, or the mean of their matrices.

    Attributes:
        layers: names of the layers with experts, in order.
        num_experts: E.
        num_kept: E'.
        groups: G, of layers with the same maps; None: each layer by itself.
        num_experts_per_tok: k of candidates; None: the model's own.
        routing_groups: groups of experts that routing is limited to; as many are kept of each.
        expert_parameters: parameters of one expert and its router row, by layer.
        bytes_per_parameter: of the weights.
        phase: "prune": operators give sets; "merge": they give matrices.
        group_probability: each matrix (a set is one) of a group is touched with this probability, one at least.
        row_probability: each kept expert of a touched set is exchanged.
        entry_probability, sigma: each entry of a touched matrix changes, by a Gaussian of this standard deviation.
        normalise_probability: the rows of W_EM are divided by their sums.
        first_parent_probability: a matrix, or a row of a touched one, is the first parent's.
        neuron_orders: orders int64 [E, I] by layer, by name.
        router_mapping: what W_RM means to the target, for the fingerprint.

    Raises:
        ValueError: numbers that do not fit together.
    """

    layers: Sequence[str]
    num_experts: int
    num_kept: int
    groups: int | None = None
    num_experts_per_tok: int | None = None
    routing_groups: int = 1
    expert_parameters: Sequence[int] = ()
    bytes_per_parameter: int = 4
    phase: Literal["prune", "merge"] = "prune"
    group_probability: float = 0.25
    row_probability: float = 0.15
    entry_probability: float = 0.25
    sigma: float = 0.065
    normalise_probability: float = 0.1
    first_parent_probability: float = 0.6
    neuron_orders: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    router_mapping: str = "logits"

    candidate_type = ExpertMaps

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "groups", len(self.layers) if self.groups is None else self.groups)
        if not 1 <= self.num_kept <= self.num_experts or self.num_kept % self.routing_groups:
            raise ValueError(
                f"num_experts = {self.num_kept} must lie in 1 .. {self.num_experts}, as the model has"
                + (f", and be a multiple of its {self.routing_groups} groups" if self.routing_groups > 1 else "")
            )
        if not 1 <= self.count <= len(self.layers):
            raise ValueError(f"groups = {self.groups} must lie in 1 .. {len(self.layers)}, the layers with experts")
        for name in ("group_probability", "row_probability", "entry_probability"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"space.{name} = {getattr(self, name)!r} must lie in (0, 1]")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"space.sigma = {self.sigma!r} must be positive")

    @property
    def count(self) -> int:
        """G."""
        assert self.groups is not None
        return self.groups

    def group_of(self, layer: int) -> int:
        """The group of a layer by number."""
        return layer * self.count // len(self.layers)

    def sample(self, rng: np.random.Generator) -> ExpertMaps:
        """Random sets; in the merging phase disturbed."""
        kept = tuple(self._random(rng) for _ in range(self.count))
        return ExpertMaps(kept) if self.phase == "prune" else self.mutate(ExpertMaps(kept), rng)

    def mutate(self, candidate: ExpertMaps, rng: np.random.Generator, *, size: float = 1.0) -> ExpertMaps:
        """A candidate that differs, wherever one can: sets by one exchange or more, matrices by Gaussians.

        `size` scales the Gaussians; an exchange has no size.
        """
        if self.phase == "merge":
            maps = self.matrices(candidate)
            touched = self._touched(maps.shape[:2], rng)
            for place in zip(*np.nonzero(touched), strict=True):
                maps[place] = disturbed(maps[place], self.entry_probability, size * self.sigma, rng)
            if rng.random() < self.normalise_probability:
                maps[:, 0] = normalised_rows(maps[:, 0])
            return self.made(maps, candidate.neuron_orders)
        kept = self.kept(candidate)
        if self.num_kept == self.num_experts:
            return ExpertMaps(kept)
        for _ in range(_TRIES):
            touched = self._touched((self.count,), rng)
            child = tuple(self._exchanged(own, rng) if on else own for own, on in zip(kept, touched, strict=True))
            if child != kept:
                return ExpertMaps(child)
        return self.sample(rng)

    def crossover(self, a: ExpertMaps, b: ExpertMaps, rng: np.random.Generator) -> ExpertMaps:
        """Sets of what both keep and some of what one keeps; matrices whole, and touched ones row by row."""
        if self.phase == "prune":
            pairs = zip(self.kept(a), self.kept(b), strict=True)
            return ExpertMaps(
                tuple(crossed_kept(own, other, self.num_experts, self.routing_groups, rng) for own, other in pairs)
            )
        first, second = self.matrices(a), self.matrices(b)
        child = np.empty_like(first)
        touched = self._touched(child.shape[:2], rng)
        for place in np.ndindex(*child.shape[:2]):
            if touched[place]:
                child[place] = crossed_rows(first[place], second[place], self.first_parent_probability, rng)
            else:
                child[place] = (first if rng.random() < self.first_parent_probability else second)[place]
        return self.made(child, a.neuron_orders or b.neuron_orders)

    def cost(self, candidate: ExpertMaps) -> dict[str, float]:
        """Parameters of the experts that are left, their bytes, and parameters of those that one token meets."""
        each = float(sum(self.expert_parameters))
        active = min(self.num_experts_per_tok or self.num_kept, self.num_kept)
        return {
            "expert_parameters": self.num_kept * each,
            "expert_bytes": self.num_kept * each * self.bytes_per_parameter,
            "active_expert_parameters": active * each,
        }

    def encode(self, candidate: ExpertMaps) -> Tensor:
        """Float32 [G or L, 2E]: what each old expert gives to the new ones, and to their routing; in any order of rows.

        A step for each entry of the candidate.
        """
        maps = self._as_it_is(candidate).sum(axis=2)  # [entries, 2, E]
        return torch.from_numpy(maps.reshape(len(maps), -1)).float()

    def key(self, candidate: ExpertMaps) -> str:
        """Sixteen hexadecimal digits; the same for candidates that differ in their form alone."""
        one = self._canonical(candidate)
        if one.prunes:
            return canonical_key(one)
        # of millions of numbers the text would take seconds
        digest = hashlib.sha256(one.neuron_orders.encode())
        for maps in (one.expert_maps, one.router_maps):
            matrices = np.array(maps, "<f8") + 0.0  # makes one of the two zeros
            digest.update(repr(matrices.shape).encode() + matrices.tobytes())
        return digest.hexdigest()[:16]

    def fingerprint(self) -> str:
        """All that changes what candidates are or how they vary, as JSON."""
        named = ("layers", "num_experts", "num_kept", "groups", "num_experts_per_tok", "routing_groups", "phase")
        shares = ("group_probability", "row_probability", "entry_probability", "sigma", "normalise_probability")
        options = {name: getattr(self, name) for name in (*named, *shares, "first_parent_probability")}
        digests = {name: _digest(orders) for name, orders in self.neuron_orders.items()}
        named_orders = {"router_mapping": self.router_mapping, "neuron_orders": digests}
        content = {"space": "expert_maps", "version": _VERSION, **named_orders, **options}
        return json.dumps(content, sort_keys=True)

    def apply(self, target: Any, candidate: ExpertMaps) -> None:
        """Edit the target's experts.

        Raises:
            UserError: the target does not offer its experts.
            ValueError: the candidate does not fit it.
        """
        require_capability(target, ReadableExperts, self)
        target.expert_editor().apply(self.layer_maps(candidate), num_experts_per_tok=self.num_experts_per_tok)

    def restore(self, target: Any) -> None:
        """Give the target its own experts back."""
        target.expert_editor().restore()

    def layer_maps(self, candidate: ExpertMaps) -> dict[str, LayerMaps]:
        """The edit of each layer, by name.

        Raises:
            ValueError: entries for neither groups nor layers, or of other sizes.
        """
        orders = self.neuron_orders[candidate.neuron_orders] if candidate.neuron_orders else {}
        made: list[LayerMaps] = []
        if candidate.prunes:
            made = [selection_maps(kept, self.num_experts) for kept in candidate.kept]
        else:
            pairs = zip(candidate.expert_maps, candidate.router_maps, strict=True)
            made = [LayerMaps(torch.tensor(expert), torch.tensor(router)) for expert, router in pairs]
        entries = self._entries(len(made))
        found = {}
        for number, layer in enumerate(self.layers):
            one = made[entries(number)]
            found[layer] = LayerMaps(one.expert_map, one.router_map, orders.get(layer))
        return found

    def candidate_of(self, maps: Mapping[str, LayerMaps], neuron_orders: str = "") -> ExpertMaps:
        """The candidate with these edits, by layer; in groups if those of each group are alike.

        Args:
            neuron_orders: the name under which the space holds their orders.
        """
        both = [np.stack([m.expert_map.double().numpy(), m.router_map.double().numpy()]) for m in maps.values()]
        return self._canonical(self.made(np.stack(both), neuron_orders))

    def made(self, maps: Array, neuron_orders: str = "") -> ExpertMaps:
        """The candidate with these matrices [G or L, 2, E', E] (W_EM, W_RM); sets where they only choose."""
        kept = []
        for expert, router in maps:
            rows = chosen_rows(torch.from_numpy(np.ascontiguousarray(expert)))
            if rows is None or not np.array_equal(expert, router) or len(set(rows.tolist())) < len(rows):
                plain = [tuple(_plain(one[which]) for one in maps) for which in (0, 1)]
                return ExpertMaps((), plain[0], plain[1], neuron_orders)
            kept.append(tuple(sorted(rows.tolist())))
        return ExpertMaps(tuple(kept))

    def kept(self, candidate: ExpertMaps) -> tuple[Kept, ...]:
        """The set of each group that is nearest: the experts that count most in its layers."""
        if candidate.prunes and len(candidate.kept) == self.count:
            return candidate.kept
        scores = self.matrices(candidate)[:, 0].max(axis=1)
        return tuple(kept_by(row, self.num_kept, self.routing_groups) for row in scores)

    def matrices(self, candidate: ExpertMaps) -> Array:
        """W_EM and W_RM of each group, a new array [G, 2, E', E]."""
        maps = self._as_it_is(candidate)
        if len(maps) == self.count:
            return maps
        of_group = [self.group_of(layer) for layer in range(len(self.layers))]
        if candidate.prunes:
            votes = np.stack([maps[np.equal(of_group, g), 0].sum(axis=(0, 1)) for g in range(self.count)])
            sets = tuple(kept_by(row, self.num_kept, self.routing_groups) for row in votes)
            return self._as_it_is(ExpertMaps(sets))
        return np.stack([maps[np.equal(of_group, g)].mean(axis=0) for g in range(self.count)])

    def _as_it_is(self, candidate: ExpertMaps) -> Array:
        """[entries, 2, E', E]."""
        if candidate.prunes:
            rows = np.eye(self.num_experts)[np.array(candidate.kept)]
            return np.stack([rows, rows], axis=1)
        return np.stack([np.array(candidate.expert_maps), np.array(candidate.router_maps)], axis=1)

    def _entries(self, count: int) -> Callable[[int], int]:
        """The number of a layer's entry in a candidate with so many."""
        if count == self.count:
            return self.group_of
        if count == len(self.layers):
            return int
        raise ValueError(f"a candidate with {count} entries fits neither {self.count} groups nor {len(self.layers)}")

    def _canonical(self, candidate: ExpertMaps) -> ExpertMaps:
        if self.count == len(self.layers):
            return candidate
        parts = [part for part in (candidate.kept, candidate.expert_maps, candidate.router_maps) if part]
        if len(parts[0]) != len(self.layers):
            return candidate
        firsts = [next(n for n in range(len(self.layers)) if self.group_of(n) == g) for g in range(self.count)]
        alike = all(part[n] == part[firsts[self.group_of(n)]] for part in parts for n in range(len(self.layers)))
        if not alike:
            return candidate
        fewer: list[Any] = [tuple(part[first] for first in firsts) for part in parts]
        if candidate.prunes:
            return ExpertMaps(fewer[0])
        return ExpertMaps((), fewer[0], fewer[1], candidate.neuron_orders)

    def _random(self, rng: np.random.Generator) -> Kept:
        return random_kept(self.num_experts, self.num_kept, self.routing_groups, rng)

    def _exchanged(self, kept: Kept, rng: np.random.Generator) -> Kept:
        return exchanged(kept, self.num_experts, self.routing_groups, self.row_probability, rng)

    def _touched(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.bool_]]:
        while True:
            touched: np.ndarray[Any, np.dtype[np.bool_]] = rng.random(shape) < self.group_probability
            if touched.any():
                return touched


def _plain(matrix: Array) -> Matrix:
    return tuple(tuple(round(float(value), _DIGITS) + 0.0 for value in row) for row in matrix)


def _digest(orders: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, order in sorted(orders.items()):
        digest.update(name.encode() + order.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
