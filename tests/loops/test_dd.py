"""The real commands of Distilled Decoding: a short distillation from a random teacher, and the table of everything."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from command_line import assert_accounted, report_of, the_error, untrained_features
from modules.tiny_imagegpt import saved_imagegpt
from modules.tiny_token_teacher import saved_teacher, tiny_teacher
from PIL import Image

from genlight.cli import main
from genlight.loops import dd_work
from genlight.nets.dd_student import student_of
from genlight.nets.published import published_shapes

MODEL = [
    "experiment=dd/digits",
    "module.teacher_recipe=null",
    "data.num_pairs=60",
    "data.shard_size=30",
    "data.batch_size=20",
    "data.images.eval_batch_size=16",
    "data.images.num_samples=40",
    "metrics.metrics=[fd]",
    "trainer.accelerator=cpu",
]
FIT = ["trainer.max_steps=6", "trainer.val_check_interval=6", "trainer.num_sanity_val_steps=0"]


def fit(root: Path, kind: str, *words: str) -> int:
    teacher = f"module.teacher={root}/teacher-{kind}"
    return main(["fit", *MODEL, *FIT, teacher, f"run.root={root}", f"run.name={kind}", *words])


def validate(root: Path, kind: str, name: str, *words: str) -> int:
    teacher = f"module.teacher={root}/teacher-{kind}"
    given = [f"ckpt_path={root}/{kind}/fit", f"run.root={root}", f"run.name={name}"]
    return main(["validate", *MODEL, teacher, *given, "method.latency_batches=[1]", *words])


def measured_shortly(patch: pytest.MonkeyPatch) -> None:
    """Times of each variant, and the samples on which a dry run measures it."""
    patch.setattr(dd_work, "_TIMED", 0.01)
    patch.setattr(dd_work, "_PROBES", (4, 16))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it the students `llamagen` and `var`, and `all`, the table of the first."""
    root = tmp_path_factory.mktemp("dd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        measured_shortly(patch)
        untrained_features(root / "cache")
        for kind in ("llamagen", "var"):
            saved_teacher(root / f"teacher-{kind}", kind)
        assert fit(root, "llamagen") == 0
        assert fit(root, "var", "module.timesteps=[0,1]") == 0
        words = ["method.refine=[1,16]", "method.involved=[[1,6],[13,17],[1,17]]", "method.latency_batches=[1,3]"]
        words += ["method.quantized=[w8,w8a8,w4]"]
        words += ["module.split_timestep=8", "module.num_inference_steps=2"]
        assert validate(root, "llamagen", "all", *words) == 0
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))
    measured_shortly(monkeypatch)


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in report_of(folder)["table"]}


def test_the_table_holds_teacher_student_and_all_between(root: Path) -> None:
    folder = root / "all" / "validate"
    assert_accounted(folder)
    rows = rows_of(folder)
    calls = {name: row["calls"] for name, row in rows.items()}
    assert calls == {
        "teacher": 16,
        "teacher, drawn": 16,
        "teacher, drawn again": 16,
        "student, 1 step": 1,
        "student, 2 steps": 2,
        "student, 1 step, vectors from 8": 1,
        "student, 2 steps, vectors from 8": 2,
        "teacher for 1 to 5": 6,
        "teacher for 13 to 16": 5,
        "teacher for 1 to 16": 16,
        "student + 1 passes of the teacher": 2,
        "student + 16 passes of the teacher": 17,
        "skip-2": 14,
        "skip-5": 11,
        "skip-8": 8,
        "onestep*, by class": 1,
        "onestep*": 1,
        "student, 1 step, w8": 1,
        "student, 1 step, w8a8": 1,
        "student, 1 step, w4": 1,
    }
    columns = {"fd_digits", "nll", "agreement", "agreement_first_quarter", "bigram_distance", "ms_1", "ms_3"}
    assert all(columns <= row.keys() for row in rows.values())
    assert all(row["ms_1"] > 0 for row in rows.values())
    sizes = {name: row["megabytes"] for name, row in rows.items() if row["megabytes"] is not None}
    assert sizes["student, 1 step"] > sizes["student, 1 step, w8"] > sizes["student, 1 step, w4"] > 0
    assert len(sizes) == 7
    notes = " ".join(report_of(folder)["notes"])
    assert "fewer than" not in notes and "has not learned" not in notes
    metrics = report_of(folder)["metrics"]
    assert metrics["fd_digits_teacher"] == rows["teacher"]["fd_digits"]
    assert metrics["fd_digits_student"] == rows["student, 2 steps, vectors from 8"]["fd_digits"]
    assert metrics["fd_digits_student_w8"] == rows["student, 1 step, w8"]["fd_digits"]
    for name in ("w8", "w8a8", "w4"):
        assert (folder / "artifact" / name / "sample.py").is_file()
    # the module as it is configured
    assert metrics["val/fd_digits"] == pytest.approx(metrics["fd_digits_student"], rel=1e-4)
    assert len({row["fd_digits"] for name, row in rows.items() if name.startswith("student, ")}) > 6
    figures = {path.name for path in (folder / "figures").glob("*.png")}
    assert {"comparison.png", "quality.png"} <= figures


