"""Writing a module as a diffusers pipeline folder.

Which pipeline a folder is of, and who can load it:

| network | case | pipeline |
|---|---|---|
| UNet2DModel, pixels, no classes | DDIM sampler | DDIMPipeline |
| | samplers that start at unit noise and scale no input (DDPM, DPM-Solver, FlowMatchEuler) | DDPMPipeline |
| | samplers that scale the input (EDM, Euler) | ConsistencyModelPipeline |
| UNet2DModel, pixels, classes | guidance_scale 1, and not a FlowMatch sampler | ConsistencyModelPipeline |
| UNet2DModel, latents, no classes | a sampler that draws no noise | LDMPipeline |
| DiT, latents, classes | a sampler that draws no noise; guidance with 1000 classes only | DiTPipeline |
| all else | see below | pipeline.py in the folder |

Stock pipelines load with ``DiffusionPipeline.from_pretrained(folder)``, wherever diffusers is.
ConsistencyModelPipeline is nothing but the loop that scales inputs and passes labels: it gives the scheduler's samples
for any model. DiTPipeline has 1000 as its null class in its code, so it cannot guide other numbers of classes.

The last row holds guidance, classes with a FlowMatch sampler, samplers whose steps take no generator (UniPC, DEIS,
Heun), DiT in pixels or without classes, UNet2DConditionModel, the learned variance of a UNet, latents with a
shift. It needs
``DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)``.

Searched solver schedules are a sampler that draws no noise, scales the input for EDM only, and starts at unit noise
otherwise. Their class lies in the folder's ``scheduler/solver_schedule.py``, so any pipeline of theirs needs
``trust_remote_code=True``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from genlight.diffusion.schedulers import SEARCHED
from genlight.io import atomic_write_bytes, atomic_write_json, atomic_write_text
from genlight.modules import exported_pipeline
from genlight.modules.exported_pipeline import GenerationPipeline, network_style
from genlight.modules.latents import FrozenVAE
from genlight.modules.networks import label_rows
from genlight.modules.pretrained import RECORD

if TYPE_CHECKING:
    from genlight.modules.diffusion import DiffusionModule

# they draw noise in their steps, and LDMPipeline and DiTPipeline give them no generator
STOCHASTIC = ("Ancestral", "CMStochastic", "DDPM", "LCM", "SASolver", "TCD")
CUSTOM = GenerationPipeline.__name__


def pipeline_name(module: DiffusionModule) -> str:
    """The diffusers pipeline that samples this module as it samples itself, or "GenerationPipeline" if none does."""
    network, scheduler = module.net, module.build_scheduler()
    style, steps = network_style(network), module.num_inference_steps
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    scales = hasattr(scheduler, "scale_model_input")
    first = float(getattr(scheduler, "init_noise_sigma", 1.0))
    # some samplers know their first noise level only when they know the steps, and stock pipelines ask before
    steady = all(_first_level(scheduler, count) == first for count in (*_searched_steps(scheduler), steps))
    deterministic = not _draws_noise(scheduler)
    conditional = module.class_conditional
    stock_latents = module.vae is not None and _only_scaled(module.vae) and scales and steady and deterministic
    learned_variance = (network.config.out_channels or network.config.in_channels) != network.config.in_channels
    if style == "unet2d" and not learned_variance:
        if module.vae is None and label_rows(network) is None:
            if isinstance(scheduler, diffusers.DDIMScheduler):
                return "DDIMPipeline"
            if takes_generator and first == 1.0 and steady and _leaves_input(scheduler):
                return "DDPMPipeline"
        square = isinstance(network.config.sample_size, int)
        if module.vae is None and square and takes_generator and scales and steady and module.guidance_scale == 1.0:
            return "ConsistencyModelPipeline"
        if stock_latents and not conditional and square:
            return "LDMPipeline"
    guided = module.guidance_scale == 1.0 or (module.num_classes == 1000 and module.guidance_scale > 1.0)
    if style == "dit" and stock_latents and conditional and first == 1.0 and guided:
        return "DiTPipeline"
    return CUSTOM


def save_pipeline(module: DiffusionModule, folder: Path) -> str:
    """Write weights (safetensors), configs, model_index.json, genlight.json and a README; returns the pipeline's name.

    ``model_index.json`` carries what the pipeline itself reads: class names for DiTPipeline; class names, number of
    classes, guidance scale and steps for pipeline.py. ``genlight.json`` carries all of these in any case.
    """
    network, name, scheduler = module.net, pipeline_name(module), module.build_scheduler()
    key = "transformer" if network_style(network) == "dit" else "unet"
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder / key, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": diffusers.__version__,
        key: ["diffusers", type(network).__name__],
        # a searched one names the file beside its config
        "scheduler": [scheduler.__module__ if _is_searched(scheduler) else "diffusers", type(scheduler).__name__],
    }
    if module.vae is not None:
        vae_key = "vqvae" if name == "LDMPipeline" else "vae"
        module.vae.network.save_pretrained(folder / vae_key, safe_serialization=True)
        index[vae_key] = ["diffusers", type(module.vae.network).__name__]
    names = {str(i): label for i, label in enumerate(module.class_names or [])} if module.class_conditional else None
    if name == CUSTOM:
        index["_class_name"] = ["pipeline", name]
        index |= {other: [None, None] for other in ("unet", "transformer", "vae") if other not in index}
        index |= {"num_classes": module.num_classes, "guidance_scale": module.guidance_scale}
        index |= {"num_inference_steps": module.num_inference_steps, "id2label": names or None}
        atomic_write_bytes(folder / "pipeline.py", Path(exported_pipeline.__file__).read_bytes())
    elif name == "DiTPipeline" and names:
        index["id2label"] = names
    atomic_write_json(folder / "model_index.json", index)
    atomic_write_json(folder / RECORD, _record(module, name))
    atomic_write_text(folder / "README.md", _readme(module, name))
    return name


def _record(module: DiffusionModule, name: str) -> dict[str, Any]:
    return {
        "kind": "pipeline",
        "version": 1,
        "pipeline": name,
        "num_inference_steps": module.num_inference_steps,
        "guidance_scale": module.guidance_scale,
        "num_classes": module.num_classes,
        "class_names": module.class_names,
        "model": module.description(),
    }


def _readme(module: DiffusionModule, name: str) -> str:
    """How to load and sample, with the arguments that give what the module gives."""
    labels = f"[{', '.join(str(i % (module.num_classes or 1)) for i in range(4))}]"
    steps = f"num_inference_steps={module.num_inference_steps}"
    count = f"class_labels={labels}" if module.class_conditional else "batch_size=4"
    if name == "ConsistencyModelPipeline" and module.class_conditional:
        count = f"batch_size=4, {count}"
    call = f"{count}, {steps}"
    if name == "DiTPipeline":
        call += f", guidance_scale={module.guidance_scale}"
    searched = _is_searched(module.build_scheduler())
    extra = ', custom_pipeline="pipeline"' if name == CUSTOM else ""
    extra += ", trust_remote_code=True" if name == CUSTOM or searched else ""
    lines = [
        "# A diffusion model trained with genlight",
        "",
        f"`{type(module.net).__name__}`, {module.prediction_type}, {module.noise_schedule!r}, as a diffusers `{name}`.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("."{extra})',
        f"images = pipeline({call}).images",
        "```",
    ]
    if name == CUSTOM:
        lines += ["", "No pipeline of diffusers samples this kind of model; `pipeline.py` needs torch and diffusers."]
    if searched:
        known = ", ".join(str(count) for count in _searched_steps(module.build_scheduler()))
        lines += ["", "The steps of the sampler were found by search; `scheduler/solver_schedule.py` makes them with"]
        lines += [f"torch and diffusers, for num_inference_steps = {known} only."]
    return "\n".join(lines) + "\n"


def _only_scaled(vae: FrozenVAE) -> bool:
    """Whether dividing by scaling_factor is all that decoding does to the latents."""
    config = vae.network.config
    moments = config.get("latents_mean") is not None and config.get("latents_std") is not None
    return not config.get("shift_factor") and not moments and bool(config.get("scaling_factor"))


def _is_searched(scheduler: Any) -> bool:
    return type(scheduler).__name__ == SEARCHED


def _searched_steps(scheduler: Any) -> list[int]:
    """The numbers of steps that searched schedules are for; empty for other schedulers."""
    return list(scheduler.available_steps) if _is_searched(scheduler) else []


def _first_level(scheduler: Any, steps: int) -> float:
    """What unit noise is multiplied by to begin with so many steps."""
    scheduler.set_timesteps(steps)
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def _draws_noise(scheduler: Any) -> bool:
    name, config = type(scheduler).__name__, scheduler.config
    if any(word in name for word in STOCHASTIC) or config.get("stochastic_sampling"):
        return True
    return str(config.get("algorithm_type", "")).startswith("sde")


def _leaves_input(scheduler: Any) -> bool:
    """Whether the network is given x_t as it is, at every step."""
    import torch

    if not hasattr(scheduler, "scale_model_input"):
        return True
    if _is_searched(scheduler):  # it counts its steps, so it cannot be asked for them all
        return bool(scheduler.config.family != "edm")
    one = torch.ones(1)
    return all(torch.equal(scheduler.scale_model_input(one, t), one) for t in scheduler.timesteps)
