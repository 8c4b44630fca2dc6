"""Sides that take turns: what they say is timed, and one that fails takes no other down."""

from pathlib import Path
from types import ModuleType

import pytest

PROOFS = Path(__file__).resolve().parents[2] / "tools" / "proofs"
SIDE = "import _turns, sys; _turns.say(seconds=1); t = iter(%s); _turns.serve(lambda: {}, lambda: {'case': next(t)})"


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROOFS))
    monkeypatch.setenv("PYTHONPATH", str(PROOFS))
    import _turns

    return _turns


def test_a_speed_is_the_median_of_the_ratios_within_rounds(turns: ModuleType, tmp_path: Path) -> None:
    programs = {
        "first": SIDE % "[2.0, 40.0, 6.0]",
        "twice": SIDE % "[1.0, 20.0, 3.0]",
        "broken": "import sys; print('no luck', file=sys.stderr); sys.exit(3)",
        "stuck": "import time; time.sleep(60)",
    }
    sides = [turns.Side(name, ["-c", program], tmp_path / name) for name, program in programs.items()]
    saved: list[int] = []
    turns.take_turns(sides, 6.0, 3, lambda: saved.append(len(sides[1].rounds)))
    first, twice, broken, stuck = sides
    assert turns.milliseconds_of(twice, "case") == 3.0 and turns.speed_of(twice, first, "case") == 2.0
    assert broken.error == "ended with 3: no luck" and not broken.rounds
    assert stuck.error is not None and stuck.error.startswith("not ready") and saved[-1] == 1
    assert turns.speed_of(broken, first, "case") is None
