"""Folders of whole pipelines of diffusers: tiny random networks, text encoders and tokenizers, as the hub has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusion.tiny_pipelines import FLOW, PIPELINES
from modules.test_pipeline import tokenized, vae
from modules.test_zoo_pipelines import bigger

from genlight.data.tokenizer import character_tokenizer
from genlight.diffusion.schedulers import build_scheduler

_LETTERS = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}


def clip(folder: Path, width: int, projection: int | None = None) -> dict[str, Any]:
    """A CLIP of letters: the tokenizer, and a text encoder of a width, with a projection if that is given."""
    tokenizer = tokenized(folder).tokenizer
    torch.manual_seed(4)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, projection_dim=projection or width, **_LETTERS
    )
    config.bos_token_id, config.eos_token_id = len(tokenizer) - 2, len(tokenizer) - 1
    made: Any = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return {"tokenizer": tokenizer, "text_encoder": made(config).eval()}


def t5(width: int, kind: str = "T5") -> dict[str, Any]:
    """A T5 (or UMT5) of characters."""
    tokenizer = character_tokenizer()
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    return {"tokenizer": tokenizer, "text_encoder": getattr(transformers, f"{kind}EncoderModel")(config).eval()}


def _second(parts: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_2": part for name, part in parts.items()}


def _sdxl(folder: Path) -> Any:
    pipe = PIPELINES["sdxl"]().pipe
    pipe.register_modules(vae=vae(), **clip(folder, 4), **_second(clip(folder, 4, 8)))
    return pipe


def _sd3(folder: Path) -> Any:
    """Without its third text encoder, as it is often used."""
    pipe = PIPELINES["sd3"]().pipe
    pipe.register_modules(vae=vae(shift_factor=0.1), **clip(folder, 16, 32), **_second(clip(folder, 16, 32)))
    return pipe


def _flux(folder: Path) -> Any:
    pipe = PIPELINES["flux"]().pipe
    shifting = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=True)
    pipe.register_modules(scheduler=shifting, vae=vae(1, shift_factor=0.1), **clip(folder, 32), **_second(t5(32)))
    return pipe


def _pixart(folder: Path) -> Any:
    pipe = PIPELINES["pixart"]().pipe
    parts = {"transformer": pipe.transformer, "scheduler": pipe.scheduler}
    return diffusers.PixArtSigmaPipeline(vae=vae(), **parts, **t5(8))


def _latte(folder: Path) -> Any:
    pipe = PIPELINES["latte"]().pipe
    pipe.register_modules(vae=vae(), **t5(32))
    return pipe


def wan_vae() -> Any:
    """Four frames to one, eight pixels to one."""
    torch.manual_seed(6)
    moments = {"latents_mean": [0.1, 0.0, -0.1, 0.2], "latents_std": [1.1, 0.9, 1.0, 1.2]}
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], **moments
    )


def _wan(folder: Path, **more: Any) -> Any:
    pipe = PIPELINES["wan"]().pipe
    scheduler = build_scheduler("UniPCMultistepScheduler", FLOW, "flow")
    parts = {"transformer": pipe.transformer, "scheduler": scheduler, "vae": wan_vae(), **t5(16, "UMT5")}
    return diffusers.WanPipeline(**parts, **more)


def _wan22(folder: Path) -> Any:
    """The second network answers from timestep 900 on."""
    return _wan(folder, transformer_2=bigger(PIPELINES["wan"]().pipe.transformer, "wan"), boundary_ratio=0.9)


_PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd": tokenized,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "latte": _latte,
    "wan": _wan,
    "wan22": _wan22,
}


def tiny_folder(name: str, root: Path) -> Path:
    """The folder of a pipeline below `root`; made where it is missing."""
    folder = root / name
    if not folder.is_dir():
        files = root / f"{name}_files"
        files.mkdir(parents=True)
        _PIPELINES[name](files).save_pretrained(folder)
    return folder
