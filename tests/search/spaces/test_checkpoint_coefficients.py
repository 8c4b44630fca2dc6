"""The space of combinations: its operators, its vectors, its names, and searches with optima known in closed form."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.stand_in import MemoryTrajectory, Target, live_weights, random_trajectory, search
from hypothesis import given, settings
from hypothesis import strategies as st
from search.toy_search import run_search
from torch import Tensor

from genlight.checkpoints.bases import EMAProfiles, GeometricBins, Raw, ema_profile
from genlight.errors import UserError
from genlight.search.cma import CMAES
from genlight.search.codec import CandidateCodec
from genlight.search.evolution import Evolution
from genlight.search.plan import PlainPlan
from genlight.search.protocols import VectorView
from genlight.search.spaces.checkpoint_coefficients import CheckpointCoefficients, Combination

# steady state: one child at a time of two among the best 12
PAPER = Evolution(population=12, children=1, tournament=1, crossover_probability=0.6, edit_sizes=(1.0, 1.0))
SPACES = {
    "raw": CheckpointCoefficients(random_trajectory(7), Raw()),
    "bins": CheckpointCoefficients(random_trajectory(12), GeometricBins(5), groups=("down", "up")),
    "profiles": CheckpointCoefficients(random_trajectory(12), EMAProfiles(4)),
    "means": CheckpointCoefficients(MemoryTrajectory(random_trajectory(4).tensors, counts=[8, 4, 2, 1]), Raw()),
    "convex": CheckpointCoefficients(random_trajectory(9), GeometricBins(4), groups=("down", "up"), signed=False),
}


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(SPACES)), seed=st.integers(0, 10_000), size=st.floats(0.05, 1))
def test_whatever_is_done_weights_sum_to_one(name: str, seed: int, size: float) -> None:
    space, rng = SPACES[name], np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    single = space.candidate_of(np.eye(len(space.counts))[1])
    for candidate in (
        space.mutate(a, rng, size=size),
        space.crossover(a, b, rng),
        space.mutate(space.crossover(a, single, rng), rng),
    ):
        weights = space.weights(candidate)
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-9)
        assert space.signed or weights.min() >= -1e-12
        # back from a vector, and back from JSON, as it was
        again = space.from_vector(space.to_vector(candidate))
        assert space.key(again) == space.key(candidate)
        np.testing.assert_allclose(space.to_vector(again), space.to_vector(candidate), atol=1e-12)
        codec = CandidateCodec(Combination)
        assert codec.from_plain(codec.to_plain(candidate)) == candidate
        assert space.encode(candidate).shape == (space.coordinates.size + 1, 1 + len(space.groups))
        assert space.cost(candidate)["l1"] == pytest.approx(np.abs(weights).sum(axis=1).max())


def test_a_mutation_has_the_paper_s_numbers() -> None:
    """A share of 0.3 of the coordinates changes, by a Gaussian of standard deviation 0.02."""
    space = CheckpointCoefficients(random_trajectory(150), Raw())
    zero, rng = Combination(((0.0,) * 149,)), np.random.default_rng(0)
    moves = np.stack([space.to_vector(space.mutate(zero, rng)) for _ in range(200)])
    changed = moves[moves != 0]
    assert len(changed) / moves.size == pytest.approx(0.3, abs=0.01)
    assert changed.std() == pytest.approx(0.02, rel=0.02)
    smaller = space.to_vector(space.mutate(zero, rng, size=0.1))
    assert np.abs(smaller).max() < 0.01


def test_a_child_of_two_is_uniform_or_on_their_line() -> None:
    space = CheckpointCoefficients(random_trajectory(41), Raw())
    rng = np.random.default_rng(0)
    first, second = (space.sample(rng) for _ in range(2))
    a, b = space.to_vector(first), space.to_vector(second)
    shares = []
    for _ in range(300):
        child = space.to_vector(space.crossover(first, second, rng))
        share = (child - b) / (a - b)
        if np.ptp(share) < 1e-6:
            shares.append(share[0])
        else:
            assert np.isin(child, np.concatenate([a, b])).all()
    assert 100 < len(shares) < 200
    assert -0.25 <= min(shares) < -0.2 and 1.2 < max(shares) <= 1.25


def test_keys_tell_what_is_mixed() -> None:
    space = SPACES["bins"]
    rng = np.random.default_rng(0)
    candidate = space.sample(rng)
    vector = space.to_vector(candidate)
    assert space.key(space.from_vector(vector + 1e-8)) == space.key(candidate)
    assert space.key(space.from_vector(vector + 1e-4)) != space.key(candidate)
    # the same weights, over members and in the basis, are one candidate
    over_members = Combination(tuple(tuple(row) for row in space.weights(candidate).tolist()), "members")
    assert space.key(over_members) == space.key(candidate)
    inside, outside = (space.candidate_of(np.eye(12)[i]) for i in (-1, 3))
    assert (inside.over, outside.over) == ("basis", "members")
    assert space.key(outside) != space.key(space.from_vector(space.to_vector(outside)))


def test_the_first_candidates_are_the_newest_and_24_profiles() -> None:
    space = CheckpointCoefficients(random_trajectory(30), Raw())
    first = space.initial_candidates()
    assert len({space.key(candidate) for candidate in first}) == 25
    assert space.weights(first[0])[0].tolist() == [0.0] * 29 + [1.0]
    np.testing.assert_allclose(space.weights(first[-1])[0], ema_profile([1] * 30, 90.0), atol=1e-12)
    bins = CheckpointCoefficients(random_trajectory(30), GeometricBins(6))
    members = bins.basis.matrix(bins.counts) > 0
    for raw, binned in zip(first, bins.initial_candidates(), strict=True):
        sums = [space.weights(raw)[0][row].sum() for row in members]
        np.testing.assert_allclose([bins.weights(binned)[0][row].sum() for row in members], sums, atol=1e-9)


def test_fingerprints_differ_where_candidates_mean_something_else() -> None:
    trajectory = random_trajectory(6)
    other = MemoryTrajectory(trajectory.tensors, fingerprint="other")
    spaces = [
        CheckpointCoefficients(trajectory),
        CheckpointCoefficients(other),
        CheckpointCoefficients(trajectory, Raw()),
        CheckpointCoefficients(trajectory, GeometricBins(4)),
        CheckpointCoefficients(trajectory, groups=("up", ".*")),
        CheckpointCoefficients(trajectory, signed=False),
        CheckpointCoefficients(trajectory, mutation_sigma=0.05),
    ]
    spaces.append(spaces[0].around(spaces[0].sample(np.random.default_rng(0))))
    assert len({space.fingerprint() for space in spaces}) == len(spaces)
    # how much is held in memory is not one of them
    assert CheckpointCoefficients(trajectory, device_bytes=0).fingerprint() == spaces[0].fingerprint()


def test_random_candidates_lie_around_the_centre() -> None:
    space = SPACES["raw"]
    centre = Combination(((1.0, -2.0, 0.5, 0.0, 0.0, 3.0),))
    around, rng = space.around(centre), np.random.default_rng(0)
    draws = np.stack([around.to_vector(around.sample(rng)) for _ in range(2000)])
    np.testing.assert_allclose(draws.mean(axis=0), centre.coefficients[0], atol=0.03)
    np.testing.assert_allclose(draws.std(axis=0), 0.2, rtol=0.1)


def test_apply_and_restore_on_a_target() -> None:
    space = CheckpointCoefficients(random_trajectory(7, noise=0.1), GeometricBins(4))
    target, rng = Target(live_weights(space.trajectory, 5.0)), np.random.default_rng(0)
    candidate = space.sample(rng)
    space.apply(target, candidate)
    first = {name: tensor.clone() for name, tensor in target.weights.items()}
    again = space.around(candidate)
    again.apply(target, space.initial_candidates()[0])
    assert all(torch.equal(target.weights[n], space.trajectory.read(6, n)) for n in target.weights)
    # a target may hand out other tensors: a module that was moved, for instance
    target.weights = {name: torch.zeros_like(tensor) for name, tensor in target.weights.items()}
    space.apply(target, candidate)
    assert all(torch.equal(target.weights[name], first[name]) for name in first)
    again.restore()
    assert all(bool((tensor == 5.0).all()) for tensor in target.weights.values())
    space.restore()  # nothing left to do


def test_a_second_target_gives_the_first_its_weights_back() -> None:
    space = SPACES["raw"]
    targets = [Target(live_weights(space.trajectory, value)) for value in (1.0, 2.0)]
    for target in targets:
        space.apply(target, space.sample(np.random.default_rng(0)))
    assert all(bool((tensor == 1.0).all()) for tensor in targets[0].weights.values())
    space.restore()
    assert all(bool((tensor == 2.0).all()) for tensor in targets[1].weights.values())


def test_lora_factors_are_mixed_by_their_products() -> None:
    """Two checkpoints of rank 1 with α = (2, -1), cut back to rank 1: the nearest to the dense sum of the products."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        {
            "q.lora_A.weight": torch.randn(1, 5, generator=generator),
            "q.lora_B.weight": torch.randn(4, 1, generator=generator),
        }
        for _ in range(2)
    ]
    space = CheckpointCoefficients(MemoryTrajectory(tensors), Raw())
    target = Target(live_weights(space.trajectory))
    space.apply(target, space.candidate_of(np.array([2.0, -1.0])))
    products = [t["q.lora_B.weight"] @ t["q.lora_A.weight"] for t in tensors]
    u, values, vh = torch.linalg.svd(2 * products[0] - products[1])
    mixed = target.weights["q.lora_B.weight"] @ target.weights["q.lora_A.weight"]
    torch.testing.assert_close(mixed, values[0] * u[:, :1] @ vh[:1])


