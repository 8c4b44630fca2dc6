"""The real command `validate experiment=s3/digits`, with an untrained network and a few candidates."""

import json
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
    run_in_ranks,
    the_error,
    untrained_features,
)
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from oracles.kills import at_line, kill

from genlight import io
from genlight.cli import main
from genlight.diffusion.solver.serialization import bank_from_json
from genlight.loops import evaluation, solver_report, solver_work

SMALL = [
    "experiment=s3/digits",
    "module.network.num_layers=1",
    "module.network.num_attention_heads=1",
    "module.network.attention_head_dim=16",
    "module.num_inference_steps=2",
    "data.eval_batch_size=20",
    "data.num_samples=40",
    "metrics.metrics=[fd]",
    "method.nfe=[2,3]",
    "method.solvers=[ddim,dpmpp_2m,unipc_2_bh2]",
    "method.spacings=[log_snr,uniform]",
    "method.teacher.steps=10",
    "method.noise.search=16",
    "method.noise.select=8",
    "method.noise.report=24",
    "method.refine.iterations=2",
    "method.finetune.iterations=2",
    "search.budget=12",
    "search.fidelity=16",
    "search.strategy.screening_fidelity=8",
    "search.strategy.promoted=4",
    "search.finalists=4",
    "trainer.accelerator=cpu",
]
# what another run measured is measured again
ALONE = "search.shared=false"


def validate(root: Path, name: str, *words: str) -> int:
    return main(["validate", *SMALL, f"run.root={root}", f"run.name={name}", *words])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `run`, a finished search."""
    root = tmp_path_factory.mktemp("s3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        untrained_features(root / "cache")
        assert validate(root, "run") == 0
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))


def outcomes(folder: Path) -> list[Any]:
    return [io.read_json(path)["outcome"] for path in sorted(folder.glob("search/*/outcome.json"))]


def test_the_report_says_what_was_gained(root: Path) -> None:
    folder = root / "run" / "validate"
    assert_accounted(folder)
    report = report_of(folder)
    rows = {(row["nfe"], row["sampler"]): row for row in report["table"]}
    for nfe in (2, 3):
        best, searched, tuned = (rows[nfe, name] for name in ("best hand-made", "searched schedule", "tuned table"))
        assert {"rmse", "low", "high", "gain", "fd_digits"} <= best.keys()
        assert best["low"] <= best["rmse"] <= best["high"]
        assert report["metrics"][f"rmse_searched_{nfe}"] == searched["rmse"]
        assert report["metrics"][f"rmse_tuned_{nfe}"] == tuned["rmse"]
        assert report["metrics"][f"fd_digits_at_{nfe}"] == tuned["fd_digits"]
    assert "fd_digits_before" in report["metrics"] and "val/fd_digits" not in report["metrics"]
    assert "Before and after" in (folder / "report.md").read_text()
    assert report["predicted"]["total_seconds"] > 0
    assert sum("no scheduler of diffusers takes the steps" in note for note in report["notes"]) == 2
    assert not (folder / "artifact" / "stock").exists()
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert {"quality.png", "schedules.png", "search-nfe2.png", "search-nfe3.png"} <= names


def test_the_artifact_samples_as_the_search_measured(root: Path) -> None:
    """Loaded by plain diffusers, for both numbers of evaluations, with the tuned table."""
    folder = root / "run" / "validate" / "artifact"
    pipeline = DiffusionPipeline.from_pretrained(
        folder, trust_remote_code=True, custom_pipeline=str(folder / "pipeline.py")
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.available_steps == [2, 3]
    for steps in (2, 3):
        images = pipeline(batch_size=2, num_inference_steps=steps, output_type="np").images
        assert images.shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="2, 3"):
        pipeline(batch_size=1, num_inference_steps=4)
    bank = bank_from_json((folder / "solver_bank.json").read_text())
    assert sorted(bank.schedules) == sorted(bank.tables) == [2, 3]


def test_the_artifact_can_be_measured_again(root: Path) -> None:
    """`module=diffusion_pretrained` samples with the searched schedule: the Fréchet distance is that of the table."""
    artifact = root / "run" / "validate" / "artifact"
    words = ["data=digits", "metrics=digits", "module=diffusion_pretrained", "metrics.metrics=[fd]"]
    words += [f"module.pretrained={artifact}", "module.num_inference_steps=3", "module.guidance_scale=1.0"]
    words += ["data.num_samples=40", "data.eval_batch_size=20", "trainer.accelerator=cpu"]
    assert main(["validate", *words, f"run.root={root}", "run.name=again"]) == 0
    found = report_of(root / "again" / "validate")["metrics"]["val/fd_digits"]
    rows = {(row["nfe"], row["sampler"]): row for row in report_of(root / "run" / "validate")["table"]}
    assert found == pytest.approx(rows[3, "tuned table"]["fd_digits"], rel=1e-3)


def test_another_run_of_the_same_search_measures_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Under another name: the same records, and the report says that they are the other run's."""

    def never(objective: Any, time_limit_s: float | None) -> Any:
        def evaluate(trials: Any) -> Any:
            raise AssertionError("a candidate was measured a second time")

        return evaluate

    monkeypatch.setattr(solver_work, "in_one_batch", never)
    few = ("method.nfe=[2]", "method.refine=null", "method.finetune=null")
    assert validate(root, "shared", *few) == 0
    folder = root / "shared" / "validate"
    found = histories(folder)["nfe2"]
    assert found == histories(root / "run" / "validate")["nfe2"]
    note = f"{len(found.splitlines()) - 1} candidates of the search nfe2 have the scores of other runs"
    assert note in report_of(folder)["notes"]
    # a repetition is for comparing, and measures in earnest
    capsys.readouterr()
    assert main(["--rerun", str(folder), "run.name=alone"]) != 0
    assert "measured a second time" in capsys.readouterr().err


