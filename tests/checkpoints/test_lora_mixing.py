"""Combinations of LoRA checkpoints against the dense sum of their products."""

import numpy as np
import pytest
import torch
from checkpoints.stand_in import MemoryTrajectory, random_trajectory
from torch import Tensor

from genlight.checkpoints.bases import GeometricBins
from genlight.checkpoints.lora import DenseStack, LoraMixer, combine_factors, lora_pairs, mixer_of
from genlight.checkpoints.mixing import WeightMixer

DOWN, UP = "unet.to_q.lora_A.default.weight", "unet.to_q.lora_B.default.weight"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def factors(members: int, rank: int, rows: int = 9, columns: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [torch.randn(rank, columns, dtype=torch.float64) for _ in range(members)],
        [torch.randn(rows, rank, dtype=torch.float64) for _ in range(members)],
    )


def dense(downs: list[Tensor], ups: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([w * up @ down for w, down, up in zip(weights, downs, ups, strict=True)]).sum(0)


def test_products_are_combined_and_not_factors() -> None:
    """Two of rank 1 with α = (2, -1): exact at rank 2, which the combined factors are not."""
    downs, ups = factors(2, 1)
    wanted = dense(downs, ups, [2.0, -1.0])
    mixed = combine_factors(downs, ups, np.array([2.0, -1.0]), rank=2)
    torch.testing.assert_close(mixed.up @ mixed.down, wanted)
    assert mixed.error <= 1e-12
    naive = (2 * ups[0] - ups[1]) @ (2 * downs[0] - downs[1])
    assert (naive - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize(("members", "rank"), [(3, 2), (5, 4)])
def test_cut_back_it_is_the_nearest_and_says_how_far(members: int, rank: int) -> None:
    downs, ups = factors(members, rank)
    weights = np.random.default_rng(0).normal(size=members)
    wanted = dense(downs, ups, weights.tolist())
    mixed = combine_factors(downs, ups, weights)
    assert mixed.down.shape == (rank, 7) and mixed.up.shape == (9, rank)
    values = torch.linalg.svdvals(wanted)
    best = float(values[rank:].norm() / values.norm())
    assert mixed.error == pytest.approx(best)
    assert float((mixed.up @ mixed.down - wanted).norm() / wanted.norm()) == pytest.approx(best)


def test_factors_in_different_groups_are_refused() -> None:
    tensors = [{DOWN: torch.randn(2, 6), UP: torch.randn(6, 2), "norm.weight": torch.randn(3)} for _ in range(3)]
    live = {name: value.clone() for name, value in tensors[-1].items()}
    with pytest.raises(ValueError, match=rf"\['lora_A', '\.\*'\] part the LoRA factors '{DOWN}' and '{UP}'"):
        LoraMixer(MemoryTrajectory(tensors), live, groups=["lora_A", ".*"])
    LoraMixer(MemoryTrajectory(tensors), live, groups=["to_q", ".*"]).mix(np.array([[0.5, 0.5], [3.0, 4.0]]))


def test_a_rank_above_the_layer_is_padded() -> None:
    downs, ups = factors(2, 5, rows=3, columns=3)
    mixed = combine_factors(downs, ups, np.array([0.5, 0.5]))
    assert mixed.down.shape == (5, 3) and mixed.error == 0
    torch.testing.assert_close(mixed.up @ mixed.down, dense(downs, ups, [0.5, 0.5]))


def lora_trajectory(members: int = 4, rank: int = 3) -> MemoryTrajectory:
    downs, ups = factors(members, rank)
    tensors = [
        {
            DOWN: down.float(),
            UP: up.float(),
            "conv.lora.down.weight": torch.randn(2, 3, 3, 3),
            "conv.lora.up.weight": torch.randn(4, 2, 1, 1),
            "norm.weight": torch.randn(6),
        }
        for down, up in zip(downs, ups, strict=True)
    ]
    return MemoryTrajectory(tensors)


def test_a_trajectory_is_mixed_in_place() -> None:
    trajectory = lora_trajectory()
    live = {name: torch.full(shape, 2.0) for name, shape in trajectory.shapes.items()}
    mixer = mixer_of(trajectory, live)
    assert isinstance(mixer, LoraMixer)
    mixer.mix(np.array([0.5, -1.0, 0.25]))
    weights = [0.5, -1.0, 0.25, 1.25]
    sides = [[t[name].double() for t in trajectory.tensors] for name in (DOWN, UP)]
    wanted = dense(*sides, weights)
    error = (live[UP].double() @ live[DOWN].double() - wanted).norm() / wanted.norm()
    assert float(error) == pytest.approx(mixer.truncation[DOWN], abs=1e-6)
    plain = sum(w * t["norm.weight"] for w, t in zip(weights, trajectory.tensors, strict=True))
    torch.testing.assert_close(live["norm.weight"], plain)
    assert live["conv.lora.down.weight"].shape == (2, 3, 3, 3) and "conv.lora.down.weight" in mixer.truncation
    mixer.mix(np.zeros(3))
    assert all(torch.equal(live[name], trajectory.read(3, name)) for name in live)
    assert set(mixer.truncation.values()) == {0.0}
    mixer.restore()
    assert all(bool((tensor == 2.0).all()) for tensor in live.values())


def test_more_columns_than_a_layer_has_are_combined_as_whole_products() -> None:
    """30 members of rank 3 drift in a layer of 40 × 36: as near as the full decomposition, in the basis and outside."""
    start, drift = ([torch.randn(3, 36), torch.randn(40, 3)] for _ in range(2))
    tensors = [
        {DOWN: start[0] + i / 30 * drift[0] + 0.1 * torch.randn(3, 36), UP: start[1] + 0.1 * torch.randn(40, 3)}
        for i in range(30)
    ]
    trajectory = MemoryTrajectory(tensors)
    live = {name: torch.zeros(shape) for name, shape in trajectory.shapes.items()}
    basis = GeometricBins(4)
    mixer = LoraMixer(trajectory, live, basis=basis)
    assert isinstance(mixer._stacks[DOWN], DenseStack)
    inside = mixer.coordinates.to_members(np.array([0.5, -1.0, 0.25]))
    outside = np.random.default_rng(0).dirichlet(np.ones(30))
    assert not mixer.coordinates.holds(outside)
    for weights in (inside, outside):
        wanted = combine_factors([t[DOWN] for t in tensors], [t[UP] for t in tensors], weights)
        mixer.mix_members(weights)
        first = {name: value.clone() for name, value in live.items()}
        whole = dense(*([t[name].double() for t in tensors] for name in (DOWN, UP)), weights.tolist())
        error = float((live[UP].double() @ live[DOWN].double() - whole).norm() / whole.norm())
        assert error <= wanted.error * 1.001 + 1e-6
        assert mixer.truncation[DOWN] == pytest.approx(error, rel=1e-3, abs=1e-5)
        mixer.mix_members(weights)
        assert all(torch.equal(live[name], first[name]) for name in live)


def test_other_trajectories_are_mixed_by_weights() -> None:
    trajectory = random_trajectory(3)
    live = {name: torch.zeros(shape) for name, shape in trajectory.shapes.items()}
    assert isinstance(mixer_of(trajectory, live), WeightMixer)


def test_factors_are_found_in_pairs() -> None:
    assert lora_pairs(["a.lora_A.weight", "a.lora_B.weight", "b.lora_down.weight", "b.lora_up.weight", "c"]) == [
        ("a.lora_A.weight", "a.lora_B.weight"),
        ("b.lora_down.weight", "b.lora_up.weight"),
    ]
    assert lora_pairs(["up.0.weight", "down.0.weight", "explora_A.weight"]) == []
    for alone in ("a.lora_A.weight", "a.lora_B.weight"):
        with pytest.raises(ValueError, match=alone):
            lora_pairs([alone])
