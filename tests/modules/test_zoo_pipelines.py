"""Members by turns in pipelines of diffusers, and the file by which a schedule is used elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusion.tiny_pipelines import PIPELINES, Tiny, relative
from modules.test_pipeline import STEPS, module_of, noise_of, tiny_pipe
from torch import Tensor, nn

from genlight.diffusion.export_scheduler import scheduler_of
from genlight.diffusion.model_schedule import ModelSchedule, solver_schedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import read_scheduler
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.serialization import SolverBank
from genlight.errors import UserError
from genlight.loops.model_costs import member_costs
from genlight.modules.model_schedule_file import (
    MODEL_SCHEDULE,
    PLAIN_USE,
    apply_to_pipeline,
    attach_model_schedule,
    boundary_ratio,
    load_model_schedule,
    write_model_schedule,
)
from genlight.modules.pipeline import PipelineModule
from genlight.modules.scheduled_denoiser import ScheduledDenoiser
from genlight.modules.zoo import Member
from genlight.modules.zoo_pipelines import denoiser_key, timestep_reader
from genlight.search.protocols import ScheduledMembers
from genlight.search.spaces.model_schedule import ModelScheduleSpace

NAMES = ("sd", "sdxl", "pixart", "dit", "sd3", "flux", "wan")
# pipelines that call their network once for each half of the guidance
TWICE = ("wan",)
BIGGER: dict[str, dict[str, Any]] = {"sd": {"block_out_channels": (8, 16)}, "sdxl": {"block_out_channels": (8, 16)}}
HALVES = ModelSchedule("multistep", (("own",), ("own",), ("big",), ("big",)), orders=(1, 2, 2, 1))
MIXED = ModelSchedule("singlestep", (("big",), ("own", "big"), ("own",)))


def bigger(network: Any, name: str) -> Any:
    """A network of the same kind, with more in it."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    more = BIGGER.get(name) or {"num_layers": config["num_layers"] + 1}
    torch.manual_seed(7)
    return type(network)(**{**config, **more}).eval()


def both(tiny: Tiny, name: str) -> dict[str, nn.Module]:
    own = getattr(tiny.pipe, denoiser_key(tiny.pipe))
    return {"own": own, "big": bigger(own, name)}


def compiled(schedule: ModelSchedule, prediction: Prediction) -> tuple[Any, list[float]]:
    """The scheduler of a schedule, and its timesteps."""
    solver = solver_schedule(schedule, prediction.schedule)
    times = compile_schedule(solver, prediction.schedule).times
    return scheduler_of(SolverBank.of(prediction, {schedule.nfe: solver})), prediction.schedule.model_timestep(
        times
    ).tolist()


def put(
    tiny: Tiny, members: dict[str, nn.Module], timesteps: Sequence[float], names: Sequence[str]
) -> ScheduledDenoiser:
    denoiser = ScheduledDenoiser(members, "own", timestep_of=timestep_reader(tiny.pipe)).eval()
    denoiser.set_schedule(timesteps, names)
    setattr(tiny.pipe, denoiser_key(tiny.pipe), denoiser)
    return denoiser


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_members_answer_as_often_as_scheduled(name: str, scale: float) -> None:
    tiny = PIPELINES[name]()
    scheduler, timesteps = compiled(MIXED, tiny.prediction)
    members = both(tiny, name)
    key = denoiser_key(tiny.pipe)
    alone = {}
    for member, network in members.items():
        setattr(tiny.pipe, key, network)
        alone[member] = tiny(scheduler, MIXED.nfe, guidance_scale=scale)
    for member in members:
        denoiser = put(tiny, members, timesteps, [member] * MIXED.nfe)
        assert torch.equal(tiny(scheduler, MIXED.nfe, guidance_scale=scale), alone[member])
    denoiser = put(tiny, members, timesteps, MIXED.members)
    mixed = tiny(scheduler, MIXED.nfe, guidance_scale=scale)
    calls = 2 if name in TWICE and scale > 1 else 1
    assert denoiser.calls == {"big": 2 * calls, "own": 2 * calls}
    assert denoiser.switches == 3  # big, own, big, own
    assert all(not torch.equal(mixed, other) for other in alone.values())
    assert tiny.pipe.unet is denoiser if key == "unet" else tiny.pipe.transformer is denoiser


