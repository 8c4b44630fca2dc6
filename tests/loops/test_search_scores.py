"""Where a run leaves scores for others: one folder for all that score alike, no other run's, or none at all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genlight.loops.search import OWN_SCORES, SearchRunner, SearchSettings, SearchTask
from genlight.run_folder import RunFolder

CONFIG = {
    "seed": 0,
    "ckpt_path": "model",
    "data": {"seed": 0},
    "module": {"guidance_scale": 1.0},
    "metrics": {"metrics": ["fd"]},
    "trainer": {"precision": "32-true"},
    "strategy": {},
    "callbacks": {"progress": {"every": 1}},
    "method": {"nfe": [4], "search": {"budget": 10}},
    "search": {"budget": 10},
    "targets": {"allow": []},
}


class Space:
    def __init__(self, text: str) -> None:
        self.text = text

    def fingerprint(self) -> str:
        return self.text


def place(folder: Path, *, on: bool = True, task: bool = True, space: str = "space", **changes: Any) -> Path | None:
    """The file of a run with this config."""
    with RunFolder.open(folder, command=["validate"], config={**CONFIG, "paths": {"cache": "cache"}, **changes}):
        trainer = SimpleNamespace(default_root_dir=str(folder), callbacks=[], is_global_zero=True)
        evaluations: Any = SimpleNamespace(trainer=trainer)
        strategy: Any = None
        problem: Any = SimpleNamespace(space=Space(space))
        named: Any = SearchTask("name", problem, strategy, strategy, {"objective": "fd"}, shared=task)
        return SearchRunner(evaluations, SearchSettings(strategy, shared=on)).scores_file(named)


def test_a_budget_and_a_name_change_nothing_but_the_file(tmp_path: Path) -> None:
    first = place(tmp_path / "first")
    assert first is not None and first.parent.parent == Path("cache/scores")
    other = {"method": {"nfe": [4, 5], "search": {"budget": 20}}, "search": {"budget": 20}}
    other["callbacks"] = {"progress": {"every": 2}}
    second = place(tmp_path / "second", **other)
    assert second is not None and second.parent == first.parent and second != first


@pytest.mark.parametrize("name", ["seed", "ckpt_path", "data", "module", "metrics", "trainer", "strategy"])
def test_what_scores_may_depend_on_has_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    first, second = place(tmp_path / "first"), place(tmp_path / "second", **{name: {"changed": 1}})
    assert first is not None and second is not None and first.parent != second.parent


def test_so_has_another_space(tmp_path: Path) -> None:
    first, second = place(tmp_path / "first"), place(tmp_path / "second", space="another")
    assert first is not None and second is not None and first.parent != second.parent


@pytest.mark.parametrize(
    "given",
    [{"on": False}, {"task": False}, {"targets": {"allow": ["mine"]}}, {"paths": {"cache": "${oc.env:SCRATCH}/x"}}],
)
def test_some_runs_share_nothing(tmp_path: Path, given: dict[str, Any]) -> None:
    assert place(tmp_path / "run", **given) is None


def test_nor_does_a_run_that_is_told_to_measure_all_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_SCORES, "1")
    assert place(tmp_path / "run") is None
