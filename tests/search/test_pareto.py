"""Fronts and hypervolumes against brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from genlight.search.pareto import front_of, hypervolume, pareto_front
from genlight.search.records import Failure, Record, Trial

points = st.integers(1, 3).flatmap(
    lambda width: st.integers(0, 9).flatmap(
        lambda count: arrays(np.float64, (count, width), elements=st.integers(0, 5).map(float))
    )
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(a <= b) and np.any(a < b))


@given(points)
def test_the_front_is_what_nothing_dominates(values: np.ndarray) -> None:
    expected = [i for i, p in enumerate(values) if not any(dominates(q, p) for q in values)]
    assert pareto_front(values) == expected


@given(points)
def test_the_volume_is_the_count_of_dominated_cells(values: np.ndarray) -> None:
    """With whole numbers, the volume below the reference is a number of unit cells."""
    width = values.shape[1]
    cells = sum(any(np.all(p <= cell) for p in values) for cell in product(range(4), repeat=width))
    assert hypervolume(values, [4.0] * width) == pytest.approx(cells, abs=1e-12)


@given(points, st.randoms(use_true_random=False))
def test_the_volume_is_that_of_the_front_in_any_order(values: np.ndarray, random: object) -> None:
    corner = [6.0] * values.shape[1]
    front = values[pareto_front(values)]
    rows = list(range(len(values)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    assert hypervolume(front, corner) == pytest.approx(hypervolume(values, corner))
    assert hypervolume(values[rows], corner) == pytest.approx(hypervolume(values, corner))


def test_bad_points_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        pareto_front([[1.0, np.nan]])
    with pytest.raises(ValueError, match="1 to 3"):
        hypervolume(np.zeros((1, 4)), np.ones(4))
    with pytest.raises(ValueError, match="reference must be 2"):
        hypervolume(np.zeros((1, 2)), [1.0])


def record(index: int, score: float | None, nfe: float, fidelity: int = 64) -> Record[int]:
    trial = Trial(index, 0, str(index), index, fidelity, "random", {"nfe": nfe}, (0, index))
    return Record(trial, score, {}, None if score is not None else Failure("timeout", ""))


def test_the_front_of_records_keeps_to_one_fidelity_and_leaves_out_failures() -> None:
    records = [record(0, 3.0, 4), record(1, 2.0, 5), record(2, 2.5, 6), record(3, None, 1), record(4, 0.1, 9, 32)]
    assert [r.index for r in front_of(records, ["score", "nfe"])] == [0, 1]
    assert [r.index for r in front_of(records, ["score", "nfe"], fidelity=32)] == [4]
    assert front_of(records[3:4], ["score", "nfe"]) == []
    with pytest.raises(ValueError, match="'bits' is unknown; record 0 has: score, nfe"):
        front_of(records, ["score", "bits"])