@pytest.mark.parametrize("name", NAMES)
def test_a_switch_in_the_middle_is_one_switch(name: str) -> None:
    tiny = PIPELINES[name]()
    scheduler, timesteps = compiled(HALVES, tiny.prediction)
    denoiser = put(tiny, both(tiny, name), timesteps, HALVES.members)
    tiny(scheduler, HALVES.nfe)
    calls = 2 if name in TWICE else 1
    assert denoiser.calls == {"own": 2 * calls, "big": 2 * calls} and denoiser.switches == 1


def test_constant_members_answer_in_the_order_of_the_schedule() -> None:
    """Each member leaves its own constant in the latents: the first step's is the noise end's."""
    tiny = PIPELINES["sd"]()

    def constant(value: float) -> nn.Module:
        network = bigger(tiny.pipe.unet, "sd")
        network.forward = lambda x, *_, **__: (torch.full_like(x, value),)
        return network  # type: ignore[no-any-return]

    values = {"own": 1.0, "big": -2.0}
    members = {name: constant(value) for name, value in values.items()}
    schedule = ModelSchedule("singlestep", (("big",), ("own",), ("own", "own")))
    scheduler, timesteps = compiled(schedule, tiny.prediction)
    put(tiny, members, timesteps, schedule.members)
    found = tiny(scheduler, schedule.nfe)
    solver = solver_schedule(schedule, tiny.prediction.schedule)
    table = compile_schedule(solver, tiny.prediction.schedule, basis="noise")
    row = table.weights[-1].tolist()
    shift = sum(weight * values[name] for weight, name in zip(row[1:], schedule.members, strict=True))
    expected = row[0] * table.initial_scale * tiny.noise().double() + shift
    assert relative(found.double(), expected) <= 1e-4
    wrong = sum(weight * values[name] for weight, name in zip(row[1:], schedule.members[::-1], strict=True))
    assert abs(wrong - shift) > 0.1


# the module


def module_with(name: str, folder: Path, **options: Any) -> PipelineModule:
    """A module of a tiny pipeline with a second member, read from a folder."""
    pipe = tiny_pipe(name)
    network = getattr(pipe, denoiser_key(pipe))
    bigger(network, name).save_pretrained(folder / "big")
    return module_of(name, pipe, members={"big": str(folder / "big")}, **options)


def space_of(module: PipelineModule) -> ModelScheduleSpace:
    return ModelScheduleSpace(module.prediction.schedule, {"own": 1.0, "big": 3.0})


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux", "wan"])
def test_a_module_samples_with_members_by_turns(name: str, tmp_path: Path) -> None:
    module, plain = module_with(name, tmp_path), module_of(name)
    assert isinstance(module, ScheduledMembers) and list(module.members) == ["own", "big"]
    noise, label = noise_of(module), torch.tensor([2, 0])
    own = plain.sample_latents(noise, label)
    assert torch.equal(module.sample_latents(noise, label), own)
    space_of(module).apply(module, MIXED)
    mixed = module.sample_latents(noise, label)
    plain.set_sampler(space_of(module).sampler(MIXED))
    assert not torch.equal(mixed, plain.sample_latents(noise, label))
    module.set_members(module.sampler.timesteps, ["own"] * MIXED.nfe)
    assert torch.equal(module.sample_latents(noise, label), plain.sample_latents(noise, label))
    # steps that are asked for by name are the pipeline's own
    space_of(module).apply(module, MIXED)
    assert torch.equal(module.sample_latents(noise, label, num_inference_steps=STEPS), own)
    module.set_sampler(None)
    assert torch.equal(module.sample_latents(noise, label), own)


