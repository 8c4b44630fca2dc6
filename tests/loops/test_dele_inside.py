"""`search.predictor=dele` in the real command of S³, with an untrained network and a few candidates."""

from pathlib import Path

import pytest
from command_line import histories, the_error, untrained_features
from loops.test_s3 import SMALL

from genlight.cli import main

WORDS = [
    *SMALL,
    "search=guided",
    "search.predictor=dele",
    "search.strategy.strategy.min_measured=4",
    "search.strategy.strategy.stage_size=6",
    "method.nfe=[3]",
    "method.refine=null",
    "method.finetune=null",
]


@pytest.mark.slow  # half a minute; test_dele.py kills and resumes
def test_it_guides_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages; the second one is cut by the budget, which is then extended to what a longer search has."""
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    untrained_features(tmp_path / "cache")
    for name, budget in (("short", 9), ("long", 12)):
        words = [f"run.root={tmp_path}", f"run.name={name}", f"search.budget={budget}"]
        assert main(["validate", *WORDS, *words]) == 0
    words = [f"run.root={tmp_path}", "run.name=short", "search.budget=12", "resume=true"]
    assert main(["validate", *WORDS, *words]) == 0
    found, expected = (histories(tmp_path / name / "validate")["nfe3"] for name in ("short", "long"))
    assert found == expected
    assert expected.count(b'"source":"guided"') == 8


def test_a_strategy_without_predictor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search=evolution", "search.predictor=dele", f"run.root={tmp_path}", "run.name=refused"]
    assert main(["validate", "experiment=s3/digits", *words]) != 0
    assert "no predictor guides Evolution" in the_error(capsys.readouterr().err)
