"""Where no callback listens, as while data are prepared or a report is measured, a signal ends the run in order and at
once: every file is whole at any time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HANDLED = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


class Leave:
    """Handler that raises SystemExit with 128 and the signal; SIGUSR1, which schedulers send ahead, is as SIGTERM."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        code = 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)
        if os.getpid() != self._process:  # a forked child owns neither the folder nor the run
            os._exit(code)
        raise SystemExit(code)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C end the run. Lightning would pass over the first and turn the last into exit 1."""
    # an embedding program that handles them itself goes on doing so; other threads cannot
    before = {number: usual for number, usual in _HANDLED.items() if signal.getsignal(number) is usual}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    leave = Leave()
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def let_requeue(trainer: Any) -> None:
    """In a SLURM job Lightning handles SIGUSR1 while its trainer runs, to put the job back into the queue, but only
    where nobody else does: `Leave` is not to count."""
    trainer._signal_connector._has_already_handler = _is_taken


def _is_taken(number: int) -> bool:
    handler = signal.getsignal(number)
    is_ours = number == signal.SIGUSR1 and isinstance(handler, Leave)
    return handler not in (None, signal.SIG_DFL) and not is_ours
