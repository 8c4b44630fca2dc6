"""The real commands of OMS-DPM on two tiny networks: costs, search, what is chosen, files, resuming, bad input."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import (
    added,
    assert_accounted,
    copied,
    histories,
    report_of,
    run_in_own_process,
    the_error,
    untrained_features,
)
from diffusers import DiTTransformer2DModel
from oracles.kills import at_line, kill

from genlight.cli import main
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.model_schedule_file import load_model_schedule
from genlight.reports.member_costs import read_costs

BUDGETS = (1.0, 3.0)


def words_of(root: Path) -> list[str]:
    return [
        "validate",
        "experiment=oms/digits",
        "module.recipe=null",
        "~module.members",
        f"+module.members={{small: {root}/small, large: {root}/large}}",
        "module.num_inference_steps=2",
        "data.eval_batch_size=20",
        "data.num_samples=40",
        "metrics.metrics=[fd]",
        "method.unit=macs",
        "method.budgets=[1,3]",
        "method.per_rule=2",
        "method.select=40",
        "method.max_evaluations=8",
        "method.curve_images=20",
        "search.budget=24",
        "search.fidelity=40",
        "search.shared=false",
        "search.finalists=3",
        "search.strategy.rounds=1",
        "search.strategy.per_budget=3",
        "search.strategy.generations=3",
        "trainer.accelerator=cpu",
        f"run.root={root}",
    ]


def validate(root: Path, name: str, *words: str) -> int:
    return main([*words_of(root), f"run.name={name}", *words])


def save_denoisers(root: Path, widths: Mapping[str, int]) -> None:
    """A folder for each name below `root`: transformers of one token, far from what they begin with."""
    for name, width in widths.items():
        torch.manual_seed(width)
        network = DiTTransformer2DModel(
            sample_size=8, in_channels=1, out_channels=1, patch_size=8, num_layers=1, num_attention_heads=1,
            attention_head_dim=width, num_embeds_ada_norm=2,
        )  # fmt: skip
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.05 * torch.randn(weight.shape))
        DiffusionModule(network, VPSchedule(), "v_prediction", class_conditional=False).save_pretrained(root / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it two models, `small` and `large`, and `run`, a finished search."""
    root = tmp_path_factory.mktemp("oms")
    save_denoisers(root, {"small": 8, "large": 24})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        untrained_features(root / "cache")
        assert validate(root, "run") == 0
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return report_of(folder)["table"]


def test_every_rule_stands_beside_what_was_chosen(root: Path) -> None:
    folder = root / "run" / "validate"
    assert_accounted(folder)
    rows, costs = rows_of(folder), read_costs(folder / "search" / "latency.json")
    for budget in BUDGETS:
        mine = [row for row in rows if row["budget"] == budget]
        known = {"single", "small_first", "large_first", "sandwich", "analytic", "random", "searched"}
        assert known >= {row["rule"] for row in mine}
        assert {"single", "analytic", "random"} <= {row["rule"] for row in mine}
        assert all(row["cost"] <= budget * max(costs.costs.values()) * (1 + 1e-9) for row in mine)
        chosen = [row for row in mine if row["chosen"]]
        assert len(chosen) == 1 and chosen[0]["select"] == min(row["select"] for row in mine)
        assert report_of(folder)["metrics"][f"fd_digits_at_{budget:g}"] == chosen[0]["fd_digits"]
    metrics = report_of(folder)["metrics"]
    assert "fd_digits_before" in metrics and "val/fd_digits" not in metrics  # it is of none that the artifact holds
    assert "searched" in {row["rule"] for row in rows}
    assert all(row["measured ms"] > 0 for row in rows)
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert {"pareto.png", "schedules.png", "search.png", "predictor.png"} <= names


def test_the_artifact_holds_a_file_for_each_budget(root: Path) -> None:
    folder = root / "run" / "validate"
    for budget in BUDGETS:
        file = load_model_schedule(folder / "artifact" / f"model_schedule_{budget:g}.json")
        row = next(row for row in rows_of(folder) if row["budget"] == budget and row["chosen"])
        assert file.nfe == row["nfe"] and file.predicted_cost == row["cost"]
        assert file.scores["fd_digits"] == row["fd_digits"]


