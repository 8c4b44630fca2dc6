"""report.json is strict, report.md says what matters, and a Fréchet number is called FID in Inception features only."""

import json
import math
from dataclasses import asdict

import pytest

from genlight.errors import UserError
from genlight.reports.report import (
    duration,
    parse_report,
    read_report,
    seconds_of,
    size,
    title_of,
    to_markdown,
    write_report,
)

FEATURES = {"name": "digits", "kind": "classifier", "num_features": 64, "fingerprint": "ab", "num_reference": 360}


def record(**changes):
    base = {
        "kind": "report",
        "version": 1,
        "command": "python -m genlight validate",
        "experiment": "digits",
        "config_hash": "c0ffee" * 5,
        "git_revision": "0123456789abcdef",
        "git_dirty": True,
        "versions": {"python": "3.11.1", "torch": "2.13.0"},
        "machine": {"cpu": "A CPU", "cores": 2, "gpus": []},
        "seed": 0,
        "draw": "report",
        "metrics": {"val/fd_digits": 0.9, "val/kid_digits": 0.001, "val/kid_digits_std": 0.0002, "val/is_digits": 9.0},
        "floor": {
            "metrics": {"fd_digits": 1.0, "kid_digits": -0.1, "is_digits": 9.5},
            "images": "all of the train split",
            "num_images": 1437,
            "reference": "all of the test split",
            "num_reference": 360,
        },
        "features": {**FEATURES, "reference_split": "test"},
        "num_samples": 2000,
        "predicted": {"total_seconds": 250.0, "peak_memory_bytes": 10**9},
        "real": {"total_seconds": 231.5},
        "files": ["figures/samples.png"],
        "notes": ["a note"],
        "weights": [{"source": "a/b", "hub_commit": "89abcdef01234567", "sampled_sha256": None}],
        "deterministic": True,
    }
    return {**base, **changes}


def test_what_is_written_is_read_back(tmp_path):
    written = write_report(tmp_path, record())
    assert read_report(tmp_path / "report.json") == written
    assert write_report(tmp_path, written) == written
    assert json.loads((tmp_path / "report.json").read_text()) == asdict(written)


def test_the_page_says_what_was_run_and_what_it_may_be_compared_with():
    page = to_markdown(parse_report(record()))
    for part in (
        "python -m genlight validate",
        "| Fréchet distance (digits features) `val/fd_digits` | 0.9 | 1 | 0.90× |",
        "0.001 ± 0.0002",
        "| Inception Score (digits features) `val/is_digits` | 9 | 9.5 | – |",
        "2000 samples, draw `report`, seed 0",
        "64 numbers per image, against 360 real images (test split)",
        "all of the train split (1437 images) against all of the test split (360 images)",
        "| time | 4 min 10 s | 3 min 52 s |",
        "| peak memory | 1.0 GB | – |",
        "[figures/samples.png](figures/samples.png)",
        "a note",
        "revision 0123456789ab with local changes",
        " · weights a/b 89abcdef0123 · ",
        " · deterministic",
    ):
        assert part in page, part
    assert "FID" not in page and "real against real | ratio" in page
    assert len(page.splitlines()) < 60


@pytest.mark.parametrize("name", ["fid", "val/fid", "FID", "val/mifid", "fid_digits", "fid_std"])
@pytest.mark.parametrize("features", [FEATURES, None])
def test_other_features_never_make_an_fid(name, features, tmp_path):
    with pytest.raises(ValueError, match="only Inception features make an FID"):
        write_report(tmp_path, record(metrics={name: 1.0}, features=features))
    floor = {**record()["floor"], "metrics": {name: 1.0}}
    with pytest.raises(ValueError, match="only Inception features make an FID"):
        parse_report(record(floor=floor, features=features))
    assert not list(tmp_path.iterdir())
    inception = {**FEATURES, "name": "inception", "kind": "inception"}
    assert "FID" in to_markdown(parse_report(record(metrics={"val/fid": 3.1}, floor=None, features=inception)))


def test_the_search_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match='"search" draw chose the candidate and cannot judge it'):
        write_report(tmp_path, record(draw="search"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"surprise": 1}, "surprise: .*unexpected|surprise: .*keyword"),
        ({"seed": "0"}, "seed: "),
        ({"metrics": {"val/fd_digits": math.nan}}, "not fit|finite"),
        ({"real": {"total_seconds": math.inf}}, "not fit|finite"),
        ({"floor": {**record()["floor"], "more": 1}}, "floor.more"),
        ({"features": {**FEATURES, "kind": "unknown"}}, "features.kind"),
        ({"machine": {"x": object()}}, "does not fit into JSON"),
        ({"draw": "other"}, "draw: "),
        ({"version": 2}, "version: "),
        ({"deterministic": "yes"}, "deterministic"),
    ],
)
def test_records_are_strict(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        write_report(tmp_path, record(**change))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_metric_that_is_not_a_number_is_told_and_no_metric_at_all_is_something_else():
    page = to_markdown(parse_report(record(metrics={}, not_finite=["val/fd_digits"])))
    assert "| `val/fd_digits` | not a number | – | – |" in page and "Nothing was measured" not in page
    assert "Nothing was measured" in to_markdown(parse_report(record(metrics={})))


def test_missing_keys_are_named():
    incomplete = record()
    del incomplete["config_hash"]
    with pytest.raises(ValueError, match="config_hash"):
        parse_report(incomplete)


@pytest.mark.parametrize(
    "text",
    ["[]", '{"kind": "report", "version": 9}', '{"kind": "proof", "version": 1}', '{"kind": "report", "version": 1}'],
)
def test_foreign_files_are_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"report\.json"):
        read_report(tmp_path / "report.json")


def test_titles():
    features = parse_report(record()).features
    assert title_of("val/kid_digits_std", features) == "kernel distance (digits features), standard deviation"
    assert title_of("val/loss", features) == "loss"
    assert title_of("mifd_digits", features) == "memorisation-informed Fréchet distance (digits features)"


@pytest.mark.parametrize(
    "seconds, text", [(0.105, "0.105 s"), (42, "42 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("count, text", [(12, "12 B"), (3_400_000_000, "3.4 GB"), (2e15, "2000.0 TB")])
def test_size(count, text):
    assert size(count) == text


@pytest.mark.parametrize("seconds", [0.25, 9.99, 42, 200, 3599, 3600, 7500, 100000])
def test_durations_are_read_as_they_are_written(seconds: float) -> None:
    assert seconds_of(duration(seconds)) == pytest.approx(seconds, abs=60 if seconds >= 3600 else 0.5)
