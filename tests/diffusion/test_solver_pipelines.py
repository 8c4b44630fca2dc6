"""Solver schedules inside the pipelines of diffusers, with tiny random networks."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
)
from diffusion.tiny_pipelines import PIPELINES, VP, Tiny, relative, stable_diffusion, stock
from torch import Tensor

from genlight.diffusion.export_scheduler import scheduler_of, stock_form, write_scheduler, write_stock_scheduler
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import Corrector, SolverSchedule, StepDecision
from genlight.diffusion.solver.presets import named_schedule, preset
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.serialization import SolverBank
from genlight.diffusion.solver.spacings import on_integers

NAMES = list(PIPELINES)
STEPS = 5


@cache
def tiny(name: str) -> Tiny:
    return PIPELINES[name]()


def same_times(scheduler: Any, prediction: Prediction) -> tuple[float | None, ...]:
    """The times that a scheduler has just used."""
    if prediction.schedule.family == "flow":
        return tuple(scheduler.sigmas.double().tolist())
    return (*(float(t) for t in scheduler.timesteps), None)


def searched(prediction: Prediction) -> SolverSchedule:
    """Uneven times, orders up to 3, noise and data, free and implicit correctors."""
    pseudo = Corrector(scales=("bh2",))
    steps = (
        StepDecision("data", corrector=pseudo),
        StepDecision("data", 2, points=((-2,),), scales=("bh2",), corrector=Corrector()),
        StepDecision("noise", 2, points=((-2,),), corrector=Corrector("implicit")),
        StepDecision("data", 3, points=((-2, -3), (-2, -3))),
        StepDecision("data"),
    )
    if prediction.schedule.family == "flow":
        return SolverSchedule((1.0, 0.93, 0.72, 0.41, 0.2, 0.0), steps, time_domain="time")
    return SolverSchedule((999.0, 871.0, 640.0, 377.5, 140.0, None), steps, time_domain="time")


@pytest.mark.parametrize("name", NAMES)
def test_preset_gives_what_the_stock_scheduler_gives(name: str) -> None:
    pipeline = tiny(name)
    scheduler, solver = stock(pipeline.prediction)
    expected = pipeline(scheduler, STEPS)
    schedule = preset(solver, pipeline.prediction.schedule, same_times(scheduler, pipeline.prediction))
    ours = scheduler_of(SolverBank.of(pipeline.prediction, {STEPS: schedule}))
    assert relative(pipeline(ours, STEPS), expected) <= 1e-5
    assert ours.timesteps.tolist() == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    assert ours.timesteps.dtype == scheduler.timesteps.dtype
    assert ours.step_index == STEPS and ours._history == {}


@pytest.mark.parametrize("name", NAMES)
def test_searched_schedule_gives_what_genlight_samples(name: str) -> None:
    """Non-uniform, multistep, with correctors; and the second of two calls equals the first."""
    pipeline, schedule = tiny(name), searched(tiny(name).prediction)
    table = compile_schedule(schedule, pipeline.prediction.schedule)
    final = sample(pipeline.model, pipeline.noise(), table, pipeline.prediction)
    scheduler = scheduler_of(SolverBank.of(pipeline.prediction, {schedule.nfe: schedule}))
    found = pipeline(scheduler, schedule.nfe)
    assert schedule.nfe == 6 and len(set(scheduler.timesteps.tolist())) == 5
    assert relative(found, pipeline.finish(final)) <= 1e-5
    assert torch.equal(pipeline(scheduler, schedule.nfe), found)


def test_an_interrupted_call_leaves_no_state() -> None:
    pipeline, schedule = tiny("sd"), searched(tiny("sd").prediction)
    scheduler = scheduler_of(SolverBank.of(pipeline.prediction, {schedule.nfe: schedule}))
    expected = pipeline(scheduler, schedule.nfe)

    def stop(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(scheduler, schedule.nfe, callback_on_step_end=stop)
    assert torch.equal(pipeline(scheduler, schedule.nfe), expected)


def test_edits_of_the_latents_act_as_with_a_stock_scheduler() -> None:
    """Masks and callbacks change x between steps; the sum is written from the latest x."""
    pipeline = tiny("sd")
    scheduler, solver = stock(pipeline.prediction)
    scheduler.set_timesteps(STEPS)
    schedule = preset(solver, pipeline.prediction.schedule, same_times(scheduler, pipeline.prediction))
    ours = scheduler_of(SolverBank.of(pipeline.prediction, {STEPS: schedule}))

    def edit(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0.9 + 0.1 * index}

    edited = [pipeline(each, STEPS, callback_on_step_end=edit) for each in (scheduler, ours)]
    assert relative(edited[1], edited[0]) <= 1e-5
    assert relative(edited[1], pipeline(ours, STEPS)) > 0.01


def test_many_step_counts_in_one_scheduler() -> None:
    pipeline = tiny("sd")
    schedules = {n: named_schedule("dpmpp_2m", VP, n) for n in (4, 6)}
    scheduler = scheduler_of(SolverBank.of(pipeline.prediction, schedules))
    for steps in (4, 6, 4):
        table = compile_schedule(schedules[steps], VP)
        expected = sample(pipeline.model, pipeline.noise(), table, pipeline.prediction)
        assert relative(pipeline(scheduler, steps), expected) <= 1e-5
    with pytest.raises(ValueError, match=r"num_inference_steps = 5: there are schedules for 4, 6 only"):
        pipeline(scheduler, 5)


def test_times_of_the_user_are_refused() -> None:
    sd, flux = tiny("sd"), tiny("flux")
    scheduler = scheduler_of(SolverBank.of(sd.prediction, {4: named_schedule("ddim", VP, 4)}))
    with pytest.raises(ValueError, match="timesteps: a searched schedule has its own"):
        sd(scheduler, 4, timesteps=[999, 700, 300, 10])
    with pytest.raises(ValueError, match="sigmas: a searched schedule has its own"):
        sd(scheduler, 4, sigmas=[14.0, 5.0, 2.0, 0.5])
    flow = scheduler_of(SolverBank.of(flux.prediction, {4: named_schedule("ddim", flux.prediction.schedule, 4)}))
    flux(flow, 4, sigmas=np.linspace(1, 1 / 4, 4))
    with pytest.raises(ValueError, match="sigmas: a searched schedule has its own"):
        flow.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.2])


def test_mu_of_another_resolution_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny("sd3")
    bank = SolverBank.of(pipeline.prediction, {3: named_schedule("ddim", pipeline.prediction.schedule, 3)})
    scheduler, said = scheduler_of(bank, setting={"mu": 1.15}), []
    monkeypatch.setattr(sys.modules[type(scheduler).__module__].logger, "warning", said.append)
    expected = pipeline(scheduler, 3, mu=1.15)
    assert said == []
    assert torch.equal(pipeline(scheduler, 3, mu=0.5), expected)
    assert said == ["mu = 0.5 is ignored: the schedules were searched at mu = 1.15"]


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_image_to_image_is_refused_unless_it_starts_from_noise(name: str) -> None:
    pipeline = tiny(name)
    scheduler = scheduler_of(
        SolverBank.of(pipeline.prediction, {4: named_schedule("ddim", pipeline.prediction.schedule, 4)})
    )
    kind = {"sd": StableDiffusionImg2ImgPipeline, "flux": FluxImg2ImgPipeline}[name]
    pipeline.pipe.scheduler = scheduler
    components = {key: value for key, value in pipeline.pipe.components.items() if key != "image_encoder"}
    if name == "sd":
        components["requires_safety_checker"] = False
    else:
        components = {key: value for key, value in components.items() if key != "feature_extractor"}
    pipe = kind(**components)
    scheduler.set_timesteps(4)
    timesteps, count = pipe.get_timesteps(4, 1.0, "cpu")
    assert count == len(timesteps) == 4
    with pytest.raises(ValueError, match="img2img needs strength = 1"):
        pipe.get_timesteps(4, 0.5, "cpu")


def test_pipelines_of_the_first_kind_of_diffusers() -> None:
    """DDPMPipeline passes a generator to step and reads no latents."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    prediction = Prediction("epsilon", VP)
    scheduler = scheduler_of(SolverBank.of(prediction, {4: named_schedule("unipc_2_bh2", VP, 4)}))
    pipe = DDPMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np", return_dict=False
    )[0]
    assert found.shape == (1, 8, 8, 3) and np.isfinite(found).all()