def test_a_killed_search_resumes_to_the_same_archive(root: Path) -> None:
    kill([*words_of(root), "run.name=killed"], at_line("schedules", 20))
    assert validate(root, "killed", "resume=true") == 0
    assert histories(root / "killed" / "validate") == histories(root / "run" / "validate")


@pytest.mark.slow  # in test_s3.py it is not, and the search is the same
def test_two_processes_give_the_archive_of_one(root: Path) -> None:
    run_in_own_process(*words_of(root), "run.name=ddp", "strategy=ddp", "trainer.devices=2")
    assert histories(root / "ddp" / "validate") == histories(root / "run" / "validate")


@pytest.mark.slow  # a search more
def test_direct_evolution_measures_about_as_many(root: Path) -> None:
    """Fewer only where a small budget has no new schedules left."""
    words = [word for word in words_of(root) if not word.startswith("search.strategy")]
    assert main([*words, "search=oms_direct", "run.name=direct"]) == 0
    lines = [histories(root / name / "validate")["schedules"].splitlines() for name in ("run", "direct")]
    assert abs(len(lines[0]) - len(lines[1])) <= 6


def test_latency_is_measured_and_kept(root: Path) -> None:
    assert validate(root, "timed", "method.unit=ms", "search.budget=7", "method.rules=[single]") == 0
    costs = read_costs(root / "timed" / "validate" / "artifact" / "latency.json")
    assert costs.unit == "ms" and all(member.latency is not None for member in costs.members.values())


def test_a_larger_budget_goes_on_from_the_archive(root: Path, capsys: pytest.CaptureFixture) -> None:
    """What is random and what a predictor chose stays; the predictor chooses more."""
    longer = copied(root / "run" / "validate", "longer")
    assert validate(root, "longer", "resume=true", "search.budget=28", "method.objective=val/kid_digits") != 0
    assert "method.objective: was 'val/fd_digits', now" in the_error(capsys.readouterr().err)
    assert validate(root, "longer", "resume=true", "search.budget=28") == 0
    assert added(root / "run" / "validate", longer) == {"schedules": 4}
    assert all(b'"source":"budgeted' in line for line in histories(longer)["schedules"].splitlines()[-4:])


def test_a_dry_run_says_what_it_would_cost(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert validate(root, "dry", "dry_run=true", f"method.costs={root}/run/validate/search/latency.json") == 0
    assert "in all" in capsys.readouterr().out
    assert not (root / "dry" / "validate" / "report.json").exists()


def test_costs_of_another_network_of_the_same_name_are_refused(root: Path, capsys: pytest.CaptureFixture) -> None:
    words = [word.replace(f"small: {root}/small", f"small: {root}/large") for word in words_of(root)]
    costs = f"method.costs={root}/run/validate/search/latency.json"
    assert main([*words, "run.name=wrong", "run.overwrite=true", "dry_run=true", costs]) != 0
    assert "measured for a small of" in the_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.budgets=[0.001]"], "method.budgets"),
        (["method.budgets=[]"], "method.budgets"),
        (["method.rules=[biggest]"], "biggest"),
        (["method.objective=val/nothing"], "method.objective"),
        (["search.budget=5"], "search.budget"),
        (["search.strategy.per_budget=2.5"], "per_budget"),
        (["module.primary=medium", "module.recipe=null"], "module.primary"),
        (["module.members={other: x}"], "~module.members +module.members="),
        (["method.kinds=[singlestep,euler]"], "kinds"),
        (["method.costs=/nowhere/latency.json"], "latency.json"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    other = words[0].startswith("module")
    given = [word for word in words_of(root) if not (other and word.lstrip("~+").startswith("module."))]
    assert main([*given, "run.name=wrong", "run.overwrite=true", *words]) != 0
    assert expected in the_error(capsys.readouterr().err)


def test_one_model_has_no_members_to_choose(root: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["method=oms", "search=oms", "method.objective=val/fd_digits", f"run.root={root}", "run.name=one"]
    assert main(["validate", "module=diffusion_pretrained", f"module.pretrained={root}/small", *words]) != 0
    assert "ZooModule" in the_error(capsys.readouterr().err)