def test_the_fingerprint_of_a_module_covers_members_and_their_names(tmp_path: Path) -> None:
    module = module_with("sd", tmp_path)
    again = module_of("sd", members={"big": str(tmp_path / "big")})
    renamed = module_of("sd", members={"huge": str(tmp_path / "big")})
    assert again.fingerprint() == module.fingerprint()
    assert len({found.fingerprint() for found in (module, renamed, module_of("sd"))}) == 3


def test_a_module_is_saved_with_its_own_network(tmp_path: Path) -> None:
    module = module_with("sd", tmp_path)
    module.save_pretrained(tmp_path / "saved")
    saved = diffusers.UNet2DConditionModel.from_pretrained(str(tmp_path / "saved"), subfolder="unet")
    own = module.members["own"].state_dict()
    assert all(torch.equal(value, own[key]) for key, value in saved.state_dict().items())
    assert isinstance(module.pipe.unet, ScheduledDenoiser)
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["unet"] == [
        "diffusers",
        "UNet2DConditionModel",
    ]


def test_members_that_a_pipeline_cannot_have(tmp_path: Path) -> None:
    other = bigger(tiny_pipe("sdxl").unet, "sdxl")
    other.save_pretrained(tmp_path / "xl")
    with pytest.raises(UserError, match=r"members.xl and members.own differ in the text"):
        module_of("sd", members={"xl": str(tmp_path / "xl")})
    with pytest.raises(UserError, match=r"members.own: the name is taken"):
        module_of("sd", members={"own": str(tmp_path / "xl")})
    with pytest.raises(UserError, match=r"module.members is empty"):
        module_of("sd").set_members([1.0], ["own"])
    pipe = tiny_pipe("wan")
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(UserError, match="switches between transformer and transformer_2 by itself"):
        module_of("wan", pipe, members={"a": "b"})


@pytest.mark.parametrize("name", ["PRXPipeline", "PRXPixelPipeline", "Krea2Pipeline", "FluxPipeline"])
def test_timesteps_that_are_given_as_fractions(name: str) -> None:
    reader = timestep_reader(type(name, (), {})())
    assert reader is not None and reader(0.25) == 250


def test_a_pipeline_that_gives_other_timesteps_than_is_known_is_refused(tmp_path: Path) -> None:
    found, failed = member_costs(module_with("flux", tmp_path), 1, "macs")
    assert list(found.costs) == ["own", "big"] and not failed
    pipe = tiny_pipe("flux")
    pipe.__class__ = type("NewPipeline", (diffusers.FluxPipeline,), {})
    module = module_of("flux", pipe, members={"big": str(tmp_path / "big")})
    with pytest.raises(UserError, match="NewPipeline gives its network the timestep 1 where 1000 is scheduled"):
        member_costs(module, 1, "macs")


# the file


def read_members(networks: dict[str, nn.Module], prediction: Prediction, folder: Path) -> dict[str, Member]:
    result = {}
    for name, network in networks.items():
        network.save_pretrained(folder / name)  # type: ignore[operator]
        result[name] = Member(name, network, folder=folder / name, root=folder / name, prediction=prediction)
    return result


