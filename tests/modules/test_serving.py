"""Every block of docs/serving.md, run as it stands: those that do not name genlight where it cannot be imported.

One folder holds a tiny artifact of each kind under the names of the page, and one process runs all plain blocks.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from experts.tiny_models import KEPT, tiny_model
from lightning.pytorch import Trainer
from modules.test_consistency import _student
from modules.test_distilled_decoding import module_of as student_of
from modules.test_pretrained_searched import schedules_for
from modules.test_zoo_pipelines import MIXED, bigger
from modules.tiny_folders import tiny_folder
from modules.tiny_token_teacher import saved_teacher
from predictors.test_predictor_file import trained
from safetensors.torch import load_file
from torch import Tensor, nn

from genlight.data.prompts import PromptsDataModule
from genlight.data.tokenizer import character_tokenizer
from genlight.diffusion.export_scheduler import scheduler_of, stock_form, write_stock_form
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.presets import preset
from genlight.diffusion.solver.serialization import SolverBank
from genlight.diffusion.solver_schedule import SolverScheduleScheduler
from genlight.experts.editor import ExpertEditor
from genlight.experts.export import export
from genlight.experts.maps import selection_maps
from genlight.loops.cost import first_validation
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_report import save_artifact
from genlight.loops.quantization_settings import KEPT as KEPT_LAYERS
from genlight.loops.quantization_settings import GroupSettings, formats_by_layer
from genlight.loops.quantization_variants import Variant
from genlight.loops.quantization_work import checked_work
from genlight.modules.latent_consistency import LatentConsistencyModule
from genlight.modules.model_schedule_file import apply_to_pipeline, load_model_schedule, write_model_schedule
from genlight.modules.pipeline import PipelineModule
from genlight.modules.zoo import ZooEntry, load_zoo
from genlight.predictors.predictor_file import load_predictor, save_predictor
from genlight.quantization.convert import quantize_layer, replace_layers
from genlight.quantization.diffusers_format import marked_quantized
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.recipe import dequantized_layer
from genlight.quantization.torchao_format import as_torchao

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
# packages that need not be installed, by a word of the blocks that need them
NEEDS = {"torchao": "torchao", "load_lora_weights": "peft"}
ABSENT = [word for word, package in NEEDS.items() if find_spec(package) is None]
ALL_BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
BLOCKS = [block for block in ALL_BLOCKS if not any(word in block for word in ABSENT)]
PLAIN = [number for number, block in enumerate(BLOCKS) if "genlight" not in block]
# what blocks call their result
RESULTS = ("images", "logits", "mean")
PROGRAM = f"""
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("genlight", "lightning", "hydra"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import save_file

found = {{}}
for number, block in json.load(open("blocks.json")).items():
    names = {{"__name__": "block"}}
    exec(compile(block, f"block {{number}}", "exec"), names)
    for name in {RESULTS}:
        if name in names:
            found[number] = torch.as_tensor(names[name]).contiguous()
assert not any(name.split(".")[0] == "genlight" for name in sys.modules)
save_file(found, "found.safetensors")
"""


def pictures(module: Any, label: Tensor | None = None, **options: Any) -> Tensor:
    """What the module makes of the noise that pipelines draw, as they return it: [2, H, W, C] in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *module.sample_shape, generator=generator)
    return (module.sample(noise, label, generator=generator, **options).permute(0, 2, 3, 1) + 1) / 2


def diffusion_artifacts(tiny: Any) -> Iterator[tuple[str, Tensor]]:
    module = tiny.module("vp")
    module.save_pretrained("plain")
    yield "plain", pictures(module)
    module = tiny.module("vp", class_conditional=True, num_classes=3, guidance_scale=2.0)
    module.save_pretrained("guided")
    yield "guided", pictures(module, torch.tensor([2, 0]))
    module = _student(tiny, num_train_timesteps=18)
    with torch.no_grad():
        for weight in module.network.parameters():
            weight.mul_(1.5).add_(torch.ones_like(weight), alpha=-0.05)
    module.num_inference_steps = 1
    module.save_pretrained("combined")
    yield "combined", pictures(module)


