"""The real commands of LCSC: a short consistency training that collects its checkpoints, and their combination."""

import json
import math
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
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
from diffusers import DiffusionPipeline
from oracles.faults import in_child
from oracles.kills import at_line, kill

from genlight import io
from genlight.checkpoints.trajectory import Trajectory
from genlight.cli import main
from genlight.errors import UserError
from genlight.loops import checkpoint_work
from genlight.loops.checkpoint_gradient import GradientDescent
from genlight.loops.checkpoint_remarks import remarks_before
from genlight.loops.checkpoint_search import CheckpointSearch
from genlight.loops.checkpoint_work import CheckpointWork, Variant
from genlight.loops.search import SearchSettings
from genlight.metrics.features import FeatureExtractor
from genlight.metrics.generative import GenerativeMetrics
from genlight.search.spaces.checkpoint_coefficients import Combination
from genlight.trainer.checkpoint_io import load_checkpoint

MODEL = [
    "experiment=lcsc/digits_cd",
    "module.teacher=null",
    "module.teacher_recipe=null",
    "module.objective._target_=genlight.diffusion.consistency.ConsistencyTraining",
    "module.network={_target_: diffusers.UNet2DModel, sample_size: 8, in_channels: 1, out_channels: 1,"
    " norm_num_groups: 4, block_out_channels: [8, 16],"
    " down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]}",
    "module.class_conditional=false",
    "data.batch_size=16",
    "data.eval_batch_size=40",
    "data.num_samples=40",
    "metrics.metrics=[fd]",
    "trainer.accelerator=cpu",
]
FIT = [
    "trainer.max_steps=16",
    "trainer.val_check_interval=16",
    "trainer.num_sanity_val_steps=0",
    "callbacks.collector.every_n_steps=2",
]
SEARCH = ["search.budget=12", "search.fidelity=40", "search.finalists=3", "method.select=40", "method.singles=3"]
SEARCH += ["search.shared=false"]


def fit(root: Path, name: str, *words: str) -> int:
    return main(["fit", *MODEL, *FIT, f"run.root={root}", f"run.name={name}", *words])


def validate(root: Path, name: str, *words: str) -> int:
    return main(
        ["validate", *MODEL, *SEARCH, f"ckpt_path={root}/trained/fit", f"run.root={root}", f"run.name={name}", *words]
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `trained`, and `found`, a finished search on it."""
    root = tmp_path_factory.mktemp("lcsc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        untrained_features(root / "cache")
        assert fit(root, "trained") == 0
        assert validate(root, "found") == 0
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["kind"]: row for row in report_of(folder)["table"]}


def test_every_average_stands_in_the_table(root: Path) -> None:
    folder = root / "found" / "validate"
    assert_accounted(folder)
    rows = rows_of(folder)
    kinds = {
        "LCSC",
        "random search",
        "last",
        "single",
        "ema",
        "swa",
        "lawa",
        "power ema",
        "line",
        "neon",
        "tracked ema",
        "post-hoc ema",
    }
    assert kinds <= rows.keys()
    assert all({"search", "select", "fd_digits"} <= row.keys() for row in rows.values())
    metrics = report_of(folder)["metrics"]
    assert metrics["fd_digits_lcsc"] == rows["LCSC"]["fd_digits"]
    assert metrics["fd_digits_last"] == rows["last"]["fd_digits"]
    assert any("effective rank" in note for note in report_of(folder)["notes"])
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert {"coefficients.png", "comparison.png", "search-lcsc.png", "search-random-search.png"} <= names


def test_gradient_descent_lowers_the_search_score(root: Path) -> None:
    """From the newest checkpoint and from the best combination: its best is below the newest checkpoint's."""
    descent = (
        "method.gradient={_target_: genlight.loops.checkpoint_gradient.GradientDescent, steps: 20, samples: 40, chunk: "
        "16, ridge: 0.0}"
    )
    assert validate(root, "descended", descent, "method.random_search=false") == 0
    rows = rows_of(root / "descended" / "validate")
    assert rows["gradient"]["search"] < rows["last"]["search"]
    best = min((rows[kind] for kind in ("gradient", "LCSC")), key=lambda row: row["select"])
    assert report_of(root / "descended" / "validate")["metrics"]["fd_digits_lcsc"] == best["fd_digits"]


def test_the_artifact_is_the_winner(root: Path, capsys: pytest.CaptureFixture) -> None:
    """Loaded by plain diffusers; measured again it has the distance of the table; its weights sum to one."""
    folder = root / "found" / "validate"
    artifact = folder / "artifact"
    content = io.read_json(artifact / "coefficients.json")
    assert content["kind"] == "checkpoint_coefficients" and len(content["steps"]) == len(content["weights"][0])
    held = next(row for row in report_of(folder)["table"] if row["weights"] == content["name"])
    assert held["select"] == min(row["select"] for row in report_of(folder)["table"])
    told = any("the search found nothing better" in note for note in report_of(folder)["notes"])
    assert told == (held["kind"] != "LCSC")
    if content["weights"] is not None:
        assert sum(content["weights"][0]) == pytest.approx(1.0, abs=1e-9)
    pipeline = DiffusionPipeline.from_pretrained(artifact)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=1, output_type="np").images.shape == (2, 8, 8, 1)
    words = ["data=digits", "metrics=digits", "metrics.metrics=[fd]", "module=consistency", "trainer.accelerator=cpu"]
    words += [
        f"module.pretrained={artifact}",
        "module.objective=null",
        "data.num_samples=40",
        "data.eval_batch_size=20",
    ]
    assert main(["validate", *words, f"run.root={root}", "run.name=again"]) == 0
    found = report_of(root / "again" / "validate")["metrics"]["val/fd_digits"]
    assert found == pytest.approx(held["fd_digits"], rel=1e-4)
    metrics = report_of(folder)["metrics"]
    assert metrics["val/fd_digits"] == metrics["fd_digits_artifact"] == held["fd_digits"]
    assert metrics["fd_digits_before"] == pytest.approx(metrics["fd_digits_last"], rel=1e-4)
    assert content["sampler"]["class"] == "CMStochasticIterativeScheduler" and content["seeds"]["search"] == 0
    assert "of the sampler, here it is" not in capsys.readouterr().err
    assert main(["validate", *words, f"run.root={root}", "run.name=twice", "module.num_inference_steps=2"]) == 0
    assert "warning: " in (told := capsys.readouterr().err) and "num_inference_steps = 1 of the sampler" in told


