"""Text-to-image and text-to-video pipelines of diffusers as generators, with tiny random networks.

Most pipelines here have no tokenizers: their `encode_prompt` is replaced by one that gives each prompt embeddings of
its own, in the order and form of that family. One pipeline has a tokenizer and a text encoder of its own.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusion.tiny_pipelines import PIPELINES, VP, dit, relative, stable_diffusion, stock
from lightning.pytorch import Trainer
from torch import Tensor

from genlight.data.digits import DigitsDataModule
from genlight.data.prompts import PromptsDataModule
from genlight.diffusion.export_scheduler import scheduler_of, write_scheduler
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.presets import named_schedule, preset
from genlight.diffusion.solver.serialization import SolverBank, fingerprint
from genlight.errors import UserError
from genlight.loops.quantization_settings import network_of
from genlight.loops.solver_banks import PipelineSampling, sampling_of
from genlight.modules.networks import noise_seeded_generators
from genlight.modules.pipeline import PipelineModule
from genlight.modules.pipeline_calls import PromptMemo
from genlight.search.protocols import SettableSampler
from genlight.search.spaces.solver_objective import TeacherObjective, make_teacher_bank
from genlight.search.spaces.solver_schedule import TableSampler

NAMES = [name for name in PIPELINES if name != "dit"]
VIDEOS = ("latte", "wan")
PROMPTS = ["a cat", "a dog", "a house", "a tree"]
STEPS = 5
CALL: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False},
    "latte": {"mask_feature": False, "clean_caption": False},
}
NUM_FRAMES = {"latte": 2, "wan": 5}


def embedding(prompts: list[str], *shape: int) -> Tensor:
    """[B, *shape], each row a function of its text alone."""
    seeds = [int.from_bytes(hashlib.sha256(f"{text}{shape}".encode()).digest()[:4], "little") for text in prompts]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def encoder(name: str, asked: list[list[str]]) -> Callable[..., tuple[Any, ...]]:
    """What takes the place of `encode_prompt`; the prompts that it is asked for are appended to `asked`."""

    def encode(prompt: list[str], *arguments: Any, **options: Any) -> tuple[Any, ...]:
        asked.append(list(prompt))
        none = [""] * len(prompt)
        sizes = {"sd": 8, "sdxl": 8, "pixart": 8, "sd3": 32, "flux": 32, "latte": 32, "wan": 16}
        one, other = (embedding(texts, 5, sizes[name]) for texts in (prompt, none))
        if name in ("sd", "latte", "wan"):
            return one, other
        if name == "pixart":
            return one, torch.ones(len(prompt), 5), other, torch.ones(len(prompt), 5)
        if name == "flux":
            return one, embedding(prompt, 32), torch.zeros(5, 3)
        pooled = {"sdxl": 8, "sd3": 64}[name]
        return one, other, embedding(prompt, pooled), embedding(none, pooled)

    return encode


def vae(latent_channels: int = 4, **options: Any) -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=latent_channels,
        **options,
    )


def tiny_pipe(name: str, asked: list[list[str]] | None = None) -> Any:
    pipe = PIPELINES[name]().pipe
    pipe.encode_prompt = encoder(name, [] if asked is None else asked)
    if name in ("sd", "latte"):
        pipe.register_modules(vae=vae())
    if name == "flux":
        pipe.register_modules(vae=vae(1, shift_factor=0.1))
    return pipe


def module_of(name: str, pipe: Any = None, **options: Any) -> PipelineModule:
    options = {"guidance_scale": 3.0, "call": CALL.get(name), "num_frames": NUM_FRAMES.get(name), **options}
    module = PipelineModule("nowhere", num_inference_steps=STEPS, height=64, width=64, **options)
    module.adopt(tiny_pipe(name) if pipe is None else pipe)
    module.prompts = list(PROMPTS)
    return module


def noise_of(module: PipelineModule, count: int = 2) -> Tensor:
    return torch.randn((count, *module.sample_shape), generator=torch.Generator().manual_seed(3))


def same_times(scheduler: Any, solver: str, prediction: Prediction) -> SolverSchedule:
    """The preset on the times that a scheduler has just used."""
    if prediction.schedule.family == "flow":
        return preset(solver, prediction.schedule, tuple(scheduler.sigmas.double().tolist()))
    return preset(solver, prediction.schedule, (*(float(t) for t in scheduler.timesteps), None))


def called(name: str, noise: Tensor, scheduler: Any, prompts: list[str], pipe: Any = None, **options: Any) -> Tensor:
    """What diffusers makes of it, called by hand."""
    pipe = tiny_pipe(name) if pipe is None else pipe
    pipe.scheduler = scheduler
    fixed = {"guidance_scale": 3.0, "height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    if name in VIDEOS:
        fixed["video_length" if name == "latte" else "num_frames"] = NUM_FRAMES[name]
    return pipe(prompt=prompts, latents=noise, return_dict=False, **{**fixed, **CALL.get(name, {}), **options})[0]


def table_of(module: PipelineModule, solver: str = "ddim", steps: int = 3) -> SolverTable:
    schedule = module.prediction.schedule
    return compile_schedule(named_schedule(solver, schedule, steps), schedule)


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_presets_give_what_stock_schedulers_give(name: str) -> None:
    module = module_of(name)
    assert fingerprint(module.prediction) == fingerprint(PIPELINES[name]().prediction)
    assert module.sample_shape == PIPELINES[name]().shape[1:]
    noise, label = noise_of(module), torch.tensor([2, 0])
    scheduler, solver = stock(module.prediction)
    expected = called(name, noise, scheduler, ["a house", "a cat"])
    table = compile_schedule(same_times(scheduler, solver, module.prediction), module.prediction.schedule)
    found = module.sample_tables([table, table_of(module, steps=STEPS)], noise, label)
    assert found.shape == (2, *noise.shape) and found.dtype == torch.float32
    assert relative(found[0], expected) <= 2e-5
    assert relative(found[1], expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    module, parts = module_of(name), module_of(name, batch_size=3)
    noise, label = noise_of(module, 4), torch.tensor([0, 1, 2, 3])
    table = [table_of(module)]
    together = module.sample_tables(table, noise, label)[0]
    single = torch.cat([module.sample_tables(table, noise[i : i + 1], label[i : i + 1])[0] for i in range(4)])
    assert relative(single, together) <= 1e-5
    assert relative(parts.sample_tables(table, noise, label)[0], together) <= 1e-5
    # and it does depend on its prompt and on its noise
    assert relative(module.sample_tables(table, noise, label.flip(0))[0], together) > 1e-6
    assert relative(module.sample_tables(table, noise.flip(0), label)[0], together) > 1e-2


def test_samplers_that_draw_noise_draw_it_by_sample() -> None:
    module = module_of("sd", scheduler="EulerAncestralDiscreteScheduler")
    noise, label = noise_of(module, 4), torch.tensor([0, 1, 2, 3])
    together = module.sample_latents(noise, label)
    single = torch.cat([module.sample_latents(noise[i : i + 1], label[i : i + 1]) for i in range(4)])
    assert relative(single, together) <= 1e-5
    assert relative(together, module_of("sd").sample_latents(noise, label)) > 1e-2


def test_set_sampler_and_back() -> None:
    module = module_of("sd")
    assert isinstance(module, SettableSampler)
    noise, label = noise_of(module), torch.tensor([1, 1])
    own = module.sample(noise, label)
    schedule = named_schedule("unipc_2_bh2", module.prediction.schedule, 4)
    table = compile_schedule(schedule, module.prediction.schedule)
    module.set_sampler(TableSampler(schedule, table))
    assert torch.equal(module.sample_latents(noise, label), module.sample_tables([table], noise, label)[0])
    assert relative(module.sample(noise, label), own) > 1e-3
    # what is asked for by name takes its place
    assert torch.equal(module.sample(noise, label, num_inference_steps=STEPS), own)
    module.set_sampler(None)
    assert torch.equal(module.sample(noise, label), own)


def test_own_scheduler_gives_what_diffusers_gives() -> None:
    module = module_of("sd")
    noise, label = noise_of(module), torch.tensor([1, 3])
    scheduler = PIPELINES["sd"]().pipe.scheduler
    expected = called("sd", noise, scheduler, ["a dog", "a tree"])
    assert torch.equal(module.sample_latents(noise, label), expected)
    images = called("sd", noise, scheduler, ["a dog", "a tree"], output_type="pt")
    assert relative(module.sample(noise, label), 2 * images - 1) <= 1e-6
    other = build_scheduler("DDIMScheduler", VP, "epsilon")
    expected = called("sd", noise, other, ["a dog", "a tree"])
    assert torch.equal(module.sample_latents(noise, label, scheduler="DDIMScheduler"), expected)
    chosen = module_of("sd", scheduler=partial(diffusers.DDIMScheduler, timestep_spacing="trailing"))
    other = build_scheduler("DDIMScheduler", VP, "epsilon", timestep_spacing="trailing")
    assert torch.equal(chosen.sample_latents(noise, label), called("sd", noise, other, ["a dog", "a tree"]))


def test_guidance_reaches_the_pipeline() -> None:
    noise, label = noise_of(module_of("sd")), torch.tensor([0, 1])
    expected = called("sd", noise, PIPELINES["sd"]().pipe.scheduler, ["a cat", "a dog"], guidance_scale=1.5)
    assert torch.equal(module_of("sd", guidance_scale=1.5).sample_latents(noise, label), expected)
    assert torch.equal(module_of("sd").sample_latents(noise, label, guidance_scale=1.5), expected)
    assert relative(module_of("sd").sample_latents(noise, label), expected) > 1e-3
    default = module_of("sd", guidance_scale=None)
    assert default.guidance_scale == 7.5
    assert torch.equal(
        default.sample_latents(noise, label), module_of("sd", guidance_scale=7.5).sample_latents(noise, label)
    )


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_encoded_once(name: str) -> None:
    asked: list[list[str]] = []
    module = module_of(name, tiny_pipe(name, asked))
    noise, label = noise_of(module), torch.tensor([0, 1])
    tables = [table_of(module), table_of(module, steps=4)]
    asked.clear()
    first = module.sample_tables(tables, noise, label)
    assert asked == [["a cat", "a dog"]]
    assert torch.equal(module.sample_tables(tables, noise, label), first)
    assert asked == [["a cat", "a dog"]]
    module.sample_tables(tables[:1], noise, label.flip(0))
    assert asked == [["a cat", "a dog"], ["a dog", "a cat"]]


def test_remembered_prompts_are_bounded_and_safe_from_changes() -> None:
    asked: list[list[str]] = []
    pipe = tiny_pipe("sd", asked)
    memo = PromptMemo(pipe, max_bytes=2 * 2 * 5 * 8 * 4)
    first, none = memo(["a"], "cpu")
    kept = first.clone()
    first.zero_()
    assert torch.equal(memo(["a"], "cpu")[0], kept) and len(asked) == 1
    memo(["b"], "cpu")
    memo(["c"], "cpu")
    assert torch.equal(memo(["a"], "cpu")[0], kept) and len(asked) == 4  # given up, encoded again
    memo(["a"], "cpu", prompt_embeds=kept)
    memo(["a"], "cpu", prompt_embeds=kept)
    assert len(asked) == 6  # tensors are passed through
    assert torch.equal(memo(["a"], "cpu")[1], none) and len(asked) == 6


@pytest.mark.parametrize("name", ["sd", "flux", "latte"])
def test_decoding_gives_what_the_pipeline_gives(name: str) -> None:
    module = module_of(name)
    noise, label = noise_of(module), torch.tensor([0, 1])
    calls = []
    network = module.networks["unet" if name == "sd" else "transformer"]
    network.register_forward_hook(lambda *_: calls.append(1))
    latents = module.sample_latents(noise, label)
    before = len(calls)
    images = module.decode(latents)
    assert before > 0 and len(calls) == before
    assert images.shape == (2, *module.image_shape) == (2, 3, 64, 64)
    assert relative(images, module.sample(noise, label)) <= 1e-5
    expected = called(name, noise, module.build_scheduler(), PROMPTS[:2], output_type="pt")
    # of a video, the middle frame
    assert relative(images, 2 * (expected[:, 1] if name == "latte" else expected) - 1) <= 1e-5


def test_half_precision_noise_is_cast_to_what_the_pipeline_takes() -> None:
    pipe = tiny_pipe("sd")
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *a, **k: tuple(x.bfloat16() for x in encode(*a, **k))
    module = module_of("sd", pipe.to(torch.bfloat16))
    found = module.sample_tables([table_of(module)], noise_of(module), torch.tensor([0, 1]))
    assert found.dtype == torch.float32
    exact = module_of("sd").sample_tables([table_of(module)], noise_of(module), torch.tensor([0, 1]))
    assert 1e-6 < relative(found, exact) < 0.1


def test_weights_that_are_cast_take_other_latents(tmp_path: Path) -> None:
    """As Lightning does in bf16-true, after shape and fingerprint were asked for."""
    module = module_of("sd", tokenized(tmp_path))
    noise, before = noise_of(module), module.fingerprint()
    exact = module.sample_latents(noise, torch.tensor([0, 1]))
    module.to(torch.bfloat16)
    assert module.latent_kind() == ((4, 8, 8), torch.bfloat16)
    assert 1e-6 < relative(module.sample_latents(noise, torch.tensor([0, 1])), exact) < 0.1
    assert module.fingerprint() != before


def test_a_latent_consistency_model_is_sampled_as_by_its_own_pipeline(tmp_path: Path) -> None:
    parts = tokenized(tmp_path).components
    torch.manual_seed(5)
    parts["unet"] = type(parts["unet"])(**{**parts["unet"].config, "time_cond_proj_dim": 8}).eval()
    parts["scheduler"] = build_scheduler("LCMScheduler", VP, "epsilon", clip_sample=True)
    pipe = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    fixed = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64, "return_dict": False}
    expected = [
        pipe(["a dog", "a tree"], latents=noise, generator=noise_seeded_generators(noise), output_type=kind, **fixed)[0]
        for kind in ("latent", "pt")
    ]
    module = module_of("sd", pipe)
    found = module.sample_latents(noise, torch.tensor([1, 3]), num_inference_steps=4)
    assert module.sample_shape == (4, 8, 8) and torch.equal(found, expected[0])
    assert relative(module.decode(found), 2 * expected[1] - 1) <= 1e-5
    assert module.prediction.schedule.definition() == VP.definition()
    with pytest.warns(UserWarning, match=r"called as StableDiffusionPipeline, whose guidance_scale is 7.5"):
        module_of("sd", pipe, guidance_scale=None)


def test_a_pipeline_that_fails_without_steps_is_named() -> None:
    pipe = tiny_pipe("sd")
    pipe.encode_prompt = lambda *_, **__: 1 / 0
    with pytest.raises(UserError, match=r"StableDiffusionPipeline cannot be asked for its latents.*division"):
        module_of("sd", pipe).sample_shape  # noqa: B018


def test_a_chosen_scheduler_shifts_times_as_the_pipelines_own() -> None:
    pipe = tiny_pipe("flux")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.7)
    module = module_of("flux", pipe)
    noise, label = noise_of(module), torch.tensor([0, 1])
    own = module.sample_latents(noise, label)
    assert torch.equal(module.sample_latents(noise, label, scheduler="FlowMatchEulerDiscreteScheduler"), own)
    static = partial(diffusers.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=False)
    assert relative(module.sample_latents(noise, label, scheduler=static), own) > 1e-3
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"):
        assert bool(module.sample_latents(noise, label, scheduler=name).isfinite().all())
        config = module.build_scheduler(name).config
        assert config["use_dynamic_shifting"] and config["base_shift"] == 0.7
    with pytest.raises(UserError, match=r"FlowMatchHeunDiscreteScheduler' cannot shift times .* as FlowMatchEuler"):
        module.sample_latents(noise, label, scheduler="FlowMatchHeunDiscreteScheduler")


def test_a_scheduler_that_a_pipeline_cannot_ask_for_timesteps_is_named() -> None:
    """Flux always says how far to shift, which a DPM-Solver takes where it shifts alone."""
    module = module_of("flux", scheduler="DPMSolverMultistepScheduler")
    with pytest.raises(UserError, match="FluxPipeline has no timesteps by DPMSolverMultistepScheduler: AssertionError"):
        module.sample_latents(noise_of(module), torch.tensor([0, 1]))


def test_a_search_of_solver_schedules_can_measure_it() -> None:
    module = module_of("sd")
    sampling = sampling_of(module)
    assert isinstance(sampling, PipelineSampling)
    noise, label = noise_of(module, 4), torch.tensor([0, 1, 2, 3])
    schedule = module.prediction.schedule
    teacher = named_schedule("dpmpp_3m_exact", schedule, 30)
    bank = make_teacher_bank(sampling, noise, schedule=teacher, conditions={"label": label})
    assert relative(bank.target, module.sample_tables([compile_schedule(teacher, schedule)], noise, label)[0]) <= 1e-5
    few, many = (named_schedule("dpmpp_2m", schedule, n) for n in (2, 12))
    scores = [found.score for found in TeacherObjective(sampling, bank).evaluate_many([few, many], 4)]
    assert 0 < scores[1] < 0.5 * scores[0]


def test_fingerprint_is_of_weights_settings_and_prompts() -> None:
    module = module_of("sd")
    same, prompts = module_of("sd"), module_of("sd")
    assert len(module.fingerprint()) == 64
    assert same.fingerprint() == module.fingerprint()
    prompts.prompts = PROMPTS[::-1]
    weights = module_of("sd")
    with torch.no_grad():
        next(weights.networks.parameters()).add_(1e-3)
    others = {m.fingerprint() for m in (prompts, weights, module_of("sd", call={"clip_skip": 1}))}
    assert len(others | {module.fingerprint()}) == 4
    json.dumps(module.description())


def tokenized(folder: Path) -> Any:
    """A Stable Diffusion with a tokenizer of single letters and a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz-',."
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(names), max_position_embeddings=16, **sizes)
    config.bos_token_id, config.eos_token_id = len(names) - 2, len(names) - 1
    pipe = stable_diffusion().pipe
    pipe.register_modules(vae=vae(), tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval())
    return pipe


