"""The real commands of MixDQ: a tiny Stable Diffusion with its text encoder, quantized, killed, saved, loaded."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from command_line import assert_accounted, histories, report_of, the_error
from modules.test_pipeline import tokenized
from oracles.kills import at_line, kill
from torch import nn

from genlight import io
from genlight.cli import main
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_report import _notes
from genlight.quantization.constant_tokens import ConstantTokenLinear
from genlight.quantization.convert import quantized_layers
from genlight.quantization.formats import LayerFormat
from genlight.quantization.special_inputs import SpecialInputs

GROUP = "_target_: genlight.loops.quantization_settings.GroupSettings, pattern"
# shortcuts, and one transformer with cross-attention
KEEP = "^conv_|^time_|^down_|^mid_|attentions.1|resnets.1|conv[12]|emb_proj"
WORDS = [
    "experiment=mixdq/sdxl_turbo",
    "module.variant=null",
    "module.dtype=float32",
    "module.num_inference_steps=2",
    "module.guidance_scale=3.0",
    "module.height=32",
    "module.width=32",
    "data.num_samples=4",
    "data.eval_batch_size=4",
    "trainer.accelerator=cpu",
    f"method.keep='{KEEP}'",
    "method.samples=8",
    "method.activation_ranges=step",
    "method.trajectory=4",
    "method.constant_ratio=1.0",
    "method.mixed.choices=[4,8]",
    "method.mixed.activation_choices=[6,8]",
    "method.mixed.average_bits=5.0",
    "method.mixed.average_activation_bits=7.0",
    "method.mixed.milliseconds=100000",
    "method.mixed.ratios=[0.8,1.0]",
    "method.mixed.samples=2",
    # shortcuts choose bits of inputs alone
    f"method.groups=[{{{GROUP}: 'attn2|ff', metric: ssim}},{{{GROUP}: shortcut, weight_bits: [8]}},{{{GROUP}: '.*'}}]",
]
LOAD = """
import sys, genlight, torch
from diffusers import UNet2DConditionModel
network = UNet2DConditionModel.from_pretrained(sys.argv[1])
x, text = torch.linspace(-1, 1, 512).reshape(2, 4, 8, 8), torch.linspace(-2, 2, 256).reshape(2, 16, 8)
with torch.no_grad():
    out = network(x, torch.tensor([7, 7]), text, return_dict=False)[0]
