"""Proof "faults": every write, sync and rename of a fit, a search and a calibration made to fail in turn, kills, full
disks, damaged and hostile files, and what else goes wrong with processes and machines.

The campaigns stand in tests/campaigns, where the tests take them in small numbers. `--share 0.1` takes a tenth of the
faults of each campaign whose number can be chosen. Times and memory are measured last, on cores that must be quiet:
`--only timed` measures them again, `--only signals` takes those campaigns again, and all else stays as it is recorded.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _commands import RESULTS, ROOT, record

sys.path.insert(0, str(ROOT / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

from campaigns import commands, damage, foreign, hostile, processes
from campaigns.commands import CALIBRATION, COMMANDS, FIT, SEARCH, Points, folder_of, reference
from search.toy_search import WordSpace, failing, faulty, rugged, run_search

from genlight.reports.proof import Bar, bar_at_most, read_proof
from genlight.search.cma import CMAES
from genlight.search.engine import FailureLimits
from genlight.search.evolution import Evolution
from genlight.search.guided import PredictorGuided
from genlight.search.random_search import RandomSearch

EVOLUTION = Evolution(population=6, children=5)
STRATEGIES: dict[str, Any] = {
    "evolution": EVOLUTION,
    "random": RandomSearch(7),
    "cma": CMAES(population_size=5),
    "gaussian": PredictorGuided(EVOLUTION, stage_size=6, min_measured=8),
    "annealed": Evolution(population=4, children=3, anneal_evaluations=40),
}


@dataclass(frozen=True)
class Campaign:
    """One row of faults: the bar it belongs to, its words, and what carries it out in a folder of its own."""

    bar: str
    what: str
    run: Callable[[Path], Points]


def campaigns(share: float) -> list[Campaign]:
    """All that may run side by side, longest first."""

    def part(count: int) -> int:
        return max(2, round(count * share))

    made = [
        Campaign("kill-fit", "SIGKILL in fit, at every write", partial(killed, FIT, part(240))),
        Campaign("disk-full", "disk full in fit, from every write on", partial(full, FIT, part(120))),
        Campaign("disk-full", "disk full in a search", partial(full, SEARCH, part(40))),
        Campaign("disk-full", "disk full in a calibration", partial(full, CALIBRATION, part(40))),
        Campaign("disk-full", "a single write of fit fails (EIO)", partial(broken, FIT, part(60))),
        Campaign("disk-full", "a single write of a search fails (EIO)", partial(broken, SEARCH, part(20))),
        Campaign("disk-full", "a single write of a calibration fails (EIO)", partial(broken, CALIBRATION, part(20))),
        Campaign("kill-search", "SIGKILL in a search, at every write", partial(killed, SEARCH, part(60))),
        Campaign(
            "kill-calibration", "SIGKILL in a calibration, at every write", partial(killed, CALIBRATION, part(60))
        ),
        Campaign("kill-fit", "SIGKILL in fit on another file system", partial(elsewhere, part(20))),
        Campaign("power-loss", "power loss in fit: what is not synced is gone", partial(unsynced, FIT, part(60))),
        Campaign("power-loss", "power loss in a search", partial(unsynced, SEARCH, part(20))),
        Campaign("power-loss", "power loss in a calibration", partial(unsynced, CALIBRATION, part(20))),
        Campaign("truncated", "files of finished runs cut in half or emptied, then resumed", partial(harmed, part(60))),
        Campaign("signals", "SIGTERM in a search and its report", partial(sent, SEARCH, signal.SIGTERM, part(30))),
        Campaign("signals", "SIGTERM in a calibration", partial(sent, CALIBRATION, signal.SIGTERM, part(20))),
        Campaign("signals", "Ctrl-C in a calibration", partial(sent, CALIBRATION, signal.SIGINT, part(10))),
        Campaign("signals", "Ctrl-C in a search", partial(sent, SEARCH, signal.SIGINT, part(10))),
        Campaign("signals", "SIGTERM twice in a search", partial(sent, SEARCH, signal.SIGTERM, part(20), times=2)),
        Campaign("signals", "Ctrl-C in fit", partial(sent, FIT, signal.SIGINT, part(30))),
        Campaign("signals", "SIGTERM in fit", partial(sent, FIT, signal.SIGTERM, part(20))),
        Campaign("disk-full", "no room for the artifact of a fit, a search, a calibration", cramped),
        Campaign("truncated", "every file that is read again, cut at 20 lengths", cut),
        Campaign(
            "bit-flip", "random bits flipped in checkpoints, artifacts and archives", partial(flipped, part(1000))
        ),
        Campaign("foreign", "a checkpoint of each tiny model given to every other", foreign.pairs),
        Campaign("pickle", "payloads under every name at every input, in folders with code", hostile.pickles),
        Campaign("failing-candidates", "a third of all candidates fails in all ways", third),
        Campaign("failing-candidates", "candidates that never end", processes.hanging),
        Campaign("clock-jumps", "fit while the clock jumps by ten years; checkpoints touched", processes.clock_jumps),
        Campaign("path-traversal", "names that lead out of a folder", partial(hostile.names, count=part(20_000))),
        Campaign("path-traversal", "indices of weights that name files inside and outside", hostile.weight_maps),
        Campaign("targets", "targets and nodes that a config may not name", refused),
    ]
    for name, strategy in STRATEGIES.items():
        run = partial(processes.sigkills, kills=part(60), strategy=strategy)
        made.append(Campaign("kill-search", f"SIGKILL at random times, {name}", run))
    run = partial(processes.sigkills, kills=part(60), ranks=2)
    made.append(Campaign("kill-search", "SIGKILL at random times of one of two ranks", run))
    if processes.can_unshare():
        made.append(Campaign("disk-full", "fit on a file system of 4 MB", small))
    return made


def killed(words: list[str], count: int, root: Path) -> Points:
    return commands.killed(root, words, count)


def unsynced(words: list[str], count: int, root: Path) -> Points:
    return commands.killed(root, words, count, power=True)


def elsewhere(count: int, root: Path) -> Points:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        return commands.killed(Path(shared), FIT, count)


def full(words: list[str], count: int, root: Path) -> Points:
    return commands.failing(root, words, errno.ENOSPC, count, for_good=True)


def broken(words: list[str], count: int, root: Path) -> Points:
    return commands.failing(root, words, errno.EIO, count)


def sent(words: list[str], number: int, count: int, root: Path, times: int = 1) -> Points:
    return commands.signalled(root, words, number, count, times)


def cramped(root: Path) -> Points:
    return _sum([commands.artifact_without_room(root / name, words) for name, words in COMMANDS.items()])


def small(root: Path) -> Points:
    wrong = processes.small_disk(root)
    return Points(1, [wrong] if wrong else [])


def finished(root: Path) -> dict[str, Path]:
    """A finished run of every command."""
    for name, words in COMMANDS.items():
        reference(root / name, words)
    return {name: folder_of(root / name / "whole", words) for name, words in COMMANDS.items()}


def cut(root: Path) -> Points:
    folders = finished(root)
    return _sum([*map(damage.cuts, folders.values()), damage.cut_checkpoints(folders["fit"])])


def flipped(count: int, root: Path) -> Points:
    return _sum([damage.flips(folder, count // 3 + 1) for folder in finished(root).values()])


def harmed(count: int, root: Path) -> Points:
    found = []
    for name, words in COMMANDS.items():
        expected = reference(root / name, words)
        found.append(damage.harmed_runs(root / name, words, root / name / "whole", expected, count // 3 + 1))
    return _sum(found)


def third(root: Path) -> Points:
    space = WordSpace()
    bad = frozenset(word.letters for word in space.all() if failing(word.letters))
    options: Any = {"time_limit_s": 0.3, "limits": FailureLimits(share=0.7)}
    found = run_search(root / "found", Evolution(10, 10), space, faulty, 200, **options)
    sound = run_search(root / "sound", Evolution(10, 10), WordSpace(banned=bad), rugged, 200)
    failed = {record.candidate.letters for record in found.records if record.failure}
    same = found.best is not None and sound.best is not None and found.best.key == sound.best.key
    return Points(
        len(bad), [] if same and failed == bad else [f"failed {len(failed)} of {len(bad)}, same winner: {same}"]
    )


def refused(root: Path) -> Points:
    wrong = [target for target in hostile.TARGETS if not hostile.is_refused(target)]
    return Points(len(hostile.TARGETS), wrong)


def _sum(parts: list[Points]) -> Points:
    return Points(sum(p.tried for p in parts), [fault for p in parts for fault in p.wrong])


def carry_out(campaign: int, share: float, folder: str) -> tuple[Points, float]:
    """One campaign in a folder of its own, and its seconds."""
    chosen, begun = campaigns(share)[campaign], time.monotonic()
    root = Path(folder) / str(campaign)
    root.mkdir()
    try:
        found = chosen.run(root)
    except Exception as error:
        found = Points(1, [f"{type(error).__name__}: {error}"])
    return found, time.monotonic() - begun


def wandb_seconds(folder: Path) -> float:
    """What a W&B that is closed, silent, slow or dying costs beyond an offline run, at most, as its test finds."""
    test = ROOT / "tests" / "trainer" / "test_loggers.py"
    base = folder / "wandb"
    subprocess.run([sys.executable, "-m", "pytest", "-q", test, f"--basetemp={base}"], cwd=ROOT, check=True)
    lost = {f.parent.name: json.loads(f.read_text())["lost"] for f in base.glob("wandb_scenarios/*/found.json")}
    return float(max(lost.values()) - lost["offline"])


def alone(folder: Path, share: float) -> list[Bar]:
    """What is timed, with nothing beside it."""
    two, seconds, _ = processes.second_process(folder)
    texts = max(60, round(2000 * share))
    fuzz, longest, most = hostile.json_fuzz(folder, texts)
    headers = hostile.headers(folder, texts)
    cost = damage.hash_cost(folder, 512)
    growth = processes.memory_growth()
    return [
        bar_at_most("out-of-memory", "growth of memory over 200 candidates that run out of it", growth, 0.01),
        bar_at_most(
            "rlimit-as",
            "exit of a process one of whose candidates wants more than it may",
            processes.beyond_the_limit(),
            0,
        ),
        bar_at_most("two-processes", "seconds until a second command in a folder has ended", seconds, 2.0),
        bar_at_most("two-processes-wrong", f"of {two.tried} such processes ended otherwise", len(two.wrong), 0),
        bar_at_most("json", f"CPU seconds of the slowest of {fuzz.tried} hostile texts", longest, 0.05),
        bar_at_most("json-memory", "MB that the largest of them took", most, 50),
        bar_at_most(
            "json-wrong",
            f"of them, and of {headers.tried} in headers of tensors, ended otherwise than refused or read",
            len(fuzz.wrong) + len(headers.wrong),
            0,
        ),
        bar_at_most("hash-cost", "CPU seconds a GB to verify", cost["seconds_per_gb"], 1.0),
        bar_at_most("wandb", "seconds lost to a W&B that is closed, silent, slow or dies", wandb_seconds(folder), 10.0),
    ]


def bars_of(made: list[Campaign], found: list[Points]) -> list[Bar]:
    """One bar for each row of faults: none of them ended otherwise than promised."""
    bars = []
    for name in dict.fromkeys(campaign.bar for campaign in made):
        parts = [(c.what, p) for c, p in zip(made, found, strict=True) if c.bar == name]
        tried, wrong = sum(p.tried for _, p in parts), sum(len(p.wrong) for _, p in parts)
        what = "; ".join(f"{p.tried} × {what}" for what, p in parts)
        bars.append(bar_at_most(name, f"{what}: wrong endings of {tried}", wrong, 0))
    return bars


def replaced(known: Sequence[Any], found: Sequence[Any], name: Callable[[Any], str]) -> list[Any]:
    """What was recorded, with what was found now in place of what has its name."""
    new = {name(each): each for each in found}
    old = [new.pop(name(each), each) for each in known]
    return [*old, *new.values()]


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", default=[], help="bars to take again; `timed`: all that is timed")
    options = parser.parse_args()
    only: list[str] = options.only
    made = campaigns(options.share)
    numbers = [n for n, campaign in enumerate(made) if not only or campaign.bar in only]
    table, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GENLIGHT_CACHE"] = str(Path(folder) / "cache")
        with ProcessPoolExecutor(2, mp_context=get_context("fork"), max_tasks_per_child=None) as pool:
            endings = pool.map(carry_out, numbers, [options.share] * len(made), [folder] * len(made))
            for number, (points, seconds) in zip(numbers, endings, strict=True):
                results.append(points)
                row = {"faults": made[number].what, "tried": points.tried, "wrong": len(points.wrong)}
                table.append({**row, "minutes": round(seconds / 60, 1)})
                print(f"{seconds:6.0f} s  {made[number].what}: {len(points.wrong)} of {points.tried} wrong", flush=True)
                for fault in points.wrong[:5]:
                    print("          ", fault, flush=True)
        bars = bars_of([made[number] for number in numbers], results)
        if not only or "timed" in only:
            bars += alone(Path(folder), options.share)
    if only:
        known = read_proof(RESULTS / "faults.json")
        bars = replaced(known.bars, bars, lambda bar: bar.id)
        table = replaced(known.table, table, lambda row: row["faults"])
        started -= known.wall_seconds
    words = ("--share", f"{options.share:g}") if options.share != 1 else ()
    # the command that repeats all of it, also where parts were taken again
    record("faults", bars, table, [0], started, words)


if __name__ == "__main__":
    main()