def test_a_killed_search_resumes_to_the_same_archive_and_winner(root: Path) -> None:
    """SIGKILL while the second search writes its 20th record; the same command with resume=true."""
    kill(["validate", *SMALL, f"run.root={root}", "run.name=killed", ALONE], at_line("nfe3", 20))
    folder = root / "killed" / "validate"
    assert len(histories(folder)["nfe3"].splitlines()) < len(histories(root / "run" / "validate")["nfe3"].splitlines())
    assert validate(root, "killed", "resume=true", ALONE) == 0
    assert histories(folder) == histories(root / "run" / "validate")
    assert outcomes(folder) == outcomes(root / "run" / "validate")


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(["strategy=ddp"], id="ddp"),
        pytest.param(
            ["strategy=deepspeed_cpu", "strategy.stage=3", "callbacks.ema=null"], id="zero3", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_give_the_archive_of_one(root: Path, strategy: list[str]) -> None:
    """Each measures candidates of its own; where the weights are sharded, both measure one candidate together."""
    name = strategy[0].split("=")[1]
    words = ["validate", *SMALL, f"run.root={root}", f"run.name={name}", *strategy, "trainer.devices=2"]
    run_in_ranks(*words)
    folder, one = root / name / "validate", root / "run" / "validate"
    assert histories(folder) == histories(one)
    assert outcomes(folder) == outcomes(one)


def test_a_search_of_one_process_is_resumed_by_two(root: Path) -> None:
    kill(["validate", *SMALL, f"run.root={root}", "run.name=moved", ALONE], at_line("nfe2", 9))
    words = ["validate", *SMALL, f"run.root={root}", "run.name=moved", ALONE, "resume=true"]
    run_in_ranks(*words, "strategy=ddp", "trainer.devices=2", "data.num_workers=0")
    assert histories(root / "moved" / "validate") == histories(root / "run" / "validate")


def test_a_metric_can_be_the_objective(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polishing in place of refinement, which needs a teacher; the hand-made schedules are measured the same way.

    Search and choice have real images of their own, apart from each other's and the report's.
    """
    compared: dict[str, Any] = {}
    measure = evaluation.measured

    def noted(evaluations: Any, module: Any, data: Any, draw: str, count: int, metrics: Any = None) -> dict[str, float]:
        compared[draw] = (metrics or module.metrics).reference.split
        return measure(evaluations, module, data, draw, count, metrics)

    monkeypatch.setattr(evaluation, "measured", noted)
    monkeypatch.setattr(solver_report, "measured", noted)
    words = ["method.objective=val/fd_digits", "search.strategy.polish=6", "method.nfe=[2]", "search.fidelity=20"]
    assert validate(root, "metric", *words, "search.strategy.screening_fidelity=null", "method.noise.select=20") == 0
    report = report_of(root / "metric" / "validate")
    rows = {row["sampler"]: row for row in report["table"]}
    assert {"best hand-made", "searched schedule"} == rows.keys()
    # of one number of evaluations the run's own metrics are those of the artifact
    assert report["metrics"]["val/fd_digits"] == rows["searched schedule"]["fd_digits"]
    lines = histories(root / "metric" / "validate")["nfe2"].splitlines()[1:]
    assert any("val/fd_digits" in json.loads(line)["facts"] for line in lines)
    assert compared == {"search": "train, part 0 of 2", "select": "train, part 1 of 2", "report": "test"}


@pytest.mark.parametrize("search", ["random", "evolution", "guided", "cma_es"])
def test_every_strategy_has_the_same_interface(root: Path, search: str) -> None:
    words = [word for word in SMALL if not word.startswith("search.strategy")]
    plain = ["search.strategy.screening_fidelity=8", "search.strategy.promoted=4", "method.nfe=[2]"]
    done = main(["validate", *words, f"search={search}", *plain, f"run.root={root}", f"run.name={search}"])
    assert done == 0
    assert report_of(root / search / "validate")["metrics"]["rmse_searched_2"] > 0


def test_a_dry_run_says_what_it_would_cost(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert validate(root, "dry", "dry_run=true") == 0
    out = capsys.readouterr().out
    assert "search nfe2" in out and "tuning" in out and "teacher" in out
    assert not (root / "dry").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.nfe=[0]"], "method.nfe"),
        (["method.objective=val/fid"], "validate does not log it; choose one of teacher, val/fd_digits"),
        (["method.mode=least"], "method.mode"),
        (["method.solvers=[dpm++]"], "unknown are ['dpm++']"),
        (["method.genes=[times,speed]"], "speed"),
        (["method.max_order=5"], "max_order"),
        (["method.teacher.solver=euler"], "method.teacher"),
        (["search.fidelity=17"], "at most method.noise.search = 16"),
        (["search.budget=0"], "search.budget"),
        (["module.prediction_type=nothing"], "prediction_type"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    assert validate(root, "wrong", *words, "run.overwrite=true") != 0
    assert expected in the_error(capsys.readouterr().err)


def test_another_search_does_not_go_on_from_this_one(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert validate(root, "run", "resume=true", "search.fidelity=12") != 0
    assert "search.fidelity: was 16, now 12" in capsys.readouterr().err


def test_a_larger_budget_goes_on_from_the_archive(root: Path, capsys: pytest.CaptureFixture) -> None:
    """S³ spreads its stages over the budget that the search was begun with; the last one is extended."""
    longer = copied(root / "run" / "validate", "longer")
    assert validate(root, "longer", "resume=true", "search.budget=15", "method.objective=val/fd_digits") != 0
    assert "method.objective: was 'teacher', now 'val/fd_digits'" in the_error(capsys.readouterr().err)
    assert validate(root, "longer", "resume=true", "search.budget=15") == 0
    assert added(root / "run" / "validate", longer) == {"nfe2": 3, "nfe3": 3}


def test_the_method_needs_a_search(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["validate", "method=s3", f"run.root={root}", "run.name=none"]) != 0
    assert "search=s3" in capsys.readouterr().err
    words = ["module=classifier", "data=digits", "search=s3", "method=s3", f"run.root={root}", "run.name=classifier"]
    assert main(["validate", *words]) != 0
    assert "DiffusionModule" in capsys.readouterr().err


def test_whole_times_of_one_solver_are_a_stock_schedulers(root: Path) -> None:
    """Which lies in the artifact; the model itself takes any times."""
    words = ["method.integer_times=true", "method.nfe=[3]", "method.finetune=null"]
    assert validate(root, "integers", *words, "method.solvers=[ddim]", "method.genes=[times]") == 0
    artifact = root / "integers" / "validate" / "artifact"
    bank = bank_from_json((artifact / "solver_bank.json").read_text())
    times = [time for time in bank.schedules[3].times[:-1] if time is not None]
    assert bank.schedules[3].time_domain == "time" and torch.tensor(times).frac().abs().max() == 0
    stock = artifact / "stock" / "3"
    scheduler = DPMSolverMultistepScheduler.from_pretrained(stock, subfolder="scheduler")
    scheduler.set_timesteps(**io.read_json(stock / "call.json"))
    assert scheduler.timesteps.tolist() == times
    assert io.read_json(stock / "model_index.json")["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    assert any("artifact/stock/3" in note for note in report_of(root / "integers" / "validate")["notes"])


def test_a_network_that_looks_timesteps_up_is_given_whole_ones(root: Path) -> None:
    """Teacher, hand-made and searched schedules, tuned table, rivals, and what the artifact samples with."""
    words = [word for word in SMALL if not word.startswith(("experiment", "module.network"))]
    words += ["search=s3", "method=s3", "method.integer_times=true", "method.nfe=[2]", "method.rivals=true"]
    words += ["module.network.block_out_channels=[16]", "module.network.norm_num_groups=4"]
    words += ["module.network.down_block_types=[DownBlock2D]", "module.network.up_block_types=[UpBlock2D]"]
    words += ["+module.network.time_embedding_type=learned", "+module.network.num_train_timesteps=1000"]
    assert main(["validate", *words, f"run.root={root}", "run.name=looked"]) == 0
    rows = {row["sampler"] for row in report_of(root / "looked" / "validate")["table"]}
    assert {"searched schedule", "tuned table", "GITS times (ddim)", "DPM-Solver++ 2M"} <= rows
    artifact = root / "looked" / "validate" / "artifact"
    entry = io.read_json(artifact / "scheduler" / "scheduler_config.json")["schedules"]["2"]
    assert entry["fine_tuned"] and all(time == round(time) for time in entry["timesteps"])
    pipeline = DiffusionPipeline.from_pretrained(artifact, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
