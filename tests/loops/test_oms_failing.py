"""A member of a zoo that breaks while it is measured: one clear stop, or, agreed to, a search without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import histories, report_of, the_error, untrained_features
from diffusers import DiTTransformer2DModel
from loops.test_oms import save_denoisers, words_of

from genlight.cli import main
from genlight.reports.member_costs import read_costs

WIDTHS = {"small": 8, "middle": 16, "large": 24}
AGREED = "method.drop_failing=true"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it three models."""
    root = tmp_path_factory.mktemp("oms_failing")
    save_denoisers(root, WIDTHS)
    untrained_features(root / "cache")
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))


def validate(root: Path, name: str, *words: str) -> int:
    """A search without a predictor, which would take most of the time."""
    members = ", ".join(f"{member}: {root}/{member}" for member in WIDTHS)
    own = [f"+module.members={{{members}}}" if w.startswith("+module.members") else w for w in words_of(root)]
    own = [word for word in own if not word.startswith("search.strategy")]
    return main([*own, "search=oms_direct", "method.rules=[single]", "method.singles=6", f"run.name={name}", *words])


def break_middle(monkeypatch: pytest.MonkeyPatch, after: Callable[[int], bool], error: Exception) -> None:
    """The middle network raises from the call on whose number `after` is true for."""
    forward, calls, broken = DiTTransformer2DModel.forward, [0], [False]

    def breaking(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.config.attention_head_dim == WIDTHS["middle"]:
            calls[0] += 1
            broken[0] |= after(calls[0])
            if broken[0]:
                raise error
        return forward(self, *arguments, **options)

    monkeypatch.setattr(DiTTransformer2DModel, "forward", breaking)


def begun(folder: Path) -> Callable[[int], bool]:
    """Whether ten lines of the archive are written: of the first random schedules, some are not yet measured."""
    archive = folder / "search" / "schedules" / "history.jsonl"
    return lambda _: archive.is_file() and len(archive.read_text().splitlines()) >= 10


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in histories(folder)["schedules"].splitlines()[1:]]


def uses_middle(line: dict[str, Any]) -> bool:
    return "middle" in json.dumps(line["candidate"])


@pytest.mark.parametrize(
    ("unit", "error"),
    [("macs", RuntimeError("no such kernel")), ("ms", torch.OutOfMemoryError("tried to allocate 1 GiB"))],
    ids=["macs", "ms"],
)
def test_a_member_that_fails_when_it_is_profiled(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, unit: str, error: Exception
) -> None:
    # at its first call, and at one that is timed
    break_middle(monkeypatch, lambda call: call > (0 if unit == "macs" else 3), error)
    name = f"profile-{unit}"
    words = [f"method.unit={unit}", "search.budget=10"]
    assert validate(root, name, *words) != 0
    said = the_error(capsys.readouterr().err)
    assert "the member middle fails" in said and str(error) in said and AGREED in said
    assert validate(root, name, *words, AGREED, "resume=true") == 0
    folder = root / name / "validate"
    assert set(read_costs(folder / "artifact" / "latency.json").members) == {"small", "large"}
    assert any("the member middle fails and is left out" in note for note in report_of(folder)["notes"])
    assert not any(uses_middle(line) for line in lines_of(folder))


@pytest.mark.slow  # half a minute; test_member_failures.py has it without networks
def test_a_member_that_fails_in_the_middle_of_the_search(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Stopped and resumed, the archive is that of a search that was to go on from the start."""
    error = RuntimeError("broken")
    with monkeypatch.context() as patch:
        break_middle(patch, begun(root / "agreed" / "validate"), error)
        assert validate(root, "agreed", AGREED) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("the member middle fails and is left out: RuntimeError: broken") == 1
    folder = root / "agreed" / "validate"
    lines = lines_of(folder)
    failed = [line for line in lines if line["failure"] is not None]
    before = [line for line in lines if line["index"] < failed[0]["index"]]
    assert failed and all(line["facts"]["member"] == "middle" and uses_middle(line) for line in failed)
    assert any(uses_middle(line) for line in before)
    # in later generations it is left out, and what failed is made up for
    first = failed[0]["generation"]
    assert not any(uses_middle(line) for line in lines if line["generation"] > first)
    assert any(line["generation"] > first for line in lines)
    assert sum(not uses_middle(line) for line in lines) == 24 + 6
    assert any("middle" in note for note in report_of(folder)["notes"])

    with monkeypatch.context() as patch:
        break_middle(patch, begun(root / "stopped" / "validate"), error)
        assert validate(root, "stopped") != 0
    said = capsys.readouterr()
    assert "the member middle fails: RuntimeError: broken" in the_error(said.err) and AGREED in said.err
    stopped = lines_of(root / "stopped" / "validate")
    assert stopped == lines[: len(stopped)] and stopped[-1]["failure"] is not None
    with monkeypatch.context() as patch:
        break_middle(patch, lambda call: True, error)
        # still not agreed to
        assert validate(root, "stopped", "resume=true") != 0
        assert AGREED in the_error(capsys.readouterr().err)
        assert validate(root, "stopped", "resume=true", AGREED) == 0
    assert histories(root / "stopped" / "validate") == histories(folder)


def test_a_member_whose_error_cannot_be_measured_is_not_allocated(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails on images alone, not where it samples: only the rule that needs its errors does without it."""
    from genlight.loops import model_curves

    curve = model_curves.error_curve

    def broken(member: Any, *arguments: Any, **options: Any) -> Any:
        if member.network.config.attention_head_dim == WIDTHS["middle"]:
            raise RuntimeError("broken")
        return curve(member, *arguments, **options)

    monkeypatch.setattr(model_curves, "error_curve", broken)
    assert validate(root, "curves", "method.rules=[single,analytic]", "search.budget=10", AGREED) == 0
    folder = root / "curves" / "validate"
    rows = [row for row in report_of(folder)["table"] if row["rule"] == "analytic"]
    assert rows and not any("middle" in row["schedule"] for row in rows)
    assert set(read_costs(folder / "search" / "latency.json").members) == set(WIDTHS)
