"""Sides of a comparison on one device, each in a process of its own, that are timed in turns.

All begin together, so that they compile at the same time, and one that crashes takes none of the others down. Then one
after the other is asked for times, round after round: what changes the device's speed meets all of them. Those that are
not ready by then stand still meanwhile, and have a second chance, together with all others.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

_MARK = "@@ "
# shares of the time that may go by until the first timing, and until the second
_FIRST, _SECOND = 0.65, 0.85
# that an answer may take
_LEAST_SECONDS, _MOST_SECONDS = 10.0, 25.0


class Side:
    """One process.

    Attributes:
        name: of the side.
        facts: what it said about itself when it was ready.
        rounds: of each case, milliseconds by round.
        error: why it gave no times, if it did not.
    """

    def __init__(self, name: str, words: Sequence[str], log: Path, niceness: int = 0) -> None:
        self.name, self.log = name, log
        self.facts: dict[str, Any] = {}
        self.rounds: dict[str, dict[int, float]] = {}
        self.error: str | None = None
        self.ready = self.settled = False
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with log.open("w") as errors:
            # sides that matter less begin with less of the processor
            self._process = subprocess.Popen(
                ["nice", "-n", str(niceness), sys.executable, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                self._answers.put(json.loads(line.removeprefix(_MARK)))
        self._answers.put(None)

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next thing it says; None, with the reason in `error`, where it says nothing more. Waits so long."""
        try:
            found = self._answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None
        if found is None:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            found = {"error": f"ended with {self._process.wait()}: {lines[-1] if lines else ''}"}
        if "error" in found:
            self.error = str(found["error"])[:400]
            return None
        return found

    def ask(self, word: str, seconds: float) -> dict[str, Any] | None:
        """Say a word and wait for the answer; one that does not answer is ended."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, which the answer says
            print(word, file=self._process.stdin, flush=True)
        found = self.answer(seconds)
        if found is None and self.error is None:
            self.error = f"no answer to {word!r} within {seconds:.0f} s"
        return found

    def send(self, number: signal.Signals) -> None:
        """A signal to the process and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def wait_until_ready(sides: Sequence[Side], until: float) -> None:
    """Wait for all that can still get ready, at most until that time of the monotonic clock."""
    while waiting := [side for side in sides if not side.ready and side.error is None]:
        if time.monotonic() > until:
            return
        for side in waiting:
            found = side.answer(0.05)
            if found is not None:
                side.facts, side.ready = found, True
            if found is not None or side.error is not None:
                print(f"{time.strftime('%X')} {side.name}: {side.error or found}", flush=True)


def take_turns(sides: Sequence[Side], seconds: float, rounds: int, save: Callable[[], None]) -> None:
    """Time all sides.

    Args:
        sides: have just been started.
        seconds: for all of it.
        rounds: of times.
        save: called whenever there is something new.
    """
    started = time.monotonic()
    try:
        for share in (_FIRST, _SECOND):
            wait_until_ready(sides, started + share * seconds)
            late = [side for side in sides if not side.ready and side.error is None]
            new = [side for side in sides if side.ready and not side.rounds and side.error is None]
            for side in late:
                side.send(signal.SIGSTOP)
            if new:
                _rounds(sides, rounds, started + seconds)
            save()
            for side in late:
                side.send(signal.SIGCONT)
            if not late:
                break
        for side in sides:
            if not side.ready and side.error is None:
                side.error = f"not ready after {time.monotonic() - started:.0f} s"
    finally:
        save()
        for side in sides:
            side.send(signal.SIGKILL)


def _rounds(sides: Sequence[Side], rounds: int, end: float) -> None:
    """Time all that are ready, those again that were timed before."""
    for side in sides:
        if side.ready and not side.settled and side.error is None:
            found = side.ask("settle", min(_MOST_SECONDS, max(_LEAST_SECONDS, end - time.monotonic())))
            side.settled = found is not None
            side.facts |= found or {}
            print(f"{time.strftime('%X')} {side.name}: {side.error or found}", flush=True)
    begin = max((turn for side in sides for times in side.rounds.values() for turn in times), default=-1) + 1
    for turn in range(begin, begin + rounds):
        for side in sides if turn % 2 else sides[::-1]:
            if side.settled and side.error is None and (time.monotonic() < end or not side.rounds):
                found = side.ask("time", _LEAST_SECONDS) or {}
                for case, milliseconds in found.items():
                    side.rounds.setdefault(case, {})[turn] = milliseconds


def milliseconds_of(side: Side, case: str) -> float | None:
    """Of one run, the median over the rounds."""
    found = side.rounds.get(case)
    return median(found.values()) if found else None


def speed_of(side: Side, first: Side, case: str) -> float | None:
    """How many times as fast as the first side: the median over the rounds that both have."""
    own, other = side.rounds.get(case, {}), first.rounds.get(case, {})
    both = own.keys() & other.keys()
    return median(other[turn] / own[turn] for turn in both) if both else None


def say(**facts: Any) -> None:
    """In a side's process: an answer."""
    print(_MARK + json.dumps(facts), flush=True)


def serve(settle: Callable[[], dict[str, Any]], times: Callable[[], dict[str, float]]) -> None:
    """In a side's process: answer until the input ends; to "settle" with more facts, to "time" with milliseconds."""
    for line in sys.stdin:
        if line.strip() == "settle":
            say(**settle())
        elif line.strip() == "time":
            say(**times())
