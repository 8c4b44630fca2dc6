"""Both commands from end to end on the default experiment made tiny: what they leave, how they compose and fail."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from command_line import TINY, genlight, report_of, the_error, untrained_features
from oracles.faults import exit_code, start_child
from oracles.kills import at_checkpoint, kill
from safetensors.torch import load_file, save_file

from genlight import io
from genlight.trainer.checkpoint_io import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished tiny fit, ``tiny/fit``."""
    folder = tmp_path_factory.mktemp("runs")
    os.environ["GENLIGHT_CACHE"] = str(folder / "cache")
    untrained_features(folder / "cache")
    assert genlight(folder, "fit", "run.name=tiny") == 0
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["state_dict"]


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*.ckpt"))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_fit_leaves_what_it_promises(root: Path) -> None:
    folder = root / "tiny" / "fit"
    record = io.read_json(folder / "run.json")
    assert record["status"] == "finished" and record["config"]["trainer"]["max_steps"] == 6
    assert {"git_revision", "versions", "machine", "date"} <= set(io.read_json(folder / "environment.json"))
    assert record["command"][:4] == ["python", "-m", "genlight", "fit"]
    assert "train/loss" in (folder / "metrics.csv").read_text().splitlines()[0]
    assert (folder / "figures" / "samples-step000004.png").is_file()
    # the last step is saved although it is no multiple of the interval's validation
    assert [p.name for p in sorted((folder / "checkpoints").glob("*"))] == ["step-000004.ckpt", "step-000006.ckpt"]
    report = report_of(folder)
    assert report["seed"] == 0 and report["versions"]["torch"] and report["predicted"] and report["real"]
    assert report["weights"] == [] and report["deterministic"] is None
    assert "report.md" in {p.name for p in folder.iterdir()}


def test_the_artifact_is_a_diffusers_folder_with_the_averaged_weights(root: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = root / "tiny" / "fit"
    io.verify_folder(folder / "artifact")
    pipeline = DiffusionPipeline.from_pretrained(folder / "artifact")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    saved = {name.removeprefix("network."): value for name, value in weights(newest(folder)).items()}
    assert equal(dict(pipeline.unet.state_dict()), saved)


def test_validate_takes_a_run_a_checkpoint_or_an_artifact_alike(root: Path) -> None:
    fit = root / "tiny" / "fit"
    values = []
    for name, path in {"run": fit, "file": newest(fit), "artifact": fit / "artifact"}.items():
        assert genlight(root, "validate", f"run.name={name}", f"ckpt_path={path}") == 0
        report = report_of(root / name / "validate")
        values.append(report["metrics"]["val/fd_digits"])
        assert report["draw"] == "report" and report["num_samples"] == 40
        assert len(report["data"]) == 64 and report["data"] == report_of(fit)["data"]
        (began_with,) = report["weights"]
        assert began_with["source"] == str(path) and len(began_with["sampled_sha256"]) == 64
        assert report["features"]["name"] == "digits" and report["floor"]["num_reference"] == 899
        assert (root / name / "validate" / "figures" / "samples.png").is_file()
    assert values[0] == values[1] == values[2]
    assert genlight(root, "validate", "run.name=untrained") == 0
    report = report_of(root / "untrained" / "validate")
    assert report["metrics"]["val/fd_digits"] != values[0]
    assert any("untrained" in note for note in report["notes"])


def test_the_score_does_not_depend_on_the_batch_size(root: Path) -> None:
    fit = root / "tiny" / "fit"
    assert genlight(root, "validate", "run.name=batches", f"ckpt_path={fit}", "data.eval_batch_size=7") == 0
    one, other = (report_of(root / name / "validate")["metrics"]["val/fd_digits"] for name in ("batches", "run"))
    assert one == pytest.approx(other, rel=1e-4)


def test_a_model_that_makes_no_numbers_is_no_success(root: Path, capsys: pytest.CaptureFixture) -> None:
    """All of the report is written, and says what came out."""
    broken = shutil.copytree(root / "tiny" / "fit" / "artifact", root / "broken")
    io.remove_path(broken / "manifest.json")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}, file)
    assert genlight(root, "validate", "run.name=no-numbers", f"ckpt_path={broken}") == 1
    told, folder = capsys.readouterr().err, root / "no-numbers" / "validate"
    remark = "val/fd_digits is not a number (nan): 40 of 40 samples hold NaN or infinity"
    assert f"warning: {remark}" in told and "no metric of this model is a number" in the_error(told)
    report, page = report_of(folder), (folder / "report.md").read_text()
    assert report["metrics"] == {} and report["not_finite"] == ["val/fd_digits"] and remark in report["notes"]
    assert "| `val/fd_digits` | not a number |" in page and "Nothing was measured" not in page
    assert io.read_json(folder / "run.json")["status"] == "failed"


