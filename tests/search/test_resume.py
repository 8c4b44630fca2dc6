"""A search that dies anywhere, any number of times, ends with the bytes of one that never did."""

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.faults import EXIT_CODE, die_at, exit_code, fail_at, hooked, in_child, start_child
from search.local_space import LocalSpace
from search.toy_search import (
    FINGERPRINT,
    Counting,
    Schedule,
    ScheduleSpace,
    Word,
    WordSpace,
    failing,
    faulty,
    rugged,
    run_search,
    schedule_error,
)

from genlight.errors import UserError
from genlight.io import DiskFullError, primitives
from genlight.predictors.ranking import RankingPredictor
from genlight.search.archive import HISTORY_FILE
from genlight.search.cma import CMAES
from genlight.search.engine import Budget, FailureLimits, Search, open_archive
from genlight.search.evaluation import DEVICE_LOST, one_by_one, over_ranks
from genlight.search.evolution import Evolution
from genlight.search.guided import PredictorGuided
from genlight.search.halving import SuccessiveHalving
from genlight.search.polish import Polish
from genlight.search.random_search import RandomSearch
from genlight.search.records import Problem
from genlight.search.screening import Screening
from genlight.search.stages import Stage, Stages

EVOLUTION = Evolution(population=6, children=5, anneal_evaluations=20)
TINY = RankingPredictor(members=2, steps=4, width=4, hidden=4, head_width=4)
STRATEGIES: dict[str, Any] = {
    "random": RandomSearch(7),
    "evolution": EVOLUTION,
    "cma": CMAES(population_size=5),
    "guided": PredictorGuided(EVOLUTION, TINY, stage_size=6, min_measured=8, generations=2, children_per_place=3),
    "gaussian": PredictorGuided(EVOLUTION, stage_size=6, min_measured=8),
    "halving": SuccessiveHalving(EVOLUTION, (1, 4, 16), (0.5, 0.25)),
    "stages": Stages(
        (Stage(RandomSearch(4), 9), Stage(EVOLUTION, 9, ScheduleSpace()), Stage(CMAES(population_size=4)))
    ),
    "screening": Screening(
        tuple(ScheduleSpace().sample(np.random.default_rng(n)) for n in range(10)), EVOLUTION, fidelity=2, promoted=4
    ),
    "polish": Stages((Stage(EVOLUTION, 14), Stage(Polish(2, 13, CMAES(0.1, 5))))),
}
INITIAL = (Schedule((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0,) * 6), Schedule((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (1,) * 6))


def search(folder: Path, name: str, evaluations: int, function: Any = schedule_error, **options: Any) -> Any:
    strategy = deepcopy(STRATEGIES[name])  # with no cache of another search, as in a new process
    options = {"fidelity": 4 if name == "screening" else 1, **options}
    return run_search(folder, strategy, LocalSpace(), function, evaluations, initial=INITIAL, **options)


def history(folder: Path) -> bytes:
    return (folder / HISTORY_FILE).read_bytes()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], bytes]:
    """The archive of an undisturbed search."""
    known: dict[str, bytes] = {}

    def get(name: str, evaluations: int) -> bytes:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            search(folder, name, 40)
            known[name] = history(folder)
        return b"".join(known[name].splitlines(keepends=True)[: evaluations + 1])

    return get


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_repeats_itself_and_depends_on_its_seed(name: str, reference: Any, tmp_path: Path) -> None:
    search(tmp_path / "again", name, 40)
    search(tmp_path / "other", name, 40, seed=1)
    assert history(tmp_path / "again") == reference(name, 40) != history(tmp_path / "other")


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=4), name=st.sampled_from(list(STRATEGIES)))
def test_an_extended_search_is_the_long_one(cuts: list[int], name: str, reference: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    for evaluations in [*sorted(cuts), 40]:
        search(folder, name, evaluations)
        assert history(folder) == reference(name, evaluations)


@pytest.mark.parametrize("name", STRATEGIES)
def test_asking_is_a_pure_function_of_the_history(name: str, tmp_path: Path) -> None:
    """Every generation, asked of a new process' strategy, is the one that the running search asked for."""
    result = search(tmp_path, name, 40)
    last = result.records[-1].trial.generation
    assert last >= 3
    for generation in range(1, last):
        kept = [r for r in result.records if r.trial.generation <= generation]
        lines = history(tmp_path).splitlines(keepends=True)
        folder = tmp_path / str(generation)
        folder.mkdir()
        (folder / HISTORY_FILE).write_bytes(b"".join(lines[: len(kept)]))
        search(folder, name, len(kept))
        assert history(folder) == b"".join(lines[: len(kept) + 1])


def test_the_cache_of_cma_es_is_only_a_cache(reference: Any, tmp_path: Path) -> None:
    strategy = CMAES(population_size=5)
    for seed in (1, 0, 0):
        folder = tmp_path / str(seed)
        for evaluations in (3, 11, 40):
            run_search(folder, strategy, LocalSpace(), schedule_error, evaluations, seed=seed, initial=INITIAL)
    assert history(tmp_path / "0") == reference("cma", 40)


@pytest.mark.parametrize(
    ("name", "evaluations"), [("evolution", 10), ("guided", 10), ("halving", 9), ("stages", 10), ("screening", 15)]
)
def test_dying_at_every_write_changes_nothing(
    name: str, evaluations: int, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "evolution":  # deaths inside a line too
        monkeypatch.setattr(primitives, "CHUNK_BYTES", 100)
    number, status = 0, EXIT_CODE
    while status == EXIT_CODE:
        number += 1
        folder = tmp_path / str(number)

        def action(folder: Path = folder, number: int = number) -> None:
            with hooked(die_at(number)):
                search(folder, name, evaluations)

        status = in_child(action)
        before = history(folder).count(b"\n") - 1 if (folder / HISTORY_FILE).exists() else 0
        objective = Counting(schedule_error)
        assert len(search(folder, name, evaluations, objective).records) == evaluations
        assert history(folder) == reference(name, evaluations), f"call {number}"
        assert len(objective.calls) == evaluations - max(before, 0), "nothing is measured twice"
    assert status == 0 and number > 6 * evaluations


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_failing_write_ends_the_run_and_changes_nothing(code: int, reference: Any, tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        try:
            with hooked(fail_at(number, code)):
                search(folder, "evolution", 7)
        except (DiskFullError, OSError) as error:
            assert isinstance(error, DiskFullError) == (code == errno.ENOSPC)
            search(folder, "evolution", 7)
            assert history(folder) == reference("evolution", 7), f"call {number}"
        else:
            break
    assert number > 35


def test_a_dozen_sigkills_change_nothing(tmp_path: Path) -> None:
    def slow(schedule: Schedule) -> float:
        time.sleep(0.004)
        return schedule_error(schedule)

    def lines() -> int:
        return history(killed).count(b"\n") if (killed / HISTORY_FILE).exists() else 0

    killed, rng, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        begun = lines()
        pid = start_child(lambda: sys.exit(search(killed, "evolution", 200, slow).stopped != "budget"))
        # Two candidates further: a second kill on one candidate would make it poison
        while kills < 12 and lines() < begun + 2:
            time.sleep(0.001)
        if kills < 12:
            time.sleep(rng.random() * 0.008)
            os.kill(pid, signal.SIGKILL)
        status = exit_code(pid)
        if status != -signal.SIGKILL:
            break
        kills += 1
    search(tmp_path / "whole", "evolution", 200)
    assert kills >= 10 and status == 0 and history(killed) == history(tmp_path / "whole")


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("name", ["evolution", "guided", "halving", "screening", "polish"])
def test_any_number_of_workers_gives_the_same_archive(name: str, workers: int, reference: Any, tmp_path: Path) -> None:
    alone = one_by_one(Counting(schedule_error))
    with ThreadPoolExecutor(workers) as pool:

        def evaluate(trials: Any) -> Any:
            return [outcome for outcomes in pool.map(lambda trial: alone([trial]), trials) for outcome in outcomes]

        search(tmp_path, name, 40, evaluate=evaluate, workers=workers)
    assert history(tmp_path) == reference(name, 40)


def test_two_processes_that_share_the_work_give_the_same_archive(reference: Any, tmp_path: Path) -> None:
    """As ranks do it: both open the archive, run the same search and evaluate their shares; the first one writes."""
    ends = Pipe()
    problem: Problem[Schedule] = Problem(LocalSpace())
    strategy = STRATEGIES["guided"]
    archives = [
        open_archive(tmp_path, problem, strategy, INITIAL, fingerprint=FINGERPRINT, writable=rank == 0)
        for rank in (0, 1)
    ]

    def one_rank(rank: int) -> None:
        def gather(outcomes: Any) -> Any:
            ends[rank].send(outcomes)
            other = ends[rank].recv()
            return [outcomes, other] if rank == 0 else [other, outcomes]

        ends[1 - rank].close()  # so that the end of one rank ends the other
        objective = Counting(schedule_error)
        evaluate = over_ranks(one_by_one(objective), rank, 2, gather)
        result = Search(problem, strategy, archives[rank], evaluate, INITIAL, workers=2).run(Budget(30))
        assert len(result.records) == 30 and 10 <= len(objective.calls) <= 20

    pid = start_child(lambda: one_rank(1))
    try:
        one_rank(0)
    finally:
        ends[0].close()
        status = exit_code(pid)
    assert status == 0 and history(tmp_path) == reference("guided", 30)


@pytest.mark.parametrize("workers", [1, 4])
def test_only_the_candidate_that_kills_twice_is_poison(workers: int, tmp_path: Path) -> None:
    space, deadly = WordSpace(), {(0, 1, 2, 0), (2, 2, 1, 0), (1, 1, 1, 1)}

    def kill(word: Word) -> float:
        if word.letters in deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return rugged(word)

    def once() -> int:
        return in_child(lambda: run_search(tmp_path, RandomSearch(), space, kill, 81, workers=workers))

    statuses = [once()]
    while statuses[-1] == -signal.SIGKILL:
        statuses.append(once())
    assert statuses == [-signal.SIGKILL] * 6 + [0]
    result = run_search(tmp_path, RandomSearch(), space, kill, 81)
    failed = {r.candidate.letters: r.failure for r in result.records if r.failure}
    assert failed.keys() == deadly
    assert {(f.kind, f.reason) for f in failed.values()} == {("poison", "took the process down 2 times")}


def test_only_the_candidate_that_loses_the_device_twice_is_poison(tmp_path: Path) -> None:
    def lose(word: Word) -> float:
        if word.letters == (0, 1, 2, 0):
            raise DEVICE_LOST("CUDA error: device-side assert triggered")
        return rugged(word)

    for _ in range(2):
        with pytest.raises(DEVICE_LOST):
            run_search(tmp_path, RandomSearch(), WordSpace(), lose, 81)
    result = run_search(tmp_path, RandomSearch(), WordSpace(), lose, 81)
    assert [r.failure.kind for r in result.records if r.failure] == ["poison"] and len(result.records) == 81


def test_only_the_candidate_that_kills_another_process_twice_is_poison(tmp_path: Path) -> None:
    """Two processes share the work; the deadly candidate comes to the second one, alone and again to the first."""

    def kill(word: Word) -> float:
        if word.letters == (0, 1, 2, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return rugged(word)

    def one_rank(rank: int, attempt: int) -> None:
        group = torch.distributed
        group.init_process_group("gloo", init_method=f"file://{tmp_path}/meet-{attempt}", rank=rank, world_size=2)

        def gather(outcomes: Any) -> Any:
            shares: list[Any] = [None, None]
            group.all_gather_object(shares, outcomes)
            return shares

        problem: Problem[Word] = Problem(WordSpace())
        archive = open_archive(tmp_path / "a", problem, RandomSearch(), fingerprint=FINGERPRINT, writable=rank == 0)
        group.barrier()
        evaluate = over_ranks(one_by_one(Counting(kill)), rank, 2, gather)
        Search(problem, RandomSearch(), archive, evaluate, workers=2).run(Budget(81))

    def both(attempt: int) -> list[int]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: in_child(lambda: one_rank(rank, attempt)), (0, 1)))

    statuses = [both(attempt) for attempt in range(3)]
    assert sorted(statuses[0]) == sorted(statuses[1]) == [-signal.SIGKILL, 1] and statuses[2] == [0, 0]
    result = run_search(tmp_path / "a", RandomSearch(), WordSpace(), rugged, 81)
    failed = {record.candidate.letters: record.failure.kind for record in result.records if record.failure}
    assert failed == {(0, 1, 2, 0): "poison"}


def test_an_orderly_end_is_no_attempt(tmp_path: Path) -> None:
    def interrupt(schedule: Schedule) -> float:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path, "evolution", 5, interrupt, workers=3)
    assert search(tmp_path, "evolution", 5).failed == 0


def test_a_time_budget_only_cuts(reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(ticks) * 3e8)  # a wall clock that jumps by decades
    now = [0.0]

    def second(schedule: Schedule) -> float:
        now[0] += 1.0
        return schedule_error(schedule)

    result = search(tmp_path, "evolution", 40, second, seconds=11, clock=lambda: now[0])
    assert result.stopped == "time" and history(tmp_path) == reference("evolution", 11)
    assert search(tmp_path, "evolution", 40).stopped == "budget"
    assert history(tmp_path) == reference("evolution", 40)


def test_a_request_to_stop_is_kept_between_candidates(reference: Any, tmp_path: Path) -> None:
    objective = Counting(schedule_error)
    result = search(tmp_path, "evolution", 40, objective, should_stop=lambda: len(objective.calls) >= 5)
    assert result.stopped == "request" and history(tmp_path) == reference("evolution", 5)


def test_an_archive_that_the_strategy_does_not_repeat_is_refused(tmp_path: Path) -> None:
    search(tmp_path, "evolution", 10)
    lines = history(tmp_path).splitlines(keepends=True)
    (tmp_path / "other").mkdir()
    search(tmp_path / "seed", "evolution", 10, seed=1)
    foreign = history(tmp_path / "seed").splitlines(keepends=True)
    (tmp_path / "other" / HISTORY_FILE).write_bytes(lines[0] + b"".join(foreign[1:]))
    with pytest.raises(
        UserError, match=r"candidate 6 in .* is \w+ at fidelity 1, where the strategy now proposes \w+ at"
    ):
        search(tmp_path / "other", "evolution", 12)


def test_another_strategy_seed_or_objective_is_refused_with_both_values(tmp_path: Path) -> None:
    search(tmp_path, "evolution", 3)
    with pytest.raises(UserError, match="seed is '0' there and '1' here"):
        search(tmp_path, "evolution", 3, seed=1)
    with pytest.raises(
        UserError, match=r"strategy is 'Evolution\(.*' there and 'RandomSearch\(generation_size=7\)' here"
    ):
        search(tmp_path, "random", 3)


def test_a_failing_third_changes_no_winner_and_no_byte(tmp_path: Path) -> None:
    space = WordSpace()
    bad = frozenset(word.letters for word in space.all() if failing(word.letters))
    assert 20 <= len(bad) <= 34
    sound = WordSpace(banned=bad)
    for strategy in (RandomSearch(), Evolution(10, 10), PredictorGuided(Evolution(10, 10), TINY, 10, min_measured=20)):
        name = type(strategy).__name__
        limits = FailureLimits(share=0.7)
        options: Any = {"time_limit_s": 0.05, "limits": limits}
        found = run_search(tmp_path / name, strategy, space, faulty, 200, **options)
        without = run_search(tmp_path / f"{name}3", strategy, sound, rugged, 200)
        assert {r.candidate.letters for r in found.records if r.failure} == bad
        assert {r.failure.kind for r in found.records if r.failure} == {
            *("exception", "not_finite", "out_of_memory", "timeout")
        }
        assert found.best and without.best
        assert found.best.candidate == without.best.candidate and found.best.score == without.best.score
        texts = list((tmp_path / name / "failures").glob("*.txt"))
        assert texts and all("Traceback" in path.read_text() for path in texts)
    run_search(tmp_path / "again", RandomSearch(), space, faulty, 200, **options)
    assert history(tmp_path / "again") == history(tmp_path / "RandomSearch")
