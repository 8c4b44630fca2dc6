"""Folders with searched solver schedules: read, sampled, written again, loaded where genlight cannot be imported."""

import functools
import json
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from genlight.diffusion.export_scheduler import scheduler_of, write_scheduler
from genlight.diffusion.schedulers import build_scheduler, read_scheduler
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import Corrector, SolverSchedule, StepDecision
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.serialization import SolverBank
from genlight.diffusion.solver_schedule import SolverScheduleScheduler
from genlight.errors import UserError
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.export import pipeline_name

CLASSES = {"class_conditional": True, "num_classes": 3}


def searched(noise_schedule):
    """4 steps, 5 evaluations: uneven times, two orders, both predictions, a free and an implicit corrector."""
    steps = (
        StepDecision("data", corrector=Corrector(scales=("bh2",))),
        StepDecision("noise", 2, points=((-2,),), corrector=Corrector("implicit")),
        StepDecision("data", 2, points=((-3,),), scales=(0.8,)),
        StepDecision("data"),
    )
    times = {"vp": (999.0, 700.5, 371.0, 90.0, None), "edm": (80.0, 9.0, 1.5, 0.3, None)}
    given = times.get(noise_schedule.family, (1.0, 0.83, 0.5, 0.2, 0.0))
    return SolverSchedule(given, steps, time_domain="time")


def schedules_for(noise_schedule):
    return {4: named_schedule("unipc_2_bh2", noise_schedule, 4), 5: searched(noise_schedule)}


def _folder(module, folder, schedules=None):
    """The folder of a module, with searched schedules for its scheduler; as a pipeline that keeps them."""
    module.save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"DDIMPipeline"', '"DDPMPipeline"'))
    bank = SolverBank.of(module.prediction, schedules or schedules_for(module.noise_schedule))
    write_scheduler(scheduler_of(bank), folder)
    return folder


def _load(folder, **options):
    options = {"class_conditional": None, "num_inference_steps": 5, **options}
    module = DiffusionModule(pretrained=str(folder), **options)
    module.configure_model()
    return module


