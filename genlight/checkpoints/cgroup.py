"""Memory that a container leaves to its processes: the limits of Linux control groups."""

import math
import re
from pathlib import Path

# files of a group in version 2 and 1: the limit, what is taken, and in memory.stat the cache of files that is idle
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def bytes_left(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Least of what this process' group and those above it may still take; infinite where none has a limit.

    Args:
        root: where the groups are mounted.
        own: names the groups of the process.
    """
    left = math.inf
    for line in own.read_text().splitlines() if own.is_file() else ():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers not in ("", "memory"):
            continue
        base, names = (root / "memory", _V1) if controllers else (root, _V2)
        group = base / path.lstrip("/")
        # inside of a container the groups above it are not seen, or its own is mounted as the root
        for folder in (group, *group.parents):
            left = min(left, _left_in(folder, *names))
            if folder == base:
                break
    return left


def _left_in(folder: Path, limit: str, taken: str, cache: str) -> float:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return math.inf
        idle = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        return max(0, int(most) - int((folder / taken).read_text()) + (int(idle[1]) if idle else 0))
    except (OSError, ValueError):
        return math.inf
