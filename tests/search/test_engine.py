"""What the driver promises beside resuming: when it gives up, what it reports, what it refuses."""

import errno
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search.toy_search import Counting, ScheduleSpace, Word, WordSpace, rugged, run_search

from genlight.errors import UserError
from genlight.io import DiskFullError
from genlight.search import evaluation
from genlight.search.engine import Budget, Progress, SearchFailedError, open_archive
from genlight.search.evaluation import DEVICE_LOST, in_one_batch, one_by_one, over_ranks
from genlight.search.evolution import Evolution
from genlight.search.protocols import (
    Evaluation,
    LiveWeights,
    SettableSampler,
    VectorView,
    require_capability,
)
from genlight.search.random_search import RandomSearch
from genlight.search.records import Problem, Proposal, Trial


def broken(word: Word) -> float:
    raise ValueError("wrong shape")


def test_it_gives_up_when_the_first_ten_fail_and_says_why(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(
            SearchFailedError, match=r"first 10 candidates all failed.*10 times.*ValueError: wrong shape"
        ):
            run_search(tmp_path, RandomSearch(), WordSpace(), broken, 80)
        assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 11
    assert "in broken" in (tmp_path / "failures" / "000003.txt").read_text()


@pytest.mark.parametrize("workers", [1, 4])
def test_it_gives_up_when_more_than_half_of_forty_fail(workers: int, tmp_path: Path) -> None:
    calls = [0]

    def mostly(word: Word) -> float:
        calls[0] += 1
        return math.nan if calls[0] > 15 else 1.0

    with pytest.raises(SearchFailedError, match=r"25 of 40 .* most often \(25 times\) with not_finite"):
        run_search(tmp_path, RandomSearch(), WordSpace(), mostly, 80, workers=workers)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 41


def test_progress_has_the_best_so_far_and_an_end(tmp_path: Path) -> None:
    now, seen = [0.0], []

    def tick(word: Word) -> float:
        now[0] += 2.0
        return rugged(word) if sum(word.letters) % 3 else math.nan

    def look(progress: Progress[Word]) -> None:
        seen.append(progress)

    run_search(tmp_path, RandomSearch(), WordSpace(), tick, 5, clock=lambda: now[0])
    result = run_search(
        tmp_path, RandomSearch(), WordSpace(), tick, 20, clock=lambda: now[0], on_progress=look, seconds=100
    )
    assert [p.evaluated for p in seen] == list(range(6, 21)) and seen[0].budget == 20
    assert [p.eta_s for p in seen] == pytest.approx([2.0 * (20 - p.evaluated) for p in seen])
    best = [p.best.score for p in seen if p.best and p.best.score is not None]
    assert best == sorted(best, reverse=True) and result.best == seen[-1].best
    assert seen[-1].failed == result.failed > 0


def test_nothing_within_the_cost_limits_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cost_limits = \{'sum': -1\}; random ones have sum from \d"):
        run_search(tmp_path, Evolution(), WordSpace(), rugged, 5, cost_limits={"sum": -1})
    with pytest.raises(ValueError, match=r"cost_limits.nfe: the space reports no such cost; it reports: sum"):
        run_search(tmp_path / "2", Evolution(), WordSpace(), rugged, 5, cost_limits={"nfe": 5})


def test_doubled_and_forbidden_proposals_are_skipped(tmp_path: Path) -> None:
    class Stubborn:
        def ask(self, problem: Problem[Word], history: Any) -> list[Proposal[Word]]:
            words = [Word((0, 0, 0, n)) for n in (0, 1, 1, 2)] if not len(history) else [Word((0, 0, 0, 1))]
            return [Proposal(word, 1, "stubborn") for word in words]

    result = run_search(tmp_path, Stubborn(), WordSpace(), rugged, 9, cost_limits={"sum": 1})
    assert [r.key for r in result.records] == ["0000", "0001"] and result.stopped == "exhausted"


def test_initial_candidates_come_first_and_are_parents(tmp_path: Path) -> None:
    initial = [Word((0, 1, 2, 0)), Word((2, 2, 2, 2))]
    result = run_search(tmp_path, Evolution(2, 4), WordSpace(), rugged, 6, initial=initial)
    assert [r.candidate for r in result.records[:2]] == initial
    assert [r.source for r in result.records[:2]] == ["initial"] * 2
    assert {r.source for r in result.records[2:]} <= {"mutation", "crossover", "random"}
    with pytest.raises(UserError, match=r"initial is '[0-9a-f]{16}' there and '' here"):
        run_search(tmp_path, Evolution(2, 4), WordSpace(), rugged, 6)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    for budget in ({"evaluations": 0}, {"evaluations": 5, "seconds": 0.0}):
        with pytest.raises(ValueError, match=r"search\.budget"):
            Budget(**budget)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers = 0"):
        run_search(tmp_path, RandomSearch(), WordSpace(), rugged, 5, workers=0)
    with pytest.raises(ValueError, match="time_limit_s"):
        one_by_one(Counting(rugged), 0.0)
    with pytest.raises(ValueError, match="has its own seed"):
        open_archive(tmp_path, Problem(WordSpace()), RandomSearch(), fingerprint={"seed": "1"})


def test_an_evaluator_with_missing_outcomes_is_found(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="0 outcomes for 1 trials"):
        run_search(tmp_path, RandomSearch(), WordSpace(), rugged, 5, evaluate=lambda trials: [])


def trials(count: int) -> list[Trial[Word]]:
    return [Trial(n, 0, str(n), Word((n,)), 1, "random", {}, (0, n)) for n in range(count)]


class Batch(Counting):
    def evaluate_many(self, words: Any, fidelity: int) -> list[Evaluation]:
        return [self.evaluate(word, fidelity) for word in words]


def test_a_batch_fails_for_its_guilty_member_only() -> None:
    def inverse(word: Word) -> float:
        return 1 / (word.letters[0] - 2)

    objective = Batch(inverse)
    outcomes = in_one_batch(objective)(trials(4))
    assert [o.score for o in outcomes] == [-0.5, -1.0, None, 1.0]
    assert outcomes[2].failure and outcomes[2].failure.reason == "ZeroDivisionError: division by zero"
    objective = Batch(rugged)
    assert [o.score for o in in_one_batch(objective)(trials(4))] == [rugged(t.candidate) for t in trials(4)]
    assert len(objective.calls) == 4


def test_a_batch_that_hangs_fails_for_its_guilty_member_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit is set: after five calls whose time is known, ten times the median is one."""
    monkeypatch.setattr(evaluation, "HANGS_SECONDS", 0.3)
    hangs: set[int] = set()

    def score(word: Word) -> float:
        while word.letters[0] in hangs:
            time.sleep(0.01)
        return float(word.letters[0])

    evaluate = in_one_batch(Batch(score))
    for _ in range(5):
        evaluate(trials(4))
    hangs = {2}
    outcomes = evaluate(trials(4))
    assert [outcome.score for outcome in outcomes] == [0.0, 1.0, None, 3.0]
    failure = outcomes[2].failure
    assert failure is not None and failure.kind == "timeout" and "10 times the median" in failure.reason


@pytest.mark.parametrize("count", range(6))
def test_shares_of_ranks_come_back_in_order(count: int) -> None:
    alone = one_by_one(Counting(lambda word: float(word.letters[0])))
    shares = [[(trial.key, *alone([trial])) for trial in trials(count)[rank::2]] for rank in (0, 1)]
    for rank in (0, 1):
        together = over_ranks(alone, rank, 2, lambda mine, rank=rank: shares if mine == shares[rank] else [])
        assert [outcome.score for outcome in together(trials(count))] == list(range(count))


def test_ranks_that_are_not_in_step_are_found() -> None:
    """Of the second there are no outcomes, or as many as were due, of other candidates."""
    alone = one_by_one(Counting(rugged))
    for gather in (lambda mine: [mine, []], lambda mine: [mine, mine]):
        with pytest.raises(RuntimeError, match=r"ranks are not in step: those of \[1\]"):
            over_ranks(alone, 0, 2, gather)(trials(4))


@pytest.mark.parametrize(
    "error",
    [
        DiskFullError("disk full"),
        OSError(errno.EIO, "i/o"),
        DEVICE_LOST("CUDA error"),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
        RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:23"),
    ],
)
def test_what_fails_on_the_machine_is_no_candidates_fault(error: Exception) -> None:
    def fail(word: Word) -> float:
        raise error

    for evaluate in (one_by_one(Counting(fail)), in_one_batch(Batch(fail))):
        with pytest.raises(type(error)):
            evaluate(trials(2))


def test_scores_and_facts_become_plain_values() -> None:
    class Typed:
        def evaluate(self, word: Word, fidelity: int) -> Evaluation:
            facts: Any = {"a": torch.tensor(2.0), "b": np.float32(0.5), "c": np.int64(3), "d": math.inf, "e": True}
            return Evaluation(torch.tensor(1.5), facts)  # type: ignore[arg-type]

    (outcome,) = one_by_one(Typed())(trials(1))
    assert outcome.score == 1.5 and type(outcome.score) is float
    assert outcome.facts == {"a": 2.0, "b": 0.5, "c": 3, "d": "inf", "e": 1}
    assert {type(value) for value in outcome.facts.values()} == {float, str, int}


def test_a_slow_candidate_in_another_thread_is_failed_when_it_returns() -> None:
    found: list[Any] = []

    def slow(word: Word) -> float:
        time.sleep(0.05)
        return 1.0

    evaluate = one_by_one(Counting(slow), 0.01)
    thread = threading.Thread(target=lambda: found.extend(evaluate(trials(1))))
    thread.start()
    thread.join()
    assert found[0].failure.kind == "timeout" and found[0].failure.reason == "took longer than 0.01 s"


def test_an_alarm_set_before_still_rings() -> None:
    import signal

    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        (outcome,) = one_by_one(Counting(rugged), 5.0)(trials(1))
        assert outcome.failure is None and not rung
        time.sleep(0.2)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def test_memory_does_not_grow_with_failures(tmp_path: Path) -> None:
    import resource

    class Hungry:
        def evaluate(self, word: Word, fidelity: int) -> Evaluation:
            held = torch.ones(2_000_000)
            raise MemoryError(held)

    evaluate = one_by_one(Hungry())
    evaluate(trials(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate(trials(12))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB; one candidate holds 8,000


def test_capabilities_are_checked_by_what_a_target_offers() -> None:
    class Sampler:
        def set_sampler(self, sampler: Any) -> None: ...

    require_capability(Sampler(), SettableSampler, WordSpace())
    message = (
        "WordSpace needs a target with LiveWeights, which Sampler does not offer; it is offered by DiffusionModule"
    )
    with pytest.raises(UserError, match=message):
        require_capability(Sampler(), LiveWeights, WordSpace(), ["DiffusionModule"])
    assert isinstance(ScheduleSpace(), VectorView) and not isinstance(WordSpace(), VectorView)


def test_toy_spaces_apply_in_place_and_undo_by_applying_another() -> None:
    class Target: ...

    target: Any = Target()
    for word in (Word((1,)), Word((2,))):
        WordSpace().apply(target, word)
        assert target.word == word
