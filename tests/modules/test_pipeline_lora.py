"""Adapters of other people in the weights of a pipeline, by diffusers and peft where that is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion.tiny_pipelines import PIPELINES
from modules.test_pipeline import PROMPTS, module_of, tiny_pipe
from safetensors.torch import save_file
from torch import Tensor

from genlight.errors import UserError
from genlight.modules.lora import LowRankAdapters
from genlight.modules.pipeline import PipelineModule
from genlight.modules.pipeline_lora import fuse_lora

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="diffusers loads adapters with peft")


def saved(folder: Path, prefix: str = "unet") -> dict[str, Tensor]:
    """Write adapters of the tiny UNet; what each adds to the weight of its layer, by name."""
    adapters = LowRankAdapters(PIPELINES["sd"]().pipe.unet, rank=2)
    for part in adapters.parameters():
        torch.nn.init.normal_(part)
    folder.mkdir(exist_ok=True)
    save_file(adapters.tensors(prefix), folder / "pytorch_lora_weights.safetensors")
    return {name: (adapters.up[key] @ adapters.down[key]).detach() for key, name in adapters.names.items()}


@needs_peft
def test_adapters_are_in_the_weights_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added, plain = saved(tmp_path), tiny_pipe("sd").unet
    monkeypatch.setattr("genlight.modules.pipeline.load_pipeline", lambda *_: tiny_pipe("sd"))
    module = PipelineModule("x", lora=str(tmp_path), guidance_scale=3.0, height=64, width=64)
    module.prompts = list(PROMPTS)
    module.configure_model()
    unet = module.pipe.unet
    assert added and list(unet.state_dict()) == list(plain.state_dict())
    for name, value in unet.state_dict().items():
        before = plain.state_dict()[name]
        torch.testing.assert_close(value, before + added.get(name.removesuffix(".weight"), torch.zeros(1)))
    assert module.fingerprint() != module_of("sd").fingerprint()
    unet.save_pretrained(tmp_path / "fused")
    again = type(unet).from_pretrained(tmp_path / "fused")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())


def test_adapters_beside_members_are_refused() -> None:
    """A model schedule names folders of weights, and the fused ones are in none."""
    with pytest.raises(ValueError, match=r"module.lora beside members: fuse it"):
        PipelineModule("x", lora="adapters", members={"big": "folder"})
    assert PipelineModule("x", lora="adapters", members={}).lora == "adapters"


@needs_peft
def test_adapters_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "other", "transformer")
    with pytest.raises(UserError, match="holds nothing for any network of a StableDiffusionPipeline"):
        fuse_lora(tiny_pipe("sd"), str(tmp_path / "other"))
    saved(tmp_path)
    other = tiny_pipe("sd")
    other.unet = type(other.unet)(**{**other.unet.config, "cross_attention_dim": 16})
    with pytest.raises(UserError, match="cannot be loaded into a StableDiffusionPipeline"):
        fuse_lora(other, str(tmp_path / "pytorch_lora_weights.safetensors"))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, Any] = {"peft": True}
    monkeypatch.setattr("genlight.modules.pipeline_lora.find_spec", installed.get)
    (tmp_path / "lora.bin").touch()
    for source, message in ((tmp_path / "lora.bin", "is no file of safetensors"), (tmp_path, "holds 0 files")):
        with pytest.raises(UserError, match=message):
            fuse_lora(tiny_pipe("sd"), str(source))
    with pytest.raises(UserError, match="object takes no adapters"):
        fuse_lora(object(), str(tmp_path))
    installed.clear()
    with pytest.raises(UserError, match=r"module.lora: .* pip install peft"):
        fuse_lora(tiny_pipe("sd"), str(tmp_path))
