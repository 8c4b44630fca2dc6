"""What the proof of Distilled Decoding measures of pairs, how it reads times, and what it does not do again."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(TOOLS / "proofs"))
    return runpy.run_path(str(TOOLS / "proofs" / "dd.py"))


def test_memory_is_never_less_than_what_was_used_at_once() -> None:
    memory = runpy.run_path(str(TOOLS / "benchmarks" / "dd_pairs.py"))["memory"]
    # a peak that is over does not hide the next one
    for _ in range(2):
        assert memory(lambda: torch.ones(60 << 20, dtype=torch.uint8).sum(), "cpu") > 59 << 20


def test_speed_of_pairs_is_that_of_the_slower_network(proof: dict[str, Any]) -> None:
    snap = {"snap_tokens": 10, "snap_codes": 20, "snap_bytes": 300, "chunk_bytes": 100}
    found = {"raster": {"pairs_speed": 9.0}, "scales": {"pairs_speed": 6.0}, "snap": snap}
    assert [(bar.id, bar.value, bar.holds) for bar in proof["pairs_bars"](found)] == [
        ("pairs-speed", 6.0, True),
        ("snap-memory", 3.0, False),
    ]


def test_a_student_s_speed_is_the_median_over_turns(
    proof: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"alone": ("teacher, drawn", "student, 1 step"), "both": ("refined",)}
    times = {"teacher, drawn": [20.0, 300.0, 40.0], "student, 1 step": [2.0, 10.0, 2.0], "refined": [5.0, 6.0, 70.0]}

    def side(name: str, words: list[str], log: Path) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, error=None, rounds={f"{row} ms_1": dict(enumerate(times[row])) for row in names[words[-1]]}
        )

    turns = proof["_turns"]
    monkeypatch.setattr(turns, "Side", side)
    monkeypatch.setattr(turns, "take_turns", lambda *arguments: None)
    result: dict[str, Any] = {"recipe": "digits", "rows": {row: {} for row in times}}
    proof["add_latencies"](tmp_path, [result], 0)
    assert result["speed"] == 20.0  # of 10, 30 and 20
    assert {row: each["ms_1"] for row, each in result["rows"].items()} == {
        "teacher, drawn": 40.0,
        "student, 1 step": 2.0,
        "refined": 6.0,
    }


def test_a_second_beginning_does_nothing_again(
    proof: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    table = [{"variant": "student + 3 passes of the teacher", "kind": "refined", "agreement": 1.0}]

    def genlight(command: str, *words: str) -> float:
        commands.append((command, *words))
        run = tmp_path / next(word.removeprefix("run.name=") for word in words if word.startswith("run.name="))
        (run / command / "artifact").mkdir(parents=True)
        (run / command / "report.json").write_text(json.dumps({"metrics": {"train/agreement": 0.5}, "table": table}))
        return 7.0

    distilled = proof["distilled"]
    monkeypatch.setitem(distilled.__globals__, "genlight", genlight)
    first = distilled(tmp_path, "digits_var", 0, ("data.images.num_samples=4",))
    assert [words[0] for words in commands] == ["fit", "validate", "validate"]
    # what is given by hand has the last word
    assert all(words[-1] == "data.images.num_samples=4" for words in commands)
    again = distilled(tmp_path, "digits_var", 0, ())
    assert len(commands) == 3
    assert first["rows"] == again["rows"] and first["exact"] == again["exact"] == 1.0
    assert first["costs"]["fit s"] == 7.0 and again["costs"]["fit s"] is None
