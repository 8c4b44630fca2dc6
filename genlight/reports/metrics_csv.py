"""One table of metrics out of the files that the parts of an interrupted run left."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from genlight.io import atomic_write_text


def merge_metrics(parts: Sequence[Path], target: Path) -> bool:
    """Writes the rows of all parts as one CSV; where a later part went over a step again, its rows count.

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
            rows = [row for row in rows if int(row["step"]) < first] + new
    if not rows:
        return False
    names = list(dict.fromkeys(name for row in rows for name in row if name))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(target, text.getvalue())
    return True