def test_the_same_command_gives_the_same_weights(root: Path) -> None:
    assert genlight(root, "fit", "run.name=again") == 0
    assert equal(weights(newest(root / "again" / "fit")), weights(newest(root / "tiny" / "fit")))


@pytest.mark.parametrize("moment", ["first checkpoint", "inside a save", "after the last step"])
def test_a_killed_fit_resumes_to_the_same_weights(root: Path, moment: str, capsys: pytest.CaptureFixture) -> None:
    """SIGKILL in mid-epoch (an epoch has 56 batches); the same command with resume=true ends bit for bit the same."""
    name = "killed-" + moment.replace(" ", "-")
    folder = root / name / "fit"
    kill(["fit", *TINY, f"run.root={root}", f"run.name={name}"], at_checkpoint(folder, moment))
    assert genlight(root, "fit", f"run.name={name}", "resume=true") == 0
    assert "continuing from" in capsys.readouterr().err
    assert equal(weights(newest(folder)), weights(newest(root / "tiny" / "fit")))
    assert len(io.read_json(folder / "run.json")["earlier"]) == 1


def test_a_damaged_newest_checkpoint_is_passed_over(root: Path, capsys: pytest.CaptureFixture) -> None:
    folder = root / "damaged" / "fit"
    shutil.copytree(root / "tiny" / "fit", folder)
    file = newest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert genlight(root, "fit", "run.name=damaged", "resume=true") == 0
    error = capsys.readouterr().err
    assert "step-000006.ckpt is passed over" in error and "continuing from" in error and "step-000004" in error
    assert equal(weights(newest(folder)), weights(newest(root / "tiny" / "fit")))


def test_a_checkpoint_that_cannot_be_read_now_keeps_its_name(root: Path, capsys: pytest.CaptureFixture) -> None:
    """What the disk did not give once it may give the next time; nothing begins anew in silence."""
    folder = root / "unread" / "fit"
    shutil.copytree(root / "tiny" / "fit", folder)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())

    def broken(path: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "load_state", broken)
        assert genlight(root, "fit", "run.name=unread", "resume=true") == 1
    assert "holds no whole checkpoint: [Errno 5]" in the_error(capsys.readouterr().err)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names