print(out.numpy().tobytes().hex())
"""


def output(network: Any) -> torch.Tensor:
    """As the program LOAD computes it; its text has another first token than that of the calibration."""
    x, text = torch.linspace(-1, 1, 512).reshape(2, 4, 8, 8), torch.linspace(-2, 2, 256).reshape(2, 16, 8)
    with torch.no_grad():
        return network(x, torch.tensor([7, 7]), text, return_dict=False)[0]


def validate(root: Path, name: str, *words: str) -> int:
    return main(["validate", *command(root, name), *words])


def command(root: Path, name: str) -> list[str]:
    return [*WORDS, f"module.pretrained={root / 'model'}", f"run.root={root}", f"run.name={name}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `model`, a pipeline whose first text token is an outlier, and `run`, a finished calibration of it."""
    root = tmp_path_factory.mktemp("mixdq")
    pipe = tokenized(root)
    embeddings = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[pipe.text_encoder.config.bos_token_id, 0] = 240
    pipe.save_pretrained(root / "model")
    assert validate(root, "run") == 0
    return root


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the table, without times, which are others in each run."""
    rows = report_of(folder)["table"]
    return {row["variant"]: {key: row[key] for key in row if not key.startswith("ms")} for row in rows}


def test_every_rival_stands_in_the_table(root: Path) -> None:
    rows = rows_of(root / "run" / "validate")
    ways = ["mixed", "mixed, greedy", "mixed by weight error", "mixed by proxy", "mixed by threshold", "uniform bits",
            "mixed, one metric", "mixed, one sum of dB for all layers", "mixed by group budgets",
            *(f"random bits {i}" for i in range(3))]  # fmt: skip
    own = ["one range for all steps", "MixDQ", *(f"MixDQ {way}" for way in ways)]
    names = ["full precision", "naive", "no constant tokens", "no split", *own]
    assert [name for name in rows if not name.startswith(("torchao", "optimum-quanto"))] == names
    for name in names[6:]:
        assert rows[name]["bits"] <= 5 + 1e-9 and rows[name]["input_bits"] <= 7 + 1e-9
    assert rows["MixDQ"]["bits"] == 8 == rows["MixDQ"]["input_bits"]
    assert rows["MixDQ"]["sqnr"] > rows["naive"]["sqnr"]
    assert rows["MixDQ mixed, one metric"]["sqnr"] > max(rows[f"MixDQ random bits {i}"]["sqnr"] for i in range(3))
    assert_accounted(root / "run" / "validate")
    metrics = report_of(root / "run" / "validate")["metrics"]
    assert metrics["sqnr_mixdq"] == rows["MixDQ mixed"]["sqnr"]
    assert metrics["optimality_gap"] == 0


def test_errors_of_layers_add_up(root: Path) -> None:
    """What the program predicts of all layers together from each alone, on other noise of another few prompts."""
    folder = root / "run" / "validate"
    facts = io.read_json(folder / "artifact" / "quantization.json")
    measured = rows_of(folder)["MixDQ mixed"]["sqnr"]
    assert facts["allocation"]["predicted_sqnr"] == pytest.approx(measured, abs=2)
    front = facts["allocation"]["front"]
    assert all(one["predicted_sqnr"] <= other["predicted_sqnr"] for one, other in pairwise(front))


def test_milliseconds_are_predicted_and_measured(root: Path) -> None:
    folder = root / "run" / "validate"
    facts = io.read_json(folder / "artifact" / "quantization.json")["allocation"]["latency"]
    times = io.read_json(folder / "search" / "latency.json")["times"]
    kept = times["layers"]
    assert kept.keys() == io.read_json(folder / "artifact" / "quantization.json")["layers"].keys()
    assert all({"8/6", "8/8"} <= own.keys() <= {"4/6", "4/8", "8/6", "8/8"} for own in kept.values())
    assert facts["samples"] == 4 and facts["over"] == [] and facts["measured"] > 0 and facts["predicted"] > 0
    expected = f"limit 100000, predicted {facts['predicted']:.4g}, measured {facts['measured']:.4g}; full precision"
    assert expected in (folder / "report.md").read_text()


def test_each_tensor_is_measured_alone(root: Path) -> None:
    text = histories(root / "run" / "validate")["sensitivity"]
    lines = [json.loads(line) for line in text.splitlines()[1:]]
    layers = {line["layer"] for line in lines}
    pairs = {(line["layer"], line["bits"], line["activation_bits"]) for line in lines}
    every = {(name, *pair) for name in layers for pair in ((4, 16), (8, 16), (16, 6), (16, 8))}
    assert len(lines) == len(pairs)
    assert every - pairs == {(name, 4, 16) for name in layers if "shortcut" in name} and pairs <= every
    # layers of other bits have their place in the picture too
    assert (root / "run" / "validate" / "figures" / "sensitivity.png").is_file()
    # images are sampled where they judge
    assert all((line["ssim"] is not None) == bool(re.search(r"attn2|\.ff\.", line["layer"])) for line in lines)


def test_the_artifact_keeps_tokens_and_splits(root: Path) -> None:
    """In a fresh process bit for bit; its cross-attention reads rows that were made in full precision."""
    unet = root / "run" / "validate" / "artifact" / "unet"
    network = diffusers.UNet2DConditionModel.from_pretrained(unet)
    layers = quantized_layers(network)
    assert len(network.sampling_steps.timesteps) == 2 and all(layer.has_steps for layer in layers.values())
    kept = [name for name, layer in layers.items() if isinstance(layer, ConstantTokenLinear)]
    assert kept and all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in kept)
    plain = diffusers.UNet2DConditionModel.from_pretrained(root / "model" / "unet")
    for name in kept:
        layer = layers[name]
        assert torch.allclose(layer.constant_outputs, plain.get_submodule(name)(layer.constant_inputs), atol=1e-6)
        assert layer.positions == (0,)
    split = [name for name, layer in layers.items() if layer.form.weight.granularity == "group"]
    assert split and all(name.endswith("conv_shortcut") for name in split)
    with pytest.warns(UserWarning, match="the same for every prompt"):
        expected = output(network).numpy().tobytes().hex()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, unet], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == expected


def test_the_dequantized_folder_is_plain(root: Path) -> None:
    """Its weights are those of the quantized layers, in layers of torch."""
    artifact = root / "run" / "validate" / "artifact"
    plain, quantized = (
        diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        for folder in (artifact / "dequantized", artifact)
    )
    assert not quantized_layers(plain) and "quantization_config" not in plain.config
    for name, layer in quantized_layers(quantized).items():
        weight = plain.get_submodule(name).weight
        assert torch.equal(weight, layer.effective_weight().reshape(weight.shape))


@pytest.mark.slow  # half a minute; in test_viditq.py it is the same code
def test_a_killed_sensitivity_resumes_to_the_same_file_and_table(root: Path) -> None:
    kill(["validate", *command(root, "killed")], at_line("sensitivity", 20))
    killed, whole = root / "killed" / "validate", root / "run" / "validate"
    assert len(histories(killed)["sensitivity"].splitlines()) == 20
    assert validate(root, "killed", "resume=true") == 0
    assert histories(killed) == histories(whole)
    assert rows_of(killed) == rows_of(whole)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.samples=2"], "8 or more different prompts"),
        (["method.constant_tokens=some"], "constant_tokens"),
        (["method.rounding=gptq"], "split_shortcuts needs rounding"),
        (["method.activation_mode=dynamic"], "split_shortcuts needs activation_mode"),
        (["method.activation_mode=dynamic", "method.split_shortcuts=false"], "activation_ranges = 'step' needs"),
        (["method.activation_ranges=all"], "activation_ranges"),
        (["method.mixed.average_bits=2"], "average_bits"),
        (["method.mixed.average_activation_bits=5"], "average_activation_bits"),
        (["method.mixed.activation_choices=null"], "need activation_choices"),
        (["method.mixed.objective=some"], "objective"),
        (["method.mixed.ratios=[0]"], "ratios"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    root: Path, words: list[str], expected: str, capfd: pytest.CaptureFixture
) -> None:
    given = [f"method.statistics={root / 'run' / 'validate' / 'calibration.safetensors'}"]
    fast = [] if "samples" in words[0] else given
    assert validate(root, "wrong", *fast, *words, "run.overwrite=true", "method.mixed.samples=1") != 0
    assert expected in the_error(capfd.readouterr().err)


def test_the_report_counts_layers_that_are_quantized() -> None:
    """Not those that read text or two feature maps and are kept in floating point."""
    layers = {name: nn.Linear(4, 4) for name in ("a", "b", "c", "kept")}
    work: Any = SimpleNamespace(
        method=QuantizationCalibration("MixDQ", keep="kept", constant_tokens="warn"),
        special=SpecialInputs({"kept": 3}, ("kept", "b", "c"), (0,)),
        ranges=SimpleNamespace(steps=None),
        forms=dict.fromkeys(("a", "b", "c"), LayerFormat()),
        network=nn.ModuleDict(layers),
    )
    row = dict.fromkeys(("bits", "input_bits", "megabytes", "file_megabytes"), 8.0)
    assert _notes(work, "MixDQ", row, row)[0].startswith("0 convolutions have scales for two feature maps; 2 layers")
