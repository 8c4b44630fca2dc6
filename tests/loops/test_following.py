"""What can follow what: each method on what each other method left, done or refused in one line with the reason."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from command_line import report_of, the_error, untrained_features
from modules.tiny_token_teacher import saved_teacher

from genlight import io
from genlight.cli import main
from genlight.modules.consistency import ConsistencyModule
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.distilled_decoding import DistilledDecodingModule
from genlight.quantization.convert import quantized_layers

SIZE = ["data.eval_batch_size=10", "data.num_samples=20", "metrics.metrics=[fd]", "trainer.accelerator=cpu"]
STAGE = ["experiment=stack/digits_stage", *SIZE]
FIT = ["trainer.val_check_interval=6", "trainer.max_steps=6", "trainer.num_sanity_val_steps=0"]
FIT += ["callbacks=collector", "callbacks.collector.every_n_steps=1"]
# a small command of each method
LCSC = ["method=lcsc", "search=lcsc", "method.objective=val/fd_digits", "method.random_search=false"]
LCSC += ["method.singles=2", "method.select=20", "search.budget=3", "search.fidelity=20", "search.finalists=1"]
S3 = ["method=s3", "search=s3", "method.nfe=[3]", "method.solvers=[dpmpp_2m]", "method.teacher.steps=6"]
S3 += ["method.noise={search: 8, select: 8, report: 8}", "method.refine=null", "method.finetune=null"]
S3 += ["search.budget=2", "search.fidelity=8", "search.finalists=1", "search.strategy.screening_fidelity=null"]
VIDITQ = ["method=viditq", "method.keep=pos_embed", "method.rivals=false", "method.dequantized=false"]
VIDITQ += ["method.samples=10", "method.trajectory=4"]
OMS = ["module=zoo", "method=oms", "search=oms", "method.objective=val/fd_digits"]
EEP = ["data=tiny_tasks", "module=causal_lm", "metrics=none", "method=eep", "search=eep", "method.num_experts=2"]
EEP += ["trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `m`, a fit, `steps`, searched for it, `codes`, these in 8 bits; folders `student`, `dd`, `experts`."""
    root = tmp_path_factory.mktemp("following")
    model = ["experiment=stack/digits", *SIZE, *FIT, "module.network.num_layers=1", "callbacks.ema=null"]
    model += ["module.network.attention_head_dim=8", "module.num_inference_steps=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        untrained_features(root / "cache")
        assert main(["fit", *model, f"run.root={root}", "run.name=m"]) == 0
        assert run(root, "steps", *STAGE, f"module.pretrained={root}/m/fit/artifact", *S3) == 0
        assert run(root, "codes", *STAGE, f"module.pretrained={root}/steps/validate/artifact", *VIDITQ) == 0
    network = read(root / "m" / "fit" / "artifact").net
    student = ConsistencyModule(network, class_conditional=True, num_classes=10)
    student.save_pretrained(root / "student")
    (root / "dd").mkdir()
    DistilledDecodingModule(str(saved_teacher(root / "teacher"))).save_pretrained(root / "dd")
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(root / "experts")
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))


def run(root: Path, name: str, *words: str) -> int:
    words = tuple(word.replace("ROOT", str(root)) for word in words)
    return main(["validate", f"run.root={root}", f"run.name={name}", "run.overwrite=true", *words])


def read(folder: Path) -> DiffusionModule:
    stated = {"class_conditional": None, "num_inference_steps": None, "guidance_scale": None}
    module = DiffusionModule(pretrained=str(folder), label_dropout=0.0, **stated)
    module.configure_model()
    return module


TRAJECTORY = "method.trajectory=ROOT/m/fit/trajectory"


def test_codes_are_calibrated_on_searched_steps(root: Path) -> None:
    made = read(root / "codes" / "validate" / "artifact")
    assert quantized_layers(made) and made.num_inference_steps == 3
    assert type(made.build_scheduler()).__name__ == "SolverScheduleScheduler"


@pytest.mark.parametrize("words", [[*LCSC, TRAJECTORY], S3], ids=["lcsc", "s3"])
def test_what_follows_searched_steps_has_them(root: Path, words: list[str]) -> None:
    """Combined weights are sampled by them; a search takes others in their place."""
    assert run(root, "next", *STAGE, "module.pretrained=ROOT/steps/validate/artifact", *words) == 0
    made = read(root / "next" / "validate" / "artifact")
    assert made.num_inference_steps == 3 and type(made.build_scheduler()).__name__ == "SolverScheduleScheduler"


ZOO = [
    *OMS,
    "module.members={plain: <plain>, codes: ROOT/codes/validate}",
    "module.primary=codes",
    "module.num_inference_steps=null",
    "module.guidance_scale=null",
    "method.unit=macs",
    "method.budgets=[2,3]",
    "method.rules=[single]",
    "method.singles=4",
    "method.select=20",
    "method.max_evaluations=4",
    "search.budget=4",
    "search.fidelity=20",
    "search.finalists=1",
    "search.strategy.rounds=1",
    "search.strategy.per_budget=1",
    "search.strategy.generations=2",
]


