"""Progress for the person who waits: a bar with what is left, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import Any, TypeVar

Item = TypeVar("Item")

IN_ALL = "in all"  # the task that is all the work of a method
# with fewer steps per second, the time of one of them says more
_SLOW = 0.1


@dataclass
class _Task:
    name: str
    total: int
    first: int
    done: int
    beats: bool
    ends: float | None
    note: str = ""
    bar: Any = None
    started: float = field(default_factory=lambda: time.monotonic())  # looked up late: tests move the clock
    moved: float = field(default_factory=lambda: time.monotonic())

    def line(self) -> str:
        """For where there is no terminal."""
        return f"{self.name}{' ' if self.total else '  '}{self.state(so_far=True)}"

    def state(self, so_far: bool) -> str:
        """Steps, note, speed, and what is left; with `so_far` also how long a slow task has run."""
        now = time.monotonic()
        made = self.done - self.first
        rate = made / max(self.moved - self.started, 1e-9)
        times = [f"{rate:.2f} per second" if rate >= _SLOW else f"{_duration(1 / rate)} each"] if made > 0 else []
        if so_far and rate < _SLOW:
            times.append(f"{_duration(now - self.started)} so far")
        end = self.moved + (self.total - self.done) / rate if made > 0 and self.total >= self.done else self.ends
        if end is not None and end >= now:
            times.append(f"about {_duration(end - now)} left")
        count = f"{self.done}/{self.total}" if self.total else ""
        return "  ".join(part for part in (count, self.note, ", ".join(times)) if part)


class ProgressDisplay:
    """Bars of several named tasks on standard error, each with a note and an estimate of what is left.

    Where standard error is no terminal, a line of all tasks, the innermost first, comes from time to time, also while
    no step of them ends.

    Args:
        line_interval: seconds between two plain lines.
        refresh_per_second: redraws of the bar.
    """

    def __init__(self, line_interval: float = 60.0, refresh_per_second: float = 4.0) -> None:
        self.line_interval = line_interval
        self.refresh_per_second = refresh_per_second
        self.enabled = True
        self._bar: Any = None
        self._tasks: dict[str, _Task] = {}
        self._expected: dict[str, float] = {}
        self._shown = time.monotonic()
        self._writing, self._over = Lock(), Event()
        self._heart: Thread | None = None

    def start(self, name: str, total: int = 0, done: int = 0, beats: bool = True) -> None:
        """A task; one that was started is given its steps.

        Args:
            name: of the task.
            total: its steps; 0: not known.
            done: that were made before.
            beats: whether lines come between two steps too.
        """
        if name in self._tasks:
            task = self._tasks[name]
            task.total, task.first, task.done = total, done, done
            self._update(task)
            return
        ends = time.monotonic() + self._expected[name] if name in self._expected else None
        self._tasks[name] = _Task(name, total, done, done, beats, ends)
        if self.enabled and (self._bar is not None or sys.stderr.isatty()):
            if name != IN_ALL:  # drawn with its first part: while a method is set up, libraries draw bars of their own
                self._draw()
        elif self.enabled and beats and self._heart is None:
            self._over.clear()
            self._heart = Thread(target=self._beat, name="progress", daemon=True)
            self._heart.start()

    @contextmanager
    def phase(self, name: str, total: int = 0, done: int = 0) -> Iterator[None]:
        """A task for as long as the context lasts; see `start`."""
        self.start(name, total, done)
        try:
            yield
        finally:
            self.stop(name)

    def counted(self, items: Collection[Item], name: str | None = None) -> Iterator[Item]:
        """The items, each one a step more of the innermost task, and done when the next is asked for.

        Args:
            items: of known number.
            name: of a task of their own.
        """
        if name is not None:
            with self.phase(name):
                yield from self.counted(items)
            return
        task = next(reversed(self._tasks.values()), None)
        if task is None or task.name == IN_ALL:
            yield from items
            return
        task.total += len(items)
        for item in items:
            yield item
            self._step(task, task.done + 1)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """What tasks will take from now on, by name: what is left of them until their steps tell more."""
        self._expected = dict(seconds)
        for name in self._tasks.keys() & seconds.keys():
            self._tasks[name].ends = time.monotonic() + seconds[name]

    def due(self) -> bool:
        """Whether it is time to show something: what costs time to find out is asked for only then."""
        interval = 1 / self.refresh_per_second if self._bar is not None else self.line_interval
        return self.enabled and time.monotonic() - self._shown >= interval

    def show(self, name: str, done: int, note: str | None = "") -> None:
        """A task has come to `done` steps; without a terminal a line, if it is time for one.

        Args:
            name: of a task that was started.
            done: steps.
            note: shown with them; None: the one before.
        """
        task = self._tasks[name]
        if note is not None:
            task.note = note
        self._step(task, done)

    def stop(self, name: str) -> None:
        """The task is done, or given up, with those that were started in it; nothing if it was never started."""
        while name in self._tasks:
            _, task = self._tasks.popitem()
            if task.name in self._expected:
                self._expected[task.name] -= time.monotonic() - task.started
            if task.bar is not None:
                self._bar.remove_task(task.bar)
                task.bar = None
        if self._bar is not None and not self._tasks:
            self._bar.stop()
            self._bar = None
        if self._heart is not None and not any(other.beats for other in self._tasks.values()):
            self._over.set()
            self._heart.join()
            self._heart = None

    def close(self) -> None:
        """Stop all tasks."""
        for name in list(self._tasks):
            self.stop(name)

    def _step(self, task: _Task, done: int) -> None:
        task.done, task.moved = done, time.monotonic()
        self._update(task)

    def _update(self, task: _Task) -> None:
        if self._bar is None:
            self._write()
        elif self.due():
            self._shown = time.monotonic()
            if task.bar is not None:
                self._bar.update(task.bar, total=task.total or None, completed=task.done)

    def _draw(self) -> None:
        self._bar = self._bar or self._new_bar()
        for task in self._tasks.values():
            if task.bar is None:
                task.bar = self._bar.add_task(task.name, total=task.total or None, completed=task.done, task=task)

    def _write(self) -> None:
        """A line, if it is time for one."""
        with self._writing:
            tasks = list(self._tasks.values())
            if tasks and self.due():
                self._shown = time.monotonic()
                sys.stderr.write("; ".join(task.line() for task in reversed(tasks)) + "\n")

    def _beat(self) -> None:
        """Lines while nothing else writes any."""
        while not self._over.wait(max(self._shown + self.line_interval - time.monotonic(), self.line_interval / 100)):
            self._write()

    def _new_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
        from rich.text import Text

        class State(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(task.fields["task"].state(so_far=False))

        bar = Progress(
            "{task.description}",
            BarColumn(),
            TimeElapsedColumn(),
            State(),
            console=Console(stderr=True),
            refresh_per_second=self.refresh_per_second,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a file or a pipe stays apart
        )
        bar.start()
        return bar


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