def test_what_must_equal_the_teacher_does(root: Path) -> None:
    rows = rows_of(root / "all" / "validate")
    teacher = rows["teacher"]
    for name in ("teacher for 1 to 16", "student + 16 passes of the teacher"):
        for column in ("agreement", "nll", "fd_digits", "bigram_distance"):
            assert rows[name][column] == pytest.approx(teacher[column], abs=1e-6), (name, column)
    # what the teacher decides first stays; what it left out differs
    assert rows["teacher for 1 to 5"]["agreement_first_quarter"] == 1.0
    assert rows["skip-8"]["agreement_first_quarter"] == 1.0 > rows["skip-8"]["agreement"] > 0.5
    # the same tokens, other vectors
    for steps in ("1 step", "2 steps"):
        codes, vectors = rows[f"student, {steps}"], rows[f"student, {steps}, vectors from 8"]
        assert codes["agreement"] == vectors["agreement"] and codes["fd_digits"] != vectors["fd_digits"]
    assert rows["teacher, drawn"]["bigram_distance"] is None


def test_a_var_is_distilled_too_and_stops_between_scales(root: Path) -> None:
    words = ["method.refine=[3]", "module.timesteps=[0,1]", "method.quantized=[w8]", "data.images.num_samples=12"]
    assert validate(root, "var", "var-all", *words) == 0
    folder = root / "var-all" / "validate"
    rows = rows_of(folder)
    assert rows["student + 3 passes of the teacher"]["agreement"] == 1.0
    # the sum of two scales has an image and a distance, but no likelihood of all tokens
    assert rows["skip-1"]["nll"] is None and rows["skip-1"]["fd_digits"] > 0
    assert rows["teacher"]["calls"] == 3
    assert rows["student, 1 step, w8"]["megabytes"] < rows["student, 1 step"]["megabytes"]
    assert report_of(folder)["metrics"]["fd_digits_student"] == rows["student, 1 step"]["fd_digits"]
    few = "data.images.num_samples=12 samples are fewer than the 16 features of val/fd_digits"
    assert few in " ".join(report_of(folder)["notes"])


def test_the_artifact_samples_without_genlight(root: Path) -> None:
    for folder in (root / "llamagen" / "fit", root / "all" / "validate"):
        program = (
            "import sys; sys.modules['genlight'] = None; sys.path.insert(0, '.'); import torch; from sample import "
            "Student; s = Student('.'); print(list(s.sample(s.noise(2, 0), torch.tensor([0, 9])).shape))"
        )
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder / "artifact")
        assert done.stdout.strip() == "[2, 1, 8, 8]", done.stderr
    config = json.loads((root / "all" / "validate" / "artifact" / "config.json").read_text())
    assert config["split_timestep"] == 8 and config["trained_timesteps"] == [0, 5]


