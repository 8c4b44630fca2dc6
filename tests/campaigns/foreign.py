"""Checkpoints of a dozen tiny models, each given to all the others."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from campaigns.commands import Points

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.errors import UserError
from genlight.modules.causal_lm import CausalLMModule
from genlight.modules.classifier import ClassifierModule
from genlight.modules.consistency import ConsistencyModule
from genlight.modules.diffusion import DiffusionModule
from genlight.nets.classifier import Classifier
from genlight.trainer.checkpoint_io import AtomicCheckpointIO, load_checkpoint


def _unet(*channels: int, **options: Any) -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels or (4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **options,
    )


def _dit(layers: int) -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=1,
        num_layers=layers,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    )


def _language_model() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CausalLMModule(
        transformers.MixtralConfig(vocab_size=16, num_key_value_heads=2, num_local_experts=2, **sizes)
    )


def _cosine() -> VPSchedule:
    return VPSchedule("squaredcos_cap_v2")


_FLOW = "FlowMatchEulerDiscreteScheduler"
MODELS: dict[str, Callable[[], Any]] = {
    "v-prediction": lambda: DiffusionModule(_unet(), _cosine(), "v_prediction"),
    "noise prediction": lambda: DiffusionModule(_unet(), _cosine(), "epsilon"),
    "linear schedule": lambda: DiffusionModule(_unet(), VPSchedule("linear"), "v_prediction"),
    "other betas": lambda: DiffusionModule(_unet(), VPSchedule("linear", 0.0001, 0.01), "v_prediction"),
    "EDM": lambda: DiffusionModule(_unet(), EDMSchedule(), "edm", scheduler="EDMEulerScheduler"),
    "flow": lambda: DiffusionModule(_unet(), FlowSchedule(), "flow", scheduler=_FLOW),
    "shifted flow": lambda: DiffusionModule(_unet(), FlowSchedule(shift=3.0), "flow", scheduler=_FLOW),
    "wider": lambda: DiffusionModule(_unet(4, 12), _cosine(), "v_prediction"),
    "classes": lambda: DiffusionModule(
        _unet(num_class_embeds=4), _cosine(), "v_prediction", class_conditional=True, num_classes=3
    ),
    "transformer": lambda: DiffusionModule(_dit(1), _cosine(), "v_prediction", class_conditional=True, num_classes=3),
    "deeper": lambda: DiffusionModule(_dit(2), _cosine(), "v_prediction", class_conditional=True, num_classes=3),
    "consistency": lambda: ConsistencyModule(_unet(), EDMSchedule()),
    "classifier": lambda: ClassifierModule(Classifier(8, 1, 3, widths=[4], blocks_per_stage=1)),
    "language model": _language_model,
}


# what a refusal names: a key of the description with both values, or a weight that is missing, or of another shape
_NAMED = re.compile(r"(?:missing |unexpected )?([\w.]+)(?:$|: .* found, .* expected$| has shape )", re.DOTALL)


def load(module: Any, path: Path) -> None:
    """As a command with ckpt_path=… does."""
    checkpoint = load_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def pairs(root: Path) -> Points:
    """Each model takes its own checkpoint, and refuses every other one in one line that names keys that differ."""
    wrong, files, described = [], {}, {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        module = make()
        module.configure_model()
        checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 1}
        module.on_save_checkpoint(checkpoint)
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        described[name] = _flat(checkpoint.get("genlight_module", {})) | shapes
        files[name] = root / f"{name}.ckpt"
        AtomicCheckpointIO().save_checkpoint(checkpoint, files[name])
    for own, make in MODELS.items():
        for other, path in files.items():
            module = make()
            module.configure_model()
            before = {key: value.clone() for key, value in module.state_dict().items()}
            try:
                load(module, path)
            except UserError as error:
                is_named = _names_what_differs(str(error), described[own], described[other])
                if own == other or "\n" in str(error) or not is_named:
                    wrong.append(f"{own} given {other}: {error}")
                if any(not torch.equal(value, before[key]) for key, value in module.state_dict().items()):
                    wrong.append(f"{own} given {other}: weights changed before the refusal")
            except Exception as error:
                wrong.append(f"{own} given {other}: {type(error).__name__}: {error}")
            else:
                if own != other:
                    wrong.append(f"{own} given {other}: accepted")
    return Points(len(MODELS) ** 2, wrong)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """What nested mappings hold, by dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix.removesuffix("."): value}
    return {key: held for name, inner in value.items() for key, held in _flat(inner, f"{prefix}{name}.").items()}


def _names_what_differs(error: str, own: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether each key that a refusal names is one that the two models have not both, or not with the same value."""
    differ = {key for key in own.keys() | other.keys() if key not in own or key not in other or own[key] != other[key]}
    *items, last = error.partition(" than the module: ")[2].split("; ")
    named = [_NAMED.match(item) for item in (items if last.startswith("and ") else [*items, last])]
    return bool(named) and all(
        found is not None and any(f"{key}.".startswith(f"{found[1]}.") for key in differ) for found in named
    )
