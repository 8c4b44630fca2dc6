"""Latent consistency on tiny random Stable Diffusion pipelines: losses, what is trained, what is written."""

import copy
import functools
from contextlib import nullcontext
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusion.tiny_pipelines import VP, flux
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from modules.test_pipeline import tiny_pipe, vae
from torch.utils.data import DataLoader

from genlight.callbacks.step_seed import StepSeed
from genlight.diffusion.consistency import latent_scalings, skipping_steps
from genlight.errors import UserError
from genlight.io import load_tensors
from genlight.modules.latent_consistency import LORA_FILE, LatentConsistencyModule
from genlight.modules.latent_parts import predict, text_conditions
from genlight.modules.lora import LowRankAdapters

PROMPTS = ["a cat", "a dog"]
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)


def module_of(name="sd", **options):
    pipe = tiny_pipe(name)
    pipe.register_modules(vae=vae())
    arguments = {"height": 64, "width": 64, "optimizer": ADAMW, "time_cond_proj_dim": 8, "lora_rank": None, **options}
    module = LatentConsistencyModule("nowhere", **arguments)
    module.adopt(pipe)
    module.prompts = list(PROMPTS)
    return module


def images(count=2):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise(count=2):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def values(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


class Batches(LightningDataModule):
    def train_dataloader(self):
        rows = [{"image": image, "text": text} for image, text in zip(images(4), PROMPTS * 2, strict=True)]
        return DataLoader(rows, batch_size=2)


def fit(module, folder, steps=2, callbacks=()):
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[StepSeed(0), *callbacks],
    )
    trainer.fit(module, datamodule=Batches())
    return trainer


def test_shards_are_refused_where_a_target_is_kept():
    for options, refused in (({}, True), ({"target_decay": 0.0}, False), ({"lora_rank": 2}, False)):
        module = LatentConsistencyModule("nowhere", optimizer=ADAMW, **options)
        module._trainer = SimpleNamespace(strategy=FSDPStrategy())
        with pytest.raises(UserError, match=r"module\.target_decay above 0") if refused else nullcontext():
            module.on_fit_start()


def test_scalings_and_timesteps_are_those_of_diffusers_scheduler():
    scheduler = diffusers.LCMScheduler(original_inference_steps=50, timestep_scaling=7.0)
    for t in (0, 19, 499, 999):
        wanted = scheduler.get_scalings_for_boundary_condition_discrete(t)
        found = latent_scalings(torch.tensor(t), 7.0)
        assert [f.item() for f in found] == pytest.approx([float(w) for w in wanted])
    grid, k = skipping_steps(1000, 50)
    scheduler.set_timesteps(50)
    assert k == 20 and scheduler.timesteps.flip(0).tolist() == grid.tolist()
    with pytest.raises(ValueError, match="solver_steps = 0"):
        skipping_steps(1000, 0)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("rank", [None, 2])
def test_student_starts_as_the_teacher(name, rank):
    module = module_of(name, lora_rank=rank)
    text = text_conditions(module.pipe, PROMPTS, (64, 64), torch.device("cpu"))
    t = torch.tensor([19.0, 999.0])
    guidance = None if rank else torch.randn(2, 8)
    student = predict(module.pipe.unet, noise(), t, text, guidance)
    with module._adapters.off() if rank else torch.no_grad():
        teacher = predict(module._held.networks["teacher"], noise(), t, text)
    torch.testing.assert_close(student, teacher)


@pytest.mark.parametrize(("name", "kind"), [("sd", "epsilon"), ("sdxl", "v_prediction")])
def test_teacher_step_is_ddim_of_the_guided_teacher(name, kind):
    module = module_of(name)
    assert module.prediction.prediction_type == kind
    text = text_conditions(module.pipe, PROMPTS, (64, 64), torch.device("cpu"))
    t, t_next = torch.tensor([999.0, 999.0]).double(), torch.tensor([979.0, 979.0]).double()
    scale = torch.tensor([3.0, 3.0])
    found = module._teacher_step(noise(), t, t_next, scale, text)
    outputs = predict(module._held.networks["teacher"], noise().repeat(2, 1, 1, 1), t.repeat(2), text.doubled())
    conditional, unconditional = outputs.detach().chunk(2)
    scheduler = diffusers.DDIMScheduler.from_config(module.pipe.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:2].tolist() == [999, 979]
    expected = scheduler.step(unconditional + 3 * (conditional - unconditional), 999, noise()).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_function_is_the_identity_at_time_zero_and_schedulers_step_elsewhere():
    module = module_of()
    text = text_conditions(module.pipe, PROMPTS, (64, 64), torch.device("cpu"))
    scale, zero = torch.full((2,), 8.0), torch.zeros(2).double()
    assert torch.equal(module._function(module.pipe.unet, noise(), zero, scale, text), noise())
    module.num_inference_steps = 1
    label = torch.tensor([0, 1])
    found = module._function(module.pipe.unet, noise(), zero + 999, scale, text)
    torch.testing.assert_close(module.sample_latents(noise(), label), found.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("rank", [None, 2])
def test_training_changes_what_is_trained_alone(name, rank, tmp_path):
    module = module_of(name, lora_rank=rank)
    held = {key: values(network) for key, network in module._held.networks.items()}
    student = values(module.networks)
    fit(module, tmp_path)
    assert all(same(before, values(module._held.networks[key])) for key, before in held.items())
    assert not same(student, values(module.networks))
    names = list(module.state_dict())
    assert all(key.startswith("networks.lora" if rank else "networks.unet") for key in names)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_equal_seeds_give_equal_training_and_averages_share_the_pipeline(tmp_path):
    found = []
    for _ in range(2):
        module = module_of()
        ema = EMAWeightAveraging(decay=0.5)
        fit(module, tmp_path, callbacks=[ema])
        found.append(values(module.networks))
        assert ema._average_model.module.pipe is module.pipe
        assert "vae" not in str(list(ema._average_model.state_dict()))
    assert same(*found)


@pytest.mark.parametrize("rank", [None, 2])
def test_samples_do_not_depend_on_the_batch(rank):
    module = module_of(lora_rank=rank)
    label = torch.tensor([0, 1])
    whole = module.sample(noise(), label)
    assert whole.shape == (2, 3, 64, 64)
    single = torch.cat([module.sample(noise()[[i]], label[[i]]) for i in range(2)])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-4)