def test_stock_form_in_a_pipeline(tmp_path: Path) -> None:
    """Whole timesteps and a solver that diffusers has: a stock scheduler and a list of timesteps do the same."""
    pipeline, prediction = stable_diffusion(), Prediction("epsilon", VP)
    schedules = {
        n: preset("dpmpp_2m", VP, (*on_integers(named_schedule("ddim", VP, n).times[:-1]), None)) for n in (4, 5)
    }
    scheduler = scheduler_of(SolverBank.of(prediction, schedules))
    expected = {n: pipeline(scheduler, n) for n in schedules}
    pipeline.pipe.scheduler = build_scheduler("DDIMScheduler", VP, "epsilon")
    pipeline.pipe.save_pretrained(tmp_path)
    calls = write_stock_scheduler(scheduler, tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        "DPMSolverMultistepScheduler",
    ]
    plain = DPMSolverMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    for steps, call in calls.items():
        assert relative(pipeline(plain, steps, **call), expected[steps]) <= 1e-5
    flow = tiny("sd3")
    schedule = named_schedule("flow_euler", flow.prediction.schedule, 5, spacing="log_snr")
    own = scheduler_of(SolverBank.of(flow.prediction, {5: schedule}))
    form = stock_form(own, 5)
    assert form is not None and form.class_name == "FlowMatchEulerDiscreteScheduler"
    theirs = flow(FlowMatchEulerDiscreteScheduler(**form.config), 5, **form.call)
    assert relative(theirs, flow(own, 5)) <= 1e-5


