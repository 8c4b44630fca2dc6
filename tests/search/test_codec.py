"""Candidates survive the way to JSON and back, or are refused; keys tell them apart."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genlight.search.codec import CandidateCodec, canonical_key


@dataclass(frozen=True)
class Step:
    time: float
    order: int
    kind: str


@dataclass(frozen=True)
class Plan:
    steps: tuple[Step, ...]
    scale: float | None = None


@dataclass(frozen=True)
class Loose:
    values: object


finite = st.floats(allow_nan=False, allow_infinity=False)
plans = st.builds(
    Plan, st.lists(st.builds(Step, finite, st.integers(), st.text()), max_size=4).map(tuple), st.none() | finite
)


@given(plans)
def test_a_candidate_comes_back_as_it_was(plan: Plan) -> None:
    codec = CandidateCodec(Plan)
    back = codec.from_plain(codec.to_plain(plan))
    assert back == plan and type(back.steps) is tuple
    assert canonical_key(back) == canonical_key(plan)


@given(plans, plans)
def test_keys_are_equal_for_equal_candidates_only(first: Plan, second: Plan) -> None:
    assert (canonical_key(first) == canonical_key(second)) == (first == second)


def test_keys_round_where_asked_and_know_one_zero() -> None:
    near, far = Plan((Step(0.12341, 1, "a"),)), Plan((Step(0.12349, 1, "a"),))
    assert canonical_key(near, digits=3) == canonical_key(far, digits=3)
    assert canonical_key(near) != canonical_key(far)
    assert canonical_key(Plan((), -0.0)) == canonical_key(Plan((), 0.0))
    assert canonical_key(Plan((), -1e-9), digits=3) == canonical_key(Plan((), 1e-9), digits=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(TypeError, match=r"another candidate|no form in JSON"):
        CandidateCodec(Plan).to_plain(Plan((), value))
    with pytest.raises(ValueError):
        canonical_key(Plan((), value))


def test_what_json_would_change_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a Plan, got Step"):
        CandidateCodec(Plan).to_plain(Step(0.0, 1, "a"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="comes back from JSON as another candidate"):
        CandidateCodec(Loose).to_plain(Loose((1, 2)))
    with pytest.raises(TypeError):
        canonical_key(Loose(np.zeros(2)))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({}, "not a Plan: steps: Field required"),
        ({"steps": [], "scala": 1.0}, "not a Plan: scala: .*got 1.0"),
        ({"steps": [{"time": "0.5", "order": 1, "kind": "a"}]}, "steps.0.time: .*got '0.5'"),
        ({"steps": [{"time": 0.5, "order": 1.5, "kind": "a"}]}, "steps.0.order"),
        ([], "not a Plan: the whole"),
    ],
)
def test_wrong_values_are_named(plain: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CandidateCodec(Plan).from_plain(plain)
