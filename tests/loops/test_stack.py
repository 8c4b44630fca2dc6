"""Methods one after another by real commands: an almost untrained transformer through LCSC, 8 bits and S³.

Each stage is a process of its own, here a forked one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import report_of, run_forked, the_error, untrained_features
from safetensors.torch import load_file

from genlight.cli import main
from genlight.loops import stack as method
from genlight.modules.consistency import ConsistencyModule
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.zoo_module import ZooModule
from genlight.quantization.convert import quantized_layers

SIZE = [
    "data.eval_batch_size=10",
    "data.num_samples=20",
    "metrics.metrics=[fd]",
    "trainer.accelerator=cpu",
]
MODEL = [
    *SIZE,
    "experiment=stack/digits",
    "module.network.num_layers=1",
    "module.network.num_attention_heads=2",
    "module.network.attention_head_dim=8",
    "module.num_inference_steps=6",
    "trainer.max_steps=12",
    "trainer.val_check_interval=12",
    "callbacks.ema.update_starting_at_step=2",
    "callbacks.collector.every_n_steps=1",
]
STAGES = {
    "lcsc": [
        "method=lcsc",
        "search=lcsc",
        "method.objective=val/fd_digits",
        "method.trajectory=${ckpt_path}/trajectory",
        "method.random_search=false",
        "method.singles=2",
        "method.select=20",
        "search.budget=4",
        "search.fidelity=20",
        "search.finalists=2",
    ],
    "w8a8": [
        "method=viditq",
        "method.keep=pos_embed",
        "method.rivals=false",
        "method.samples=10",
        "method.trajectory=4",
    ],
    "s3": [
        "method=s3",
        "search=s3",
        "method.nfe=[3]",
        "method.solvers=[dpmpp_2m]",
        "method.teacher.steps=10",
        "method.noise={search: 8, select: 8, report: 8}",
        "method.refine=null",
        "method.finetune=null",
        "search.budget=3",
        "search.fidelity=8",
        "search.finalists=2",
        "search.strategy.screening_fidelity=null",
    ],
}
# a stage that is taken out and put back comes last
ORDER = ["~method.stages.s3"]


def stack(root: Path, *words: str) -> int:
    """The command; the network is quantized before its sampler is searched, unlike in the recipe."""
    given = [f"{'+' * (name == 's3')}method.stages.{name}={json.dumps(of)}" for name, of in STAGES.items()]
    shared = f"method.shared={json.dumps(SIZE)}"
    return main(["validate", *MODEL, f"run.root={root}", "run.name=m", *ORDER, *given, shared, *words])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `m`: a fit, and a finished stack."""
    root = tmp_path_factory.mktemp("stack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        patch.setattr(method, "run_command", run_forked)
        untrained_features(root / "cache")
        assert main(["fit", *MODEL, f"run.root={root}", "run.name=m"]) == 0
        assert stack(root) == 0
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))
    monkeypatch.setattr(method, "run_command", run_forked)


def artifact(root: Path, stage: str) -> Path:
    return root / "m" / "validate" / "stages" / stage / "validate" / "artifact"


def read(folder: Path) -> DiffusionModule:
    module = DiffusionModule(
        pretrained=str(folder), class_conditional=None, label_dropout=0.0, num_inference_steps=None, guidance_scale=None
    )
    module.configure_model()
    return module


def test_one_table_holds_what_each_stage_saves_and_costs(root: Path) -> None:
    rows = {row["stage"]: row for row in report_of(root / "m" / "validate")["table"]}
    assert list(rows) == ["plain", *STAGES]
    assert [row["nfe"] for row in rows.values()] == [6, 6, 6, 3]
    plain, last = rows["plain"], rows["s3"]
    assert plain["gain"] == 1 and plain["loss"] == 0
    assert rows["lcsc"]["megabytes"] == plain["megabytes"] and rows["w8a8"]["megabytes"] == last["megabytes"]
    assert last["gain"] == pytest.approx(2 * plain["megabytes"] / last["megabytes"])
    assert last["loss"] == pytest.approx(last["fd_digits"] - plain["fd_digits"])
    names = {path.name for path in (root / "m" / "validate" / "figures").glob("*.png")}
    assert {"stack.png", "comparison.png"} <= names


