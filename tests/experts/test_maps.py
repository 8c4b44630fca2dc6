"""Maps: what is a selection, what is the identity, and what is refused."""

import pytest
import torch
from torch import Tensor

from genlight.experts.maps import LayerMaps, chosen_rows, is_identity, selection_maps


def test_selection_is_sorted_and_read_back() -> None:
    maps = selection_maps([6, 1, 3], 8)
    for matrix in (maps.expert_map, maps.router_map):
        rows = chosen_rows(matrix)
        assert rows is not None and rows.tolist() == [1, 3, 6]
    assert not is_identity(maps) and is_identity(selection_maps(range(8), 8))
    assert maps.num_experts == 3 and maps.same(selection_maps([1, 3, 6], 8)) and not maps.same(None)


@pytest.mark.parametrize("change", [torch.tensor(1e-6), torch.tensor(-1e-6)])
def test_nearly_one_hot_is_no_selection(change: Tensor) -> None:
    matrix = selection_maps([0, 2], 4).expert_map.clone()
    matrix[1, 3] += change
    assert chosen_rows(matrix) is None
    assert chosen_rows(0.5 * torch.eye(3)) is None and chosen_rows(torch.zeros(2, 3)) is None


@pytest.mark.parametrize("kept", [[], [0, 0], [8], [-1]])
def test_sets_that_are_none_are_refused(kept: list[int]) -> None:
    with pytest.raises(ValueError, match=r"distinct experts of 0 \.\. 7"):
        selection_maps(kept, 8)


def test_matrices_that_do_not_fit_are_refused() -> None:
    two = torch.eye(4)[:2]
    with pytest.raises(ValueError, match="expert_map of shape"):
        LayerMaps(torch.rand(5, 4), torch.rand(5, 4))
    with pytest.raises(ValueError, match="router_map of shape"):
        LayerMaps(two, torch.eye(4))
    with pytest.raises(ValueError, match="router_map must hold finite"):
        LayerMaps(two, two * float("nan"))
    with pytest.raises(ValueError, match="expert_map must hold finite"):
        LayerMaps(two.long(), two)
    with pytest.raises(ValueError, match="permutation"):
        LayerMaps(two, two, torch.zeros(4, 3, dtype=torch.int64))
