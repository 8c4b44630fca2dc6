"""Processor time of other processes of Python, as a person has it: with compiled modules kept."""

import os
import resource
from pathlib import Path


def keeping_modules(folder: Path) -> dict[str, str]:
    """The environment of this process, in which Python keeps what it compiles in a folder."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return environ | {"PYTHONPYCACHEPREFIX": str(folder)}


def children_seconds() -> float:
    """Processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
