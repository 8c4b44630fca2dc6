"""What a dry run says where models are missing: it asks their fits for their cost, and leaves nothing behind."""

import contextvars
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from command_line import the_error, untrained_features
from hydra.core.hydra_config import HydraConfig

from genlight import recipes
from genlight.cli import accepted, main
from genlight.loops import stack
from genlight.reports.cost import seconds_said
from genlight.reports.report import seconds_of
from genlight.runner import run

SAMPLES = ["data.eval_batch_size=10", "data.num_samples=20", "metrics.metrics=[fd]", "trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that a dry run starts: in this process, to save the start of each. None trains to its end."""
    commands: list[tuple[str, ...]] = []

    def in_this_process(command: str, *words: str, show: bool = True) -> str:
        assert not show and {"dry_run=true", "trainer.max_steps=20"} & set(words)
        commands.append((command, *words))
        outer = HydraConfig.instance().cfg
        try:
            config = accepted([f"command={command}", *words])
            choices = dict(HydraConfig.get().runtime.choices)
            with redirect_stdout(io.StringIO()) as said:
                assert contextvars.Context().run(run, config, choices, list(words)) == 0
        finally:
            HydraConfig.instance().cfg = outer
        return said.getvalue()

    monkeypatch.setattr(recipes, "run_command", in_this_process)
    monkeypatch.setattr(stack, "run_command", in_this_process)
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return commands


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str]]:
    """Make a dry run; what its table says."""

    def plan(*words: str) -> dict[str, str]:
        code = main([*words, f"run.root={tmp_path}/runs", "dry_run=true"])
        said, told = capsys.readouterr()
        assert code == 0, told
        rows = (line.strip(" │").split("│") for line in said.splitlines())
        return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}

    return plan


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def total(row: str) -> float:
    """The seconds of a training in a table."""
    return seconds_of(row.partition("= ")[2])


def test_members_and_feature_network_come_as_trainings(
    tmp_path: Path, planned: Callable[..., dict[str, str]], asked: list[tuple[str, ...]]
) -> None:
    """Also where the folders of the members are typed."""
    members = {name: f"{tmp_path}/runs/oms/digits_{name}/fit" for name in ("w16", "w32")}
    rows = planned(
        "validate",
        "experiment=oms/digits",
        *SAMPLES,
        *(f"~module.{part}.w{width}" for part in ("members", "recipe.overrides") for width in (64, 128, 192)),
        *(f"module.members.{name}={folder}" for name, folder in members.items()),
        *(f"module.recipe.overrides.w{w}=['module.network.attention_head_dim={w // 2}']" for w in (16, 32)),
        "module.num_inference_steps=2",
        "method.unit=macs",
        "method.budgets=[1]",
        "method.per_rule=1",
        "method.singles=2",
        "method.select=20",
        "method.max_evaluations=4",
        "method.curve_images=20",
        "search.budget=20",
        "search.fidelity=20",
        "search.finalists=2",
        "search.strategy.rounds=1",
        "search.strategy.per_budget=2",
        "search.strategy.generations=2",
    )
    trainings = [f"training of {name}" for name in ("digits_w16", "digits_w32", "features/digits")]
    assert list(rows)[: len(trainings)] == trainings
    said = seconds_said(rows["time"])
    assert said is not None and said[0] > sum(total(rows[name]) for name in trainings)
    assert len(asked) == 6 and not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow  # half a minute; members and a student go the same way
def test_a_language_model_that_was_begun_stays_as_it_is(tmp_path: Path, planned: Callable[..., dict[str, str]]) -> None:
    """Nor is a folder touched that the fit would replace."""
    begun = tmp_path / "runs" / "eep" / "tiny_moe" / "fit"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "run.json").write_text("{}")
    (begun / "checkpoints" / "step-000001.ckpt").write_text("weights")
    before = files(tmp_path)
    rows = planned(
        "validate",
        "experiment=eep/digits",
        "data.num_samples=24",
        "data.eval_batch_size=24",
        "method.calibration=24",
        "method.select=24",
        "method.random_draws=1",
        "method.baselines=[frequency]",
        "search.budget=16",
        "search.strategy.prune_evaluations=10",
        "search.strategy.prune.population=6",
        "search.strategy.prune.children=4",
        "search.strategy.merge.children=4",
        "search.fidelity=24",
        "search.finalists=2",
        "trainer.accelerator=cpu",
    )
    assert "training of eep/tiny_moe" in rows and any(name.startswith("search experts2") for name in rows)
    assert files(tmp_path) == before


def test_what_lies_elsewhere_has_to_be_made_first(
    tmp_path: Path, asked: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=oms/digits", f"module.members.w16={tmp_path}/elsewhere/w16/fit", f"run.root={tmp_path}/runs"]
    assert main(["validate", *words, "dry_run=true"]) == 1
    assert "make it first, by fit experiment=oms/digits_member" in the_error(capsys.readouterr().err)
    assert not asked


def test_a_student_waits_for_tokenizer_teacher_and_pairs(
    tmp_path: Path, planned: Callable[..., dict[str, str]], asked: list[tuple[str, ...]]
) -> None:
    """The teacher's cost has that of its tokenizer in it."""
    words = ["data.num_pairs=100", "data.shard_size=10", "data.batch_size=20", "data.images.num_samples=20"]
    words += ["data.images.eval_batch_size=10"]
    rows = planned("fit", "experiment=dd/digits", *words, "trainer.accelerator=cpu", "trainer.max_steps=40")
    names = [word for words in asked for word in words if word.startswith("experiment=")]
    teacher, tokenizer = "experiment=dd/digits_teacher", "experiment=dd/digits_tokenizer"
    assert sorted(names) == [teacher, teacher, tokenizer, tokenizer]
    assert next(iter(rows)) == "training of dd/digits_teacher" and rows["shard of pairs"].startswith("7 ×")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_a_stack_adds_up_its_model_and_its_stages(tmp_path: Path, planned: Callable[..., dict[str, str]]) -> None:
    """The checkpoints that LCSC combines are there after a few steps."""
    untrained_features(tmp_path / "cache")
    before = files(tmp_path)
    lcsc = ["method=lcsc", "search=lcsc", "method.objective=val/fd_digits", "method.trajectory=${ckpt_path}/trajectory"]
    lcsc += ["method.random_search=false", "method.singles=2", "method.select=20", "module.num_inference_steps=2"]
    lcsc += ["search.budget=4", "search.fidelity=20", "search.finalists=2"]
    rows = planned(
        "validate",
        "experiment=stack/digits",
        *SAMPLES,
        "module.num_inference_steps=2",
        "~method.stages.s3",
        "~method.stages.w8a8",
        f"method.stages.lcsc={json.dumps(lcsc)}",
    )
    assert list(rows)[:2] == ["training of digits", "stage lcsc"]
    assert files(tmp_path) == before
