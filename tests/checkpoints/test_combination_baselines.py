"""Baselines are the averages and extrapolations that their names say, as weights and as mixed parameters."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.stand_in import MemoryMember, MemoryTrajectory, Target, live_weights, random_trajectory

from genlight.checkpoints.baselines import baseline_candidates, baseline_weights
from genlight.checkpoints.bases import GeometricBins, Raw
from genlight.checkpoints.ema_profiles import ema_weights
from genlight.search.spaces.checkpoint_coefficients import CheckpointCoefficients


def test_every_kind_is_there_once_and_sums_to_one() -> None:
    named = baseline_weights(random_trajectory(40))
    kinds = {name.split()[0] for name in named}
    assert kinds == {"last", "single", "ema", "swa", "lawa", "power", "line", "neon"}
    assert len([name for name in named if name.startswith("single")]) == 19  # the newest is called last
    assert len([name for name in named if name.startswith("ema")]) == 24
    assert all(weights.sum() == pytest.approx(1, abs=1e-12) for weights in named.values())
    assert len({weights.round(9).tobytes() for weights in named.values()}) == len(named)


def test_each_is_what_its_name_says() -> None:
    trajectory = random_trajectory(10, every=50)
    named, newest, mean = baseline_weights(trajectory), np.eye(10)[9], np.full(10, 0.1)
    assert named["last"].tolist() == newest.tolist()
    assert named["single 150"].tolist() == np.eye(10)[2].tolist()
    assert named["swa"].tolist() == pytest.approx(mean.tolist())
    assert named["lawa 4"].tolist() == pytest.approx([0] * 6 + [0.25] * 4)
    assert named["line 2"].tolist() == pytest.approx((3 * newest - 2 * mean).tolist())
    assert named["line -0.5"].tolist() == pytest.approx((0.5 * newest + 0.5 * mean).tolist())
    assert named["neon 50 0.5"].tolist() == pytest.approx((1.5 * newest - 0.5 * np.eye(10)[0]).tolist())
    longest = [name for name in named if name.startswith("ema")][-1]
    # horizon h in checkpoints, every 50 steps: a rate per step of (1 - 1/h)^(1/50)
    per_step = (1 - 1 / 30) ** (1 / 50)
    assert longest == "ema 30" and named[longest] == pytest.approx(ema_weights(trajectory.steps, per_step))
    # the wider the profile, the less of it is on the newest
    powers = [weights[-1] for name, weights in named.items() if name.startswith("power")]
    assert powers == sorted(powers, reverse=True) and powers[0] > 0.9


def test_members_that_are_means_weigh_their_checkpoints() -> None:
    named = baseline_weights(MemoryTrajectory(random_trajectory(3).tensors, counts=[4, 2, 1]))
    assert named["swa"].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert named["lawa 2"].tolist() == pytest.approx([0, 2 / 3, 1 / 3])


def test_initial_weights_have_no_part_in_a_power_function_average() -> None:
    """Checkpoints at steps 0, 500 and 1000; the others share the training as they do without the first."""
    later = random_trajectory(2, every=500)
    trajectory: Any = SimpleNamespace(members=[MemoryMember(0, 0), *later.members])
    named = baseline_weights(trajectory)
    assert all(np.isfinite(weights).all() for weights in named.values())
    assert all(weights.sum() == pytest.approx(1, abs=1e-12) for weights in named.values())
    for name, weights in baseline_weights(later).items():
        if name.startswith("power"):
            assert named[name].tolist() == pytest.approx([0.0, *weights])
    assert ema_weights([0, 500, 1000], 0.999).tolist() == pytest.approx([0.0, *ema_weights([500, 1000], 0.999)])


@pytest.mark.parametrize("basis", [Raw(), GeometricBins(3)])
def test_as_candidates_they_mix_to_the_weighted_sum_on_any_basis(basis: Raw) -> None:
    trajectory = random_trajectory(8, noise=0.1)
    space = CheckpointCoefficients(trajectory, basis, groups=("down", "up"))
    target = Target(live_weights(trajectory))
    weights = baseline_weights(trajectory)
    candidates = baseline_candidates(trajectory, space)
    assert list(candidates) == list(weights)
    assert len({space.key(candidate) for candidate in candidates.values()}) == len(candidates)
    for name, candidate in candidates.items():
        space.apply(target, candidate)
        for parameter, tensor in target.weights.items():
            expected = sum(w * trajectory.read(i, parameter).double() for i, w in enumerate(weights[name]))
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-5, msg=name)


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="singles = 0"):
        baseline_weights(random_trajectory(3), singles=0)
    with pytest.raises(ValueError, match="two or more members"):
        baseline_weights(random_trajectory(1))