def written(tiny: Tiny, name: str, schedule: ModelSchedule, folder: Path) -> tuple[Path, dict[str, nn.Module]]:
    networks = both(tiny, name)
    members = read_members(networks, tiny.prediction, folder)
    path = folder / MODEL_SCHEDULE
    options: dict[str, Any] = {"budget": 9.0, "predicted_cost": 8.5, "scores": {"fid": 3.25}}
    predictions = dict.fromkeys(members, tiny.prediction)
    file = write_model_schedule(path, schedule, members, predictions, primary="own", **options)
    assert load_model_schedule(path) == file
    return path, networks


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "dit"])
def test_a_file_makes_a_pipeline_sample_as_the_schedule(name: str, tmp_path: Path) -> None:
    tiny = PIPELINES[name]()
    path, networks = written(tiny, name, MIXED, tmp_path)
    scheduler, timesteps = compiled(MIXED, tiny.prediction)
    put(tiny, networks, timesteps, MIXED.members)
    expected = tiny(scheduler, MIXED.nfe)
    fresh, file = PIPELINES[name](), load_model_schedule(path)
    assert file.nfe == 4 and [e.member for e in file.evaluations] == list(MIXED.members)
    assert [e.order for e in file.evaluations] == [1, 2, 2, 1] and [e.timestep for e in file.evaluations] == timesteps
    assert (file.budget, file.predicted_cost, file.scores) == (9.0, 8.5, {"fid": 3.25})
    denoiser = apply_to_pipeline(fresh.pipe, file, networks, resident=1)
    assert torch.equal(fresh(fresh.pipe.scheduler, file.nfe), expected)
    assert denoiser.calls == {"big": 2 * 1, "own": 2 * 1} and denoiser.moves > 0


@pytest.mark.parametrize("resident", [None, 1])
def test_members_that_wait_are_not_put_on_the_device(
    resident: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, real = list[Any](), diffusers.UNet2DConditionModel.to

    def note(network: Any, *arguments: Any, **options: Any) -> Any:
        moved.extend([network] if isinstance(arguments[0], torch.device) else [])
        return real(network, *arguments, **options)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "to", note)
    module = module_with("sd", tmp_path, resident=resident)
    assert module.scheduled is not None and module.scheduled.resident == resident
    assert any(network is module.members["big"] for network in moved) == (resident is None)
    path, _ = written(PIPELINES["sd"](), "sd", MIXED, tmp_path)
    scheduled = attach_model_schedule(PIPELINES["sd"]().pipe, path, resident=resident)
    assert any(network is scheduled.members["big"] for network in moved) == (resident is None)
    offloaded = PIPELINES["sd"]().pipe
    add_hook_to_module(offloaded.unet, ModelHook())
    with pytest.raises(UserError, match="attach the schedule first"):
        attach_model_schedule(offloaded, path, resident=resident)


