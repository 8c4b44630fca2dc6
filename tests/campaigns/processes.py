"""Faults of processes and machines: kills at random times, memory, hangs, clocks, a second process, small disks."""

import gc
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from campaigns.commands import FIT, Points, differing, folder_of, reference, results, resumed, run
from oracles.faults import in_child
from search.toy_search import Schedule, ScheduleSpace, Word, WordSpace, rugged, run_search, schedule_error

from genlight.search import evaluation
from genlight.search.archive import HISTORY_FILE
from genlight.search.evaluation import one_by_one
from genlight.search.evolution import Evolution
from genlight.search.protocols import Evaluation
from genlight.search.random_search import RandomSearch
from genlight.search.records import Trial

_STRATEGY = Evolution(population=6, children=5)


def _lines(folder: Path) -> int:
    file = folder / HISTORY_FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def sigkills(root: Path, kills: int, strategy: Any = _STRATEGY, seed: int = 0) -> Points:
    """So many SIGKILLs at random times into one search, which then has the bytes of one that none disturbed."""

    def slow(schedule: Schedule) -> float:
        time.sleep(0.002)
        return schedule_error(schedule)

    folder, rng, wrong, done = root / "killed", random.Random(seed), [], 0
    budget = 4 * kills + 20

    def search(place: Path, function: Any) -> Any:
        return run_search(place, strategy, ScheduleSpace(), function, budget, seed=seed)

    while True:
        before, pid = _lines(folder), os.fork()
        if pid == 0:
            os._exit(0 if search(folder, slow).stopped == "budget" else 1)
        # two candidates further: a second kill on one candidate would make it poison
        while done < kills and _lines(folder) < before + 2 and not _has_ended(pid):
            time.sleep(0.0005)
        if done < kills:
            time.sleep(rng.random() * 0.006)
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != -signal.SIGKILL:
            break
        done += 1
    search(root / "whole", schedule_error)
    if status != 0 or (folder / HISTORY_FILE).read_bytes() != (root / "whole" / HISTORY_FILE).read_bytes():
        wrong.append(f"after {done} kills the search ended with {status}, or with other bytes")
    return Points(done, wrong)


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


def second_process(root: Path) -> tuple[Points, float]:
    """A second process in a held folder: the seconds until it gives up, and what it changed."""
    program = (
        "import sys, time; from genlight.run_folder import RunFolder\n"
        "from genlight.errors import UserError\n"
        "begun = time.monotonic()\n"
        "try: RunFolder.open(sys.argv[1], command=['fit'], config={}, resume=sys.argv[2] == 'resume')\n"
        "except UserError as error: print(time.monotonic() - begun, error); sys.exit(1)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    path, wrong, longest = root / "held", [], 0.0
    command = [sys.executable, "-c", program, str(path)]
    first = subprocess.Popen([*command, "new"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    try:
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        for how in ("new", "resume"):
            done = subprocess.run([*command, how], capture_output=True, text=True, check=False)
            longest = max(longest, float(done.stdout.split()[0]))
            if done.returncode != 1 or f"process {first.pid} on {os.uname().nodename}" not in done.stdout:
                wrong.append(f"{how}: {done.returncode}, {done.stdout}{done.stderr}")
        if before != {file.name: file.read_bytes() for file in path.iterdir()}:
            wrong.append("the second process changed the folder")
    finally:
        first.kill()
        first.wait()
    third = subprocess.Popen([*command, "resume"], stdout=subprocess.PIPE, text=True)
    if third.stdout is None or third.stdout.readline() != "held\n":
        wrong.append("a dead process holds the folder")
    third.kill()
    third.wait()
    return Points(3, wrong), longest


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
    return "; ".join(resumed(disk, words, reference(root, words)))


def can_unshare() -> bool:
    """Whether this system lets a process have mounts of its own."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
