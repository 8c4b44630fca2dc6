"""Recipes for published models, each on a tiny random model of its classes: some to the end, the others planned."""

import io
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pyarrow as pa
import pytest
import torch
import transformers
from command_line import report_of, the_error
from experts.tiny_models import tiny_model
from loops.test_eep import SEARCH, TASKS
from modules.test_zoo_pipelines import bigger
from modules.tiny_folders import tiny_folder
from PIL import Image
from pyarrow import parquet

from genlight.cli import main
from genlight.data.prompts import PromptsDataModule
from genlight.data.tokenizer import character_tokenizer
from genlight.modules.pipeline import PipelineModule
from genlight.quantization.convert import quantized_layers

RECIPES = Path(__file__).resolve().parents[1] / "conf" / "experiment"
# what tiny networks need beside small numbers
SIZES: dict[str, list[str]] = {
    "sd": [],
    "sdxl": ["module.variant=null"],
    "sd3": ["+module.call.max_sequence_length=16"],
    "flux": ["+module.call.max_sequence_length=16"],
    "pixart": ["+module.call.use_resolution_binning=false", "+module.call.max_sequence_length=16"],
    "latte": ["module.num_frames=2"],
    "wan": ["module.num_frames=5", "+module.call.max_sequence_length=16"],
    "wan22": ["module.num_frames=5", "+module.call.max_sequence_length=16", "+module.call.guidance_scale_2=3"],
}
FEW: dict[str, list[str]] = {
    "s3": [
        "method.nfe=[3]",
        "method.spacings=[uniform]",
        "method.teacher.steps=4",
        *(f"method.noise.{draw}=2" for draw in ("search", "select", "report")),
        "method.refine.iterations=1",
        "method.finetune.iterations=1",
        "search.budget=3",
        "search.fidelity=2",
        "search.strategy.screening_fidelity=1",
        "search.strategy.promoted=2",
        "search.shared=false",
    ],
    "viditq": ["method.samples=2", "method.trajectory=1", "method.rivals=false", "module.num_inference_steps=2"],
    "mixdq": ["method.samples=8", "method.trajectory=1", "method.mixed.samples=1", "method.rivals=false"],
    "oms": [
        "method.budgets=[2]",
        "method.max_evaluations=3",
        "method.per_rule=1",
        "method.singles=2",
        "method.select=2",
        "method.objective=val/variation",
        "method.mode=min",
        "search.budget=4",
        "search.fidelity=1",
        "search.finalists=2",
        "search.strategy.rounds=1",
        "search.strategy.per_budget=2",
        "search.strategy.generations=2",
        "search.shared=false",
        "module.num_inference_steps=2",
    ],
}
# a metric that needs no downloaded network, for metrics=clip
VARIATION = [
    "metrics=clip",
    "~metrics.metrics.clip_score",
    "+metrics.metrics.variation={_target_: torchmetrics.image.TotalVariation, _partial_: true}",
    "metrics.float_images=[variation]",
]
PLANNED = {
    "s3/sd15": "sd",
    "s3/sd3": "sd3",
    "s3/flux": "flux",
    "s3/pixart_sigma": "pixart",
    "viditq/pixart_sigma": "pixart",
    "mixdq/sdxl_turbo": "sdxl",
    "mixdq/sdxl_turbo_paper": "sdxl",
    "oms/wan": "wan",
}
ENDED = {
    "s3/wan": "wan22",
    "s3/sdxl": "sdxl",
    "viditq/wan": "wan",
    "viditq/latte": "latte",
    "viditq/flux": "flux",
    "viditq/sd3": "sd3",
}
EXPERTS = {
    "eep/qwen_moe": "qwen2_moe",
    "eep/olmoe": "olmoe",
    "eep/deepseek": "deepseek_v2",
    "eep/gpt_oss": "gpt_oss",
}
# which test runs the others
ELSEWHERE = {
    "oms/sd15": "loops/test_oms_pipeline.py",
    "eep/mixtral": "loops/test_eep.py",
    "dd/imagegpt": "loops/test_dd.py",
    "dd/var_d16": "loops/test_dd.py",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def words_of(root: Path, recipe: str, model: str) -> list[str]:
    """The recipe's own command, with a tiny model and small numbers."""
    found = [
        "validate",
        f"experiment={recipe}",
        f"module.pretrained={tiny_folder(model, root)}",
        "module.dtype=float32",
        "module.height=32",
        "module.width=32",
        "data.num_samples=2",
        "data.eval_batch_size=1",
        *FEW[recipe.split("/", maxsplit=1)[0]],
        *SIZES[model],
        "trainer.accelerator=cpu",
        f"run.root={root}",
        f"run.name={recipe}",
    ]
    if recipe.startswith("oms"):
        member = root / "member"
        if not member.is_dir():
            own = diffusers.WanTransformer3DModel.from_pretrained(root / model / "transformer")
            bigger(own, model).save_pretrained(member)
        found += [*VARIATION[1:], "~module.members", f"+module.members={{small: {member}}}"]
    return found


def finished(root: Path, recipe: str, *words: str) -> Path:
    assert main([*words_of(root, recipe, ENDED[recipe]), *words]) == 0
    return root / recipe / "validate"


def test_every_recipe_for_a_published_model_is_tested_here_or_elsewhere() -> None:
    published = {
        f"{path.parent.name}/{path.stem}"
        for path in RECIPES.rglob("*.yaml")
        if re.search(r"^  (pretrained|teacher): [\w-]+/[\w.-]+$", path.read_text(), flags=re.MULTILINE)
    }
    assert published == {*PLANNED, *ENDED, *EXPERTS, *ELSEWHERE, "s3/ddpm_cifar10"}
    for recipe, file in ELSEWHERE.items():
        assert f"experiment={recipe}" in (Path(__file__).parent / file).read_text()


@pytest.mark.parametrize("recipe", PLANNED)
def test_a_recipe_is_planned(recipe: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It measures a little of everything that the method does, and says what all of it will cost."""
    assert main([*words_of(root, recipe, PLANNED[recipe]), "dry_run=true"]) == 0, capsys.readouterr().err
    assert "peak memory" in capsys.readouterr().out


def test_a_video_transformer_is_calibrated_quantized_saved_and_read_again(root: Path) -> None:
    folder = finished(root, "viditq/wan", *VARIATION)
    report = report_of(folder)
    full, row = report["table"]
    assert 10 < row["sqnr"] < 60 and row["bits"] == 4 and row["megabytes"] < full["megabytes"]
    artifact = folder / "artifact"
    pipe = diffusers.WanPipeline.from_pretrained(artifact)
    layers = quantized_layers(pipe.transformer)
    # both attentions and the feed-forward network of the block
    assert {name.split(".")[2] for name in layers} == {"attn1", "attn2", "ffn"} and len(layers) == 10
    # what is read measures what was reported, on latents with a time axis
    module = PipelineModule(str(artifact), height=32, width=32, num_frames=5)
    assert len(module.sample_shape) == 4 and module.sample_shape[1] == 2
    others = ("experiment", "method", "module.pretrained", "run.name")
    words = [word for word in words_of(root, "viditq/wan", "wan") if not word.startswith(others)]
    words += ["data=prompts", "module=pipeline", "module.guidance_scale=5.0", "module.batch_size=1", *VARIATION]
    assert main([*words, f"module.pretrained={artifact}", "run.name=again"]) == 0
    found = report_of(root / "again" / "validate")["metrics"]["val/variation"]
    assert found == pytest.approx(report["metrics"]["val/variation"], rel=1e-6)
    assert found != pytest.approx(full["variation"], rel=1e-6)
    assert not quantized_layers(diffusers.WanPipeline.from_pretrained(artifact / "dequantized").transformer)


def assert_same_latents(pipe: Any, artifact: Path, call: dict[str, Any], **sizes: Any) -> None:
    """A searched pipeline of diffusers makes of a noise, in its three steps, what the search measured."""
    data = PromptsDataModule()
    module = PipelineModule(str(artifact), num_inference_steps=3, guidance_scale=5.0, call=call, **sizes)
    module.check_data(data)
    noise = torch.randn(1, *module.sample_shape, generator=torch.Generator().manual_seed(0))
    expected = module.sample_latents(noise, torch.tensor([2]))
    options: dict[str, Any] = {"latents": noise, "output_type": "latent", "return_dict": False}
    found = pipe(data.prompts[2], num_inference_steps=3, guidance_scale=5.0, **sizes, **call, **options)[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_schedule_is_searched_for_a_pipeline_of_two_text_encoders(root: Path) -> None:
    artifact = finished(root, "s3/sdxl") / "artifact"
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(artifact, trust_remote_code=True)
    assert pipe.scheduler.available_steps == [3]
    assert_same_latents(pipe, artifact, {}, height=32, width=32)


def test_a_schedule_is_searched_for_two_networks_that_share_the_steps(root: Path) -> None:
    artifact = finished(root, "s3/wan") / "artifact"
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(artifact, trust_remote_code=True)
    assert pipe.scheduler.available_steps == [3]
    calls = {"transformer": 0, "transformer_2": 0}

    def counted(name: str) -> Any:
        def count(*_: Any) -> None:
            calls[name] += 1

        return count

    for name in calls:
        getattr(pipe, name).register_forward_hook(counted(name))
    call: dict[str, Any] = {"max_sequence_length": 16, "guidance_scale_2": 3}
    assert_same_latents(pipe, artifact, call, height=32, width=32, num_frames=5)
    assert min(calls.values()) > 0 and sum(calls.values()) == 6


def test_two_networks_that_share_the_steps_are_not_quantized(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(root, "viditq/wan", "wan22")
    assert main([*words, "run.name=two"]) != 0
    assert "switches between transformer and transformer_2" in the_error(capsys.readouterr().err)


@pytest.mark.parametrize("recipe", ["viditq/latte", "viditq/flux", "viditq/sd3"])
def test_an_artifact_loads_quantized(recipe: str, root: Path) -> None:
    folder = finished(root, recipe, "method.dequantized=false")
    row = report_of(folder)["table"][-1]
    assert row["sqnr"] > 10
    assert ("motion" in row) == ("flow_size" in row) == (recipe == "viditq/latte")
    # the tiny folder has no third text encoder
    absent = {"text_encoder_3": None, "tokenizer_3": None} if recipe == "viditq/sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "artifact", **absent)
    bits = {layer.form.weight.bits for layer in quantized_layers(pipe.transformer).values()}
    assert bits == ({4} if recipe == "viditq/flux" else {4, 8})


def test_a_schedule_is_searched_for_the_published_model_of_cifar10(root: Path) -> None:
    """On four photographs in the layout of the hub; the network knows no classes."""
    blocks: dict[str, Any] = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    network = diffusers.UNet2DModel(32, norm_num_groups=4, block_out_channels=(4, 8), layers_per_block=1, **blocks)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(root / "ddpm")
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    photographs = pa.table({"img": [{"bytes": stream.getvalue()}] * 4, "label": [0, 1, 2, 3]})
    (root / "data" / "cifar10" / "plain_text").mkdir(parents=True)
    for split in ("train", "test"):
        parquet.write_table(photographs, root / "data" / "cifar10" / "plain_text" / f"{split}-00000-of-00001.parquet")
    words = ["experiment=s3/ddpm_cifar10", f"module.pretrained={root}/ddpm", f"data.root={root}/data", *FEW["s3"]]
    words += ["metrics=none", "data.num_samples=2", "data.eval_batch_size=2", "trainer.accelerator=cpu"]
    assert main(["validate", *words, f"paths.cache={root}/cache", f"run.root={root}", "run.name=ddpm_cifar10"]) == 0
    artifact = root / "ddpm_cifar10" / "validate" / "artifact"
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(artifact, trust_remote_code=True)
    assert pipe.scheduler.available_steps == [3]
    assert pipe(batch_size=2, num_inference_steps=3, output_type="np").images.shape == (2, 32, 32, 3)


def test_the_features_of_frames_are_asked_for_before_anything_is_sampled(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, missing = words_of(root, "viditq/latte", "latte"), root / "inception.safetensors"
    assert main([*words, "metrics=video_inception", f"metrics.extractor.path={missing}", "run.name=without"]) != 0
    assert f"Inception weights not found: no file {missing}" in the_error(capsys.readouterr().err)


def mixture(root: Path, name: str) -> list[str]:
    """A tiny model with a tokenizer below `root`, and the words of a recipe that prunes it."""
    folder, rows = root / name, root / "rows.jsonl"
    tokenizer = character_tokenizer()
    tiny_model(name, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [{"q": f"{n * n % 97}+{n}?", "a": n % 3, "w": str(n % 7)} for n in range(120)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    words = [TASKS.replace("FILE", str(rows)), f"module.pretrained={folder}", "module.dtype=float32"]
    words += ["data.max_length=32", "data.eval_batch_size=12", "data.num_samples=24", "trainer.accelerator=cpu"]
    words += ["data.shares={train: 0.1, search: 0.4, select: 0.2, report: 0.3}", f"run.root={root}"]
    words += ["method.num_experts=4", "method.calibration=24", "method.select=24", "method.tasks=[letters]"]
    return [*words, *SEARCH]


@pytest.mark.parametrize("recipe", [recipe for recipe in EXPERTS if recipe != "eep/qwen_moe"])
def test_a_mixture_is_planned(recipe: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = mixture(root, EXPERTS[recipe])
    assert main(["validate", f"experiment={recipe}", *words, f"run.name={recipe}", "dry_run=true"]) == 0
    assert "peak memory" in capsys.readouterr().out


def test_a_mixture_with_a_shared_expert_keeps_half_of_the_others(root: Path) -> None:
    words = mixture(root, "qwen2_moe")
    assert main(["validate", "experiment=eep/qwen_moe", *words, "run.name=qwen"]) == 0
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(root / "qwen" / "validate" / "artifact")
    assert model.config.num_experts == 4 and len(model.model.layers[1].mlp.experts.down_proj) == 4
    full = transformers.AutoModelForCausalLM.from_pretrained(root / "qwen2_moe")
    shared = (m.model.layers[1].mlp.shared_expert.down_proj.weight for m in (model, full))
    assert torch.equal(*shared)