def test_wrong_input_is_named() -> None:
    space = SPACES["raw"]
    with pytest.raises(UserError, match="LiveWeights"):
        space.apply(object(), space.initial_candidates()[0])
    with pytest.raises(ValueError, match="does not fit 1 groups of 6"):
        space.weights(Combination(((0.0, 0.0),)))
    with pytest.raises(ValueError, match=r"must be \[1, 7\]"):
        space.candidate_of(np.ones(3))
    for wrong, message in (
        ({"groups": ()}, "groups"),
        ({"mutation_probability": 0.0}, "mutation_probability = 0.0"),
        ({"mutation_sigma": -1.0}, "mutation_sigma = -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            CheckpointCoefficients(space.trajectory, **wrong)
    with pytest.raises(ValueError, match="needs 2 or more"):
        CheckpointCoefficients(random_trajectory(1))


def distance_to(space: CheckpointCoefficients, goal: dict[str, Tensor]) -> Any:
    """‖θ(α) - θ*‖² at the target's weights, which are mixed as in a real search."""
    target = Target(live_weights(space.trajectory))

    def score(candidate: Combination) -> float:
        space.apply(target, candidate)
        return float(sum((tensor.double() - goal[name]).square().sum() for name, tensor in target.weights.items()))

    return score


def test_extrapolation_is_found_and_averaging_cannot() -> None:
    """θ_t = θ* + a ρ^t at ρ = 0.9 and two checkpoints: α = (-9, 10) is θ* exactly, beyond both of them.

    Two groups, each with a coefficient of its own, as CMA-ES needs two coordinates.
    """
    generator = torch.Generator().manual_seed(0)
    goal = {name: 0.1 * torch.randn(20, generator=generator).double() for name in ("one", "two")}
    a = {name: torch.randn(20, generator=generator).double() for name in goal}
    trajectory = MemoryTrajectory([{n: (goal[n] + a[n] * 0.9**t).float() for n in goal} for t in range(2)])
    scale = float(sum(tensor.square().sum() for tensor in a.values())) ** 0.5
    found = {}
    for signed in (True, False):
        space = CheckpointCoefficients(trajectory, Raw(), groups=("one", "two"), signed=signed)
        records = search(
            space,
            CMAES(sigma=0.2),
            distance_to(space, goal),
            1500,
            initial=space.initial_candidates(),
            stop_below=(1e-6 * scale) ** 2,
        )
        found[signed] = min(records, key=lambda record: record.rank)
        if signed:
            np.testing.assert_allclose(space.weights(found[True].candidate), [[-9, 10]] * 2, atol=1e-4)
    assert found[True].score is not None and found[True].score ** 0.5 <= 1e-6 * scale
    # the best average is the newest checkpoint itself, at 0.9 |a|
    assert found[False].score == pytest.approx((0.9 * scale) ** 2, rel=1e-6)


@pytest.mark.parametrize("groups", [(".*",), ("down", "up")])
def test_cma_es_reaches_the_optimum_of_a_quadratic(groups: tuple[str, ...]) -> None:
    """α* = G⁻¹1 / (1ᵀG⁻¹1) in each group, G_ij = ⟨θ_i - θ*, θ_j - θ*⟩; the optimum is Σ 1 / (1ᵀG⁻¹1)."""
    trajectory = random_trajectory(5, noise=0.3)
    generator = torch.Generator().manual_seed(1)
    goal = {name: torch.randn(shape, generator=generator).double() for name, shape in trajectory.shapes.items()}
    optimum = 0.0
    for group in groups:
        names = [name for name in goal if group == ".*" or name.startswith(group)]
        rows = torch.stack(
            [torch.cat([(t[n].double() - goal[n]).reshape(-1) for n in names]) for t in trajectory.tensors]
        )
        optimum += float(1 / torch.linalg.solve(rows @ rows.T, torch.ones(5, dtype=torch.float64)).sum())
    space = CheckpointCoefficients(trajectory, Raw(), groups=groups)
    records = search(
        space,
        CMAES(),
        distance_to(space, goal),
        1500,
        initial=space.initial_candidates(),
        stop_below=1.01 * optimum,
    )
    assert optimum * (1 - 1e-6) <= min(r.score for r in records if r.score is not None) <= 1.01 * optimum


def test_the_paper_s_search_leaves_its_start_far_behind(tmp_path: Path) -> None:
    """The steady-state search under the engine, with PlainPlan, on a quadratic whose optimum is an extrapolation."""
    generator = torch.Generator().manual_seed(0)
    goal = {"w": torch.randn(30, generator=generator).double()}
    a = torch.randn(30, generator=generator).double()
    trajectory = MemoryTrajectory(
        [{"w": (goal["w"] + a * 0.9**t + 0.05 * torch.randn(30, generator=generator)).float()} for t in range(12)]
    )
    space = CheckpointCoefficients(trajectory, Raw())
    assert isinstance(space, VectorView)
    plan = PlainPlan(PAPER, screening_fidelity=None).plan(space, 300, space.initial_candidates())
    score = distance_to(space, goal)
    records = list(run_search(tmp_path / "ga", plan.strategy, space, score, 325, initial=plan.initial).records)
    start, end = (min(r.score for r in part if r.score is not None) for part in (records[:25], records))
    assert len(records) == 325 and len({r.key for r in records}) == 325
    assert {r.source for r in records[25:]} == {"mutation", "crossover"}
    assert end < 0.1 * start
