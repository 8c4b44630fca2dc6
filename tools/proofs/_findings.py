"""What a proof has measured so far, for those whose time on a machine is short."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from genlight.io import atomic_write_json
from genlight.reports.environment import environment


@dataclass
class Findings:
    """What a part has measured; kept in a file that is whole at any time.

    Attributes:
        file: where.
        seconds: after which the process ends, with what it has.
        values: numbers by name.
        rows: lines of the table.
        failures: what went wrong, by measurement.
        processes: that end with this one.
    """

    file: Path
    seconds: float
    values: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    @cached_property
    def surroundings(self) -> dict[str, Any]:
        return environment(["python", *sys.argv])

    def save(self) -> None:
        with self._lock:
            values = {name: value for name, value in self.values.items() if math.isfinite(value)}
            rows = [{key: _plain(value) for key, value in row.items()} for row in self.rows]
            found = {"values": values, "rows": rows, "failures": self.failures, "seconds": self.elapsed}
            atomic_write_json(self.file, found | {"environment": self.surroundings})

    def add(self, values: Mapping[str, float] | None = None, **row: Any) -> None:
        """Numbers for bars, and a line of the table."""
        self.values |= values or {}
        if row:
            self.rows.append(row)
        self.say(
            ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in (row | (values or {})).items())
        )
        self.save()

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """A measurement whose failure is written down, and is the end of nothing else."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures[name] = f"{type(error).__name__}: {error}"[:300]
            self.say(f"{name} failed")
            self.save()

    def stop_in_time(self) -> None:
        """End this process at the limit, whatever it does then."""

        def stop() -> None:
            self.failures["time"] = f"stopped after {self.seconds:g} s"
            self.say("out of time")
            self.save()
            for process in self.processes:
                process.kill()
            os._exit(0)

        timer = threading.Timer(self.left, stop)
        timer.daemon = True
        timer.start()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