@pytest.mark.slow  # long, and one more pair
def test_a_zoo_of_stages_is_measured_by_each_of_its_schedules(root: Path) -> None:
    """Codes with searched steps and the plain model take turns; the artifact samples as the search reported."""
    words = ["method=stack", "method.experiment=stack/digits_stage", "method.objective=val/fd_digits"]
    words += [
        f"method.stages={{oms: {json.dumps(ZOO)}}}",
        f"method.shared={json.dumps(SIZE)}",
        f"ckpt_path={root}/m/fit",
    ]
    assert run(root, "zoo", *STAGE, f"module.pretrained={root}/m/fit/artifact", *words) == 0
    folder = root / "zoo" / "validate"
    rows = {row["stage"]: row for row in report_of(folder)["table"]}
    assert list(rows) == ["plain", "oms, 2 calls", "oms, 3 calls"]
    own = [row for row in report_of(folder / "stages" / "oms" / "validate")["table"] if row["chosen"]]
    for row, found in zip(own, list(rows.values())[1:], strict=True):
        assert found["fd_digits"] == pytest.approx(row["fd_digits"], rel=1e-5) and found["nfe"] == row["nfe"]
    assert (folder / "artifact" / "model_schedule_3.json").is_file()
    assert run(root, "no", *STAGE, "module.pretrained=ROOT/zoo/validate/artifact", *S3) == 1


def test_a_one_step_student_is_quantized(root: Path) -> None:
    student = ["module=consistency", "module.objective=null", "module.class_conditional=null"]
    assert run(root, "student8", *STAGE, *student, f"module.pretrained={root}/student", *VIDITQ) == 0
    folder = root / "student8" / "validate"
    made = ConsistencyModule(pretrained=str(folder / "artifact"), class_conditional=None)
    made.configure_model()
    assert quantized_layers(made)
    assert report_of(folder)["metrics"]["val/fd_digits"] > 0


def test_checkpoints_of_a_token_student_are_combined(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the trainer's steps as they were, so that only the weights differ."""
    pairs = ["experiment=dd/digits", "module.teacher_recipe=null", f"module.teacher={root}/teacher"]
    pairs += ["data.num_pairs=40", "data.shard_size=40", "data.batch_size=20", "metrics.metrics=[fd]"]
    pairs += ["data.images.eval_batch_size=10", "data.images.num_samples=20", "trainer.accelerator=cpu"]
    assert main(["fit", *pairs, *FIT, "callbacks.ema=null", f"run.root={root}", "run.name=d"]) == 0
    assert run(root, "d2", *pairs, f"ckpt_path={root}/d/fit", *LCSC) == 0
    rows = {row["kind"]: row for row in report_of(root / "d2" / "validate")["table"]}
    assert {"last", "LCSC"} <= rows.keys()
    config = io.read_json(root / "d2" / "validate" / "artifact" / "config.json")
    assert config["kind"] == "distilled_decoding_student"
    for words, reason in ((S3, "does not offer"), (VIDITQ, "quantize: use method=dd with method.quantized")):
        capsys.readouterr()
        assert run(root, "d3", *pairs, f"ckpt_path={root}/d/fit", *words) == 1
        assert reason in the_error(capsys.readouterr().err)


ONE_PASS, EXPERTS, PIPELINE = "student of Distilled Decoding", "module=causal_lm reads", "a pipeline of diffusers"
MEMBERS = "module.members={a: ROOT/m/fit, b: ROOT/%s}"
REFUSED = {
    "dd lcsc": ([*STAGE, "module.pretrained=ROOT/dd", *LCSC, TRAJECTORY], ONE_PASS),
    "dd s3": ([*STAGE, "module.pretrained=ROOT/dd", *S3], ONE_PASS),
    "dd quantized": (["experiment=viditq/digits", "module.pretrained=ROOT/dd"], ONE_PASS),
    "dd oms": ([*STAGE, *OMS, MEMBERS % "dd"], ONE_PASS),
    "dd eep": ([*EEP, "module.pretrained=ROOT/dd"], ONE_PASS),
    "eep lcsc": ([*STAGE, "module.pretrained=ROOT/experts", *LCSC, TRAJECTORY], EXPERTS),
    "eep lcsc of a larger model": (
        [*EEP[:3], "module.pretrained=ROOT/experts", "data.num_samples=9", *LCSC, TRAJECTORY,
         "method.objective=val/log_likelihood"],
        "method.trajectory",
    ),
    "eep s3": ([*STAGE, "module.pretrained=ROOT/experts", *S3], EXPERTS),
    "eep quantized": ([*STAGE, "module.pretrained=ROOT/experts", *VIDITQ], EXPERTS),
    "eep quantized as itself": (
        [*EEP[:3], "module.pretrained=ROOT/experts", *VIDITQ],
        "has no network to quantize",
    ),
    "eep oms": ([*STAGE, *OMS, MEMBERS % "experts"], EXPERTS),
    "diffusion eep": ([*EEP, "module.pretrained=ROOT/steps/validate/artifact"], PIPELINE),
    "consistency oms": ([*STAGE, *OMS, MEMBERS % "student"], "members.b"),
    "consistency lcsc": (
        [*STAGE, "module=consistency", "module.objective=null", "module.class_conditional=null",
         "module.pretrained=ROOT/student", *LCSC],
        "give ckpt_path",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_follow_is_refused_with_the_reason(
    root: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, "no", *words) == 1
    assert reason in the_error(capsys.readouterr().err)


def test_a_folder_is_told_from_its_own_json(root: Path) -> None:
    """No weights are needed to say what it is."""
    for name in ("dd", "experts"):
        config = json.loads((root / name / "config.json").read_text())
        (root / f"bare-{name}").mkdir()
        (root / f"bare-{name}" / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    from genlight.modules.artifact_kind import told_kind

    assert ONE_PASS in told_kind(root / "bare-dd") and EXPERTS in told_kind(root / "bare-experts")
    assert PIPELINE in told_kind(root / "student") and "module.teacher" in told_kind(root / "teacher")
    assert told_kind(root / "m") == "" == told_kind(root / "m" / "fit" / "artifact" / "transformer")
