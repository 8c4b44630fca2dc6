"""What an edited layer is: which experts it has and how the router chooses among them, as two matrices.

EEP (Liu et al. 2024, arXiv:2407.00945, section 4): of E experts, E' are left, each a mixture Σ_i W_EM[j, i] θ_i of the
old weights, and the router's rows are mixed by a matrix of their own, W_RM. Pruning is the case of equal one-hot rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """The edit of one layer.

    Attributes:
        expert_map: W_EM, [E', E]: new experts from old ones.
        router_map: W_RM, [E', E]: rows of the new router from rows of the old one.
        neuron_orders: [E, I] or None: neurons of each expert in a new order before it is mixed. Reordering alone
            changes no expert's output.

    Raises:
        ValueError: shapes that do not fit together, numbers that are not finite, orders that are no permutations.
    """

    expert_map: Tensor
    router_map: Tensor
    neuron_orders: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.expert_map.shape)
        if len(shape) != 2 or not 1 <= shape[0] <= shape[1]:
            raise ValueError(f"expert_map of shape {list(shape)} must be [kept, experts] with 1 <= kept <= experts")
        if tuple(self.router_map.shape) != shape:
            raise ValueError(f"router_map of shape {list(self.router_map.shape)} must be as expert_map, {list(shape)}")
        for name, value in (("expert_map", self.expert_map), ("router_map", self.router_map)):
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must hold finite floating-point numbers")
        if self.neuron_orders is not None:
            rows = self.neuron_orders
            if rows.ndim != 2 or len(rows) != shape[1] or not bool((rows.sort(1)[0] == _counting(rows)).all()):
                raise ValueError("neuron_orders must be [experts, neurons], each row a permutation")

    @property
    def num_experts(self) -> int:
        """E', the experts that are left."""
        return len(self.expert_map)

    def same(self, other: "LayerMaps | None") -> bool:
        """Whether the other edit has the same numbers."""
        return other is not None and all(
            (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
            for a, b in (
                (self.expert_map, other.expert_map),
                (self.router_map, other.router_map),
                (self.neuron_orders, other.neuron_orders),
            )
        )


def selection_maps(kept: Sequence[int], num_experts: int) -> LayerMaps:
    """The edit that prunes: equal one-hot rows for the kept experts, ascending.

    Raises:
        ValueError: `kept` is empty, repeats an expert, or names one outside 0 .. num_experts - 1.
    """
    ordered = sorted(kept)
    if not ordered or len(set(ordered)) != len(ordered) or not 0 <= ordered[0] <= ordered[-1] < num_experts:
        raise ValueError(f"kept = {list(kept)} must name distinct experts of 0 .. {num_experts - 1}, at least one")
    rows = one_hot(torch.tensor(ordered), num_experts).float()
    return LayerMaps(rows, rows)


def chosen_rows(matrix: Tensor) -> Tensor | None:
    """Indices int64 [rows] of a matrix whose rows are exactly one-hot, on the CPU; None for any other matrix."""
    matrix = matrix.detach().cpu()
    index = matrix.argmax(dim=1)
    return index if torch.equal(matrix, one_hot(index, matrix.shape[1]).to(matrix.dtype)) else None


def is_identity(maps: LayerMaps) -> bool:
    """Whether an edit leaves its layer as it is."""
    rows = chosen_rows(maps.expert_map), chosen_rows(maps.router_map)
    return all(row is not None and torch.equal(row, torch.arange(maps.expert_map.shape[1])) for row in rows)


def _counting(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[1], device=rows.device)