def _edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("kind", ["vp", "epsilon", "edm", "flow"])
def test_the_module_samples_what_the_schedules_say(tiny, tmp_path, kind):
    """Against the solver's own sampling, which knows neither scheduler nor folder."""
    source = tiny.module(kind)
    module = _load(_folder(source, tmp_path))
    assert module.fingerprint() == source.fingerprint()
    noise = torch.randn(3, *module.sample_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for nfe, schedule in schedules_for(source.noise_schedule).items():
            table = compile_schedule(schedule, source.noise_schedule)
            expected = sample(source.predict, noise, table, source.prediction)
            found = module.sample_latents(noise, num_inference_steps=nfe)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(module.sample_latents(noise), module.sample_latents(noise, num_inference_steps=5))


def test_the_scheduler_is_exactly_that_of_the_folder(tiny, tmp_path):
    module = _load(_folder(tiny.module("flow"), tmp_path))
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    built = module.build_scheduler()
    assert isinstance(built, SolverScheduleScheduler) and built.available_steps == [4, 5]
    assert dict(built.config) == {key: value for key, value in config.items() if not key.startswith("_")}
    assert built is not module.build_scheduler()
    stock = "FlowMatchEulerDiscreteScheduler"
    assert isinstance(module.build_scheduler(stock), getattr(diffusers, stock))


@pytest.mark.parametrize("kind", ["vp", "epsilon", "edm", "flow"])
def test_noise_schedule_and_prediction_type_come_back(tiny, kind):
    prediction = tiny.module(kind).prediction
    scheduler = scheduler_of(SolverBank.of(prediction, schedules_for(prediction.schedule)))
    config = json.loads(scheduler.to_json_string())
    for form in (scheduler, config):
        schedule, prediction_type = read_scheduler(form)
        assert schedule.fingerprint() == prediction.schedule.fingerprint()
        assert prediction_type == prediction.prediction_type
    other = tiny.module("epsilon" if kind == "vp" else "vp").prediction
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    with pytest.raises(ValueError, match=r"holds schedules searched for noise_schedule = .*, not for VPSchedule"):
        build_scheduler("SolverScheduleScheduler", other.schedule, other.prediction_type, **options)
    with pytest.raises(ValueError, match=r"scheduler\.familly: .* did you mean family\?"):
        build_scheduler("SolverScheduleScheduler", prediction.schedule, prediction.prediction_type, familly="vp")
    with pytest.raises(ValueError, match="this config holds none"):
        build_scheduler("SolverScheduleScheduler", prediction.schedule, prediction.prediction_type)


def test_steps_that_were_not_searched_for_are_refused(tiny, tmp_path):
    folder = _folder(tiny.module("vp"), tmp_path)
    with pytest.raises(UserError, match=r"module\.num_inference_steps = 50, but .* are for 4, 5: set it to one of"):
        _load(folder, num_inference_steps=50)
    # and can be tried again; a stock scheduler takes any number
    assert _load(folder, num_inference_steps=50, scheduler="DDIMScheduler").num_inference_steps == 50
    with pytest.raises(ValueError, match="there are schedules for 4, 5 only"):
        _load(folder).sample_latents(torch.randn(1, 1, 8, 8), num_inference_steps=7)


def test_configs_that_are_not_whole_are_refused_in_one_line(tiny, tmp_path):
    folder = _folder(tiny.module("vp"), tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    whole = path.read_text()

    def error(change):
        _edit(path, change)
        with pytest.raises(UserError) as caught:
            _load(folder)
        path.write_text(whole)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "schedules were searched for noise_schedule" in error(lambda c: c.update(beta_end=0.03))
    assert "prediction_type" in error(lambda c: c.update(prediction_type="epsilon"))
    assert "schema_version = 2" in error(lambda c: c.update(schema_version=2))
    assert "damaged" in error(lambda c: c["schedules"]["5"].pop("table"))
    assert "damaged" in error(lambda c: c["schedules"].update({"5": 7}))
    assert "rows of the table" in error(lambda c: c["schedules"]["5"]["table"].pop())
    assert "at timestep 700.5 it was made for sigma" in error(lambda c: c["schedules"]["5"]["sigmas"].__setitem__(1, 9))
    assert "has no such option" in error(lambda c: c.update(code="import os"))
    assert _load(folder).build_scheduler().available_steps == [4, 5]


def test_code_of_the_folder_never_runs(tiny, tmp_path):
    folder = _folder(tiny.module("vp"), tmp_path)
    sentinel = tmp_path / "ran"
    (folder / "scheduler" / "solver_schedule.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    module = _load(folder)
    assert isinstance(module.build_scheduler(), SolverScheduleScheduler)
    module.sample(torch.randn(1, 1, 8, 8))
    assert not sentinel.exists()
    # what is written again is our file, not the folder's
    module.save_pretrained(tmp_path / "again")
    assert "open(" not in (tmp_path / "again" / "scheduler" / "solver_schedule.py").read_text()


def test_different_first_noise_levels_need_our_pipeline(tiny, tmp_path):
    """Stock pipelines multiply by the first level before they know the number of steps."""
    source = tiny.module("edm")
    low = SolverSchedule((40.0, 1.0, None), (StepDecision(), StepDecision()), time_domain="time")
    one = _load(_folder(source, tmp_path / "one", {2: low}), num_inference_steps=2)
    two = _load(_folder(source, tmp_path / "two", {2: low, **schedules_for(source.noise_schedule)}))
    assert pipeline_name(one) == "ConsistencyModelPipeline"
    assert pipeline_name(two) == "GenerationPipeline"


def _cases(tiny):
    """name -> (module, the pipeline its folder with searched schedules is of, arguments of the call)."""
    count, labels = {"batch_size": 3}, {"class_labels": [2, 0, 1]}
    scaling, custom = "ConsistencyModelPipeline", "GenerationPipeline"
    latent = {"vae": tiny.vae(scaling_factor=0.4)}
    return {
        "vp": (tiny.module("vp"), "DDPMPipeline", count),
        "epsilon": (tiny.module("epsilon"), "DDPMPipeline", count),
        "flow": (tiny.module("flow"), "DDPMPipeline", count),
        "edm": (tiny.module("edm"), scaling, count),
        "classes": (tiny.module("vp", **CLASSES), scaling, count | labels),
        "classes-flow": (tiny.module("flow", **CLASSES), scaling, count | labels),
        "guided": (tiny.module("vp", **CLASSES, guidance_scale=2.0), custom, labels),
        "latent": (tiny.module("vp", tiny.unet(4, 4), **latent), "LDMPipeline", count),
        "dit": (tiny.module("vp", tiny.dit(4, 4), **CLASSES, **latent), "DiTPipeline", labels),
        "dit-guided-flow": (tiny.module("flow", tiny.dit(), **CLASSES, guidance_scale=3.0), custom, labels),
        "condition-unet": (tiny.module("edm", tiny.condition_unet(), **CLASSES), custom, labels),
    }


_SCRIPT = """
import importlib.abc, json, sys

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("genlight", "lightning", "hydra"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Wall())
import diffusers, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
results = {}
for folder, call in json.load(open("calls.json")).items():
    record = json.load(open(folder + "/genlight.json"))
    custom = {"custom_pipeline": "pipeline"} if record["pipeline"] == "GenerationPipeline" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, low_cpu_mem_usage=False, trust_remote_code=True, **custom
    )
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == record["pipeline"], (folder, type(pipeline))
    assert type(pipeline.scheduler).__name__ == "SolverScheduleScheduler", folder
    if record["pipeline"] == "DiTPipeline":
        call["guidance_scale"] = record["guidance_scale"]
    for steps in (5, 4):
        generator = torch.Generator().manual_seed(7)
        images = pipeline(generator=generator, output_type="np", num_inference_steps=steps, **call).images
        results[f"{folder}/{steps}"] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
assert not any(name.split(".")[0] == "genlight" for name in sys.modules)
save_file(results, "images.safetensors")
"""


def test_folders_written_again_sample_the_same_images_without_genlight(tiny, tmp_path):
    cases, expected = _cases(tiny), {}
    for name, (source, pipeline, call) in cases.items():
        _folder(source, tmp_path / "first" / name)
        module = _load(tmp_path / "first" / name, guidance_scale=source.guidance_scale)
        assert (name, pipeline_name(module)) == (name, pipeline)
        module.save_pretrained(tmp_path / name)
        label = torch.tensor(call["class_labels"]) if "class_labels" in call else None
        noise = torch.randn(3, *module.sample_shape, generator=torch.Generator().manual_seed(7))
        for steps in (4, 5):
            expected[f"{name}/{steps}"] = (module.sample(noise, label, num_inference_steps=steps) + 1) / 2
        again = _load(tmp_path / name, guidance_scale=source.guidance_scale)
        assert again.fingerprint() == source.fingerprint(), name
        assert again.build_scheduler().config == module.build_scheduler().config, name
        assert json.loads((tmp_path / name / "model_index.json").read_text())["scheduler"] == [
            "solver_schedule",
            "SolverScheduleScheduler",
        ]
    (tmp_path / "calls.json").write_text(json.dumps({name: call for name, (_, _, call) in cases.items()}))
    (tmp_path / "script.py").write_text(_SCRIPT)
    cache = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **cache}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    images = load_file(tmp_path / "images.safetensors")
    assert images.keys() == expected.keys()
    for name, value in expected.items():
        difference = (images[name] - value).abs().max().item()
        assert difference < 1e-5, (name, difference)
        assert value.std() > 1e-3, name


def test_the_readme_says_how_to_load_and_for_how_many_steps(tiny, tmp_path):
    _load(_folder(tiny.module("vp"), tmp_path / "first")).save_pretrained(tmp_path / "again")
    text = (tmp_path / "again" / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained(".", trust_remote_code=True)' in text
    assert "pipeline(batch_size=4, num_inference_steps=5)" in text and "num_inference_steps = 4, 5 only" in text
    files = sorted(path.name for path in (tmp_path / "again" / "scheduler").iterdir())
    assert files == ["scheduler_config.json", "solver_schedule.py"]


def test_a_partial_of_the_class_samples_and_saves_too(tiny, tmp_path):
    """What the folder's scheduler becomes is a choice like any other, for a module that was saved with none too."""
    source = tiny.module("vp")
    scheduler = scheduler_of(SolverBank.of(source.prediction, schedules_for(source.noise_schedule)))
    choice = functools.partial(SolverScheduleScheduler, **scheduler.config)
    module = tiny.module("vp", scheduler=choice, num_inference_steps=5)
    noise = torch.randn(2, 1, 8, 8)
    assert torch.equal(module.sample(noise), source.sample(noise, scheduler=choice, num_inference_steps=5))
    assert not torch.equal(module.sample(noise), source.sample(noise, num_inference_steps=5))
    assert (pipeline_name(source), pipeline_name(module)) == ("DDIMPipeline", "DDPMPipeline")
    module.save_pretrained(tmp_path)
    assert torch.equal(_load(tmp_path).sample(noise), module.sample(noise))
