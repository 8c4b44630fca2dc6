"""Progress for the person who waits: a bar with what is left, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Task:
    total: int
    first: int
    bar: Any = None
    started: float = field(default_factory=lambda: time.monotonic())  # looked up late: tests move the clock


class ProgressDisplay:
    """Bars of several named tasks on standard error, each with a note and an estimate of what is left.

    Args:
        line_interval: seconds between two plain lines where standard error is no terminal.
        refresh_per_second: redraws of the bar.
    """

    def __init__(self, line_interval: float = 60.0, refresh_per_second: float = 4.0) -> None:
        self.line_interval = line_interval
        self.refresh_per_second = refresh_per_second
        self.enabled = True
        self._bar: Any = None
        self._tasks: dict[str, _Task] = {}
        self._shown = time.monotonic()

    def start(self, name: str, total: int, done: int = 0) -> None:
        """A task of `total` steps, of which `done` were made before."""
        task = self._tasks[name] = _Task(total, done)
        if self.enabled and sys.stderr.isatty():
            self._bar = self._bar or self._new_bar()
            task.bar = self._bar.add_task(name, total=total or None, completed=done, note="")

    def due(self) -> bool:
        """Whether it is time to show something: what costs time to find out is asked for only then."""
        interval = 1 / self.refresh_per_second if self._bar is not None else self.line_interval
        return self.enabled and time.monotonic() - self._shown >= interval

    def show(self, name: str, done: int, note: str = "") -> None:
        """Bring a started task up to date."""
        self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._tasks[name].bar, completed=done, note=note)
        else:
            sys.stderr.write(self._line(name, done, note) + "\n")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.enabled and self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self.enabled:
            sys.stderr.write(text + "\n")

    def stop(self, name: str) -> None:
        """The task is done, or given up; nothing if it was never started."""
        task = self._tasks.pop(name, None)
        if self._bar is not None and task is not None:
            self._bar.remove_task(task.bar)
            if not self._tasks:
                self._bar.stop()
                self._bar = None

    def close(self) -> None:
        """Stop all tasks."""
        for name in list(self._tasks):
            self.stop(name)

    def _line(self, name: str, done: int, note: str) -> str:
        task = self._tasks[name]
        rate = (done - task.first) / max(time.monotonic() - task.started, 1e-9)
        left = f", about {_duration((task.total - done) / rate)} left" if rate > 0 and task.total >= done else ""
        return f"{name} {done}/{task.total}  {note}  {rate:.2f} per second{left}"

    def _new_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", Remaining())
        note = TextColumn("{task.fields[note]}")
        bar = Progress(*columns, note, console=Console(stderr=True), refresh_per_second=self.refresh_per_second)
        bar.start()
        return bar


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
