"""The real commands of ViDiT-Q: an untrained transformer of 16 tokens, quantized, saved and loaded again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import assert_accounted, histories, report_of, run_in_ranks, the_error, untrained_features
from diffusers import DiTTransformer2DModel
from lightning.pytorch.strategies import FSDPStrategy
from oracles.kills import at_line, kill

from genlight import io
from genlight.cli import main
from genlight.errors import UserError
from genlight.io import primitives
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_work import checked_work
from genlight.quantization.convert import quantized_layers
from genlight.quantization.packing import packed_width

MODEL = [
    "experiment=viditq/digits",
    "module.network.num_layers=2",
    "module.network.num_attention_heads=2",
    "module.network.attention_head_dim=8",
    "module.num_inference_steps=3",
    "data.eval_batch_size=10",
    "data.num_samples=20",
    "metrics.metrics=[fd]",
    "trainer.accelerator=cpu",
]
SMALL = ["method.samples=20", "method.trajectory=8", "method.mixed.samples=2"]
LAYERS = 12
LOAD = """
import sys, genlight, torch
from diffusers import DiTTransformer2DModel
network = DiTTransformer2DModel.from_pretrained(sys.argv[1])
assert "genlight.loops" not in sys.modules
x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
with torch.no_grad():
    out = network(x, timestep=torch.tensor([7, 7]), class_labels=torch.tensor([1, 10]), return_dict=False)[0]
print(out.numpy().tobytes().hex())
"""


def validate(root: Path, name: str, *words: str) -> int:
    return main(["validate", *MODEL, *SMALL, f"run.root={root}", f"run.name={name}", *words])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `run`, a finished calibration with mixed bits."""
    root = tmp_path_factory.mktemp("viditq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENLIGHT_CACHE", str(root / "cache"))
        untrained_features(root / "cache")
        assert validate(root, "run") == 0
    return root


@pytest.fixture(autouse=True)
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(root / "cache"))


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the table, without times, which are others in each run."""
    rows = report_of(folder)["table"]
    return {row["variant"]: {key: row[key] for key in row if not key.startswith("ms")} for row in rows}


def weights_of(folder: Path) -> dict[str, bytes]:
    """All files of weights of an artifact, by their places in it."""
    artifact = folder / "artifact"
    return {str(path.relative_to(artifact)): path.read_bytes() for path in artifact.glob("**/*.safetensors")}


def output(network: Any) -> torch.Tensor:
    """As the program LOAD computes it."""
    x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    with torch.no_grad():
        return network(x, timestep=torch.tensor([7, 7]), class_labels=torch.tensor([1, 10]), return_dict=False)[0]


def test_every_rival_stands_in_the_table(root: Path) -> None:
    folder = root / "run" / "validate"
    assert_accounted(folder)
    rows = rows_of(folder)
    assert [name for name in rows if not name.startswith(("torchao", "optimum-quanto"))][:7] == [
        "full precision",
        "static",
        "dynamic",
        "groups (Q-DiT)",
        "scale (SmoothQuant)",
        "rotation (QuaRot)",
        "static-dynamic",
    ]
    mixed = [row for name, row in rows.items() if "mixed" in name]
    assert len(mixed) == 5 and all(row["bits"] <= 5 for row in mixed)
    assert rows["ViDiT-Q"]["bits"] == 4 and rows["full precision"]["bits"] == 16
    assert all(row["sqnr"] > 5 and row["psnr"] > 10 and "fd_digits" in row for n, row in rows.items() if n[0] != "f")
    metrics = report_of(folder)["metrics"]
    assert metrics["sqnr_viditq"] == rows["ViDiT-Q mixed"]["sqnr"]
    assert metrics["val/fd_digits"] == rows["ViDiT-Q mixed"]["fd_digits"]
    assert metrics["fd_digits_full_precision"] == rows["full precision"]["fd_digits"]
    assert -1 <= metrics["proxy_rank_correlation_3_bits"] <= 1
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert {"comparison.png", "sensitivity.png", "bits.png", "ranges.png"} <= names


def test_memory_is_what_the_codes_take(root: Path) -> None:
    """Each row of a weight is packed: four bits an input, and a scale and a zero point beside it."""
    rows = rows_of(root / "run" / "validate")
    shapes = [(16, 16)] * 8 + [(64, 16), (16, 64)] * 2
    plain = sum(4 * outputs * inputs for outputs, inputs in shapes)
    packed = sum(outputs * (packed_width(inputs, 4) + 4 + 1) for outputs, inputs in shapes)
    saved = (rows["full precision"]["megabytes"] - rows["dynamic"]["megabytes"]) * 1e6
    assert saved == pytest.approx(plain - packed, abs=1)
    # half of a row's inputs share a scale and a zero point: twice as many of these
    more = (rows["groups (Q-DiT)"]["megabytes"] - rows["dynamic"]["megabytes"]) * 1e6
    assert more == pytest.approx(sum(outputs * 5 for outputs, _ in shapes), abs=1)


def test_a_file_holds_what_the_table_says(root: Path) -> None:
    """The tensors of the artifact's network, and of the plain one, which has those of the dequantized."""
    folder, rows = root / "run" / "validate", rows_of(root / "run" / "validate")
    for place, name in (("transformer", "ViDiT-Q mixed"), ("dequantized/transformer", "full precision")):
        (file,) = (folder / "artifact" / place).glob("*.safetensors")
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        assert rows[name]["file_megabytes"] * 1e6 == pytest.approx(len(content) - header, abs=0.5)


