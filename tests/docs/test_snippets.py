"""Python on the pages, run as it stands on tiny artifacts in the places that it names.

That of docs/serving.md is run by a test of its own, and so are the files of the pages on additions.
"""

import functools
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from docs.pages import PAGES, ROOT, programs_of
from loops.test_oms import save_denoisers
from modules.test_distilled_decoding import module_of as student_of
from modules.test_pretrained_searched import schedules_for
from modules.test_scheduled_zoo import folder_of
from modules.test_serving import by_turns
from modules.tiny_token_teacher import saved_teacher, tiny_teacher
from predictors.test_predictor_file import trained
from quantization.tiny_pixart import converted

from genlight.diffusion.export_scheduler import scheduler_of
from genlight.diffusion.model_schedule import ModelSchedule
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.solver.serialization import SolverBank
from genlight.diffusion.solver_schedule import SolverScheduleScheduler
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.token_folder import read_token_teacher
from genlight.modules.zoo_module import ZooModule
from genlight.nets import published
from genlight.nets.llamagen import LlamaGenTransformer
from genlight.nets.vq import VectorQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer
from genlight.predictors.predictor_file import save_predictor
from genlight.quantization.convert import quantized_layers
from genlight.quantization.diffusers_format import marked_quantized


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the programs run, and find modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def run(page: str, **given: Any) -> dict[str, Any]:
    """All programs of a page one after the other, with what a reader has at hand; what they leave, by name."""
    names = given
    for number, program in enumerate(programs_of(page)):
        exec(compile(program, f"{page}, program {number}", "exec"), names)
    return names


def test_every_page_with_a_program_is_tested_here_or_elsewhere() -> None:
    found = {page for page in (str(path.relative_to(ROOT)) for path in PAGES) if programs_of(page)}
    methods = {f"docs/methods/{name}.md" for name in ("dd", "dele", "oms", "s3", "viditq")}
    # files of the pages on additions begin with their docstrings
    assert found == {"README.md", "docs/serving.md", *methods}


def test_the_readme() -> None:
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, norm_num_groups=4, block_out_channels=(8, 16), **blocks
    )
    ddim = functools.partial(diffusers.DDIMScheduler, timestep_spacing="trailing")
    DiffusionModule(network, VPSchedule(), "v_prediction", scheduler=ddim).save_pretrained("runs/demo/fit/artifact")
    images = run("README.md")["images"]
    assert len(images) == 4 and images[0].size == (8, 8)


def test_searched_schedules(folder: Path) -> None:
    """Of a transformer, as `s3/digits` has it, whose folder brings its own pipeline."""
    save_denoisers(folder, {"model": 8})
    module = DiffusionModule(pretrained="model", class_conditional=None, num_inference_steps=5)
    module.configure_model()
    schedule = module.noise_schedule
    assert schedule is not None
    config = scheduler_of(SolverBank.of(module.prediction, schedules_for(schedule))).config
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    module.scheduler = functools.partial(SolverScheduleScheduler, **options)
    module.save_pretrained("runs/s3/validate/artifact")
    assert (folder / "runs/s3/validate/artifact/pipeline.py").is_file()
    assert run("docs/methods/s3.md")["pipeline"].scheduler.available_steps == [4, 5]


def test_members_by_turns(folder: Path) -> None:
    save_denoisers(folder, {"small": 8, "large": 24})
    zoo = ZooModule({"small": "small", "large": "large"}, "large", num_inference_steps=None, guidance_scale=None)
    zoo.configure_model()
    schedule = ModelSchedule("singlestep", (("large", "small"), ("small",)))
    folder_of(Path("runs/oms/validate/artifact"), zoo, {4.0: schedule})
    next(by_turns(folder))
    Path("by_turns/model_schedule_2.json").rename("model_schedule_10.json")
    pipe = diffusers.DiffusionPipeline.from_pretrained("pipeline")
    noise = torch.randn(2, 1, 8, 8)
    names = run("docs/methods/oms.md", noise=noise, label=None, pipe=pipe)
    assert names["images"].shape == noise.shape
    assert {name for _, name in names["scheduled"].schedule} == {"own", "big"}
    assert len(names["result"].images) == 1


def test_predictors() -> None:
    written, tokens = trained()
    save_predictor("runs/mine/validate/artifact", written, {})
    names = run("docs/methods/dele.md", tokens=tokens)
    assert names["mean"].shape == names["deviation"].shape == (len(tokens),)


def test_quantized_transformers() -> None:
    network = converted()
    with marked_quantized(network, {}):
        network.save_pretrained("artifact/transformer")
    found = run("docs/methods/viditq.md")["network"]
    assert quantized_layers(found).keys() == quantized_layers(network).keys()


def test_distilled_students_and_teachers_of_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first in the folder of its artifact."""
    student_of(str(saved_teacher(Path("source")))).save_pretrained("artifact")
    monkeypatch.chdir("artifact")
    monkeypatch.syspath_prepend(str(folder / "artifact"))
    tokenizer = VQTokenizer(VectorQuantizer(12, 4), [8] * 5, 8, layers_per_block=1, norm_num_groups=4)
    transformer = LlamaGenTransformer(12, 16, 16, 2, 2, text_dim=6, text_length=5, multiple_of=8)
    given = {"transformer": transformer, "tokenizer": tokenizer, "captions": torch.randn(3, 5, 6)}
    var = tiny_teacher("var")
    networks = {"var_tokenizer": var.tokenizer, "var_transformer": var.model.transformer}
    for name, (function, network) in zip(("vae_ch160v4096z32", "var_d16"), networks.items(), strict=True):
        shapes = published.published_shapes(network).items()
        safetensors.torch.save_file({key: torch.randn(shape) for key, shape in shapes}, f"{name}.safetensors")
        monkeypatch.setattr(published, function, lambda *_, network=network: network)
    try:
        names = run("docs/methods/dd.md", **given)
    finally:
        sys.modules.pop("sample", None)  # the artifact's own file
    assert names["images"].shape == (4, 1, 8, 8)
    assert read_token_teacher("teacher").num_classes == 3
    assert read_token_teacher("teachers/var_d16").settings.top_k == 900


def test_released_students() -> None:
    """The first line of the shell, with a smaller network in a file of the same kind, is what the second one reads."""
    teacher = str(saved_teacher(Path("source"), "var"))
    network = student_of(teacher).student
    weights = {key: torch.randn(shape) for key, shape in published.published_shapes(network).items()}
    torch.save({"trainer": {"ema_parameters": weights}}, "var-d16.pth")
    page = (ROOT / "docs/methods/dd.md").read_text()
    lines = [shlex.split(line) for line in page.splitlines() if line.startswith("    python ") and "var-d16" in line]
    (_, program, *words), command = lines
    runpy.run_path(str(ROOT / program))["main"](words)
    (key,) = (word.removeprefix("module.student_weights=") for word in command if "student_weights" in word)
    read = student_of(teacher, trained=False, student_weights=key).student
    assert torch.equal(read.backbone.head.bias, weights["head.bias"])