def test_the_last_checkpoint_is_the_plain_weights(root: Path) -> None:
    """The row "last" of the report is what the raw weights of the run reach: nothing is left of the averages."""
    trajectory = Trajectory.open(root / "trained" / "fit" / "trajectory")
    last = {name: trajectory.read(-1, name) for name in trajectory.names}
    checkpoint = sorted((root / "trained" / "fit" / "checkpoints").glob("*.ckpt"))[-1]
    raw = load_checkpoint(checkpoint).get("current_model_state", load_checkpoint(checkpoint)["state_dict"])
    assert all(torch.equal(raw[name], value) for name, value in last.items())


def test_a_killed_search_resumes_to_the_same_archive(root: Path) -> None:
    words = [*MODEL, *SEARCH, f"ckpt_path={root}/trained/fit", f"run.root={root}", "run.name=killed"]
    kill(["validate", *words], at_line("lcsc", 20))
    assert validate(root, "killed", "resume=true") == 0
    assert histories(root / "killed" / "validate") == histories(root / "found" / "validate")
    assert rows_of(root / "killed" / "validate") == rows_of(root / "found" / "validate")


@pytest.mark.slow  # in test_s3.py it is not, and the search is the same
def test_two_processes_give_the_archive_of_one(root: Path) -> None:
    words = [*MODEL, *SEARCH, f"ckpt_path={root}/trained/fit", f"run.root={root}", "run.name=ddp", "strategy=ddp"]
    run_in_own_process("validate", *words, "trainer.devices=2")
    assert histories(root / "ddp" / "validate") == histories(root / "found" / "validate")


@pytest.mark.parametrize(
    "words",
    [
        ["search=genetic", "method.basis={_target_: genlight.checkpoints.bases.Raw}"],
        ["method.signed=false"],
        ["method.groups=[conv, .*]"],
        ["method.until=12"],
    ],
    ids=lambda words: words[0],
)
def test_other_ways_to_combine(root: Path, words: list[str]) -> None:
    """Without the averages that the training tracked, which have no weights over checkpoints."""
    name = words[0].split("=")[1].strip("[]").replace(", ", "-").replace(".*", "rest")
    folder = root / "without-averages"
    if not folder.is_dir():
        shutil.copytree(root / "trained" / "fit" / "trajectory", folder, ignore=shutil.ignore_patterns("ema"))
    words = [*words, f"method.trajectory={folder}", "method.random_search=false"]
    assert validate(root, f"other-{name}", *words) == 0
    content = io.read_json(root / f"other-{name}" / "validate" / "artifact" / "coefficients.json")
    weights = torch.tensor(content["weights"])
    assert torch.allclose(weights.sum(1), torch.ones(len(weights)))
    if "method.signed=false" in words:
        assert (weights >= -1e-12).all()
    if "method.until=12" in words:
        assert content["steps"][-1] == 12


