"""Every key is described, and the page of them is what the configs say."""

from pathlib import Path

import pytest

from genlight import cli, options

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "options.md"


@pytest.mark.parametrize("file", options.files())
def test_every_key_has_a_description(file: str) -> None:
    """A comment above the key in conf/, or a line in the docstring of the class that takes it."""
    assert [option.path for option in options.options(file) if not option.text] == []


@pytest.mark.parametrize("file", options.files())
def test_a_default_ends_before_the_comment_of_the_next_key(file: str) -> None:
    assert [option.path for option in options.options(file) if " # " in f" {option.default} "] == []


def test_a_key_without_comment_and_docstring_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("# mine\n_target_: torch.nn.Linear\nfirst: 1\n\n# two\nsecond: 2\n")
    monkeypatch.setattr(options, "CONF", tmp_path)
    assert [(o.path, o.default, o.text) for o in options.options("data/mine.yaml")] == [
        ("first", "1", ""),
        ("second", "2", "two"),
    ]


def test_the_page_is_up_to_date() -> None:
    """Else: python tools/record_options.py."""
    assert PAGE.read_text() == options.reference()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("search.budget", "candidates measured beside the initial ones"),
        ("seed", "seed of initial weights"),
        ("search/s3", "strategy.kappa = 2.0"),
        ("data.batch_size", "(int)"),
        ("logger", "wandb.offline"),
    ],
)
def test_help_explains_keys_options_and_groups(word: str, expected: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--help", word]) == 0
    assert expected in capsys.readouterr().out


def test_help_for_a_misspelt_key_names_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--help", "search.budgt"]) == cli.USAGE_ERROR
    assert "did you mean 'search.budget'?" in capsys.readouterr().err
