"""Reading members of a zoo, refusing those that cannot take turns, and sampling with them as one module."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from lightning.pytorch import Trainer

from genlight import recipes
from genlight.data.digits import DigitsDataModule
from genlight.diffusion.model_schedule import ModelSchedule
from genlight.diffusion.noise_schedules import FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.errors import UserError
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.zoo import Member, Zoo, ZooEntry, load_zoo
from genlight.modules.zoo_checks import check_compatible
from genlight.modules.zoo_module import ZooModule
from genlight.search.protocols import ScheduledMembers, SettableSampler
from genlight.search.spaces.model_schedule import ModelScheduleSpace

WIDTHS = {"small": 8, "mid": 16, "large": 24}


@pytest.fixture
def folders(tiny: SimpleNamespace, tmp_path: Path) -> dict[str, str]:
    """Three pipeline folders of unconditional networks of 8×8 pixels."""
    result = {}
    for name, width in WIDTHS.items():
        network = tiny.unet(block_out_channels=(width, width), attention_head_dim=8)
        tiny.module("vp", network).save_pretrained(tmp_path / name)
        result[name] = str(tmp_path / name)
    return result


def edit(path: str | Path, **values: Any) -> None:
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**content, **values}))


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_names_stay_attached_whatever_the_order(folders: dict[str, str]) -> None:
    for order in (("small", "mid", "large"), ("large", "small", "mid")):
        for name in order:  # the order on disk is that of creation at most
            os.utime(folders[name])
        zoo = load_zoo({name: folders[name] for name in order})
        assert tuple(zoo.networks) == order and zoo.largest == "large"
        for name, network in zoo.networks.items():
            assert network.config.block_out_channels[0] == WIDTHS[name]
            assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert zoo.noise_schedule.fingerprint() == VPSchedule("squaredcos_cap_v2").fingerprint()
        assert {p.prediction_type for p in zoo.predictions.values()} == {"v_prediction"}


def test_sources_of_every_kind_give_the_same_network(folders: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one" / "fit"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"members.x: .* its fit has not finished"):
        load_zoo({"x": str(run)})
    (run / "artifact").symlink_to(folders["small"])
    (tmp_path / "wrapped").mkdir()
    (tmp_path / "wrapped" / "inner").symlink_to(Path(folders["small"]) / "unet")
    entries = {
        "pipeline": folders["small"],
        "run": {"source": str(run)},
        "component": ZooEntry(folders["small"], component="unet"),
        "network": str(Path(folders["small"]) / "unet"),
        "subfolder": {"source": folders["small"], "subfolder": "unet"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zoo = load_zoo(entries)
    assert len({member.sha256 for member in zoo.members.values()}) == 1
    # a network without a scheduler beside it is taken to predict what the others do
    assert zoo.members["network"].prediction is None and zoo.predictions["network"] == zoo.predictions["pipeline"]
    with pytest.raises(UserError, match="none has a scheduler"):
        load_zoo({"network": entries["network"]}).noise_schedule  # noqa: B018
    with pytest.raises(UserError, match="leads out of"):
        load_zoo({"x": {"source": str(tmp_path / "wrapped"), "subfolder": "inner"}})


def test_precision_as_stored_or_as_asked(folders: dict[str, str], tmp_path: Path) -> None:
    network = diffusers.UNet2DModel.from_pretrained(folders["small"], subfolder="unet").to(torch.bfloat16)
    network.save_pretrained(tmp_path / "half", variant="bf16")
    half = {"source": str(tmp_path / "half"), "variant": "bf16"}
    with pytest.warns(UserWarning, match="the same weights"):
        found = load_zoo({"half": half, "cast": {**half, "dtype": "float32"}, "full": folders["mid"]})
    assert [str(net.dtype) for net in found.networks.values()] == ["torch.bfloat16", "torch.float32", "torch.float32"]
    assert load_zoo({"half": half}, dtype=torch.float16).networks["half"].dtype == torch.float16


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "one member or more"),
        ({"": "a"}, "the name of a member is ''"),
        ([("a", "small"), ("a", "mid")], "members.a is given twice"),
        ({"a": {"source": "small", "path": "b"}}, "members.a.path: there is no such field; known are source"),
        ({"a": {"subfolder": "b"}}, "members.a: source = ''"),
        ({"a": {"source": "b", "dtype": "int8"}}, "members.a: dtype = 'int8'"),
        ({"a": "/nowhere/at/all"}, "members.a: /nowhere/at/all is not a folder"),
    ],
)
def test_entries_that_do_not_fit(
    entries: Any, message: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_zoo(entries)


def test_what_a_folder_lacks_is_said_with_the_member(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"members.x.component = transformer: model_index.json names none such"):
        load_zoo({"x": {"source": folders["small"], "component": "transformer"}})
    with pytest.raises(UserError, match=r"members.x: .* holds no config.json"):
        load_zoo({"x": str(tmp_path)})
    weights = next((Path(folders["mid"]) / "unet").glob("*.safetensors"))
    weights.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"members.x: .* is damaged"):
        load_zoo({"x": folders["mid"]})
    weights.unlink()
    with pytest.raises(UserError, match=r"members.x: .* no weights as safetensors"):
        load_zoo({"x": folders["mid"]})
    edit(Path(folders["small"]) / "scheduler" / "scheduler_config.json", _class_name="CMStochasticIterativeScheduler")
    with pytest.raises(UserError, match=r"members.x: .* cannot be turned into another's"):
        load_zoo({"x": folders["small"]})


def member(name: str, *, schedule: Any = None, kind: str = "epsilon", **values: Any) -> Member:
    """A member that is nothing but what its configs say."""
    config = {"in_channels": 4, "out_channels": 4, "sample_size": 64, "cross_attention_dim": 768}
    own = {key: values.pop(key) for key in ("vae", "num_classes") if key in values}
    network = SimpleNamespace(config={**config, **values})
    prediction = None if schedule == "unknown" else Prediction(kind, schedule or VPSchedule("scaled_linear"))
    return Member(name, network, prediction=prediction, **own)


ZERO_SNR = VPSchedule("scaled_linear", rescale_zero_terminal_snr=True)
SCALED = {"scaling_factor": 0.18215, "latent_channels": 4}


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ({}, {"in_channels": 16, "out_channels": 16}, "shape of the noise: in_channels: 16 found, 4 expected"),
        ({}, {"out_channels": 3}, "shape of the noise: out_channels: 3 found"),
        ({}, {"sample_size": 96}, r"shape of the noise: sample_size: \[96, 96\] found"),
        ({}, {"cross_attention_dim": 1024}, "text that they attend to: text width: 1024 found, 768 expected"),
        ({"joint_attention_dim": 4096}, {"joint_attention_dim": 2048}, "text width: 2048 found, 4096 expected"),
        ({"caption_channels": 8}, {"caption_channels": 9}, "text width: 9 found, 8 expected"),
        ({"vae": SCALED}, {"vae": {**SCALED, "scaling_factor": 0.7}}, "scale of the latents: scaling_factor: 0.7"),
        ({}, {"num_classes": 10}, "classes that they know: num_classes: 10 found, None expected"),
        ({"num_classes": 9}, {"num_classes": 10}, "num_classes: 10 found, 9 expected"),
        ({}, {"guidance_embeds": True}, "guidance: guidance_embeds: True found, False expected"),
        ({}, {"time_cond_proj_dim": 256}, "guidance: time_cond_proj_dim: 256 found"),
        ({}, {"schedule": VPSchedule("linear")}, "noise schedule: beta_schedule: 'linear' found"),
        ({}, {"schedule": FlowSchedule(), "kind": "flow"}, "noise schedule: family: 'flow' found, 'vp' expected"),
        ({"schedule": FlowSchedule()}, {"schedule": FlowSchedule(500)}, "noise schedule: num_train_timesteps: 500"),
        ({"kind": "v_prediction"}, {"schedule": ZERO_SNR, "kind": "v_prediction"}, "rescale_zero_terminal_snr: True"),
        (
            {"schedule": ZERO_SNR, "kind": "v_prediction"},
            {"schedule": ZERO_SNR, "kind": "epsilon"},
            "members.two predicts epsilon and members.one v_prediction: at the first step",
        ),
    ],
)
def test_each_way_not_to_fit_has_one_clear_error(one: dict[str, Any], two: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_compatible(
            [member("one", **one), member("between", schedule="unknown", **_shared(one)), member("two", **two)]
        )
    assert "members.two" in str(caught.value) and "members.one" in str(caught.value)


def _shared(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("schedule", "kind")}


def test_what_may_differ_does() -> None:
    check_compatible(
        [
            member("plain", vae=SCALED),
            member("variance", out_channels=8, sample_size=(64, 64)),
            member("velocity", kind="v_prediction", num_layers=3),
            member("network alone", schedule="unknown"),
        ]
    )
    # the shift of flow matching moves times, and not the process
    check_compatible([member(str(shift), kind="flow", schedule=FlowSchedule(shift=shift)) for shift in (1.0, 3.0)])
    # networks with captions may be of any width inside
    check_compatible([member(str(width), caption_channels=8, cross_attention_dim=width) for width in (1152, 2240)])


def test_one_weights_file_twice_is_a_warning(folders: dict[str, str], tmp_path: Path) -> None:
    for twin in (folders["small"], str(tmp_path / "copy")):
        if twin != folders["small"]:
            diffusers.UNet2DModel.from_pretrained(folders["small"], subfolder="unet").save_pretrained(twin)
        with pytest.warns(UserWarning, match=r"members\.a and members\.b have the same weights"):
            assert len(load_zoo({"a": folders["small"], "c": folders["mid"], "b": twin}).members) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_zoo(folders)


# the module


def space_of(module: ZooModule, **options: Any) -> ModelScheduleSpace:
    costs = {name: float(parameters(network)) for name, network in module.members.items()}
    return ModelScheduleSpace(module.prediction.schedule, costs, **options)


def noise_and_label(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_primary_samples_until_a_sampler_is_set(folders: dict[str, str]) -> None:
    module = ZooModule(folders, num_inference_steps=4)
    assert isinstance(module, SettableSampler) and isinstance(module, ScheduledMembers)
    noise = noise_and_label()
    alone = DiffusionModule(
        pretrained=folders["large"], class_conditional=None, label_dropout=0.0, num_inference_steps=4
    )
    own = module.sample(noise)
    assert module.primary == "large" and module.sample_shape == (1, 8, 8) and list(module.members) == list(WIDTHS)
    assert torch.equal(own, alone.sample(noise))
    schedule = ModelSchedule("singlestep", (("small",), ("large", "mid"), ("mid",)))
    space = space_of(module)
    space.apply(module, schedule)
    searched = module.sample(noise)
    assert not torch.equal(searched, own)
    assert dict(module.scheduled.calls) == {"small": 1, "large": 1, "mid": 2}  # type: ignore[union-attr]
    # who answers matters, and steps that are asked for take its place
    space.apply(module, ModelSchedule("singlestep", (("mid",), ("large", "mid"), ("small",))))
    assert not torch.allclose(module.sample(noise), searched)
    assert torch.equal(module.sample(noise, num_inference_steps=4), own)
    module.set_sampler(None)
    assert torch.equal(module.sample(noise), own)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_schedule_of_one_member_is_that_member_alone(name: str, folders: dict[str, str]) -> None:
    module = ZooModule(folders, primary="mid")
    alone = DiffusionModule(pretrained=folders[name], class_conditional=None, label_dropout=0.0)
    sampler = space_of(module).sampler(ModelSchedule("singlestep", ((name,), (name, name), (name, name, name))))
    alone.set_sampler(sampler)
    module.set_sampler(sampler)
    module.set_members(sampler.timesteps, [name] * 6)
    # kernels of the processor may add in another order
    torch.testing.assert_close(module.sample(noise_and_label()), alone.sample(noise_and_label()), rtol=0, atol=2e-5)


def test_guidance_asks_one_member_for_both_halves(tiny: SimpleNamespace, tmp_path: Path) -> None:
    for width in (8, 16):
        network = tiny.unet(block_out_channels=(width, width), num_class_embeds=4)
        conditional = tiny.module("epsilon", network, class_conditional=True, num_classes=3)
        conditional.save_pretrained(tmp_path / str(width))
    module = ZooModule({str(w): str(tmp_path / str(w)) for w in (8, 16)}, guidance_scale=2.0)
    noise, label = noise_and_label(), torch.tensor([0, 1, 2, 0])
    space = space_of(module)
    space.apply(module, ModelSchedule("singlestep", (("8",), ("16", "8"), ("16",))))
    guided = module.sample(noise, label)
    assert module.num_classes == 3 and dict(module.scheduled.calls) == {"8": 2, "16": 2}  # type: ignore[union-attr]
    assert not torch.allclose(guided, module.sample(noise, label, guidance_scale=1.0))


def test_members_of_other_prediction_types_take_turns(tiny: SimpleNamespace, tmp_path: Path) -> None:
    for kind, width in (("epsilon", 8), ("v_prediction", 16)):
        network = tiny.unet(block_out_channels=(width, width))
        DiffusionModule(network, VPSchedule("linear"), kind).save_pretrained(tmp_path / kind)
    module = ZooModule({kind: str(tmp_path / kind) for kind in ("v_prediction", "epsilon")}, primary="epsilon")
    module.save_pretrained(tmp_path / "saved")
    saved = {"v_prediction": str(tmp_path / "saved" / "members" / "v_prediction"), "epsilon": str(tmp_path / "saved")}
    assert ZooModule(saved, primary="epsilon").fingerprint() == module.fingerprint()
    assert module.prediction_type == "epsilon"
    sampler = space_of(module).sampler(ModelSchedule("singlestep", (("v_prediction",),) * 4))
    module.set_sampler(sampler)
    module.set_members(sampler.timesteps, ["v_prediction"] * 4)
    alone = DiffusionModule(pretrained=str(tmp_path / "v_prediction"), class_conditional=None, label_dropout=0.0)
    alone.set_sampler(sampler)
    found, expected = module.sample_latents(noise_and_label()), alone.sample_latents(noise_and_label())
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_the_fingerprint_is_of_names_weights_and_order(folders: dict[str, str]) -> None:
    one = ZooModule(folders).fingerprint()
    assert ZooModule(folders).fingerprint() == one
    others = [
        ZooModule({**folders, "small": folders["mid"], "mid": folders["small"]}),
        ZooModule({name: folders[name] for name in reversed(folders)}),
        ZooModule(folders, primary="small"),
        ZooModule({name: folders[name] for name in ("small", "large")}),
    ]
    changed = ZooModule(folders)
    with torch.no_grad():
        next(changed.members["small"].parameters()).add_(1)
    fingerprints = [one, changed.fingerprint(), *(other.fingerprint() for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)


def test_it_is_measured_and_not_trained(folders: dict[str, str], tmp_path: Path) -> None:
    module, data = ZooModule(folders, num_inference_steps=2), DigitsDataModule(8, 1, None, 8, 8, 8, 0)
    module.check_data(data)
    data.noise_shape = module.sample_shape
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=1, enable_model_summary=False, **quiet)
    trainer.validate(module, datamodule=data, verbose=False)
    assert module.grid_images is not None and module.grid_images.shape == (8, 1, 8, 8)
    with pytest.raises(UserError, match="members are trained by experiments of their own"):
        trainer.fit(module, datamodule=data)
    with pytest.raises(UserError, match="leave ckpt_path null"):
        module.load_pretrained(folders["small"])


def test_it_is_saved_as_the_primarys_pipeline_and_the_other_networks(folders: dict[str, str], tmp_path: Path) -> None:
    module = ZooModule(folders)
    module.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved"
    again = ZooModule(
        {"small": str(saved / "members" / "small"), "mid": str(saved / "members" / "mid"), "large": str(saved)}
    )
    assert again.fingerprint() == module.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": {}}, "module.members is empty"),
        ({"primary": "huge"}, "module.primary = 'huge'"),
        ({"resident": 0}, "module.resident = 0"),
        ({"recipe": {"experiment": "digits"}}, "module.recipe needs experiment, and overrides"),
        ({"recipe": {"experiment": "digits", "overrides": {"huge": []}}}, "overrides.huge is not in module.members"),
        ({"recipe": {"experiment": "digits", "overrides": {"a": "b=1"}}}, "must be a list of words"),
        ({"num_inference_steps": 0}, "module.num_inference_steps"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZooModule(**{"members": {"a": "a", "b": "b"}, **options})


def test_a_recipe_makes_the_members_that_are_missing(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    members: dict[str, Any] = {
        "small": str(runs / "zoo-small" / "fit"),
        "mid": {"source": str(runs / "zoo-mid" / "fit")},
    }
    members["large"] = folders["large"]
    recipe = {"experiment": "some/member", "overrides": {"small": ["a=1", "b=2"], "mid": ["a=3"]}}
    asked: list[tuple[str, ...]] = []

    def fit(experiment: str, is_there: Callable[[], bool], what: str, folder: Path, *words: str) -> None:
        if is_there():
            return
        asked.append((experiment, *words))
        root, name = (word.partition("=")[2] for word in words[:2])
        target = Path(root) / name / "fit"
        target.mkdir(parents=True)
        (target / "run.json").write_text("{}")
        (target / "artifact").symlink_to(folders[name.removeprefix("zoo-")])

    monkeypatch.setattr(recipes, "fit_where_missing", fit)
    module = ZooModule(members, recipe=recipe)
    for _ in range(2):
        module.prepare("elsewhere", "cache")
    common = (f"run.root={runs}", "run.name=zoo-small", "paths.cache=cache")
    assert asked[0] == ("some/member", *common, "a=1", "b=2")
    assert [words[2] for words in asked] == ["run.name=zoo-small", "run.name=zoo-mid"]
    assert list(module.members) == ["small", "mid", "large"]
    monkeypatch.setattr(recipes, "fit_where_missing", lambda *_: None)
    with pytest.raises(UserError, match=r"has not written module.members.small"):
        ZooModule({"small": str(runs / "other" / "fit")}, recipe={**recipe, "overrides": {"small": []}}).prepare("", "")
    with pytest.raises(UserError, match="is not the folder of a fit"):
        ZooModule({"small": "a/b"}, recipe={**recipe, "overrides": {"small": []}}).prepare("", "")


def test_a_zoo_says_which_is_the_largest(folders: dict[str, str]) -> None:
    zoo = load_zoo({"large": folders["large"], "small": folders["small"]})
    assert isinstance(zoo, Zoo) and zoo.largest == "large"
