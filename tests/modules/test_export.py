"""Exported folders are sampled in one process in which genlight cannot be imported."""

import functools
import json
import subprocess
import sys

import diffusers
import torch
from safetensors.torch import load_file

from genlight.modules.diffusion import DiffusionModule
from genlight.modules.export import pipeline_name
from genlight.modules.exported_pipeline import network_style

DDIM = functools.partial(diffusers.DDIMScheduler, timestep_spacing="trailing")
DPM = functools.partial(diffusers.DPMSolverMultistepScheduler, timestep_spacing="trailing")
EULER = functools.partial(diffusers.EulerDiscreteScheduler, timestep_spacing="trailing")
CLASSES = {"class_conditional": True, "num_classes": 3}


def _cases(tiny):
    """name -> (module, the pipeline it must be of, arguments of the call)."""
    count, labels = {"batch_size": 3}, {"class_labels": [2, 0, 1]}
    scaling, custom = "ConsistencyModelPipeline", "GenerationPipeline"
    latent = {"vae": tiny.vae(scaling_factor=0.4)}
    shifted = {"vae": tiny.vae(scaling_factor=0.4, shift_factor=0.2)}
    wide = tiny.dit(4, 4, 1000)
    return {
        "ddim": (tiny.module("vp"), "DDIMPipeline", count),
        "ddpm": (tiny.module("epsilon"), "DDPMPipeline", count),
        "dpm-solver": (tiny.module("vp", scheduler=DPM), "DDPMPipeline", count),
        "flow": (tiny.module("flow"), "DDPMPipeline", count),
        "euler": (tiny.module("epsilon", scheduler=EULER), scaling, count),
        "euler-leading": (tiny.module("epsilon", scheduler="EulerDiscreteScheduler"), scaling, count),
        "edm": (tiny.module("edm"), scaling, count),
        "unipc": (tiny.module("vp", scheduler="UniPCMultistepScheduler"), custom, count),
        "classes": (tiny.module("vp", **CLASSES), scaling, count | labels),
        "classes-edm": (tiny.module("edm", **CLASSES), scaling, count | labels),
        "classes-flow": (tiny.module("flow", **CLASSES), custom, labels),
        "guided": (tiny.module("vp", **CLASSES, guidance_scale=2.0), custom, labels),
        "guided-ddpm": (tiny.module("epsilon", **CLASSES, guidance_scale=2.0), custom, labels),
        "latent": (tiny.module("vp", tiny.unet(4, 4), **latent), "LDMPipeline", count),
        "latent-shifted": (tiny.module("vp", tiny.unet(4, 4), **shifted), custom, count),
        "latent-flow": (tiny.module("flow", tiny.unet(4, 4), **latent), custom, count),
        "dit": (tiny.module("vp", tiny.dit(4, 4), **CLASSES, **latent), "DiTPipeline", labels),
        "dit-guided": (
            tiny.module("vp", wide, class_conditional=True, num_classes=1000, guidance_scale=3.0, **latent),
            "DiTPipeline",
            labels,
        ),
        "dit-guided-few": (
            tiny.module("vp", tiny.dit(4, 4), **CLASSES, guidance_scale=3.0, **latent),
            custom,
            labels,
        ),
        "dit-variance": (tiny.module("vp", tiny.dit(4, 4, out_channels=8), **CLASSES, **latent), "DiTPipeline", labels),
        "dit-pixels": (tiny.module("vp", tiny.dit(), **CLASSES), custom, labels),
        "dit-unconditional": (tiny.module("flow", tiny.dit()), custom, count),
        "condition-unet": (tiny.module("vp", tiny.condition_unet(), **CLASSES), custom, labels),
    }


_SCRIPT = """
import json, sys
import importlib.abc

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("genlight", "lightning", "hydra"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import diffusers, torch
from safetensors.torch import save_file
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
results = {}
for folder, call in json.load(open("calls.json")).items():
    custom = json.load(open(folder + "/model_index.json"))["_class_name"][0] == "pipeline"
    extra = {"custom_pipeline": "pipeline", "trust_remote_code": True} if custom else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **extra)
    pipeline.set_progress_bar_config(disable=True)
    record = json.load(open(folder + "/genlight.json"))
    assert type(pipeline).__name__ == record["pipeline"], (folder, type(pipeline))
    if "DiTPipeline" == record["pipeline"]:
        call["guidance_scale"] = record["guidance_scale"]
    steps = {} if custom else {"num_inference_steps": record["num_inference_steps"]}
    images = pipeline(generator=torch.Generator().manual_seed(7), output_type="np", **call, **steps).images
    results[folder] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if "id2label" in pipeline.config and pipeline.config.id2label:
        assert pipeline.config.id2label["1"] == "one"
assert not any(name.split(".")[0] == "genlight" for name in sys.modules)
save_file(results, "images.safetensors")
"""


def _sample(module, call):
    """As the pipelines do: noise and the noise of the steps from one generator."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(3, *module.sample_shape, generator=generator)
    label = torch.tensor(call["class_labels"]) if "class_labels" in call else None
    return (module.sample(noise, label, generator=generator) + 1) / 2


def test_a_compiled_network_is_known_for_what_it_is(tiny):
    for network in (tiny.unet(), tiny.dit()):
        assert network_style(torch.compile(network, backend="eager")) == network_style(network)


def test_every_kind_of_pipeline_samples_the_same_images_without_genlight(tiny, tmp_path):
    cases, expected = _cases(tiny), {}
    for name, (module, pipeline, call) in cases.items():
        assert (name, pipeline_name(module)) == (name, pipeline)
        if call.get("class_labels"):
            module.class_names = ["zero", "one", "two"]
        module.save_pretrained(tmp_path / name)
        expected[name] = _sample(module, call)
    (tmp_path / "calls.json").write_text(json.dumps({name: call for name, (_, _, call) in cases.items()}))
    (tmp_path / "script.py").write_text(_SCRIPT)
    # the copy of pipeline.py goes to a cache of modules: keep it out of the user's
    cache = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **cache}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    images = load_file(tmp_path / "images.safetensors")
    assert images.keys() == cases.keys()
    for name, value in expected.items():
        difference = (images[name] - value).abs().max().item()
        assert difference < 1e-5, (name, difference)
        assert value.std() > 1e-3, name

    # and each folder reads back as the module it was
    for name, (module, _, call) in cases.items():
        again = DiffusionModule(
            pretrained=str(tmp_path / name),
            class_conditional=None,
            num_inference_steps=4,
            guidance_scale=module.guidance_scale,
        )
        again.configure_model()
        assert again.fingerprint() == module.fingerprint(), name
        assert again.build_scheduler().config == module.build_scheduler().config, name
        assert torch.equal(_sample(again, call), expected[name]), name
        assert again.class_names == module.class_names


def test_folders_hold_safetensors_and_say_how_to_sample(tiny, tmp_path):
    module = tiny.module("vp", **CLASSES, guidance_scale=2.0)
    module.save_pretrained(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "README.md",
        "genlight.json",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    readme = (tmp_path / "README.md").read_text()
    assert 'from_pretrained(".", custom_pipeline="pipeline", trust_remote_code=True)' in readme
    assert "pipeline(class_labels=[0, 1, 2, 0], num_inference_steps=4)" in readme
    assert "import genlight" not in (tmp_path / "pipeline.py").read_text()
    assert json.loads((tmp_path / "genlight.json").read_text())["guidance_scale"] == 2.0
