"""The networks of a folder or hub id as their configs describe them: shapes and types, and not a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from genlight.errors import UserError
from genlight.modules.artifact_kind import told_kind
from genlight.modules.pretrained import STORED, component_folder, downloaded, first_line, read_object, stored_dtype
from genlight.reports.origin import HUB_ID

# what a model is called that is no part of a pipeline
ALONE = "network"
_LIBRARIES = ("diffusers", "transformers")
_STORED = {**STORED, "F64": torch.float64}


@dataclass(frozen=True)
class Outline:
    """What there is to look at.

    Attributes:
        networks: by their names in the pipeline, on torch's meta device.
        skipped: parts that could not be looked at, and why, by name.
    """

    networks: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def read_outline(source: str) -> Outline:
    """The networks of a diffusers pipeline, of one network of diffusers, or of a language model of transformers.

    Of a hub id the configs alone are downloaded: weights are then taken to be of the type that the config says, or
    float32. Code that a folder brings along is never run.

    Raises:
        UserError: neither a folder nor a hub id in reach, or one in which nothing is described.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or not HUB_ID.fullmatch(source):
            raise UserError(f"module.pretrained = {source} is neither a folder nor a hub id")
        folder = downloaded(source, ["model_index.json", "*config.json"], where="module.pretrained = ")
    if not (folder / "model_index.json").is_file():
        return Outline({ALONE: _single(folder)})
    outline = Outline()
    for name, entry in read_object(folder / "model_index.json").items():
        is_part = isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
        if name.startswith("_") or not is_part:  # _class_name may be the pipeline's own file
            continue
        try:
            network = _part(component_folder(folder, name), *entry)
        except Exception as error:  # diffusers, transformers and torch each raise their own
            outline.skipped[name] = f"{'.'.join(entry)}: {first_line(error)}"
            continue
        if network is not None:
            outline.networks[name] = network
    return outline


def outline_of(module: nn.Module) -> Outline:
    """The networks of a module as it was built; their weights are given up."""
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    return Outline({name: child.to("meta") for name, child in children.items()})


def _single(folder: Path) -> nn.Module:
    """The network of a folder that is no pipeline; UserError if it has none."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind, name = config.get("model_type"), config.get("_class_name")
    loader: Any = AutoModelForCausalLM
    try:
        if isinstance(name, str) and (found := _part(folder, "diffusers", name)) is not None:
            return found
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            described = CONFIG_MAPPING[kind].from_dict(_plain(config))
            return _empty(folder, config, lambda: loader.from_config(described, trust_remote_code=False))
    except Exception as error:  # as above
        raise UserError(f"{folder} cannot be looked at: {first_line(error)}") from error
    raise UserError(f"{folder} describes no network of diffusers or transformers{told_kind(folder)}")


def _part(folder: Path, library: str, name: str) -> nn.Module | None:
    """A part of a pipeline; None for what is no network.

    Raises:
        ValueError: a class that is not of diffusers or transformers as installed.
    """
    import diffusers
    import transformers

    if library not in _LIBRARIES:
        raise ValueError(f"no class of {' or '.join(_LIBRARIES)}, and code of others is not run")
    found = getattr(diffusers if library == "diffusers" else transformers, name, None)
    if not isinstance(found, type):
        raise ValueError(f"{library} as installed has no such class")
    if not issubclass(found, (diffusers.ModelMixin, transformers.PreTrainedModel)):
        return None
    config, made = read_object(folder / "config.json"), cast(Any, found)
    if issubclass(found, diffusers.ModelMixin):
        return _empty(folder, config, lambda: made.from_config(_plain(config)))
    described = made.config_class.from_dict(_plain(config))
    return _empty(folder, config, lambda: made(described))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _empty(folder: Path, config: Mapping[str, Any], make: Callable[[], nn.Module]) -> nn.Module:
    """A network without weights, of the type in which those of the folder are stored."""
    with torch.device("meta"):
        network = make()
    said = str(config.get("dtype") or config.get("torch_dtype"))
    known = {str(kind).removeprefix("torch."): kind for kind in _STORED.values()}
    stored = stored_dtype(sorted(folder.glob("*.safetensors")), known=_STORED)
    # not the networks' own `to`, which warn of layers that a pipeline would keep in float32
    return nn.Module.to(network, "meta", stored or known.get(said, torch.float32)).eval()
