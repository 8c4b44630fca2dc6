"""ImageGPT from folders of transformers and from the hub: weights as safetensors, and the colours of its tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import ImageGPTForCausalImageModeling

from genlight.errors import UserError
from genlight.io import read_json, verify_if_described
from genlight.modules.artifact_kind import told_kind
from genlight.modules.pretrained import downloaded, first_line, read_object
from genlight.modules.pretrained_lm import check_loaded, check_shards
from genlight.nets.autoregressive import SamplingSettings
from genlight.nets.imagegpt import ColourClusters, ImageGPT, imagegpt_options

# what transformers writes beside the weights; the second since its fifth version, where a processor has several parts
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# how many colours `generate` of transformers draws from where no number is named; 0 is all of them
DEFAULT_TOP_K = 50
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def imagegpt_folder(source: str | Path) -> Path | None:
    """The folder of transformers that `source` is, downloaded if it is a hub id; None if it is neither.

    Raises:
        UserError: a hub id that is not in reach.
    """
    folder = Path(source)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(source)):
        return None
    return downloaded(str(source), ["README.md", "*.json", "*.safetensors"], where="teacher = ")


def read_imagegpt(folder: Path) -> tuple[ImageGPT, SamplingSettings]:
    """The network of a folder of transformers, frozen, on the CPU, and how its samples are drawn.

    Temperature, top-k and top-p are those that transformers samples with: of its generation_config.json where it names
    them, else the library's own, a top-k of `DEFAULT_TOP_K` among them.

    Raises:
        UserError: no ImageGPT, no colours, weights that do not fit or are not safetensors, or settings out of range.
    """
    if read_object(folder / "config.json").get("model_type") != "imagegpt":
        raise UserError(f"{folder} is neither an ImageGPT nor a fit of module=autoregressive{told_kind(folder)}")
    check_shards(folder)
    verify_if_described(folder)
    clusters = _colours(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no weights as safetensors; pickled weights are not read")
    loader: Any = ImageGPTForCausalImageModeling
    try:
        network, info = loader.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise UserError(f"{folder} cannot be loaded as an ImageGPT: {first_line(error)}") from error
    check_loaded(info, str(folder))
    try:
        imagegpt_options(network.config)
        if network.config.vocab_size != len(clusters.codebook) + 1:
            raise ValueError(
                f"vocab_size = {network.config.vocab_size} must be {len(clusters.codebook) + 1}, one more than colours"
            )
        settings = _settings(folder, len(clusters.codebook))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from error
    network.eval().requires_grad_(False)
    return ImageGPT(network, clusters), settings


def _colours(folder: Path) -> ColourClusters:
    """The clusters of the image processor; where transformers cannot load it without torchvision, its JSON will do."""
    for name in _PROCESSORS:
        record = read_json(folder / name) if (folder / name).is_file() else {}
        record = record.get("image_processor", record) if isinstance(record, dict) else {}
        if record.get("clusters") is not None:
            try:
                return ColourClusters(torch.tensor(record["clusters"], dtype=torch.float32))
            except (TypeError, ValueError) as error:
                raise UserError(f"{folder / name}: {error}") from error
    raise UserError(
        f"{folder} has no {_PROCESSORS[0]} with clusters, the colours that ImageGPT's tokens stand for: save its "
        "ImageGPTImageProcessor there too"
    )


def _settings(folder: Path, num_codes: int) -> SamplingSettings:
    path = folder / "generation_config.json"
    record = read_json(path) if path.is_file() else {}
    names = ("temperature", "top_k", "top_p")
    given: dict[str, Any] = {name: record[name] for name in names if record.get(name) is not None}
    settings = SamplingSettings(**{"top_k": DEFAULT_TOP_K, **given})
    # all are left where there are no more
    return replace(settings, top_k=settings.top_k if settings.top_k < num_codes else 0)