def test_a_folder_through_lightning_and_back(tmp_path: Path) -> None:
    """Loaded, validated with the embedded prompts, its schedule searched and saved, loaded by diffusers."""
    folder, saved = tmp_path / "model", tmp_path / "saved"
    tokenized(tmp_path).save_pretrained(folder)
    module = PipelineModule(str(folder), num_inference_steps=3, batch_size=2)
    assert module._pipe is None
    data = PromptsDataModule(num_samples=6, eval_batch_size=4)
    module.check_data(data)
    data.noise_shape = module.sample_shape
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(module, datamodule=data, verbose=False)
    batch = next(iter(data.val_dataloader()))
    prompts = [data.prompts[number] for number in batch["label"]]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(prompts, latents=batch["noise"], num_inference_steps=3, output_type="pt", return_dict=False)[0]
    assert module.grid_images is not None and module.grid_images.shape == (6, 3, 64, 64)
    assert relative(module.grid_images[: len(expected)], 2 * expected - 1) <= 1e-4
    assert not any(p.requires_grad for p in module.parameters()) and len(list(module.parameters())) > 50

    module.save_pretrained(saved)
    bank = SolverBank.of(module.prediction, {3: named_schedule("dpmpp_2m", module.prediction.schedule, 3)})
    write_scheduler(scheduler_of(bank), saved)
    assert not list(saved.rglob("*.bin")) and list(saved.rglob("*.safetensors"))
    again = PipelineModule(str(saved), num_inference_steps=3)
    again.prompts = data.prompts
    found = again.sample_latents(batch["noise"], batch["label"])
    table = compile_schedule(bank.schedules[3], module.prediction.schedule)
    assert relative(found, module.sample_tables([table], batch["noise"], batch["label"])[0]) <= 1e-5
    with pytest.raises(
        UserError, match=r"num_inference_steps = 4, but the searched schedules of the pipeline are for 3"
    ):
        PipelineModule(str(saved), num_inference_steps=4).configure_model()


