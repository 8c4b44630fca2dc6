"""CMA-ES around the best candidates of a search: continuous decisions only, one start after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search.local_space import LocalSpace
from search.toy_search import Schedule, ScheduleSpace, WordSpace, rugged, run_search, schedule_error

from genlight.errors import UserError
from genlight.search.cma import CMAES
from genlight.search.evolution import Evolution
from genlight.search.polish import Polish
from genlight.search.random_search import RandomSearch
from genlight.search.records import History, Problem
from genlight.search.screening import Screening
from genlight.search.stages import Stage, Stages


def polished(before: int, polish: Polish, first: Any = None) -> Stages:
    return Stages((Stage(first or Evolution(10, 10), before), Stage(polish)))


def test_the_best_are_polished_one_after_the_other(tmp_path: Path) -> None:
    strategy = polished(40, Polish(starts=2, evaluations=30, cma=CMAES(0.05)))
    result = run_search(tmp_path, strategy, LocalSpace(), schedule_error, 200)
    assert result.stopped == "exhausted" and len(result.records) == 40 + 60
    starts = sorted(result.records[:40], key=lambda r: r.rank)[:2]
    for number, start in enumerate(starts):
        own = result.records[40 + 30 * number : 70 + 30 * number]
        assert {r.source for r in own} == {f"polish_{number + 1}"}
        assert {r.candidate.kinds for r in own} == {start.candidate.kinds}
        first = np.array([r.candidate.times for r in own[:8]])
        assert np.abs(first - start.candidate.times).max() < 0.25
        assert min(r.score for r in own if r.score is not None) < (start.score or 0)
    # both walks have random numbers of their own
    steps = [np.array(result.records[n].candidate.times) - s.candidate.times for n, s in zip((40, 70), starts)]
    assert not np.allclose(*steps)


def test_it_finds_the_bottom_around_a_start(tmp_path: Path) -> None:
    """The bowl has its bottom where the times are the start's neighbours."""

    def bowl(schedule: Schedule) -> float:
        times = np.array([0.1, 0.15, 0.3, 0.5, 0.8, 0.9])
        return float(np.sum((np.array(schedule.times) - times) ** 2)) + (schedule.kinds != (1,) * 6)

    start = Schedule((0.15, 0.2, 0.35, 0.45, 0.75, 0.95), (1,) * 6)
    strategy = Polish(starts=1, evaluations=150, cma=CMAES(0.05))
    result = run_search(tmp_path, strategy, LocalSpace(), bowl, 151, initial=[start])
    assert result.best and result.best.score is not None and result.best.score < 1e-3 < bowl(start)


def test_an_earlier_polish_is_one_of_the_strategies_before(tmp_path: Path) -> None:
    polish = Polish(starts=1, evaluations=12, cma=CMAES(0.05, 6))
    strategy = Stages((Stage(RandomSearch(10), 20), Stage(polish, 12), Stage(RandomSearch(10), 10), Stage(polish)))
    records = run_search(tmp_path, strategy, LocalSpace(), schedule_error, 60).records
    assert [r.source for r in records] == [*["random"] * 20, *["polish_1"] * 12, *["random"] * 10, *["polish_1"] * 12]
    start = min(records[:42], key=lambda r: r.rank)
    assert {r.candidate.kinds for r in records[42:]} == {start.candidate.kinds}


class Coarse(LocalSpace):
    """So few times that a walk soon meets no new ones."""

    def from_vector(self, vector: np.ndarray) -> Schedule:
        return super().from_vector(np.round(vector * 2) / 2)


def test_a_start_with_nothing_new_gives_way_to_the_next(tmp_path: Path) -> None:
    strategy = polished(6, Polish(starts=3, evaluations=50, cma=CMAES(0.3)), RandomSearch(6))
    result = run_search(tmp_path, strategy, Coarse(steps=2), schedule_error, 300)
    assert result.stopped == "exhausted"
    sources = [r.source for r in result.records[6:]]
    assert sources == sorted(sources) and {"polish_1", "polish_2"} <= set(sources)
    assert sources.count("polish_1") < 50
    assert len({r.key for r in result.records}) == len(result.records)


def test_a_start_without_two_continuous_decisions_is_passed_over(tmp_path: Path) -> None:
    result = run_search(tmp_path, polished(5, Polish(), RandomSearch(5)), LocalSpace(steps=1), schedule_error, 50)
    assert result.stopped == "exhausted" and len(result.records) == 5


def test_other_fidelities_are_no_starts(tmp_path: Path) -> None:
    space, rng = LocalSpace(), np.random.default_rng(0)
    many = tuple(space.sample(rng) for _ in range(10))
    inner = Screening(many, Polish(starts=1, evaluations=8), fidelity=1, promoted=2)
    records = run_search(tmp_path, inner, space, schedule_error, 20, fidelity=4).records
    assert [r.fidelity for r in records] == [1] * 10 + [4] * 10 and records[-1].source == "polish_1"


def test_it_needs_a_space_with_around(tmp_path: Path) -> None:
    for space, function in ((ScheduleSpace(), schedule_error), (WordSpace(), rugged)):
        name = type(space).__name__
        with pytest.raises(UserError, match=f"Polish needs a space with `around`, which {name} does not offer"):
            run_search(tmp_path / name, polished(5, Polish(), RandomSearch(5)), space, function, 9)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="starts = 0"):
        Polish(starts=0)
    with pytest.raises(ValueError, match="evaluations = 0"):
        Polish(evaluations=0)
    assert Polish().ask(Problem(LocalSpace()), History()) == []
