"""Pictures of the pages of methods that are drawn from docs/results: docs/images/*.png.

python tools/pictures.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genlight.reports.drawing import BLUE, GREY, finish_axes, new_figure, save_figure
from genlight.reports.proof import read_proof

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"


def dots(values: Mapping[str, Sequence[float]], ours: str, xlabel: str, path: Path) -> None:
    """One row of dots for each name, the largest mean on top; names that begin with `ours` in colour."""
    names = sorted(values, key=lambda name: sum(values[name]) / len(values[name]))
    figure = new_figure(0.28 * len(names) + 0.9)
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        colour = BLUE if name.startswith(ours) else GREY
        axes.plot(values[name], [place] * len(values[name]), "o", color=colour, markersize=6, alpha=0.8)
    axes.set_yticks(range(len(names)), names)
    finish_axes(axes, xlabel, "", "")
    save_figure(figure, path)


def by_name(pairs: Iterable[tuple[str, float | None]]) -> dict[str, list[float]]:
    """Values by name, without the number of a candidate at the end of it, or the rule that it began as."""
    found: dict[str, list[float]] = {}
    for name, value in pairs:
        if value is not None:
            found.setdefault(re.sub(r"^(EEP \w+) .+$| \d+$", r"\1", name), []).append(float(value))
    return found


def eep() -> None:
    """Accuracy of two of eight experts, by who chose them."""
    rows: list[dict[str, Any]] = [dict(row) for row in read_proof(RESULTS / "eep.json").table]
    warm = by_name((row["model"], row["accuracy"]) for row in rows if row.get("search of") == "eep")
    cold = by_name((row["model"], row["accuracy"]) for row in rows if row.get("search of") == "as published")
    values = warm | {f"{name} (the paper's search)": cold[name] for name in cold if name.startswith("EEP")}
    label = "accuracy on digits, two of eight experts (full: all eight); a dot for each seed"
    dots(values, "EEP", label, IMAGES / "eep_accuracy.png")


if __name__ == "__main__":
    eep()