def test_dtype_of_a_folder(tmp_path: Path) -> None:
    pipe = tokenized(tmp_path)
    pipe.unet.to(torch.float16)
    pipe.save_pretrained(tmp_path / "model")
    for name, wanted in (("auto", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        module = PipelineModule(str(tmp_path / "model"), dtype=name)
        module.configure_model()
        assert {p.dtype for p in module.parameters()} == {wanted}


def test_a_video_gives_its_middle_frame() -> None:
    module = module_of("latte")
    noise, label = noise_of(module, 1), torch.tensor([0])
    assert noise.shape == (1, 4, 2, 8, 8)
    frames = called("latte", noise, module.build_scheduler(), PROMPTS[:1], output_type="pt")
    assert frames.shape == (1, 2, 3, 64, 64)
    assert relative(module.sample(noise, label), 2 * frames[:, 1] - 1) <= 1e-5
    assert module.sample_latents(noise, label).shape == noise.shape


def test_offloaded_networks_are_moved_by_diffusers_alone() -> None:
    """On a GPU it is asked to, once; Lightning moves none of them, and sampling is the same."""
    module, label = module_of("sd", offload=True), torch.tensor([0, 1])
    told: list[torch.device] = []
    real = module.pipe.enable_model_cpu_offload
    module.pipe.enable_model_cpu_offload = lambda device: told.append(device)
    module.to("meta")
    assert module.device.type == "meta" and {each.device.type for each in module.parameters()} == {"cpu"}
    module.on_validation_epoch_start()
    module.on_validation_epoch_start()
    assert told == [torch.device("meta")]
    expected = module.sample_latents(noise_of(module), label)
    real(device="cpu")
    assert torch.equal(module.sample_latents(noise_of(module), label), expected)


def test_offloading_on_a_cpu_is_said_to_do_nothing() -> None:
    module = module_of("sd", offload=True)
    module.pipe.enable_model_cpu_offload = None
    with pytest.warns(UserWarning, match="does nothing on a CPU") as caught:
        module.on_validation_epoch_start()
        module.on_validation_epoch_start()
    assert len(caught) == 1
    with pytest.raises(UserError, match=r"use module.offload=false"):
        network_of(module)


def test_a_pipeline_that_cannot_be_offloaded_is_named() -> None:
    module = module_of("sd", offload=True).to("meta")
    module.pipe.model_cpu_offload_seq = None
    with pytest.raises(UserError, match=r"module.offload=true: .*model_cpu_offload_seq"):
        module.on_validation_epoch_start()


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"module.dtype = 'half' must be auto, float32, float16, bfloat16"):
        PipelineModule("x", dtype="half")
    for key in ("num_inference_steps", "height", "width", "num_frames", "batch_size", "resident"):
        with pytest.raises(ValueError, match=rf"module.{key} = 0 must be at least 1"):
            PipelineModule("x", **{key: 0})


def test_what_is_no_such_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        PipelineModule(str(tmp_path / "nowhere")).configure_model()
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        PipelineModule(str(tmp_path)).configure_model()
    dit().pipe.save_pretrained(tmp_path / "dit")
    with pytest.raises(UserError, match="DiTPipeline takes no prompts; use module=diffusion_pretrained"):
        PipelineModule(str(tmp_path / "dit")).configure_model()
    tokenized(tmp_path).save_pretrained(tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded as a diffusers pipeline"):
        PipelineModule(str(tmp_path / "sd")).configure_model()
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="cannot be loaded as a diffusers pipeline"):
        PipelineModule(str(tmp_path / "sd")).configure_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 5}, "module.num_frames = 5, but StableDiffusionPipeline makes images: set it to null"),
        ({"call": {"negative_promt": "x"}}, "module.call.negative_promt: .*did you mean negative_prompt"),
        ({"call": {"latents": 1}}, "module.call.latents is not free: it is set by data.seed"),
        ({"call": {"num_images_per_prompt": 2}}, "module.call.num_images_per_prompt is not free"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "module.scheduler: .*flow-matching"),
    ],
)
def test_settings_that_do_not_fit_the_pipeline(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module_of("sd", **options)


def test_data_and_labels_that_do_not_fit() -> None:
    module = module_of("sd")
    with pytest.raises(UserError, match="needs prompts, which data=digits does not have: use data=prompts"):
        module.check_data(DigitsDataModule(8, 1, 10, 16, 16, 16, 0))
    noise = noise_of(module)
    with pytest.raises(ValueError, match="needs labels"):
        module.sample(noise)
    with pytest.raises(ValueError, match="label: 0 … 4 are not all among the 4 prompts"):
        module.sample(noise, torch.tensor([0, 4]))
    module.prompts = None
    with pytest.raises(ValueError, match="the prompts are not known"):
        module.sample(noise, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="fit has nothing to train"):
        module.configure_optimizers()


def test_a_scheduler_that_is_not_known_can_be_measured_but_not_searched() -> None:
    pipe = tiny_pipe("sd")
    pipe.scheduler = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    module = module_of("sd", pipe)
    assert module.sample_shape == (4, 8, 8)
    with pytest.raises(UserError, match=r"its scheduler cannot be replaced: scheduler = 'DDIMInverseScheduler'"):
        module.prediction  # noqa: B018


def test_a_negative_prompt_reaches_every_sample() -> None:
    heard: list[Any] = []
    pipe = tiny_pipe("sd")
    encode = pipe.encode_prompt

    def listening(prompt: list[str], *arguments: Any, **options: Any) -> Any:
        heard.append(arguments[3])
        return encode(prompt)

    pipe.encode_prompt = listening
    module = module_of("sd", pipe, call={"negative_prompt": "blurred"})
    noise = noise_of(module)
    heard.clear()
    module.sample_latents(noise, torch.tensor([0, 1]))
    assert heard == [["blurred", "blurred"]]
