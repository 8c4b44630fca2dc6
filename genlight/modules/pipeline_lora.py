"""Low-rank adapters of other people added to the weights of a diffusers pipeline, before anything is made of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from genlight.errors import UserError
from genlight.io import verify_if_described
from genlight.modules.pretrained import downloaded, first_line

# what diffusers calls the file that it writes
_FILE = "pytorch_lora_weights.safetensors"


def fuse_lora(pipe: Any, source: str | None) -> None:
    """Add adapters, such as an LCM-LoRA, to the weights of a pipeline for good, at their full strength.

    Args:
        pipe: of diffusers, with weights in floating point.
        source: the file, its folder, or a hub id; None: nothing is added.

    Raises:
        UserError: peft is missing, no such adapters, or they fit none of the pipeline's networks.
    """
    if source is None:
        return
    if find_spec("peft") is None:
        raise UserError("module.lora: diffusers needs peft to load adapters: pip install peft")
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"module.lora: {type(pipe).__name__} takes no adapters")
    file, what = _adapter_file(source), f"module.lora = {source}"
    try:
        # safetensors alone: without the word diffusers would read pickles too
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
        found = pipe.get_list_adapters()
        if found:
            pipe.fuse_lora()
            pipe.unload_lora_weights()
    except Exception as error:  # diffusers, peft, safetensors and torch each raise their own
        raise UserError(f"{what} cannot be loaded into a {type(pipe).__name__}: {first_line(error)}") from error
    if not found:
        raise UserError(f"{what} holds nothing for any network of a {type(pipe).__name__}")


def _adapter_file(source: str) -> Path:
    """The file on this machine; UserError where there is none, or several."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"module.lora = {source} is no file of safetensors; others are not read")
        return path
    if path.is_dir():
        verify_if_described(path)
    else:
        path = downloaded(source, ["README.md", "*.safetensors"], where="module.lora: ")
    files = sorted(path.glob("*.safetensors"))
    if path / _FILE in files:
        return path / _FILE
    if len(files) != 1:
        raise UserError(f"module.lora = {source} holds {len(files)} files of safetensors: name one of them")
    return files[0]