_FOREIGN = """
import importlib.abc, json, sys

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "genlight":
            raise ImportError("genlight is not installed here")

sys.meta_path.insert(0, Wall())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
results = {}
for name, folder in json.loads(sys.argv[1]).items():
    missing = dict.fromkeys(json.loads(open(folder + "/missing.json").read()))
    try:
        DiffusionPipeline.from_pretrained(folder, **missing)
        raise SystemExit("custom code ran without trust")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **missing)
    assert type(pipe.scheduler).__name__ == "SolverScheduleScheduler"
    pipe.set_progress_bar_config(disable=True)
    inputs = load_file(folder + "/inputs.safetensors")
    if name == "sd":  # saved again from here, it loads again
        pipe.save_pretrained(folder + "/again")
        pipe = DiffusionPipeline.from_pretrained(folder + "/again", trust_remote_code=True, **missing)
        pipe.set_progress_bar_config(disable=True)
    arguments = json.loads(open(folder + "/arguments.json").read())
    results[name] = pipe(**inputs, **arguments, return_dict=False)[0].contiguous()
assert not any(module.split(".")[0] == "genlight" for module in sys.modules)
save_file(results, sys.argv[2])
"""


def test_folders_load_where_genlight_does_not_exist(tmp_path: Path) -> None:
    """All folders in one process that cannot import genlight."""
    from safetensors.torch import load_file, save_file

    expected, folders = {}, {}
    for name in ("sd", "pixart", "sd3", "flux", "wan"):
        pipeline, schedule = tiny(name), searched(tiny(name).prediction)
        scheduler = scheduler_of(SolverBank.of(pipeline.prediction, {schedule.nfe: schedule}))
        folder = folders[name] = tmp_path / name
        pipeline.pipe.scheduler = stock(pipeline.prediction)[0]
        pipeline.pipe.save_pretrained(folder)
        write_scheduler(scheduler, folder)
        arguments = pipeline.arguments | {"num_inference_steps": schedule.nfe, "latents": pipeline.noise()}
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        save_file(tensors, folder / "inputs.safetensors")
        missing = [key for key, part in pipeline.pipe.components.items() if part is None]
        (folder / "missing.json").write_text(json.dumps(missing))
        rest = {key: value for key, value in arguments.items() if key not in tensors}
        (folder / "arguments.json").write_text(json.dumps(rest))
        expected[name] = pipeline(scheduler, schedule.nfe)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    names = json.dumps({name: str(folder) for name, folder in folders.items()})
    done = subprocess.run(
        [sys.executable, "-c", _FOREIGN, names, str(tmp_path / "results.safetensors")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "results.safetensors")
    for name, value in expected.items():
        assert relative(found[name], value) <= 1e-6, name