def searched_artifacts(tiny: Any) -> Iterator[tuple[str, Tensor]]:
    """Two schedules of which no scheduler of diffusers knows one, and DDIM on even steps."""
    module = tiny.module("vp")
    stock = functools.partial(diffusers.DDIMScheduler, timestep_spacing="trailing", clip_sample=False)
    even = module.build_scheduler(stock)
    even.set_timesteps(4)
    times = (*(float(t) for t in even.timesteps), None)
    ddim: SolverSchedule = preset("ddim", module.noise_schedule, times)
    for name, schedules, steps in (
        ("searched", schedules_for(module.noise_schedule), 5),
        ("even", {4: ddim}, 4),
    ):
        scheduler = scheduler_of(SolverBank.of(module.prediction, schedules))
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        module.scheduler, module.num_inference_steps = functools.partial(SolverScheduleScheduler, **config), steps
        module.save_pretrained(name)
        yield name, pictures(module)
    form = stock_form(scheduler, 4)
    assert form is not None
    write_stock_form(form, Path("even"), Path("even/stock/4"))


def quantized_artifacts(tiny: Any) -> Iterator[tuple[str, Tensor]]:
    module = tiny.module("vp")
    form = LayerFormat(WeightFormat(4), ActivationFormat(8))
    forms, _ = formats_by_layer(module.net, form, KEPT_LAYERS, [GroupSettings()])
    plain = {name: module.net.get_submodule(name) for name in forms}
    layers: dict[str, Any] = {name: quantize_layer(plain[name], found) for name, found in forms.items()}
    replace_layers(module.net, layers)
    with marked_quantized(module.net, {}):
        module.save_pretrained("quantized")
    yield "quantized", pictures(module)
    replace_layers(module.net, {name: dequantized_layer(plain[name], layers[name]) for name in layers})
    module.save_pretrained("quantized/dequantized")
    yield "quantized/dequantized", pictures(module)
    if "torchao" in ABSENT:
        return
    module = tiny.module("vp")
    linear = {name: layer for name, layer in module.net.named_modules() if isinstance(layer, nn.Linear)}
    form = LayerFormat(WeightFormat(8, symmetric=True))
    with as_torchao(module.net, {name: quantize_layer(layer, form) for name, layer in linear.items()}):
        module.save_pretrained("quantized/torchao")
        yield "quantized/torchao", pictures(module)


def text_pictures(pipe: Any, guidance_scale: float = 3.0) -> Tensor:
    """What blocks ask of the pipeline, which is the live one here."""
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return torch.from_numpy(pipe("a cat", num_inference_steps=2, guidance_scale=guidance_scale, **options).images)


def mixdq_artifacts(root: Path) -> Iterator[tuple[str, Tensor]]:
    """The pipeline's network as a calibration quantizes it, first token kept and shortcuts split."""
    module = PipelineModule("pipeline", num_inference_steps=2, guidance_scale=3.0)
    data = PromptsDataModule(num_samples=4, eval_batch_size=4)
    module.check_data(data)
    data.noise_shape = module.sample_shape
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=str(root), **quiet)
    method = QuantizationCalibration(
        title="MixDQ", weight_symmetric=True, activation_symmetric=False, activation_mode="static",
        split_shortcuts=True, constant_tokens="warn", constant_ratio=0.0, rounding="nearest", balance="none",
        keep="^conv_", samples=8, trajectory=1,
    )  # fmt: skip
    work = checked_work(method, trainer, module, data)
    first_validation(trainer, module, data)
    layers = work.layers(Variant.mixed(method, method.title))
    assert work.special.splits and work.special.text
    save_artifact(work, layers, {}, Path("mixdq"), module)
    plain = {name: dequantized_layer(work.calibrated.layers[name], layer) for name, layer in layers.items()}
    for name, made in (("mixdq", layers), ("mixdq/dequantized", plain)):
        with work.replaced(made):
            yield name, text_pictures(module.pipe)


