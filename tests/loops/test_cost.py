"""The account of time that all methods share: what is scaled by samples, what is left, when there is no room."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from search.toy_search import WordSpace, rugged, run_search

from genlight.callbacks.timing import StepTimer
from genlight.errors import UserError
from genlight.loops.cost import (
    FirstValidation,
    SampleLine,
    announce,
    first_validation,
    rehearsal_of,
    sample_line,
    search_phase,
    timed,
)
from genlight.reports.cost import Phase, PlannedFile, estimate
from genlight.search.engine import Budget
from genlight.search.plan import SearchPlan
from genlight.search.random_search import RandomSearch
from genlight.search.records import Problem


def test_seconds_of_samples_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second, and half a second a sample, but the first measurement warms up for ten."""
    clock, warm = [0.0], [10.0]
    monkeypatch.setattr("genlight.loops.cost.time.monotonic", lambda: clock[0])

    def measure(samples: int) -> None:
        clock[0] += 1 + 0.5 * samples + (warm.pop() if warm else 0.0)

    line = sample_line(measure, 40)
    assert line == SampleLine(1.0, 0.5) and line.seconds(100) == 51.0
    # another that took 11 seconds, with twice the samples
    assert line.scaled(11.0, 2) == 21.0 and line.scaled(0.5, 3) == 0.5
    assert sample_line(measure, 1).seconds(1) == pytest.approx(1.5)


class FakeTrainer(SimpleNamespace):
    """Validates 20 batches of 5 samples, two seconds each but for the first, and two seconds beside."""

    def validate(self, module: Any, datamodule: Any, verbose: bool) -> list[dict[str, float]]:
        count = min(20, self.limit_val_batches if isinstance(self.limit_val_batches, int) else 20)
        self.num_val_batches = [count]
        timer = self.callbacks[0]
        timer._batches = [3.0, 2.0, 2.0, 2.0][:count]
        self.clock[0] += 3 + 2 * (count - 1) + 2
        return [{"val/fd": 7}]


@pytest.mark.parametrize(("dry", "done", "left"), [(False, 20, 0), (True, 4, 16)])
def test_the_first_validation_and_what_a_dry_run_leaves_of_it(
    dry: bool, done: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("genlight.loops.cost.time.monotonic", lambda: clock[0])
    trainer = FakeTrainer(callbacks=[StepTimer(0.0)], clock=clock, limit_val_batches=0.25, world_size=1)
    datamodule = SimpleNamespace(eval_batch_size=5, num_samples=100)
    found = first_validation(trainer, None, datamodule, dry=dry)
    assert found == FirstValidation({"val/fd": 7.0}, (2.0, 2.0, 2.0), done, 20)
    assert (found.left.count, found.left.total) == (left, 2.0 * left) and trainer.limit_val_batches == 1.0


def test_the_first_of_several_pieces_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("genlight.loops.cost.time.monotonic", lambda: clock[0])

    def piece(seconds: float) -> Any:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    assert timed([piece(5), piece(1), piece(2)]) == (1.0, 2.0)
    assert timed([piece(5)]) == (5.0,)


def test_what_an_archive_holds_is_not_measured_again(tmp_path: Path) -> None:
    evaluations: Any = SimpleNamespace(trainer=SimpleNamespace(default_root_dir=str(tmp_path)), shares=2)
    plan = SearchPlan(RandomSearch(4), (), Budget(20))
    rehearsal = rehearsal_of(Problem(WordSpace()), plan, 10.0)
    assert len(rehearsal.trials) == rehearsal.count == 20
    phase = search_phase("words", evaluations, (10.0,), rehearsal)
    assert phase.count == 20 and phase.seconds == pytest.approx((5.0,), abs=0.1)
    run_search(tmp_path / "search" / "words", RandomSearch(4), WordSpace(), rugged, 12)
    assert search_phase("words", evaluations, (10.0,), rehearsal).count == 8


def test_a_run_without_room_on_the_disk_is_refused(tmp_path: Path) -> None:
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True, callbacks=[])
    small, large = (
        estimate([Phase("step", (1.0,), 1)], [PlannedFile("artifact", size)], tmp_path) for size in (10, 10**18)
    )
    announce(trainer, small)
    with pytest.raises(UserError, match="are free: make room"):
        announce(trainer, large)
