"""The page on adding a method, followed as it stands but for a small network and few samples."""

from command_line import TINY, report_of, untrained_features
from docs.pages import files_of, follow

PAGE = "docs/add_a_method.md"


def test_the_page_can_be_followed(tmp_path, monkeypatch):
    assert set(files_of(PAGE)) == {"gain/method.py", "my_conf/method/gain.yaml", "test_gain.py"}
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    untrained_features(tmp_path / "cache")
    small = [word for word in TINY if word.startswith("module.network")]
    assert len(follow(PAGE, tmp_path, monkeypatch, [*small, "data.num_samples=120"])) == 4
    run = tmp_path / "runs" / "base" / "validate"
    before, after = report_of(run)["table"]
    assert before["gain"] == 1.0 and 0.8 <= after["gain"] <= 1.25
    history = (run / "search" / "gain" / "history.jsonl").read_text().splitlines()
    # a line for the problem, the initial candidate, and the budget
    assert len(history) >= 7
    assert set(report_of(run)["metrics"]) == {"val/fd_digits", "val/fd_digits_before"}
    assert "output gain" in (run / "artifact" / "README.md").read_text()
    assert (run / "artifact" / "model_index.json").is_file()
