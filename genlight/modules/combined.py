"""The sampler that combined weights belong to: written beside them, and compared where they are sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genlight import io

COEFFICIENTS = "coefficients.json"


def sampler_of(module: Any) -> dict[str, Any] | None:
    """Class and config of a module's scheduler, its steps and its guidance; None for modules without a scheduler.

    Plain JSON: what is not finite in the config, as some schedulers have it, is the text "-Infinity" and its like.
    """
    if not hasattr(module, "build_scheduler"):
        return None
    config = json.loads(module.build_scheduler().to_json_string(), parse_constant=str)
    return {
        "class": config.pop("_class_name"),
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "num_inference_steps": module.num_inference_steps,
        "guidance_scale": getattr(module, "guidance_scale", 1.0),
    }


def other_sampler(source: str | Path | None, module: Any) -> str | None:
    """What to say of a folder that `method=lcsc` wrote, and of a module that samples it; None where they agree.

    Args:
        source: where the weights of the module are from.
        module: as it will be sampled.
    """
    file = Path(source) / COEFFICIENTS if source else None
    if file is None or not file.is_file():
        return None
    content, own = io.read_json(file), sampler_of(module)
    stated = content.get("sampler") if isinstance(content, dict) else None
    if not isinstance(stated, dict) or own is None:
        return None
    for name in ("class", "num_inference_steps", "guidance_scale"):
        if stated.get(name) != own[name]:
            return (
                f"{source}: its weights were combined for {name} = {stated.get(name)} of the sampler, here it is "
                f"{own[name]}: they may be worse than those of the training"
            )
    given = stated.get("config")
    config: dict[str, Any] = given if isinstance(given, dict) else {}
    # another version of the library may know more options
    for name in sorted(config.keys() & own["config"].keys()):
        if config[name] != own["config"][name]:
            return (
                f"{source}: its weights were combined for {name} = {config[name]} of the {own['class']}, here it is "
                f"{own['config'][name]}: they may be worse than those of the training"
            )
    return None
