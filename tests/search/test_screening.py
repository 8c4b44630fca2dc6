"""Many candidates on few samples, the best of them on all, and a strategy that sees the latter only."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search.toy_search import Counting, Word, WordSpace, rugged, run_search

from genlight.search.evolution import Evolution
from genlight.search.halving import PROMOTION, SuccessiveHalving
from genlight.search.random_search import RandomSearch
from genlight.search.records import History, Problem, Proposal
from genlight.search.screening import SCREENING, Screening

WORDS = WordSpace().all()[:30]


class Biased(Counting):
    """Few samples are too kind by far, so any mixing of fidelities would show."""

    def evaluate(self, candidate: Word, fidelity: int) -> Any:
        evaluation = super().evaluate(candidate, fidelity)
        return type(evaluation)(evaluation.score - 10 / fidelity)


def test_the_best_of_the_screened_are_measured_again_and_the_search_goes_on_from_them(tmp_path: Path) -> None:
    seen: list[History[Word]] = []

    class Spy(RandomSearch):
        def ask(self, problem: Any, history: Any) -> Any:
            seen.append(history)
            return super().ask(problem, history)

    strategy = Screening(tuple(WORDS), Spy(8), fidelity=2, promoted=5)
    result = run_search(tmp_path, strategy, WordSpace(), Biased(rugged), 60, fidelity=16)
    assert [r.fidelity for r in result.records] == [2] * 30 + [16] * 30
    assert [r.source for r in result.records[:35]] == [SCREENING] * 30 + [PROMOTION] * 5
    assert [r.candidate for r in result.records[30:35]] == sorted(WORDS, key=rugged)[:5]
    assert all({r.fidelity for r in history} == {16} for history in seen)
    assert [history.next_index for history in seen] == [35, 43, 51, 59]
    assert [len(history) for history in seen] == [5, 13, 21, 29]
    assert result.best and result.best.fidelity == 16
    # what was screened and not promoted may be proposed again
    again = {r.key for r in result.records[35:]} & {r.key for r in result.records[:30]}
    assert again and not again & {r.key for r in result.records[30:35]}


def test_failed_candidates_are_not_promoted(tmp_path: Path) -> None:
    def odd(word: Word) -> float:
        if sum(word.letters) % 2:
            raise RuntimeError
        return rugged(word)

    strategy = Screening(tuple(WORDS), Evolution(4, 4), fidelity=1, promoted=20)
    records = run_search(tmp_path / "some", strategy, WordSpace(), odd, 60, fidelity=2).records
    even = sorted((word for word in WORDS if not sum(word.letters) % 2), key=rugged)
    assert [r.candidate for r in records if r.source == PROMOTION] == even
    assert len(records) == 60

    def none(word: Word) -> float:
        raise RuntimeError

    few = Screening(tuple(WORDS[:4]), RandomSearch(3), fidelity=1, promoted=2)
    records = run_search(tmp_path / "none", few, WordSpace(), none, 9, fidelity=2).records
    assert [r.fidelity for r in records] == [1] * 4 + [2] * 5


def test_candidates_beyond_the_cost_limits_are_not_screened(tmp_path: Path) -> None:
    strategy = Screening(tuple(WORDS), RandomSearch(4), fidelity=1, promoted=3)
    records = run_search(tmp_path, strategy, WordSpace(), rugged, 30, fidelity=2, cost_limits={"sum": 3}).records
    allowed = [word for word in WORDS if sum(word.letters) <= 3]
    assert [r.candidate for r in records if r.source == SCREENING] == allowed and len(allowed) < 30
    costly = Screening((Word((2, 2, 2, 2)),), RandomSearch(4), fidelity=1, promoted=3)
    problem = Problem(WordSpace(), fidelity=2, cost_limits={"sum": 3})
    assert {p.source for p in costly.ask(problem, History())} == {"random"}


def test_what_was_measured_before_is_not_promoted_again(tmp_path: Path) -> None:
    best = sorted(WORDS, key=rugged)[:3]
    strategy = Screening(tuple(WORDS), RandomSearch(5), fidelity=1, promoted=3)
    for count, promoted in ((2, 1), (3, 0)):
        folder = tmp_path / str(count)
        records = run_search(folder, strategy, WordSpace(), rugged, 50, fidelity=2, initial=best[:count]).records
        assert len(records) == 50
        assert [r.candidate for r in records if r.source == PROMOTION] == best[count:][:promoted]


def test_it_goes_with_halving_on_top(tmp_path: Path) -> None:
    strategy = Screening(tuple(WORDS), SuccessiveHalving(RandomSearch(4), (2, 8), (0.5,)), fidelity=1, promoted=4)
    records = run_search(tmp_path, strategy, WordSpace(), Biased(rugged), 30 + 4 + 2 + 4 + 2, fidelity=2).records
    assert [r.fidelity for r in records] == [1] * 30 + [2] * 4 + [8] * 2 + [2] * 4 + [8] * 2


def test_its_text_is_short_and_names_candidates_and_strategy() -> None:
    def text(words: list[Word], **options: Any) -> str:
        return repr(Screening(tuple(words), RandomSearch(4), **options))

    assert text(WORDS) == text(list(WORDS)) and len(text(WordSpace().all())) < 150
    assert "RandomSearch(generation_size=4)" in text(WORDS)
    assert len({text(WORDS), text(WORDS[::-1]), text(WORDS[1:]), text(WORDS, fidelity=3), text(WORDS, promoted=3)}) == 5


def test_settings_that_make_no_sense_are_refused() -> None:
    for options, message in (
        ({"fidelity": 0}, "fidelity = 0"),
        ({"promoted": 0}, "promoted = 0"),
        ({"candidates": ()}, "candidates must hold"),
    ):
        with pytest.raises(ValueError, match=message):
            Screening(**{"candidates": tuple(WORDS), "strategy": RandomSearch(), **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"screening on 64 samples needs search\.fidelity above that, got 64"):
        Screening(tuple(WORDS), RandomSearch()).ask(Problem(WordSpace(), fidelity=64), History())


def test_asking_changes_nothing() -> None:
    strategy: Screening = Screening(tuple(WORDS), RandomSearch(4), fidelity=1, promoted=3)
    problem = Problem(WordSpace(), fidelity=2)
    first: list[Proposal[Word]] = strategy.ask(problem, History())
    assert first == strategy.ask(problem, History()) and np.all([p.fidelity == 1 for p in first])