def test_members_of_a_relative_folder_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, _ = written(PIPELINES["sd"](), "sd", MIXED, Path("models"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    scheduled = attach_model_schedule(PIPELINES["sd"]().pipe, tmp_path / path)
    assert {name for _, name in scheduled.schedule} == {"own", "big"}


def test_offloaded_members_are_called_one_at_a_time(tmp_path: Path) -> None:
    """diffusers moves the whole of what takes turns before each call."""
    module = module_with("sd", tmp_path, offload=True)
    assert module.resident == 1 and module.scheduled is not None
    module.scheduled.to("meta")
    assert {name: network.device.type for name, network in module.members.items()} == {"own": "meta", "big": "cpu"}


def test_other_weights_are_an_error_that_names_the_member(tmp_path: Path) -> None:
    tiny = PIPELINES["sd"]()
    path, networks = written(tiny, "sd", MIXED, tmp_path)
    file = load_model_schedule(path)
    with pytest.raises(UserError, match=r"members.big is missing"):
        apply_to_pipeline(tiny.pipe, file, {"own": networks["own"]})
    with torch.no_grad():
        next(networks["big"].parameters())[0] += 1
    with pytest.raises(UserError, match=r"members.big has other weights than the schedule was made for: it was /"):
        apply_to_pipeline(tiny.pipe, file, networks)
    networks["own"].to(torch.float16)
    with pytest.raises(UserError, match=r"members.own has other weights .*: it is in float16, not float32"):
        apply_to_pipeline(tiny.pipe, file, networks)
    assert not isinstance(tiny.pipe.unet, ScheduledDenoiser)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "genlight.solver_bank"}, "its kind is 'genlight.solver_bank'"),
        ({"version": 2}, "version 2; version 1 is known here"),
        ({"primary": "huge"}, "do not name the same members"),
        ({"primary": "big"}, "its fingerprint is"),
        ({"surprise": 1}, "surprise"),
        ({"budget": "9"}, "budget"),
        ({"schedule": {"kind": "singlestep", "steps": [[]], "slots": [], "orders": []}}, "schedule"),
        ({"scheduler": {}}, "scheduler"),
    ],
)
def test_files_that_were_changed_or_are_of_another_kind(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, _ = written(PIPELINES["sd"](), "sd", MIXED, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_model_schedule(path)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        load_model_schedule(path)


def test_a_schedule_is_written_with_members_that_there_are(tmp_path: Path) -> None:
    tiny = PIPELINES["sd"]()
    members = read_members({"own": tiny.pipe.unet}, tiny.prediction, tmp_path)
    with pytest.raises(ValueError, match="big is not among the members own"):
        write_model_schedule(tmp_path / "x.json", MIXED, members, {"own": tiny.prediction})
    alone = ModelSchedule("singlestep", (("own",), ("own",)))
    members |= {"big": Member("big", bigger(tiny.pipe.unet, "sd"))}
    predictions = dict.fromkeys(members, tiny.prediction)
    file = write_model_schedule(tmp_path / "x.json", alone, members, predictions, primary="big")
    # what is not used is left out
    assert [record.name for record in file.members] == ["own"] == [file.primary]


def test_one_switch_of_wan_is_a_boundary_ratio(tmp_path: Path) -> None:
    tiny = PIPELINES["wan"]()
    path, networks = written(tiny, "wan", HALVES, tmp_path)
    file = load_model_schedule(path)
    apply_to_pipeline(tiny.pipe, file, networks)
    expected = tiny(tiny.pipe.scheduler, file.nfe)
    ratio = boundary_ratio(file)
    assert ratio is not None and 0 < ratio < 1
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=networks[file.evaluations[0].member],
        transformer_2=networks[file.evaluations[-1].member],
        scheduler=file.build_scheduler(),
        boundary_ratio=ratio,
    )
    stock = Tiny(pipe, tiny.prediction, tiny.arguments, tiny.shape)
    assert torch.equal(stock(file.build_scheduler(), file.nfe), expected)
    other = tmp_path / "other"
    other.mkdir()
    path, _ = written(PIPELINES["wan"](), "wan", MIXED, other)
    assert boundary_ratio(load_model_schedule(path)) is None


def test_the_documented_use_needs_no_genlight(tmp_path: Path) -> None:
    tiny = PIPELINES["sd"]()
    path, networks = written(tiny, "sd", MIXED, tmp_path)
    apply_to_pipeline(tiny.pipe, load_model_schedule(path), networks)
    expected = tiny(tiny.pipe.scheduler, MIXED.nfe)
    assert len(PLAIN_USE.strip().splitlines()) <= 20
    program = f"""
import sys
sys.path.insert(0, ".")
sys.modules["genlight"] = None
import diffusers, torch
unet = diffusers.UNet2DConditionModel.from_pretrained("own")
pipe = diffusers.StableDiffusionPipeline(
    vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)
{PLAIN_USE}
from safetensors.torch import load_file, save_file
given = load_file("given.safetensors")
result = pipe(
    num_inference_steps=steps, guidance_scale=3.0, height=64, width=64, output_type="latent", return_dict=False, **given
)[0]
save_file({{"result": result}}, "result.safetensors")
"""
    from safetensors.torch import load_file, save_file

    given = {key: value for key, value in tiny.arguments.items() if isinstance(value, Tensor)}
    save_file({"latents": tiny.noise(), **given}, tmp_path / "given.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "result.safetensors")["result"], expected)


def test_the_scheduler_of_a_file_states_what_the_members_were_trained_on(tmp_path: Path) -> None:
    tiny = PIPELINES["sd3"]()
    path, _ = written(tiny, "sd3", HALVES, tmp_path)
    schedule, kind = read_scheduler(load_model_schedule(path).build_scheduler())
    assert kind == "flow" and schedule.definition() == tiny.prediction.schedule.definition()