def test_a_run_that_is_refused_at_once_imports_no_torch(root: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "genlight", "fit", *TINY, f"run.root={root}", "run.name=tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *imported, last = done.stderr.splitlines()
    assert done.returncode == 1 and any(line.startswith("error: ") for line in done.stderr.splitlines()), last
    assert not any(line.split("|")[-1].strip() in ("torch", "lightning") for line in imported)


def test_without_room_for_temporary_files_a_dry_run_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*arguments: object, **options: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    assert genlight(root, "fit", "run.name=nowhere", "dry_run=true") == 1
    assert "No usable temporary directory" in the_error(capsys.readouterr().err)


def test_a_dry_run_estimates_and_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert genlight(root, "fit", "run.name=dry", "dry_run=true", "trainer.max_steps=1000") == 0
    assert "1,000 ×" in capsys.readouterr().out
    assert not (root / "dry").exists()
    assert list(tmp_path.glob("genlight-*/run.json")) == []


def test_classes_and_guidance_work_by_switches(root: Path) -> None:
    words = ["module.class_conditional=true", "module.guidance_scale=2.0", "run.name=classes", "trainer.max_steps=2"]
    assert genlight(root, "fit", *words) == 0
    assert (root / "classes" / "fit" / "artifact" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "run.name=tiny"], "holds a run already"),
        (
            ["fit", "run.name=tiny", "resume=true", "module.num_inference_steps=3"],
            "module.num_inference_steps: was 2, now 3",
        ),
        (["fit", "run.name=../out"], "run.name"),
        (["validate", "run.name=v1", "ckpt_path=nowhere"], "there is no such file or folder"),
        (["validate", "run.name=v3", "data.draw=search"], "use report"),
        (["validate", "run.name=v2", "ckpt_path=."], "neither a run"),
        (["fit", "run.name=f1", "strategy=deepspeed_zero2"], "deepspeed_cpu"),
        (
            [
                *("fit", "run.name=f8", "strategy=deepspeed_cpu", "strategy.stage=3"),
                *("callbacks.ema=null", "callbacks.checkpoint=null"),
            ],
            "callbacks.checkpoint is left out",
        ),
        (["fit", "run.name=f2", "data=cifar10", "data.root=nowhere"], "nowhere"),
        (["fit", "run.name=f3", "module.network.in_channels=3", "module.network.out_channels=3"], "data.channels"),
        (["fit", "run.name=f4", "module.prediction_type=flow"], "prediction_type"),
        (["fit", "run.name=f5", "module.optimizer.lr=1e30", "trainer.gradient_clip_val=null"], "step"),
        (["fit", "run.name=f6", "trainer.accelerator=gpu"], "GPU"),
        (["validate", "run.name=v4", "data.num_samples=1"], "data.num_samples=1: metrics need 2 samples or more"),
        (["fit", "run.name=f9", "trainer.max_steps=4", "dry_run=true", "data=cifar10", "data.root=nowhere"], "takes 5"),
        (["fit", "run.name=tiny", "resume=true", "trainer.max_steps=4"], "has 6 steps already, more than trainer.max"),
        (["fit", "run.name=f7", "+module.network.block_out_chanels=[8]"], "block_out_channels"),
    ],
    ids=lambda v: " ".join(v[1:]) if isinstance(v, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    assert genlight(root, *words) != 0
    assert expected in the_error(capsys.readouterr().err)


def test_another_architecture_is_named_by_its_first_keys(root: Path, capsys: pytest.CaptureFixture) -> None:
    words = [
        "validate",
        "run.name=other",
        f"ckpt_path={root / 'tiny' / 'fit'}",
        "module.network.block_out_channels=[8,24]",
    ]
    assert genlight(root, *words) != 0
    assert "block_out_channels" in capsys.readouterr().err


def written(folder: Path) -> dict[Path, int]:
    """When each file of a run was written."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "error.log"))
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["+module.pretrained={folder}/artifact"], "run.overwrite=true would replace"),
        (["data=cifar10", "data.root=/nowhere"], "/nowhere"),
        (["trainer.accelerator=gpu"], "GPU"),
        (["module.network.in_channels=3", "module.network.out_channels=3"], "data.channels"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_fails_before_its_first_step_replaces_nothing(
    root: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    folder = root / "kept" / "fit"
    if not folder.exists():
        shutil.copytree(root / "tiny" / "fit", folder)
    before = written(folder)
    words = [word.format(folder=folder) for word in words]
    assert genlight(root, "fit", "run.name=kept", "run.overwrite=true", *words) == 1
    assert expected in capsys.readouterr().err
    assert written(folder) == before and (folder / "artifact" / "manifest.json").is_file()


def test_a_run_that_begins_replaces_the_one_before(root: Path) -> None:
    folder = root / "replaced" / "fit"
    shutil.copytree(root / "tiny" / "fit", folder)
    (folder / "old").write_text("x")
    assert genlight(root, "fit", "run.name=replaced", "run.overwrite=true", "trainer.max_steps=2") == 0
    assert not (folder / "old").exists() and not list(folder.glob(".repl*"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002.ckpt"]


def test_a_second_process_stops_at_once_and_names_the_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "run.name=busy", "trainer.max_steps=100000", "callbacks.checkpoint.every_n_train_steps=50"]
    first = start_child(lambda: sys.exit(genlight(root, *words)))
    try:
        folder = root / "busy" / "fit"
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoints/*.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert genlight(root, *words) != 0
        assert f"process {first} on " in the_error(capsys.readouterr().err)
    finally:
        os.kill(first, signal.SIGTERM)
        code = exit_code(first)
    assert code == 143
    assert (folder / "checkpoints" / "interrupted.ckpt").is_file()
    assert io.read_json(folder / "run.json")["status"] == "interrupted"
