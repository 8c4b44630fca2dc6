"""What proofs share: processes on one core, and the reports that commands leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genlight.reports.proof import Bar, write_proof
from genlight.reports.results_page import write_results_page
from genlight.run_folder import LOCK_FILE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def run(*words: str | Path) -> str:
    """A Python process on one core; what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def genlight(*words: str) -> float:
    """One command of genlight on one core; its wall seconds."""
    started = time.monotonic()
    run("-m", "genlight", *words)
    return time.monotonic() - started


def report(folder: Path) -> dict[str, Any]:
    """What a run reported."""
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def in_use(run: Path) -> bool:
    """Whether a command runs in this folder of a run."""
    from filelock import FileLock, Timeout

    if not (run / LOCK_FILE).is_file():
        return False
    try:
        with FileLock(run / LOCK_FILE, timeout=0.0):
            return False
    except Timeout:
        return True


def bar_if_measured(
    make: Callable[[str, str, float, float], Bar], id: str, what: str, value: Callable[[], float], limit: float
) -> Bar:
    """A bar; one that does not hold where what `value` reads is missing, as of a part that failed or was left out."""
    try:
        return make(id, what, value(), limit)
    except (KeyError, ValueError, ZeroDivisionError):
        return Bar(id, what, "not measured", make(id, what, 0.0, limit).bar, False)


def watch(
    calls: Mapping[str, tuple[Any, str]], finish: Callable[[str], object] = lambda name: None
) -> dict[str, list[float]]:
    """From now on, the wall seconds of each call of some methods, by name; filled in as they return.

    Args:
        calls: class and name of each method.
        finish: given the name, waits until the work of a call is done, where the call does not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*values, **options)
            finally:
                finish(name)
                seconds[name].append(time.perf_counter() - begun)

        return call

    for name, (owner, method) in calls.items():
        setattr(owner, method, watched(name, getattr(owner, method)))
    return seconds


def record(
    name: str,
    bars: Sequence[Bar],
    table: list[dict[str, Any]],
    seeds: Iterable[int],
    started: float,
    words: Sequence[str] = (),
) -> None:
    """Write docs/results/<name>.json and the page of all results; print the bars.

    Args:
        name: of the proof.
        bars, table, seeds: what it found.
        started: ``time.monotonic()`` at its beginning.
        words: options it was given that change what was measured.
    """
    command = ["python", f"tools/proofs/{name}.py", *words] if words else ["make", "proof", f"NAME={name}"]
    write_proof(
        RESULTS / f"{name}.json",
        bars=list(bars),
        seeds=list(seeds),
        wall_seconds=time.monotonic() - started,
        table=table,
        command=command,
    )
    write_results_page(RESULTS)
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")