def test_the_report_begins_with_what_a_step_takes(root: Path) -> None:
    """So small a network is slower in few bits."""
    report = report_of(root / "run" / "validate")
    times = {row["variant"]: [row[key] for key in ("ms_low", "ms", "ms_high")] for row in report["table"]}
    assert all((None in found) == (name not in ("full precision", "ViDiT-Q mixed")) for name, found in times.items())
    for name in ("full precision", "ViDiT-Q mixed"):
        assert times[name][0] > 0 and times[name] == sorted(times[name])
    first = next(note for note in report["notes"] if not note.startswith("ckpt_path"))
    assert first.startswith("simulated: not faster on this machine (cpu, ")


def test_layers_in_floating_point_are_named(root: Path) -> None:
    folder = root / "run" / "validate"
    content = io.read_json(folder / "artifact" / "quantization.json")
    left = content["left_out"]
    assert left.keys().isdisjoint(content["layers"]) and "proj_out_2" in left
    assert left["proj_out_2"] == {"type": "Linear", "reason": "a pattern keeps it"}
    assert {entry["reason"] for entry in left.values() if entry["type"] == "Embedding"} == {"no quantized form"}
    (note,) = [note for note in report_of(folder)["notes"] if note.startswith("left in floating point: ")]
    assert " Linear (a pattern keeps it): " in note


def test_the_artifact_is_the_network_that_was_measured(root: Path) -> None:
    """In a process of its own with bare `from_pretrained`: bit for bit; as a pipeline: the distance of the table."""
    folder = root / "run" / "validate"
    artifact = folder / "artifact"
    network = DiTTransformer2DModel.from_pretrained(artifact / "transformer")
    assert len(quantized_layers(network)) == LAYERS
    done = subprocess.run(
        [sys.executable, "-c", LOAD, artifact / "transformer"], capture_output=True, text=True, check=True
    )
    assert bytes.fromhex(done.stdout.split()[-1]) == output(network).numpy().tobytes()
    half = DiTTransformer2DModel.from_pretrained(artifact / "transformer", torch_dtype=torch.bfloat16)
    for name, layer in quantized_layers(half).items():
        assert torch.equal(layer.weight_scale, quantized_layers(network)[name].weight_scale)
    content = json.loads((artifact / "transformer" / "config.json").read_text())["quantization_config"]
    assert content["quant_method"] == "viditq" and content["settings"]["seeds"]["rotation"] == 0
    assert content["settings"]["average_weight_bits"] == rows_of(folder)["ViDiT-Q mixed"]["bits"]
    assert "import genlight" in (artifact / "README.md").read_text()
    words = ["data=digits", "metrics=digits", "module=diffusion_pretrained", "metrics.metrics=[fd]"]
    words += [f"module.pretrained={artifact}", "module.num_inference_steps=3", "module.guidance_scale=1.5"]
    words += ["data.num_samples=20", "data.eval_batch_size=10", "trainer.accelerator=cpu"]
    words += ["metrics.extractor.dtype=float32"]
    assert main(["validate", *words, f"run.root={root}", "run.name=again"]) == 0
    found = report_of(root / "again" / "validate")["metrics"]["val/fd_digits"]
    assert found == pytest.approx(rows_of(folder)["ViDiT-Q mixed"]["fd_digits"], rel=1e-6)


def test_the_dequantized_folder_is_plain(root: Path) -> None:
    """Its weights are those of the quantized layers; only inputs are not rounded."""
    artifact = root / "run" / "validate" / "artifact"
    plain = DiTTransformer2DModel.from_pretrained(artifact / "dequantized" / "transformer")
    quantized = DiTTransformer2DModel.from_pretrained(artifact / "transformer")
    assert "quantization_config" not in json.loads((artifact / "dequantized/transformer/config.json").read_text())
    for name, layer in quantized_layers(quantized).items():
        assert torch.equal(plain.get_submodule(name).weight, layer.effective_weight())
    error = (output(plain) - output(quantized)).square().sum() / output(plain).square().sum()
    assert 0 < error < 1e-2


def test_a_killed_sensitivity_resumes_to_the_same_file_and_table(root: Path) -> None:
    words = [*MODEL, *SMALL, f"run.root={root}", "run.name=killed"]
    kill(["validate", *words], at_line("sensitivity", 20))
    killed, whole = root / "killed" / "validate", root / "run" / "validate"
    assert len(histories(killed)["sensitivity"].splitlines()) == 20
    assert validate(root, "killed", "resume=true") == 0
    assert histories(killed) == histories(whole)
    assert len(histories(whole)["sensitivity"].splitlines()) == 1 + 3 * LAYERS
    assert rows_of(killed) == rows_of(whole)


