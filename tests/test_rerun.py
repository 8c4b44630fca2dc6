"""`--rerun` with real commands of the tiny experiment: the same bits, what differs, what a record may not say."""

import os
from pathlib import Path

import pytest
from command_line import TINY, report_of, the_error, untrained_features

from genlight import io, rerun
from genlight.cli import main
from genlight.errors import UserError
from genlight.loops.search import OWN_SCORES

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [*TINY, "trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.checkpoint.every_n_train_steps=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `first/fit`, a finished run."""
    root = tmp_path_factory.mktemp("rerun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        untrained_features(root / "cache")
        assert main(["fit", *WORDS, f"run.root={root}", "run.name=first", "resume=true"]) == 0
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def test_a_repeated_fit_is_the_same_to_the_last_bit(root: Path, capsys: pytest.CaptureFixture) -> None:
    first, again = root / "first" / "fit", root / "first-rerun" / "fit"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert main(["--rerun", str(first)]) == 0
    captured = capsys.readouterr()
    count = len(report_of(first)["metrics"])
    assert f"metrics compared: {count}, files of weights: 1\n" in captured.out
    assert f"{first} and {again}: the same to the last bit\n" in captured.out
    assert "the recorded one" not in captured.err
    assert report_of(again)["metrics"] == report_of(first)["metrics"]
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    # once more there is a run already
    assert main(["--rerun", str(first)]) == 1
    assert "overwrite=true" in the_error(capsys.readouterr().err)


def test_what_is_typed_replaces_the_record_and_what_differs_is_named(root: Path, capsys) -> None:
    assert main(["--rerun", str(root / "first" / "fit"), "seed=1", "run.name=other"]) == 1
    captured = capsys.readouterr()
    assert "not the same: train/loss" in captured.out and "safetensors" in captured.out
    # of the seed itself it is known; not of what follows from it
    assert "the recorded one: callbacks.step_seed.seed: was 0, now 1; data.seed: was 0, now 1\n" in captured.err
    found, before = report_of(root / "other" / "fit"), report_of(root / "first" / "fit")
    assert found["seed"] == 1 and found["data"] == before["data"]


def changed_record(root: Path, tmp_path: Path, **changes: object) -> Path:
    """A run folder like the first one, with other entries in its record."""
    folder = tmp_path / "run" / "fit"
    folder.mkdir(parents=True)
    io.atomic_write_json(folder / "run.json", io.read_json(root / "first" / "fit" / "run.json") | changes)
    (folder / "report.json").write_bytes((root / "first" / "fit" / "report.json").read_bytes())
    return folder


def test_another_config_is_told_and_a_failure_passed_on(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    config = io.read_json(root / "first" / "fit" / "run.json")["config"]
    config["module"]["num_inference_steps"] = 9
    started: list[list[str]] = []
    monkeypatch.setattr(rerun, "main", lambda words: started.append(words) or 7)
    assert main(["--rerun", str(changed_record(root, tmp_path, config=config))]) == 7
    assert "recorded one: module.num_inference_steps: was 9, now 2\n" in capsys.readouterr().err
    (words,) = started
    assert words[0] == "fit" and words[-1] == "run.name='first-rerun'"
    assert "resume=true" not in words and "run.name=first" not in words


@pytest.mark.parametrize(("typed", "own"), [([], True), (["search.shared=true"], False)])
def test_nothing_that_a_repetition_starts_takes_scores_of_the_first_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], own: bool
) -> None:
    """Unless it is asked to: the searches of a stack are in commands of their own."""
    seen: list[bool] = []
    monkeypatch.setattr(rerun, "main", lambda words: seen.append(OWN_SCORES in os.environ) or 7)
    monkeypatch.setattr(rerun, "composed", lambda flags, words: ({"dry_run": True}, {}))
    monkeypatch.setattr(rerun, "config_differences", lambda *given: [])
    assert rerun.rerun(["--rerun", str(root / "first" / "fit"), *typed]) == 7
    assert seen == [own] and OWN_SCORES not in os.environ


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rerun"], "needs the folder of a finished run"),
        (["--rerun", "seed=1"], "needs the folder of a finished run"),
        (["--rerun", "nowhere"], "it is not a run folder"),
        (["--rerun", "FIRST", "--multirun", "seed=1,2"], "not --multirun"),
        (["--rerun", "FIRST", "trainer.max_stps=1"], "did you mean 'trainer.max_steps'?"),
        (["--rerun", "FIRST", "data=digitz", "run.name=x"], "did you mean 'digits'?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(root: Path, words: list[str], expected: str, capsys) -> None:
    before = sorted(root.iterdir())
    assert main([str(root / "first" / "fit") if word == "FIRST" else word for word in words]) == 2
    assert expected in the_error(capsys.readouterr().err)
    assert sorted(root.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"status": "interrupted"}, "only a finished one"),
        ({"command": ["rm", "-rf", "/"]}, "was not made by a command of genlight"),
        ({"command": "fit"}, "was not made by a command of genlight"),
        ({"config": {}}, "without run.name"),
    ],
)
def test_other_records_are_refused(root: Path, tmp_path: Path, changes: dict, expected: str, capsys) -> None:
    assert main(["--rerun", str(changed_record(root, tmp_path, **changes))]) == 2
    assert expected in the_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    "word",
    ["targets.allow=[subprocess]", "+targets={allow:[os]}", "module.trust_remote_code=true", "hydra.job.chdir=true",
     "+module={trust_remote_code:true}", "hydra/launcher=x", "--config-dir=/tmp"],
)  # fmt: skip
def test_what_only_a_person_may_say_is_not_taken_from_a_file(word: str) -> None:
    with pytest.raises(UserError, match="only where it is typed"):
        rerun.repeated(["seed=1", word], [])


def test_secrets_are_asked_for_again() -> None:
    with pytest.raises(UserError, match=r"secrets are not recorded, add logger\.wandb\.api_key="):
        rerun.repeated(["logger=wandb", "+logger.wandb.api_key=***"], [])
    assert rerun.repeated(["logger=wandb", "+logger.wandb.api_key=***"], ["logger.wandb.api_key"]) == ["logger=wandb"]


def test_metrics_are_compared_by_name() -> None:
    found = rerun.metric_rows({"a": 1.0, "b": 2.0}, {"b": 2.5, "c": 3.0})
    assert [(row["metric"], row["difference"]) for row in found] == [("a", None), ("b", 0.5), ("c", None)]
