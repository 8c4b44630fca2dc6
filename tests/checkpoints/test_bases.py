"""Bases, coordinates, groups and the projection, each against what defines it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.checkpoints.bases import (
    Coordinates,
    EMAProfiles,
    GeometricBins,
    Raw,
    bin_sizes,
    ema_profile,
    group_of_names,
    profile_horizons,
    project_to_simplex,
)

COUNTS = st.lists(st.integers(1, 5), min_size=2, max_size=40)
BASES = st.sampled_from([Raw(), GeometricBins(2), GeometricBins(7), EMAProfiles(2), EMAProfiles(6)])


@settings(deadline=None)
@given(counts=COUNTS, basis=BASES, seed=st.integers(0, 999))
def test_every_combination_sums_to_one_and_comes_back(counts: list[int], basis: Raw, seed: int) -> None:
    matrix = basis.matrix(counts)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    assert matrix[-1].tolist() == [0.0] * (len(counts) - 1) + [1.0]
    coordinates = Coordinates(matrix, counts)
    free = np.random.default_rng(seed).normal(size=(3, coordinates.size))
    weights = coordinates.to_members(free)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-9)
    assert coordinates.holds(weights)
    again = coordinates.to_members(coordinates.from_members(weights))
    np.testing.assert_allclose(again, weights, atol=1e-8)
    assert coordinates.to_members(np.zeros(coordinates.size)).tolist() == matrix[-1].tolist()


@given(total=st.integers(1, 300), number=st.integers(1, 300))
def test_bins_cover_all_members_and_grow_with_age(total: int, number: int) -> None:
    if number > total:
        with pytest.raises(ValueError, match="bins"):
            bin_sizes(total, number)
        return
    sizes = bin_sizes(total, number)
    assert len(sizes) == number and sum(sizes) == total and sizes == sorted(sizes)
    assert number == 1 or sizes[0] == 1


def test_bins_of_150_members() -> None:
    sizes = bin_sizes(150, 16)
    assert sizes[0] == 1 and sizes[-1] >= 20
    # Σ q^j = 150 over 16 terms at q = 1.2590
    assert all(abs(size - 1.2590**j) <= 1 for j, size in enumerate(sizes))


def test_a_bin_of_bins_is_the_mean_of_their_checkpoints() -> None:
    """Members that hold 4, 2, 1 and 1 checkpoints: the older bin weighs its members 4 : 2 : 1."""
    assert GeometricBins(2).matrix([4, 2, 1, 1])[0].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])


@settings(deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 999))
def test_weights_are_summed_over_each_bin(counts: list[int], seed: int) -> None:
    basis = GeometricBins(4).matrix(counts)
    weights = np.random.default_rng(seed).normal(size=len(counts))
    weights /= weights.sum()
    sums = [weights[row > 0].sum() for row in basis[:-1]]
    np.testing.assert_allclose(
        Coordinates(basis, counts).from_members(weights), sums, atol=1e-8 * np.abs(weights).sum()
    )


@given(counts=COUNTS, horizon=st.floats(1.001, 500))
def test_a_profile_is_the_exponential_mean_of_all_checkpoints(counts: list[int], horizon: float) -> None:
    gamma, total = 1 - 1 / horizon, sum(counts)
    each = gamma ** np.arange(total - 1, -1, -1.0)
    parts = np.split(each / each.sum(), np.cumsum(counts)[:-1])
    np.testing.assert_allclose(ema_profile(counts, horizon), [part.sum() for part in parts], atol=1e-12)


def test_profiles_span_from_the_newest_to_nearly_the_mean() -> None:
    horizons = profile_horizons([1] * 50)
    assert len(horizons) == 24 and horizons[0] == pytest.approx(1.01) and horizons[-1] == pytest.approx(150)
    assert ema_profile([1] * 50, horizons[0])[-1] > 0.99
    assert ema_profile([1] * 50, horizons[-1]).max() < 0.024


@given(points=st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_the_projection_is_the_nearest_of_many(points: list[float]) -> None:
    def full(free: np.ndarray) -> np.ndarray:
        return np.append(free, 1 - free.sum())

    free = np.array(points)
    found = full(project_to_simplex(free))
    assert found.min() >= -1e-12
    draws = np.random.default_rng(0).dirichlet(np.full(len(found), 0.5), size=200)
    distances = np.linalg.norm(draws - full(free), axis=1)
    assert np.linalg.norm(found - full(free)) <= distances.min() + 1e-9
    np.testing.assert_allclose(project_to_simplex(found[:-1]), found[:-1], atol=1e-12)


def test_groups_are_first_matches() -> None:
    names = ["down.0.attn.q", "down.0.conv", "time.0"]
    assert group_of_names(names, ("attn", "^down", ".*")) == [0, 1, 2]
    for groups, message in (
        ((), "at least one"),
        (("attn",), "down.0.conv"),
        (("down", "attn", ".*"), "'attn'"),
        (("(",), "regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            group_of_names(names, groups)


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="size = 1"):
        GeometricBins(1)
    with pytest.raises(ValueError, match="two or more"):
        Raw().matrix([1])
    with pytest.raises(ValueError, match="horizon = 1"):
        ema_profile([1, 1], 1.0)