def adapters() -> Iterator[tuple[str, Tensor]]:
    if "load_lora_weights" in ABSENT:
        return
    module = LatentConsistencyModule("pipeline", lora_rank=2)
    module.configure_model()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.networks.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    module.save_pretrained("adapters")
    yield "adapters", text_pictures(module.pipe, guidance_scale=1.0)


def by_turns(root: Path) -> Iterator[tuple[str, Tensor]]:
    folder = tiny_folder("sd", root)
    folder.rename("pipeline")
    Path("by_turns").mkdir()
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained("pipeline")
    bigger(pipe.unet, "sd").save_pretrained("big/unet")
    zoo = load_zoo({"own": "pipeline", "big": ZooEntry("big", "unet")})
    path = Path("by_turns/model_schedule_2.json")
    write_model_schedule(path, MIXED, zoo.members, zoo.predictions, primary="own")
    apply_to_pipeline(pipe, load_model_schedule(path), zoo.networks)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    found = pipe("a cat", num_inference_steps=MIXED.nfe, guidance_scale=3.0, **options).images
    yield "by_turns", torch.from_numpy(found)


def other_artifacts() -> Iterator[tuple[str, Tensor]]:
    tokenizer = character_tokenizer()
    model = tiny_model("mixtral", vocab_size=len(tokenizer))
    editor = ExpertEditor(model)
    editor.apply(dict.fromkeys(editor.layers, selection_maps(KEPT, 8)))
    export(editor, "experts")
    tokenizer.save_pretrained("experts")
    with torch.no_grad():
        yield "experts", model(**tokenizer("12+7=", return_tensors="pt")).logits
    module = student_of(str(saved_teacher(Path("teacher"))))
    module.save_pretrained("student")
    noise = torch.randn(4, *module.sample_shape, generator=torch.Generator().manual_seed(0))
    yield "student", module.sample(noise, torch.arange(4))
    written, tokens = trained()
    save_predictor("predictor", written, {})
    yield "predictor", torch.as_tensor(written.fitted().predict(torch.zeros_like(tokens[:3]))[0])


def result_of(names: dict[str, Any]) -> Tensor | None:
    return next((torch.as_tensor(names[name]) for name in RESULTS if name in names), None)


def test_every_block_gives_what_the_live_model_gives(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    expected: dict[str, Tensor] = {}
    for made in (
        diffusion_artifacts(tiny), searched_artifacts(tiny), quantized_artifacts(tiny), by_turns(tmp_path),
        mixdq_artifacts(tmp_path), adapters(), other_artifacts(),
    ):  # fmt: skip
        expected |= dict(made)
    found: dict[int, Tensor] = {}
    for number, block in enumerate(BLOCKS):
        if number not in PLAIN:
            names: dict[str, Any] = {}
            exec(block, names)
            if (value := result_of(names)) is not None:
                found[number] = value
    (tmp_path / "blocks.json").write_text(json.dumps({number: BLOCKS[number] for number in PLAIN}))
    (tmp_path / "program.py").write_text(PROGRAM)
    # a copy of files that folders bring goes to a cache of modules: keep it out of the user's
    cache = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **cache}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")  # where torchao and peft may lie
    done = subprocess.run([sys.executable, "program.py"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found |= {int(number): value for number, value in load_file("found.safetensors").items()}
    assert len(found) == len(BLOCKS) and sum("genlight" in block for block in BLOCKS) == 4
    used = set()
    for number, value in found.items():
        name = max((name for name in expected if f'"{name}' in BLOCKS[number]), key=len)
        used.add(name)
        assert value.shape == expected[name].shape, (number, name)
        assert (value - expected[name]).abs().max() <= 1e-5, (number, name, (value - expected[name]).abs().max())
        assert expected[name].std() > 1e-3 or name == "predictor", name
    assert used == set(expected)
    assert load_predictor("predictor").head == "fusion"
