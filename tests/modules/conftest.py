"""Tiny networks and modules, small enough to sample in milliseconds."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.modules.diffusion import DiffusionModule

SCHEDULES = {
    "vp": (functools.partial(VPSchedule, "squaredcos_cap_v2"), "v_prediction"),
    "epsilon": (functools.partial(VPSchedule, "linear"), "epsilon"),
    "edm": (EDMSchedule, "edm"),
    "flow": (FlowSchedule, "flow"),
}
SCHEDULERS: dict[str, functools.partial[Any]] = {
    "vp": functools.partial(diffusers.DDIMScheduler, timestep_spacing="trailing"),
    "epsilon": functools.partial(diffusers.DDPMScheduler),
    "edm": functools.partial(diffusers.EDMEulerScheduler),
    "flow": functools.partial(diffusers.FlowMatchEulerDiscreteScheduler),
}


def _randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Every weight non-zero: DiT starts with zeros that would hide whether labels and times arrive."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1) * 0.1)
    return network


def _unet(size: int = 8, channels: int = 1, **options: Any) -> diffusers.UNet2DModel:
    arguments = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return _randomised(diffusers.UNet2DModel(**{**arguments, **options}))


def _condition_unet(**options: Any) -> diffusers.UNet2DConditionModel:
    return _randomised(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **options,
        )
    )


def _dit(size: int = 8, channels: int = 1, num_classes: int = 3, **options: Any) -> diffusers.DiTTransformer2DModel:
    return _randomised(
        diffusers.DiTTransformer2DModel(
            sample_size=size,
            in_channels=channels,
            num_embeds_ada_norm=num_classes,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            **options,
        )
    )


def _vae(**options: Any) -> diffusers.AutoencoderKL:
    return _randomised(
        diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            **options,
        )
    )


def _module(kind: str = "vp", network: torch.nn.Module | None = None, **options: Any) -> DiffusionModule:
    schedule, prediction_type = SCHEDULES[kind]
    options = {"scheduler": SCHEDULERS[kind], "num_inference_steps": 4, **options}
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    return DiffusionModule(network or _unet(), schedule(), prediction_type, optimizer=optimizer, **options)


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Builders: unet, condition_unet, dit, vae (random weights, equal at each call) and module(kind, network, ...)."""
    builders: dict[str, Callable[..., Any]] = {"unet": _unet, "condition_unet": _condition_unet, "dit": _dit}
    return SimpleNamespace(**builders, vae=_vae, module=_module)
