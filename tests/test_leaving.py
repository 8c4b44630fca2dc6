"""A signal where no callback listens ends a command in order, and leaves others' handlers to them."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import genlight
from oracles.faults import in_child

from genlight import io, runner
from genlight.leaving import leaving_on_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_run_outside_the_trainer_is_marked_as_interrupted(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # a shell may have begun the tests with Ctrl-C ignored
    try:
        monkeypatch.setattr(runner, "_carry_out", lambda this: os.kill(os.getpid(), number))
        assert genlight(tmp_path, "fit", "run.name=asked") == code
        assert io.read_json(tmp_path / "asked" / "fit" / "run.json")["status"] == "interrupted"
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_a_forked_process_leaves_alone() -> None:
    with leaving_on_signals():
        assert in_child(lambda: os.kill(os.getpid(), signal.SIGUSR1)) == 143


def test_a_handler_that_is_there_stays() -> None:
    def ours(*arguments: Any) -> None: ...

    before = signal.signal(signal.SIGUSR1, ours)
    try:
        with leaving_on_signals():
            assert signal.getsignal(signal.SIGUSR1) is ours
        assert signal.getsignal(signal.SIGUSR1) is ours
    finally:
        signal.signal(signal.SIGUSR1, before)