def test_saved_pipeline_samples_the_same_in_plain_diffusers(tmp_path):
    module = module_of()
    with torch.no_grad():
        module.pipe.unet.time_embedding.cond_proj.weight.normal_()
    prompt = module.pipe.encode_prompt(PROMPTS, "cpu", 1, True)[0]
    module.save_pretrained(tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path, safety_checker=None, text_encoder=None, tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, diffusers.LCMScheduler) and pipeline.unet.config.time_cond_proj_dim == 8
    arguments = {"prompt_embeds": prompt, "latents": noise(), "height": 64, "width": 64, "output_type": "latent"}
    for scale in (8.0, 12.0):
        theirs = pipeline(num_inference_steps=1, guidance_scale=scale, **arguments).images
        ours = module.sample_latents(noise(), torch.tensor([0, 1]), num_inference_steps=1, guidance_scale=scale)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_adapters_are_written_under_the_names_of_diffusers(tmp_path):
    module = module_of(lora_rank=2)
    module.save_pretrained(tmp_path)
    tensors = load_tensors(tmp_path / LORA_FILE)
    tensors = tensors[0] if isinstance(tensors, tuple) else tensors
    layers = {n for n, m in module.pipe.unet.named_modules() if isinstance(m, torch.nn.Linear) and ".to_q" in n}
    assert layers and all(f"unet.{name}.lora_A.weight" in tensors for name in layers)
    assert diffusers.LCMScheduler.from_pretrained(tmp_path / "scheduler").config.original_inference_steps == 50


def test_adapters_equal_a_changed_weight():
    network = torch.nn.Sequential(torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 3)})["to_q"])
    holder = torch.nn.Module()
    holder.attention = torch.nn.Module()
    holder.attention.to_q = network[0]
    adapters = LowRankAdapters(holder, 2)
    torch.nn.init.normal_(adapters.up["attention-to_q"])
    x = torch.randn(5, 4)
    weight = network[0].weight + adapters.up["attention-to_q"] @ adapters.down["attention-to_q"]
    torch.testing.assert_close(network[0](x), torch.nn.functional.linear(x, weight, network[0].bias))
    with adapters.off():
        torch.testing.assert_close(network[0](x), torch.nn.functional.linear(x, network[0].weight, network[0].bias))
    twin = copy.deepcopy(adapters)
    assert set(twin.state_dict()) == set(adapters.state_dict()) and not twin.active


def test_prompts_come_from_prompts_or_from_the_names_of_classes():
    module = module_of(caption="one {}")
    module.check_data(SimpleNamespace(prompts=["x"]))
    assert module.prompts == ["x"]
    module.check_data(SimpleNamespace(class_names=("cat", "dog")))
    assert module.prompts == ["one cat", "one dog"]
    with pytest.raises(UserError, match="neither prompts nor named classes"):
        module.check_data(SimpleNamespace())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"guidance_min": 0.5}, "guidance_min"),
        ({"target_decay": 1.0}, "target_decay = 1.0"),
        ({"num_inference_steps": 51}, "num_inference_steps = 51"),
        ({"distance": "lpips"}, "distance = 'lpips'"),
        ({"caption": "a cat"}, "caption"),
    ],
)
def test_bad_arguments_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        LatentConsistencyModule("nowhere", **options)


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(UserError, match="UNet2DConditionModel"):
        LatentConsistencyModule("nowhere", guidance_scale=1.0).adopt(flux().pipe)
    with pytest.raises(UserError, match="lora_rank = 0"):
        module_of(lora_rank=0)
    with pytest.raises(UserError, match="to_nothing"):
        module_of(lora_rank=1, lora_targets=["to_nothing"])
    with pytest.raises(UserError, match="cannot be searched"):
        module_of().set_sampler(object())
    assert VP.family == "vp"
