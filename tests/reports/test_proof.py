"""Proofs keep failed bars."""

import json
import math

import pytest

from genlight.errors import UserError
from genlight.reports.proof import bar_at_least, bar_at_most, read_proof, write_proof

BARS = [
    bar_at_most("demo-fd-floor", "distance over the floor", 0.9, 1.5),
    bar_at_least("demo-fd-gain", "gain", 18.0, 20),
]


def test_the_file_has_the_agreed_form(tmp_path):
    path = tmp_path / "digits.json"
    written = write_proof(
        path, bars=BARS, seeds=[0], wall_seconds=200.0, table=[{"steps": 20, "fd": 1.25}], command=["make", "demo"]
    )
    content = json.loads(path.read_text())
    wanted = ["command", "date", "git_revision", "machine", "versions", "seeds", "wall_seconds", "bars", "table"]
    assert list(content) == wanted and content["command"] == "make demo"
    assert set(content["bars"][0]) == {"id", "what", "value", "bar", "holds"}
    assert [bar["holds"] for bar in content["bars"]] == [True, False]
    assert read_proof(path) == written


def test_a_value_that_is_no_number_holds_no_bar_and_is_not_written(tmp_path):
    bar = bar_at_most("a", "x", math.nan, 1.0)
    assert not bar.holds
    with pytest.raises(ValueError, match="finite"):
        write_proof(tmp_path / "a.json", bars=[bar], seeds=[0], wall_seconds=1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ids", [["a", "a"], ["A b"]])
def test_ids_are_plain_and_different(tmp_path, ids):
    bars = [bar_at_most(name, "x", 0.0, 1.0) for name in ids]
    with pytest.raises(ValueError, match="different ids"):
        write_proof(tmp_path / "a.json", bars=bars, seeds=[], wall_seconds=1.0)


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"command": "y"}')
    with pytest.raises(UserError, match=r"x\.json"):
        read_proof(tmp_path / "x.json")
