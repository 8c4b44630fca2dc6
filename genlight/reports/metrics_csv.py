"""One table of metrics out of the files that the parts of an interrupted run left."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from genlight.io import atomic_write_text


def merge_metrics(parts: Sequence[Path], target: Path) -> bool:
    """Writes the rows of all parts as one CSV; where a later part went over a step again, its rows count. At its first
    step it may go over a validation alone: of that step, rows with other columns are kept.

    Args:
        parts: files of a CSV logger in the order in which they were written.
        target: the merged file.

    Returns:
        False, and nothing is written, if no part holds a row.
    """
    rows: list[dict[str, str]] = []
    for part in parts:
        with part.open(newline="", encoding="utf-8") as file:
            new = [row for row in csv.DictReader(file) if row.get("step")]
        if new:
            first = min(int(row["step"]) for row in new)
            again = [_columns(row) for row in new if int(row["step"]) == first]
            kept = [row for row in rows if int(row["step"]) == first and _columns(row) not in again]
            rows = [row for row in rows if int(row["step"]) < first] + kept + new
    if not rows:
        return False
    names = list(dict.fromkeys(name for row in rows for name in row if name))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(target, text.getvalue())
    return True


def _columns(row: dict[str, str]) -> set[str]:
    return {name for name, value in row.items() if value}
