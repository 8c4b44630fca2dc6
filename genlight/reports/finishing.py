"""How long the end of a run takes, pictures and files, from pictures that are drawn for nothing."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from genlight.reports.cost import Phase
from genlight.reports.search_figures import search_curve

FINISH = "pictures and files"
_DRAWN = 3
# the artifact and the report take about as long as a picture each
_FILES = 2


def finishing(pictures: int) -> Phase:
    """The end of a run with so many pictures; what draws is loaded by then."""
    points = [(index, 1.0 / (1 + index), "", 1) for index in range(50)]
    seconds = []
    with tempfile.TemporaryDirectory(prefix="genlight-") as folder:
        for _ in range(_DRAWN):
            begun = time.monotonic()
            search_curve(points, Path(folder) / "picture.png", ylabel="")
            seconds.append(time.monotonic() - begun)
    return Phase(FINISH, tuple(seconds[1:]), pictures + _FILES)