def test_a_signal_keeps_what_was_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM at the tenth line: the layer at hand is finished, and the lines are those of the whole run."""
    file = root / "stopped" / "validate" / "search" / "sensitivity" / "history.jsonl"

    def hook(primitive: str, path: Path) -> None:
        if file.is_file() and len(file.read_bytes().splitlines()) == 10:
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(primitives, "before_primitive", hook)
    with pytest.raises(SystemExit, match="143"):
        sys.exit(validate(root, "stopped"))
    lines = file.read_bytes().splitlines()
    assert 10 <= len(lines) < 13
    assert lines == histories(root / "run" / "validate")["sensitivity"].splitlines()[: len(lines)]


def test_a_calibration_serves_its_own_network_only(root: Path, capsys: pytest.CaptureFixture) -> None:
    file = root / "run" / "validate" / "calibration.safetensors"
    given = [f"method.statistics={file}", "method.mixed=null", "method.rivals=false", "method.dequantized=false"]
    assert validate(root, "given", *given) == 0
    assert not (root / "given" / "validate" / "calibration.safetensors").exists()
    uniform = rows_of(root / "run" / "validate")["ViDiT-Q"]
    assert rows_of(root / "given" / "validate")["ViDiT-Q"] == uniform
    assert not (root / "given" / "validate" / "artifact" / "dequantized").exists()
    assert validate(root, "other", *given, "seed=1") != 0
    assert "has the statistics of" in the_error(capsys.readouterr().err)


def test_layers_judged_by_another_metric_keep_their_share(root: Path) -> None:
    """Decoupling moves bits within attention only; what attention takes altogether is not more."""
    folder = root / "run" / "validate"
    content = io.read_json(folder / "artifact" / "quantization.json")
    bits = {name: entry["weight_bits"] for name, entry in content["layers"].items()}
    assert len(bits) == LAYERS and set(bits.values()) <= {3, 4, 8}
    lines = [json.loads(line) for line in (folder / "search/sensitivity/history.jsonl").read_text().splitlines()[1:]]
    ssim = {(line["layer"], line["bits"]): 1 - line["ssim"] for line in lines if line["ssim"] is not None}
    attention = [name for name in bits if "attn" in name]
    # all are of one size: no exchange of bits between two of them lowers the sum
    for one in attention:
        for other in attention:
            now = ssim[one, bits[one]] + ssim[other, bits[other]]
            assert now <= ssim[one, bits[other]] + ssim[other, bits[one]] + 1e-9


def test_a_dry_run_says_what_it_would_cost(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert validate(root, "dry", "dry_run=true") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("layers in few bits", "calibration.safetensors", "artifact/dequantized"))
    assert not (root / "dry").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.weight_bits=9"], "weight.bits = 9 must be 2 to 8"),
        (["method.balance=some"], "balance"),
        (["method.alpha=2"], "alpha = 2"),
        (["method.keep=nothing_like_this"], "nothing_like_this"),
        (["method.mixed.average_bits=2"], "average_bits"),
        (["method.mixed.choices=[4]"], "choices"),
        (["method.mixed.average_bits=null"], "must be given"),
        (["method.groups=[]"], "no pattern matches"),
        (["method.statistics=nowhere.safetensors"], "nowhere.safetensors"),
        (["method.samples=0"], "samples = 0"),
        (["method.numbers=float8"], "mixed must be null"),
        (["method.torchao=true"], "balance=scale rank=0 mixed=null"),
        (
            ["method.torchao=true", "method.balance=scale", "method.mixed=null", "method.weight_bits=8"],
            "weight_symmetric=true",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capfd: pytest.CaptureFixture
) -> None:
    assert validate(root, "wrong", *words, "run.overwrite=true") != 0
    assert expected in the_error(capfd.readouterr().err)


def test_two_processes_give_the_table_and_artifact_of_one(root: Path) -> None:
    """Each measures layers and variants of its own, the second the winner; lines are in the order of one process."""
    words = [*MODEL, *SMALL, f"run.root={root}", "run.name=ddp", "method.rivals=false", "method.samples_out=true"]
    run_in_ranks("validate", *words, "strategy=ddp", "trainer.devices=2")
    two, one = root / "ddp" / "validate", root / "run" / "validate"
    assert histories(two)["sensitivity"] == histories(one)["sensitivity"]
    rows, every = rows_of(two), rows_of(one)
    assert list(rows) == ["full precision", "ViDiT-Q", "ViDiT-Q mixed"]
    assert rows == {name: every[name] for name in rows}
    assert weights_of(two) == weights_of(one)
    for place in ("full_precision", "quantized"):
        names = io.read_json(two / "samples" / place / "prompts.json")
        assert len(names) == 20 and {path.name for path in (two / "samples" / place).glob("*.png")} == set(names)


def test_weights_in_parts_are_refused() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy(), world_size=2)
    with pytest.raises(UserError, match="layers are quantized whole"):
        checked_work(QuantizationCalibration(), trainer, None, None)


def test_a_gpu_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"method: numbers = 'float8' needs a GPU of compute capability 8\.9"):
        checked_work(
            QuantizationCalibration(numbers="float8"), SimpleNamespace(strategy=strategy, world_size=1), None, None
        )
