"""What proofs share: processes on one core, and the reports that commands leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from genlight.reports.proof import Bar, write_proof
from genlight.reports.results_page import write_results_page

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
