"""Faults of processes and machines: kills at random times, memory, hangs, clocks, a second process, small disks."""

import gc
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from campaigns.commands import FIT, Points, differing, folder_of, reference, results, resumed, run
from oracles.faults import in_child, start_child
from search.toy_search import (
    FINGERPRINT,
    Counting,
    Schedule,
    ScheduleSpace,
    Word,
    WordSpace,
    rugged,
    run_search,
    schedule_error,
)
from torch import distributed

from genlight.search import evaluation
from genlight.search.archive import HISTORY_FILE
from genlight.search.engine import Budget, Search, open_archive
from genlight.search.evaluation import Keyed, one_by_one, over_ranks
from genlight.search.evolution import Evolution
from genlight.search.protocols import Evaluation
from genlight.search.random_search import RandomSearch
from genlight.search.records import Problem, Trial

_STRATEGY = Evolution(population=6, children=5)


def _lines(folder: Path) -> int:
    file = folder / HISTORY_FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _slow(schedule: Schedule) -> float:
    time.sleep(0.002)
    return schedule_error(schedule)


def sigkills(root: Path, kills: int, strategy: Any = _STRATEGY, seed: int = 0, ranks: int = 1) -> Points:
    """So many SIGKILLs at random times into one search, or into one of the ranks that share it; it then has the bytes
    of one that none disturbed."""
    folder, rng, wrong, done = root / "killed", random.Random(seed), [], 0
    budget = 4 * kills * ranks + 20

    def search(rank: int) -> str:
        if ranks > 1:
            return _search_as(rank, ranks, root / f"meeting-{done}", folder, strategy, budget, seed)
        return run_search(folder, strategy, ScheduleSpace(), _slow, budget, seed=seed).stopped

    while True:
        before, pids = _lines(folder), [_forked(lambda rank=rank: search(rank)) for rank in range(ranks)]
        # two candidates further: a second kill on one candidate would make it poison
        while done < kills and _lines(folder) < before + 2 and not any(map(_has_ended, pids)):
            time.sleep(0.0005)
        if done < kills:
            time.sleep(rng.random() * 0.006)
            os.kill(rng.choice(pids), signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if -signal.SIGKILL not in statuses:
            break
        done += 1
    run_search(root / "whole", strategy, ScheduleSpace(), schedule_error, budget, seed=seed)
    if any(statuses) or (folder / HISTORY_FILE).read_bytes() != (root / "whole" / HISTORY_FILE).read_bytes():
        wrong.append(f"after {done} kills the search ended with {statuses}, or with other bytes")
    return Points(done, wrong)


def _forked(search: Callable[[], str]) -> int:
    """The process of a search, whose status is 0 if it ends with its budget."""
    return start_child(lambda: sys.exit(search() != "budget"))


def _search_as(rank: int, ranks: int, meeting: Path, folder: Path, strategy: Any, budget: int, seed: int) -> str:
    """One of the processes that search together over gloo, as they do under the trainer: the first one writes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    where: dict[str, Any] = {"init_method": f"file://{meeting}", "rank": rank, "world_size": ranks}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=30), **where)
    problem: Problem[Schedule] = Problem(ScheduleSpace(), seed, 1, {})
    archive = open_archive(folder, problem, strategy, fingerprint=FINGERPRINT, writable=rank == 0)
    distributed.barrier()

    def gather(outcomes: list[Keyed]) -> list[list[Keyed]]:
        shares: list[Any] = [None] * ranks
        distributed.all_gather_object(shares, outcomes)
        return shares

    evaluate = over_ranks(one_by_one(Counting(_slow)), rank, ranks, gather)
    return Search(problem, strategy, archive, evaluate, workers=ranks).run(Budget(budget)).stopped


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def memory_growth(candidates: int = 200, megabytes: int = 8) -> float:
    """Growth of the resident memory over so many candidates that run out of memory, as a share of what it was."""

    class Hungry:
        def evaluate(self, word: Word, fidelity: int) -> Evaluation:
            held = torch.ones(megabytes * 2**18)
            raise (MemoryError if word.letters[0] % 2 else torch.OutOfMemoryError)(f"{held.sum()} and {id(held)}")

    evaluate = one_by_one(Hungry())

    def trials(count: int) -> list[Trial[Word]]:
        return [Trial(n, 0, str(n), Word((n,)), 1, "random", {}, (0, n)) for n in range(count)]

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1])

    gc.freeze()  # each failure collects garbage, which need not look at what the tests have imported
    try:
        evaluate(trials(20))
        before = resident()
        evaluate(trials(candidates))
        return (resident() - before) / before
    finally:
        gc.unfreeze()


def beyond_the_limit() -> int:
    """A candidate that takes more memory than the process may have (RLIMIT_AS), in a child: its exit status."""

    class Huge:
        def evaluate(self, word: Word, fidelity: int) -> Evaluation:
            if word.letters[0] == 1:
                torch.ones(2**34)
            return Evaluation(float(word.letters[0]))

    def action() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        trials = [Trial(n, 0, str(n), Word((n,)), 1, "random", {}, (0, n)) for n in range(3)]
        found = one_by_one(Huge())(trials)
        assert [outcome.score for outcome in found] == [0.0, None, 2.0]

    return in_child(action)


def hanging(root: Path, hangs_after: float = 0.3) -> Points:
    """Candidates that never end, with no limit set: each is failed as ten times the median, and nothing else is."""
    bad = {(2, 0, 1, 0), (1, 1, 1, 1), (0, 2, 2, 1)}

    def score(word: Word) -> float:
        while word.letters in bad:
            time.sleep(0.01)
        return rugged(word)

    before, evaluation.HANGS_SECONDS = evaluation.HANGS_SECONDS, hangs_after
    try:
        found = run_search(root / "hanging", RandomSearch(9), WordSpace(), score, 81)
    finally:
        evaluation.HANGS_SECONDS = before
    failed = {record.candidate.letters: record.failure.reason for record in found.records if record.failure}
    sound = run_search(root / "sound", RandomSearch(9), WordSpace(banned=frozenset(bad)), rugged, 78)
    wrong = [] if set(failed) == bad else [f"failed are {failed}"]
    if found.best is None or sound.best is None or found.best.key != sound.best.key:
        wrong.append("another winner")
    return Points(len(bad), wrong)


def clock_jumps(root: Path) -> Points:
    """A fit while the wall clock jumps by ten years at every look, then with checkpoints touched in wrong order."""
    expected, wrong = reference(root, FIT), []

    def jump() -> None:
        real, looks = time.time, iter(range(10**9))
        time.time = lambda: real() + (-1) ** next(looks) * 10 * 365.25 * 86400

    ended = run(root / "jumping", FIT, before=jump)
    folder = folder_of(root / "jumping", FIT)
    if ended.code != 0 or (names := differing(results(folder), expected)):
        wrong.append(f"ended with {ended.code}: {names if ended.code == 0 else ended.text[-300:]}")
    for order, file in enumerate(sorted(folder.glob("checkpoints/*.ckpt"), reverse=True)):
        os.utime(file, (1e9 + order, 1e9 + order))
    ended = run(root / "jumping", FIT, "resume=true", before=jump)
    if ended.code != 0 or differing(results(folder), expected):
        wrong.append(f"resumed with {ended.code}: {ended.text[-300:]}")
    return Points(2, wrong)


def second_process(root: Path) -> tuple[Points, float, float]:
    """A fit in a folder that another process holds: what it changed, and until it gives up, from its start, the seconds
    by the clock and of the CPU."""
    program = (
        "import sys, time; from genlight.run_folder import RunFolder\n"
        "RunFolder.open(sys.argv[1], command=['fit'], config={}, resume=sys.argv[2] == 'resume')\n"
        "print('held', flush=True); time.sleep(60)"
    )
    path, wrong, longest, most = root / "held" / "fit", [], 0.0, 0.0
    holder = [sys.executable, "-c", program, str(path)]
    first = subprocess.Popen([*holder, "new"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    try:
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        for how in ("resume=true", "run.overwrite=true"):
            command = [sys.executable, "-m", "genlight", "fit", f"run.root={root}", "run.name=held", how]
            begun, used = time.monotonic(), _children_seconds()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            longest, most = max(longest, time.monotonic() - begun), max(most, _children_seconds() - used)
            if done.returncode != 1 or f"process {first.pid} on {os.uname().nodename}" not in done.stderr:
                wrong.append(f"{how}: {done.returncode}, {done.stdout}{done.stderr}")
        if before != {file.name: file.read_bytes() for file in path.iterdir()}:
            wrong.append("the second process changed the folder")
    finally:
        first.kill()
        first.wait()
    third = subprocess.Popen([*holder, "resume"], stdout=subprocess.PIPE, text=True)
    if third.stdout is None or third.stdout.readline() != "held\n":
        wrong.append("a dead process holds the folder")
    third.kill()
    third.wait()
    return Points(3, wrong), longest, most


def _children_seconds() -> float:
    """CPU seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def small_disk(root: Path) -> str:
    """What is wrong about a fit on a disk that is too small: see `fit_on_small_disk`, which gets mounts of its own."""
    program = (
        "import sys, pathlib, campaigns.processes as p; sys.exit(p.fit_on_small_disk(pathlib.Path(sys.argv[1])) or 0)"
    )
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", program, root],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-800:]


def fit_on_small_disk(root: Path, free: int = 500_000) -> str:
    """A fit on a file system of 4 MB that fills up on the way, then again with room; what is wrong, if anything."""
    disk, words = root / "disk", [*FIT, "callbacks.checkpoint.save_top_k=-1"]
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    filler = disk / "filler"
    filler.write_bytes(b"x" * (4 * 2**20 - free))
    ended = run(disk, words)
    if not ended.is_told or "disk full" not in ended.text:
        return f"ended with {ended.code}: {ended.text[-500:]}"
    filler.unlink()
    return "; ".join(resumed(disk, words, reference(root, words), torn=True))


def can_unshare() -> bool:
    """Whether this system lets a process have mounts of its own."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
