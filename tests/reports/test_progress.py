"""What the person who waits reads while a part of a method goes on, with and without a terminal."""

import io
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from genlight.callbacks.progress import StepProgress, display_of
from genlight.loops.evaluation import CandidateTrainer, in_turn
from genlight.reports.progress import IN_ALL, ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_comes_while_nothing_ends_and_then_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(line_interval=0.05)
    with pytest.raises(ZeroDivisionError), display.phase(IN_ALL), display.phase("choice"):
        time.sleep(0.15)
        raise ZeroDivisionError
    said = capsys.readouterr()
    assert said.out == "" and "choice  0 s so far; in all  0 s so far\n" in said.err
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_what_was_predicted_is_left_until_rows_tell_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = ProgressDisplay()

    def line(name: str) -> str:
        display.show(name, 0)
        return capsys.readouterr().err.splitlines()[-1]

    with display.phase(IN_ALL):
        display.expect({"choice": 300.0, IN_ALL: 600.0})
        with display.phase("choice"):
            now[0] += 120
            assert line("choice") == "choice  2 min so far, about 3 min left; in all  2 min so far, about 8 min left"
        with display.phase("choice"):  # what is left of all that has this name
            now[0] += 60
            assert "choice  60 s so far, about 2 min left" in line("choice")
            rows = display.counted(range(4), "rows")
            for _ in range(3):
                next(rows)
                now[0] += 40
            now[0] += 20
            assert line(IN_ALL).startswith("rows 2/4  40 s each, 2 min so far, about 20 s left; choice")
            rows.close()
            now[0] += 600
            assert line("choice") == "choice  13 min so far; in all  15 min so far"


def test_parts_of_a_method_show_their_rows_on_the_first_process_alone(capsys: pytest.CaptureFixture[str]) -> None:
    bars = [StepProgress(line_interval=0.05)]
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=bars, logger=False, enable_checkpointing=False)
    evaluations = CandidateTrainer(trainer)
    with evaluations.timing("report"):
        in_turn(evaluations, [lambda: time.sleep(0.1)] * 3)
    assert "report 1/3  " in capsys.readouterr().err and evaluations.spent["report"] >= 0.29
    other: Any = SimpleNamespace(callbacks=trainer.callbacks, is_global_zero=False)  # type: ignore[attr-defined]
    assert display_of(trainer) is evaluations.display and not display_of(other).enabled


def test_a_terminal_has_bars_and_standard_output_stays_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    display = ProgressDisplay()
    with display.phase(IN_ALL):
        assert terminal.getvalue() == ""
        with display.phase("report", total=3, done=1):
            print('{"a": 1}')
    assert "report" in terminal.getvalue() and "1/3" in terminal.getvalue() and IN_ALL in terminal.getvalue()
    assert capsys.readouterr().out == '{"a": 1}\n' and sys.stderr is terminal
