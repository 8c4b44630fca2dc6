"""Scores that runs share: the search is the same with them, and measures what nobody has measured."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from search.toy_search import FINGERPRINT, Word, WordSpace, rugged

from genlight.search.archive import ATTEMPTS_FILE, HISTORY_FILE, unseal
from genlight.search.engine import Budget, Search, SearchResult, open_archive
from genlight.search.evaluation import one_by_one
from genlight.search.evolution import Evolution
from genlight.search.protocols import Evaluation, Strategy
from genlight.search.random_search import RandomSearch
from genlight.search.records import Problem
from genlight.search.shared import keep_score, known_first, read_scores

BAD = (1, 0, 0, 0)


class Measured:
    """The rugged score; counts what it measures, and fails one word."""

    def __init__(self) -> None:
        self.words: list[Word] = []

    def evaluate(self, candidate: Word, fidelity: int) -> Evaluation:
        self.words.append(candidate)
        if candidate.letters == BAD:
            raise ValueError("a bad word")
        return Evaluation(rugged(candidate) / fidelity, {"first": candidate.letters[0], "share": 0.5, "name": "x"})


def search(folder: Path, own: Path | None, strategy: Strategy, budget: int) -> tuple[SearchResult, Measured]:
    """A search that shares its scores, if it has a file for them."""
    measured, problem = Measured(), Problem(WordSpace(), seed=1)
    archive = open_archive(folder, problem, strategy, fingerprint=FINGERPRINT)
    known = {} if own is None else read_scores(own)
    result = Search(
        problem,
        strategy,
        archive,
        known_first(one_by_one(measured), known, archive.share),
        workers=3,
        on_progress=lambda progress: own and keep_score(own, progress.record),
    ).run(Budget(budget))
    return result, measured


def test_the_same_search_of_another_run_measures_nothing(tmp_path: Path) -> None:
    strategy = Evolution(population=6, children=4)
    alone, _ = search(tmp_path / "alone", None, strategy, 30)
    first, measured = search(tmp_path / "first", tmp_path / "scores" / "1.jsonl", strategy, 30)
    assert len(measured.words) == 30 and first.records == alone.records
    again, measured = search(tmp_path / "again", tmp_path / "scores" / "2.jsonl", strategy, 30)
    # what failed may have failed for the machine's sake
    failed = [record.candidate for record in alone.records if record.failure]
    assert failed and measured.words == failed and again.records == alone.records and again.best == alone.best
    assert (tmp_path / "again" / HISTORY_FILE).read_bytes() == (tmp_path / "alone" / HISTORY_FILE).read_bytes()
    notes = [unseal(line, "a note") for line in (tmp_path / "again" / ATTEMPTS_FILE).read_text().splitlines()[1:]]
    shared = [index for note in notes if note["kind"] == "shared" for index in note["indices"]]
    assert shared == [record.index for record in alone.records if not record.failure]


def test_another_strategy_and_budget_measures_what_is_new(tmp_path: Path) -> None:
    """All words in random order after an evolution: each word is measured once, but for the bad one."""
    first, _ = search(tmp_path / "first", tmp_path / "scores" / "1.jsonl", Evolution(population=6, children=4), 30)
    alone, _ = search(tmp_path / "alone", None, RandomSearch(9), 81)
    found, measured = search(tmp_path / "second", tmp_path / "scores" / "2.jsonl", RandomSearch(9), 81)
    known = {record.key for record in first.records if not record.failure}
    assert found.records == alone.records
    assert measured.words == [r.candidate for r in alone.records if r.key not in known]


def test_damaged_and_torn_lines_are_measured_again(tmp_path: Path) -> None:
    own = tmp_path / "scores" / "1.jsonl"
    search(tmp_path / "first", own, RandomSearch(9), 12)
    lines: Sequence[bytes] = own.read_bytes().splitlines(keepends=True)
    damaged = lines[2].replace(b'"score":', b'"score":1')
    other = lines[3].replace(b'"version":1', b'"version":2')
    own.write_bytes(b"".join([*lines[:2], damaged, other, *lines[4:-1], lines[-1][:20]]))
    (own.parent / "3.jsonl").write_bytes(b"\xff\n")
    whole = read_scores(own.parent / "2.jsonl")
    assert len(whole) == len(lines) - 3 and not read_scores(tmp_path / "nowhere" / "1.jsonl")
    # of its own file a run reads nothing: it has its archive
    assert not read_scores(own)


def test_a_search_goes_on_where_scores_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result, measured = search(tmp_path / "first", tmp_path / "file" / "scores" / "1.jsonl", RandomSearch(9), 5)
    assert result.stopped == "budget" and len(measured.words) == 5


@pytest.mark.parametrize("fidelity", [2, 1])
def test_scores_belong_to_a_number_of_samples(tmp_path: Path, fidelity: int) -> None:
    own = tmp_path / "scores" / "1.jsonl"
    result, _ = search(tmp_path / "first", own, RandomSearch(9), 5)
    record = next(record for record in result.records if record.score is not None)
    found = read_scores(own.parent / "2.jsonl").get((record.key, fidelity))
    assert (found is None) if fidelity == 2 else (found.score, found.facts) == (record.score, record.facts)
