"""OMS-DPM on a whole Stable Diffusion with tiny random networks, by the real command, and what attaches its result."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from command_line import report_of, the_error
from modules.test_pipeline import tokenized
from modules.test_zoo_pipelines import bigger

from genlight.cli import main
from genlight.data.prompts import PromptsDataModule
from genlight.modules.model_schedule_file import attach_model_schedule, load_model_schedule
from genlight.modules.pipeline import PipelineModule
from genlight.modules.scheduled_denoiser import ScheduledDenoiser
from genlight.reports.cost import count_macs
from genlight.reports.member_costs import read_costs
from genlight.search.spaces.model_schedule import ModelScheduleSpace

BUDGETS = (1.0, 4.0)
SCALE = 3.0


def words_of(root: Path) -> list[str]:
    return [
        "validate",
        "experiment=oms/sd15",
        f"module.pretrained={root}/model",
        "module.dtype=auto",
        f"module.guidance_scale={SCALE}",
        "~module.members",
        f"+module.members={{big: {root}/big}}",
        "module.num_inference_steps=2",
        "~metrics.metrics.clip_score",
        "+metrics.metrics.variation={_target_: torchmetrics.image.TotalVariation, _partial_: true}",
        "metrics.float_images=[variation]",
        "method.objective=val/variation",
        "method.mode=min",
        f"method.budgets=[{','.join(f'{budget:g}' for budget in BUDGETS)}]",
        "method.max_evaluations=4",
        "method.per_rule=1",
        "method.singles=4",
        "method.select=4",
        "data.num_samples=4",
        "data.eval_batch_size=2",
        "search.budget=8",
        "search.fidelity=2",
        "search.shared=false",
        "search.finalists=2",
        "search.strategy.rounds=1",
        "search.strategy.per_budget=2",
        "search.strategy.generations=2",
        "trainer.accelerator=cpu",
        f"run.root={root}",
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it a pipeline, a further network `big` for it, and `run`, a finished search."""
    root = tmp_path_factory.mktemp("oms_pipeline")
    pipe = tokenized(root)
    pipe.save_pretrained(root / "model")
    bigger(pipe.unet, "sd").save_pretrained(root / "big")
    assert main([*words_of(root), "run.name=run"]) == 0
    return root


def loaded(root: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(root / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_time_is_measured_and_schedules_are_chosen(root: Path) -> None:
    folder = root / "run" / "validate"
    costs, report = read_costs(folder / "search" / "latency.json"), report_of(folder)
    assert costs.unit == "ms" and list(costs.members) == ["own", "big"]
    for budget in BUDGETS:
        rows = [row for row in report["table"] if row["budget"] == budget]
        assert sum(bool(row["chosen"]) for row in rows) == 1
        assert all(row["cost"] <= budget * max(costs.costs.values()) * (1 + 1e-9) + costs.batch for row in rows)
        assert all(row["measured ms"] > 0 and row["predicted ms"] > 0 for row in rows)
        assert f"variation_at_{budget:g}" in report["metrics"]
    # which rules fit into which budget is up to the machine
    assert {"single", "random"} <= {row["rule"] for row in report["table"]}


def test_costs_are_of_both_halves_of_the_guidance(root: Path) -> None:
    """Counted once more on each network alone, with two rows and the embeddings of sixteen tokens."""
    costs = read_costs(root / "run" / "validate" / "search" / "latency.json")
    networks = {"own": loaded(root).unet, "big": diffusers.UNet2DConditionModel.from_pretrained(root / "big")}
    for name, network in networks.items():
        given = (torch.zeros(2, 4, 8, 8), torch.tensor(500), torch.zeros(2, 16, 8))
        assert costs.members[name].macs == pytest.approx(count_macs(network, *given), rel=1e-3)
        assert costs.members[name].parameters == network.num_parameters()


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_attached_schedule_samples_what_was_measured(root: Path, budget: float) -> None:
    path = root / "run" / "validate" / "artifact" / f"model_schedule_{budget:g}.json"
    file, pipe = load_model_schedule(path), loaded(root)
    scheduled = attach_model_schedule(pipe, path)
    data = PromptsDataModule()
    module = PipelineModule(str(root / "model"), guidance_scale=SCALE, members={"big": str(root / "big")})
    module.check_data(data)
    costs = {"own": 1.0, "big": 1.0}
    ModelScheduleSpace(module.prediction.schedule, costs).apply(module, file.schedule)
    noise = torch.randn((1, *module.sample_shape), generator=torch.Generator().manual_seed(0))
    expected = module.sample_latents(noise, torch.tensor([5]))
    options: dict[str, Any] = {"latents": noise, "output_type": "latent", "return_dict": False}
    found = pipe(data.prompts[5], num_inference_steps=file.nfe, guidance_scale=SCALE, **options)[0]
    assert torch.allclose(found, expected, atol=1e-6)
    assert scheduled.calls.total() == file.nfe == len(scheduled.schedule)


def test_the_artifact_says_where_weights_are_and_its_lines_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "run" / "validate" / "artifact"
    assert not list(folder.rglob("*.safetensors")) and (folder / "latency.json").is_file()
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert f"guidance_scale={SCALE}" in lines and len(lines.splitlines()) <= 8
    monkeypatch.chdir(folder)
    named: dict[str, Any] = {}
    exec(lines, named)
    assert isinstance(named["pipe"].unet, ScheduledDenoiser) and len(named["result"].images) == 1
    assert os.getcwd() == str(folder)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.rules=[single,analytic]"], "method.rules: analytic needs real images"),
        (["~module.members"], "module.members is empty"),
        (["~module.members", "+module.members={}"], "module.members is empty"),
    ],
    ids=" ".join,
)
def test_what_a_pipeline_cannot_have_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    given = [w for w in words_of(root) if "members" not in w] if words[0].startswith("~") else words_of(root)
    assert main([*given, "run.name=wrong", "run.overwrite=true", *words]) != 0
    assert expected in the_error(capsys.readouterr().err)
