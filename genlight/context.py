"""What the parts of one run share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """One accepted command.

    Attributes:
        config: the composed config, from which objects are built.
        plain: the same, resolved to plain containers.
        recorded: the same as it is written: secrets masked, values of the environment left as references.
        command: "fit" or "validate".
        words: the command line.
        experiment: the name of the recipe.
        folder: the run folder.
        started: ``time.monotonic()`` at the start.
        notes: what the report has to say besides numbers.
        fingerprint: hash of the config.
        begin: says that the run has begun: what it replaces goes.
        room: where there must be room for what it keeps; "": in the folder of all runs.
    """

    config: Any
    plain: dict[str, Any]
    recorded: dict[str, Any]
    command: str
    words: list[str]
    experiment: str
    folder: Path
    started: float = field(default_factory=time.monotonic)
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    begin: Callable[[], None] = lambda: None
    room: str = ""