@pytest.mark.slow  # test_oms.py extends a search
def test_a_larger_budget_goes_on_from_the_archive(root: Path, capsys: pytest.CaptureFixture) -> None:
    longer = copied(root / "found" / "validate", "longer")
    assert validate(root, "longer", "resume=true", "search.budget=15", "method.objective=val/kid_digits") != 0
    assert "method.objective: was 'val/fd_digits', now" in the_error(capsys.readouterr().err)
    assert validate(root, "longer", "resume=true", "search.budget=15") == 0
    assert added(root / "found" / "validate", longer) == {"lcsc": 3, "random-search": 3}


def test_a_dry_run_says_what_it_would_cost(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert validate(root, "dry", "dry_run=true") == 0
    assert "search lcsc" in capsys.readouterr().out
    assert not (root / "dry").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.trajectory=nowhere"], "train with callbacks=collector"),
        (["ckpt_path=null"], "give ckpt_path"),
        (["method.trajectory=[ROOT/trained/fit/checkpoints/*.ckpt]"], "1 checkpoints; a combination needs three"),
        (["method.trajectory=[ROOT/trained/fit/artifact/nothing-*]"], "there is nothing at"),
        (["method.objective=val/fid"], "choose one of val/fd_digits"),
        (["method.until=5"], "from step"),
        (["method.groups=[]"], "groups"),
        (["method.gradient={_target_: genlight.loops.checkpoint_gradient.GradientDescent, lr: 0}"], "lr"),
        (
            [
                "method.gradient={_target_: genlight.loops.checkpoint_gradient.GradientDescent}",
                "module.num_inference_steps=2",
            ],
            "module.num_inference_steps=1",
        ),
        (["method.groups=[nothing_like_this]"], "groups"),
        (["search=none"], "there is no key 'search.budget'"),
        (["method.basis={_target_: genlight.checkpoints.bases.GeometricBins, size: 0}"], "size"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    words = [word.replace("ROOT", str(root)) for word in words]
    assert validate(root, "wrong", *words, "run.overwrite=true") != 0
    assert expected in the_error(capsys.readouterr().err)


def test_sharded_weights_are_refused(root: Path, capfd: pytest.CaptureFixture) -> None:
    """In a process of its own, which DeepSpeed marks."""
    words = [*MODEL, *SEARCH, f"ckpt_path={root}/trained/fit", f"run.root={root}", "run.name=sharded"]
    words += ["strategy=deepspeed_cpu", "strategy.stage=3", "callbacks.ema=null", "callbacks.ema_bank=null"]
    assert in_child(lambda: sys.exit(main(["validate", *words]))) > 0
    assert "use strategy=auto or strategy=ddp" in capfd.readouterr().err


def test_a_damaged_checkpoint_is_named(root: Path, capsys: pytest.CaptureFixture) -> None:
    folder = root / "copy"
    shutil.copytree(root / "trained" / "fit" / "trajectory", folder)
    files = sorted(folder.glob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-7])
    assert validate(root, "damaged", f"method.trajectory={folder}") != 0
    assert files[1].name in capsys.readouterr().err
    method = CheckpointSearch(SearchSettings(strategy=None), "val/fd_digits", str(folder), skip_damaged=True)
    space = method.space(None, Stand(Trajectory.open(root / "trained" / "fit" / "trajectory")))
    assert len(space.trajectory.members) == len(files) - 1 and files[1].name in space.trajectory.damaged[0]


class Stand(torch.nn.Module):
    """A module with the weights that a trajectory holds, and one more."""

    def __init__(self, trajectory: Trajectory, sampler: int = 1) -> None:
        super().__init__()
        self.weights = {name: trajectory.read(-1, name).clone().requires_grad_() for name in trajectory.names}
        self.num_inference_steps, self.vae, self.metrics = sampler, None, None

    def configure_model(self) -> None: ...

    def live_weights(self) -> dict[str, torch.Tensor]:
        return {**self.weights, "other": torch.zeros(1, requires_grad=True)}

    denoised = live_weights


def test_a_person_is_told_what_is_left_out(root: Path) -> None:
    trajectory = Trajectory.open(root / "trained" / "fit" / "trajectory")
    module = Stand(trajectory)
    module.metrics = GenerativeMetrics(Features(), ["fd"])
    settings = SearchSettings(strategy=None, fidelity=40)
    method = CheckpointSearch(settings, "val/fid", str(trajectory.folder))
    work: Any = SimpleNamespace(method=method, module=module, space=method.space(None, module))
    lacking, few = remarks_before(work)
    assert f"lack 1 of {len(trajectory.names) + 1} parameters (other" in lacking
    assert "search.fidelity=40 samples are fewer than the 2048 features of val/fid" in few
    # of a norm that was trained, not of one beside it
    layer = trajectory.names[0].rpartition(".")[0]
    buffers = [(f"{place}.running_mean", torch.zeros(1)) for place in (layer, "frozen")]
    module.named_buffers = lambda: iter(buffers)  # type: ignore[method-assign]
    assert f"1 running statistics of norms ({layer}.running_mean, …) are not mixed" in remarks_before(work)[1]


def test_what_fails_on_the_select_draw_is_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its infinite score could not be written, and it would fail again on the report draw."""
    scores = {"LCSC 3": 2.0, "neon 2": math.inf, "last": 1.0}
    method = CheckpointSearch(SearchSettings(strategy=None), "val/fid", str(root))
    work = CheckpointWork(method, SimpleNamespace(timing=lambda name: nullcontext()), None, None, None, "")
    work.runner = SimpleNamespace(notes=[], folder=root)
    found = [Variant(name, name.split(" ")[0], Combination(()), 1.0) for name in scores]
    monkeypatch.setattr(CheckpointWork, "searched_kinds", ())
    monkeypatch.setattr(CheckpointWork, "_of_records", lambda self: list(found))
    monkeypatch.setattr(CheckpointWork, "_tracked", lambda self: [])
    monkeypatch.setattr(CheckpointWork, "_descended", lambda self: [])
    monkeypatch.setattr(CheckpointWork, "judge", lambda self, weights, draw, count: list(scores.values()))
    assert [variant.name for variant in work.search()] == ["last", "LCSC 3"]
    assert work.runner.notes == ["could not be measured, and are left out: neon 2"]
    scores["LCSC 3"] = math.inf
    with pytest.raises(UserError, match="no combination could be measured"):
        work.search()


def test_a_lost_device_is_no_bad_score(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = CheckpointSearch(SearchSettings(strategy=None), "val/fid", str(root))
    work = CheckpointWork(method, None, None, None, None, "")
    errors = iter([ValueError("one"), torch.AcceleratorError("lost", 1)])
    monkeypatch.setattr(CheckpointWork, "objective", lambda self, draw: None)
    monkeypatch.setattr(CheckpointWork, "measured", lambda *_: (_ for _ in ()).throw(next(errors)))
    monkeypatch.setattr(checkpoint_work, "in_turn", lambda evaluations, pieces: [piece() for piece in pieces])
    assert work.judge([Combination(())], "select", 1) == [math.inf]
    with pytest.raises(torch.AcceleratorError):
        work.judge([Combination(())], "select", 1)


def test_gradients_do_not_go_through_a_decoder_nor_through_rounding(root: Path) -> None:
    module = Stand(Trajectory.open(root / "trained" / "fit" / "trajectory"))
    metrics = GenerativeMetrics(Features(), ["fd"])
    with pytest.raises(UserError, match="rounded to 256 levels"):
        GradientDescent().check(module, metrics, "val/fid")
    module.vae = object()
    with pytest.raises(UserError, match="decoder of a VAE"):
        GradientDescent().check(module, metrics, "val/fid")


class Features(FeatureExtractor):
    name, is_inception, num_features = "inception", True, 2048


def test_another_network_is_refused(root: Path, capsys: pytest.CaptureFixture) -> None:
    trajectory = root / "trained" / "fit" / "trajectory"
    words = [word for word in MODEL if not word.startswith("module.network")]
    network = next(word for word in MODEL if word.startswith("module.network")).replace("[8, 16]", "[8, 24]")
    done = main(
        ["validate", *words, network, *SEARCH, f"method.trajectory={trajectory}", f"run.root={root}", "run.name=other"]
    )
    assert done != 0
    assert "network." in the_error(capsys.readouterr().err)


def test_history_says_what_was_mixed(root: Path) -> None:
    lines = histories(root / "found" / "validate")["lcsc"].splitlines()[1:]
    records = [json.loads(line) for line in lines]
    assert {record["source"] for record in records} == {"initial", "cma_es"}
    assert all("val/fd_digits" in record["facts"] for record in records if record["failure"] is None)
