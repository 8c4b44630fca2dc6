"""What the proof of Distilled Decoding measures of pairs, and how it reads times."""

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
