"""A newcomer's first hour on handwritten digits: docs/results/newcomer.json.

In a clean clone `make demo`, then the commands of every page of a method, as written there.

Of each page the commands below "Try it" run up to the first `validate`, in a shell, from the root of the clone; two
pages at a time, each on one core. Commands marked "needs ..." want something to download and are left out. Methods that
follow each other are measured by whole.py, with the command of docs/methods/stack.md.

    make proof NAME=newcomer
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _commands import ROOT, record

from genlight.reports.proof import Bar, bar_at_most

# longest first, so that both cores end together
PAGES = ("oms", "lcsc", "viditq", "mixdq", "eep", "s3", "dele", "dd")
COMMAND = "    python -m genlight "


def first_commands(page: str) -> list[str]:
    """Of the text of a method's page the commands of "Try it" up to the first `validate`."""
    tried = re.split(r"^## ", page, flags=re.MULTILINE)[1]
    found: list[str] = []
    for line in tried.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition("#")
        if not line.startswith(COMMAND) or comment.strip().startswith("needs "):
            continue
        found.append(command.strip())
        if "genlight validate" in command:
            break
    return found


def hour(clone: Path) -> list[dict[str, Any]]:
    """Clone into a folder that is not there yet, demo, pages: a row for each command, its seconds and exit status."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment["GENLIGHT_CACHE"] = str(clone.parent / "cache")  # nothing of earlier runs
    rows = [_shell("make demo", clone, environment)]
    pages = {name: (clone / "docs" / "methods" / f"{name}.md").read_text() for name in PAGES}

    def page(name: str) -> list[dict[str, Any]]:
        return [_shell(command, clone, environment) for command in first_commands(pages[name])]

    with ThreadPoolExecutor(2) as pool:
        return rows + [row for part in pool.map(page, PAGES) for row in part]


def bars_of(rows: Sequence[Mapping[str, Any]], minutes: float) -> list[Bar]:
    """None fails, and all are done within the hour."""
    failed = sum(row["status"] != 0 for row in rows)
    what = f"of `make demo` and {len(rows) - 1} commands of the pages, as written, those that fail"
    return [
        bar_at_most("commands", what, failed, 0),
        bar_at_most("minutes", "minutes of all of it, installation included, on 2 cores", minutes, 60),
    ]


def _shell(command: str, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """One command as typed; its last words are printed where it fails."""
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    row = {"command": command, "seconds": round(time.monotonic() - started), "status": done.returncode}
    print(row, flush=True)
    if done.returncode:
        print(done.stdout[-1500:], flush=True)
    return row


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = hour(Path(folder) / "clone")
    record("newcomer", bars_of(rows, (time.monotonic() - started) / 60), rows, [], started)


if __name__ == "__main__":
    main()
