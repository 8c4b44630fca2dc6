"""Causal language models of transformers from folders and the hub: weights as safetensors, every key accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genlight.errors import UserError
from genlight.io import read_json, verify_if_described
from genlight.modules.artifact_kind import told_kind
from genlight.modules.networks import first_of
from genlight.modules.pretrained import downloaded, first_line, read_object

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["README.md", "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load_language_model(source: str, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """The causal language model of a folder or hub id, on the CPU.

    Args:
        dtype: a key of `DTYPES`, or "auto": the type that the weights are stored in.
        trust_remote_code: run code that the folder brings along.

    Raises:
        UserError: not found, not a language model that transformers knows, damaged, without weights as safetensors, or
            its weights do not fit its config.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = language_model_folder(source, trust_remote_code)
    config = read_object(folder / "config.json")
    kind = config.get("model_type")
    if kind is None and (other := told_kind(folder)):
        raise UserError(f"{source} is no language model of transformers{other}")
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        raise UserError(
            f"{source} is of type {kind}, which transformers does not know; module.trust_remote_code=true runs the "
            "code that the folder brings along"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{source} has no weights as safetensors; pickled weights are not read")
    loader: Any = AutoModelForCausalLM
    unpacked = _unpacked(config)
    try:
        network, info = loader.from_pretrained(
            str(folder),
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **unpacked,
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise UserError(f"{source} cannot be loaded as a causal language model: {first_line(error)}") from error
    check_loaded(info, source)
    if unpacked:
        # else `save_pretrained` would write the numbers under the names that their codes had
        network._weight_conversions = None
    return network


def check_loaded(info: Mapping[str, Any], source: str) -> None:
    """UserError naming the first keys if the loading info of `from_pretrained` says that not every key was used."""
    problems = [f"missing {key}" for key in sorted(info["missing_keys"])]
    problems += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    problems += [f"{entry[0]} has another shape" for entry in sorted(info["mismatched_keys"])]
    if problems:
        raise UserError(f"the weights of {source} do not fit its config.json: {first_of(problems)}")


def _unpacked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that unpack weights in MXFP4 (gpt-oss) and FP8 (DeepSeek-V3), which some GPUs would keep in codes."""
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    quantization = config.get("quantization_config")
    kinds: dict[Any, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") not in kinds:
        return {}
    # what stands under these names in the folder is replaced by what is given here
    kept = quantization.get("modules_to_not_convert", quantization.get("ignored_layers"))
    made = kinds[quantization["quant_method"]](modules_to_not_convert=kept, dequantize=True)
    return {"quantization_config": made}


def language_model_folder(source: str, trust_remote_code: bool = False) -> Path:
    """The folder itself, checked where it has a manifest, or that of a hub id once downloaded.

    Raises:
        UserError: neither a folder with a config.json nor a model of the hub in reach.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or not _HUB_ID.fullmatch(source):
            raise UserError(
                f"module.pretrained = {source} is neither a folder nor a hub id such as allenai/OLMoE-1B-7B"
            )
        folder = downloaded(source, [*_FILES, "*.py"] if trust_remote_code else _FILES)
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} is no folder of transformers: it has no config.json{told_kind(folder)}")
    check_shards(folder)
    verify_if_described(folder)
    return folder


def check_shards(folder: Path) -> None:
    """UserError if an index of weights names what is no file of its own folder: transformers opens what is named."""
    for index in folder.glob("*.safetensors.index.json"):
        # 700 billion weights in a quarter of a million tensors have an index of 20 MB
        content = read_json(index, max_bytes=1 << 26, max_entries=1_000_000)
        named = content.get("weight_map") if isinstance(content, dict) else None
        names = set(map(str, named.values())) if isinstance(named, dict) else {""}
        for name in sorted(names):
            if not name or Path(name).name != name:
                raise UserError(f"{index} names {name!r} for weights: a file of its own folder is needed")
