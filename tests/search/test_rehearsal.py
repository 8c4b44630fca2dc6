"""A search without measurements proposes as many as the real one, and the same where scores decide nothing."""

from pathlib import Path

import pytest
from search.toy_search import WordSpace, rugged, run_search

from genlight.search.engine import Budget
from genlight.search.evolution import Evolution
from genlight.search.plan import SearchPlan, with_screening
from genlight.search.random_search import RandomSearch
from genlight.search.records import Problem
from genlight.search.rehearsal import Rehearsal, rehearsed

SPACE = WordSpace()


def test_a_random_search_is_rehearsed_as_it_will_be(tmp_path: Path) -> None:
    found = run_search(tmp_path, RandomSearch(7), SPACE, rugged, 30)
    rehearsal = rehearsed(Problem(SPACE), SearchPlan(RandomSearch(7), (), Budget(30)), 60.0)
    assert [trial.key for trial in rehearsal.trials] == [record.key for record in found.records]
    assert rehearsal.count == 30 and 0 < rehearsal.seconds < 60


def test_screening_shows_in_the_fidelities() -> None:
    """Eight words on two samples, three of them again on ten, then what evolution makes of these."""
    plan = with_screening(Evolution(population=3, children=4), tuple(SPACE.all()[:8]), 12, 2, 3)
    rehearsal = rehearsed(Problem(SPACE, fidelity=10), plan, 60.0)
    assert [trial.fidelity for trial in rehearsal.trials] == [2] * 8 + [10] * 15
    assert rehearsal.mean([float(trial.fidelity) for trial in rehearsal.trials]) == (16 + 150) / 23


def test_it_ends_with_the_space() -> None:
    rehearsal = rehearsed(Problem(SPACE), SearchPlan(RandomSearch(100), (), Budget(10_000)), 60.0)
    assert rehearsal.count == len(rehearsal.trials) <= 81


def test_what_takes_too_long_is_extrapolated() -> None:
    rehearsal = rehearsed(Problem(SPACE), SearchPlan(RandomSearch(5), (), Budget(50)), 0.0)
    assert len(rehearsal.trials) == 5 and rehearsal.count == 50
    whole = Rehearsal((), 10, 0.0)
    # 1, 2, 3, 4, and six more like 3 and 4
    assert whole.mean([1.0, 2.0, 3.0, 4.0]) == pytest.approx((10 + 6 * 3.5) / 10)
    assert whole.mean([]) == 0.0 and whole.some(3) == []
    assert rehearsal.some(5) == [trial.candidate for trial in rehearsal.trials]
    assert rehearsal.some(1) == [rehearsal.trials[2].candidate]