def test_a_stage_is_measured_as_in_its_own_run(root: Path) -> None:
    """The report noise is one and the same in the run of a stage and in the table of all."""
    rows = {row["stage"]: row for row in report_of(root / "m" / "validate")["table"]}
    for stage in ("lcsc", "w8a8"):
        own = report_of(artifact(root, stage).parent)
        value = own["metrics"]["fd_digits_artifact" if stage == "lcsc" else "val/fd_digits"]
        assert rows[stage]["fd_digits"] == pytest.approx(value, rel=1e-6)


def test_the_artifact_has_the_work_of_every_stage(root: Path) -> None:
    """Codes of the quantizer are handed on bit for bit, with the searched steps."""
    before, after = (load_file(next((artifact(root, s) / "transformer").glob("*.safetensors"))) for s in ("w8a8", "s3"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    whole = read(root / "m" / "validate" / "artifact")
    assert quantized_layers(whole) and whole.num_inference_steps == 3
    assert type(whole.build_scheduler()).__name__ == "SolverScheduleScheduler"
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.equal(whole.sample(noise, label), read(artifact(root, "s3")).sample(noise, label))


def test_a_finished_stage_is_not_done_again(root: Path) -> None:
    """Resumed, every artifact stays as it was, and is measured to the same table."""
    kept = [artifact(root, stage) / "manifest.json" for stage in STAGES]
    stamps, table = [file.stat().st_mtime_ns for file in kept], report_of(root / "m" / "validate")["table"]
    assert stack(root, "resume=true") == 0
    assert [file.stat().st_mtime_ns for file in kept] == stamps
    assert report_of(root / "m" / "validate")["table"] == table


def test_artifacts_take_turns_in_a_zoo(root: Path) -> None:
    """Combined weights, codes and searched steps are members like any other; the primary samples with its own steps."""
    members: dict[str, Any] = {"plain": str(root / "m" / "fit"), **{s: str(artifact(root, s).parent) for s in STAGES}}
    zoo = ZooModule(members, primary="s3", num_inference_steps=None)
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.equal(zoo.sample(noise, label), read(artifact(root, "s3")).sample(noise, label))
    times = [900.0, 500.0, 100.0]
    zoo.set_members(times, ["plain", "w8a8", "lcsc"])
    model = zoo.denoiser()
    for time, name in zip(times, ("plain", "w8a8", "lcsc"), strict=True):
        folder = root / "m" / "fit" / "artifact" if name == "plain" else artifact(root, name)
        t = torch.full((2,), time)
        assert torch.allclose(model(noise, t, label), read(folder).denoiser()(noise, t, label), atol=1e-6)


REFUSED = {
    "quantized twice": ("w8a8", ["method=viditq"], "is quantized already"),
    "codes combined": (
        "w8a8",
        ["method=lcsc", "search=lcsc", "method.objective=val/fd_digits", "method.trajectory=x"],
        "the network of the module is quantized",
    ),
}


@pytest.mark.parametrize(("stage", "words", "reason"), REFUSED.values(), ids=REFUSED)
def test_impossible_pairs_are_refused_with_the_reason(
    root: Path, stage: str, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["validate", "experiment=stack/digits_stage", *SIZE, f"run.root={root}", f"run.name=no-{words[0][7:]}"]
    assert main([*command, f"module.pretrained={artifact(root, stage)}", *words]) == 1
    assert reason in the_error(capsys.readouterr().err)


def test_a_one_step_student_has_no_sampler_to_search(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a consistency model, and where its folder is read as a diffusion model."""
    network = read(root / "m" / "fit" / "artifact").net
    ConsistencyModule(network, class_conditional=True, num_classes=10).save_pretrained(root / "student")
    command = ["validate", "experiment=stack/digits_stage", *SIZE, f"run.root={root}", "method=s3", "search=s3"]
    command += [f"module.pretrained={root / 'student'}"]
    assert main([*command, "run.name=no-s3"]) == 1
    assert "consistency model" in the_error(capsys.readouterr().err)
    student = ["module=consistency", "module.objective=null", "module.class_conditional=null"]
    assert main([*command, *student, "run.name=no-s3-student"]) == 1
    assert "its sampler cannot be searched" in the_error(capsys.readouterr().err)