def test_a_student_that_is_told_scales_is_measured_at_the_one_asked_for(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["module.guidance_range=[1,3]", f"module.teacher={root}/teacher-llamagen", f"run.root={root}"]
    assert main(["fit", *MODEL, *FIT, *told, "run.name=told"]) == 0
    few = ["method.refine=[16]", "method.skip=[8]", "method.latency_batches=[]", f"ckpt_path={root}/told/fit"]
    few += ["method.involved=[[1,6],[2,4]]", "method.skip_zeros=true"]
    measure = ["validate", *MODEL, *told, *few, "run.overwrite=true"]
    assert main([*measure, "run.name=told-high", "module.guidance_scale=2.5"]) == 0
    rows, others = rows_of(root / "told-high" / "validate"), rows_of(root / "all" / "validate")
    (note,) = [note for note in report_of(root / "told-high" / "validate")["notes"] if "has not learned" in note]
    assert note.startswith("'teacher for 2 to 3': the student goes on after 3 groups") and note.endswith("[0, 5]")
    refined = rows["student + 16 passes of the teacher"]
    assert refined["agreement"] == 1.0 and refined["nll"] == pytest.approx(rows["teacher"]["nll"])
    assert rows["skip-8, zeros"]["calls"] == 8 and rows["skip-8, zeros"]["nll"] is None
    # the teacher of "all" has its own scale, 1.5
    assert rows["teacher"]["nll"] != others["teacher"]["nll"]
    config = json.loads((root / "told-high" / "validate" / "artifact" / "config.json").read_text())
    assert config["guidance_scale"] == 2.5 and config["student"]["guidance_range"] == [1.0, 3.0]
    for words, message in (
        (["module.guidance_scale=3.5"], "guidance_scale = 3.5 must be from 1.0 to 3.0"),
        (["data.guidance_range=null"], "data.guidance_range = null, but module.guidance_range = [1.0, 3.0]"),
    ):
        capsys.readouterr()
        assert main([*measure, "run.name=mistake", *words]) != 0
        assert message in the_error(capsys.readouterr().err)


def test_an_imagegpt_of_transformers_is_distilled_and_measured(root: Path) -> None:
    """64 pixels of 9 colours, no classes; the teacher for all groups is the teacher."""
    (root / "pictures").mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(root / "pictures" / f"{number}.png")
    words = ["experiment=dd/imagegpt", "metrics=none", "trainer.accelerator=cpu", "module.timesteps=[0,5]"]
    words += [f"data.images.root={root / 'pictures'}", "data.images.image_size=8", "data.images.num_samples=8"]
    words += [f"module.teacher={saved_imagegpt(root / 'gpt', size=8)}", f"run.root={root}"]
    words += ["data.num_pairs=20", "data.shard_size=20", "data.batch_size=10"]
    assert main(["fit", *words, *FIT, "run.name=gpt-student"]) == 0
    few = ["method.refine=[64]", "method.skip=[32]", "method.latency_batches=[]", "method.involved=[[1,65]]"]
    assert main(["validate", *words, *few, "run.name=gpt-all", f"ckpt_path={root}/gpt-student/fit"]) == 0
    rows = rows_of(root / "gpt-all" / "validate")
    assert rows["teacher"]["calls"] == 64 and rows["student, 2 steps"]["calls"] == 2
    for name in ("teacher for 1 to 64", "student + 64 passes of the teacher"):
        assert rows[name]["agreement"] == 1.0
    assert rows["skip-32"]["agreement"] >= 0.5 and rows["skip-32"]["agreement_first_quarter"] == 1.0
    # without images to compare with, likelihood is what is told first
    assert report_of(root / "gpt-all" / "validate")["metrics"]["nll_student"] == rows["student, 1 step"]["nll"]


def test_a_released_student_is_measured_and_exported_by_the_recipe_of_its_teacher(root: Path) -> None:
    """A small VAR, and weights as they are published. Mixed precision leaves the teacher exact."""
    for label in range(10):
        (root / "classes" / str(label)).mkdir(parents=True)
        Image.new("L", (8, 8), 25 * label).save(root / "classes" / str(label) / "0.png")
    shapes = published_shapes(student_of(tiny_teacher("var").model))
    weights = {key: torch.randn(shape) / 4 for key, shape in shapes.items()}
    safetensors.torch.save_file(weights, root / "released.safetensors")
    words = ["experiment=dd/var_d16", "metrics=none", "trainer.accelerator=cpu", "module.timesteps=[0,1]"]
    words += ["module.split_timestep=1", f"module.teacher={root}/teacher-var", f"run.root={root}"]
    words += [f"module.student_weights={root}/released.safetensors", f"data.images.root={root}/classes"]
    words += [f"data.images.{key}" for key in ("image_size=8", "channels=1", "num_classes=10", "num_samples=8")]
    words.append("data.images.held_out_fraction=0.5")
    assert main(["validate", *words, "method=none", "run.name=released"]) == 0
    assert (root / "released" / "validate" / "report.json").is_file()
    words += ["data.num_pairs=20", "data.shard_size=20", "data.batch_size=10"]
    assert main(["fit", *words, *FIT, "trainer.max_steps=1", "run.name=released-pairs"]) == 0
    few = ["method.refine=[3]", "method.latency_batches=[]"]
    assert main(["validate", *words, *few, "run.name=released-all"]) == 0
    folder = root / "released-all" / "validate"
    assert rows_of(folder)["student + 3 passes of the teacher"]["agreement"] == 1.0
    saved = safetensors.torch.load_file(folder / "artifact" / "student.safetensors")
    assert torch.equal(saved["student.backbone.head.weight"], weights["head.weight"])


def test_no_recipe_takes_vectors_that_are_means() -> None:
    """Squared error alone makes them so."""
    for path in (Path(__file__).parents[2] / "conf" / "experiment" / "dd").glob("*.yaml"):
        module = yaml.safe_load(path.read_text()).get("module", {})
        assert module.get("split_timestep") is None or module.get("perceptual_weight", 0) > 0, path.name


def test_mistakes_are_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["method.involved=[[1,18]]"], "method: involved = [1, 18]"),
        (["method.skip=[16]"], "method: skip = [16] must be less than 16"),
        (["method.refine=[0]"], "method.refine = [0] must be 1 or more"),
        (["data.num_pairs=9"], "data: num_pairs = 9 must be at least 10"),
        (["method.quantized=[w3]"], "method.quantized = ['w3']: w3 must be one of w8, w8a8, w4"),
        (["data.num_pairs=61"], "lacks shard 2 of 3: not all pairs are made"),
        (["module.timesteps=[0,9]"], "module.timesteps = [0, 9], but the checkpoint has learned [0, 5]"),
    ):
        assert validate(root, "llamagen", "mistake", "run.overwrite=true", *words) != 0
        assert message in the_error(capsys.readouterr().err)


def test_a_dry_run_says_what_all_rows_cost(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(root, "llamagen", "dry", "dry_run=true") == 0
    assert "variants" in capsys.readouterr().out
