"""What latent consistency training needs of a diffusers pipeline: its parts held apart, text conditions, calls."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler
from genlight.modules.exported_pipeline import Network
from genlight.modules.latents import FrozenVAE


class HeldPipeline:
    """A pipeline and those of its networks that are no submodules: neither trained, averaged nor in a checkpoint.

    Copies of the module share it.
    """

    def __init__(self) -> None:
        self.pipe: Any = None
        self.networks: dict[str, nn.Module] = {}
        self.vae: FrozenVAE | None = None
        self.prediction: Prediction | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldPipeline:
        return self

    def to(self, device: torch.device) -> None:
        """Move the networks that are elsewhere."""
        for network in self.networks.values():
            parameter = next(network.parameters(), None)
            if parameter is not None and parameter.device != device:
                network.to(device)


@dataclass(frozen=True)
class TextConditions:
    """Embeddings of a batch of prompts [B, L, D], of as many empty ones, and what SDXL takes beside them."""

    embedding: Tensor
    empty: Tensor
    pooled: Tensor | None = None
    empty_pooled: Tensor | None = None
    sizes: Tensor | None = None

    def doubled(self) -> TextConditions:
        """The prompts, and after them the empty ones, as conditions of 2 B samples."""
        if self.pooled is None or self.empty_pooled is None or self.sizes is None:
            return TextConditions(torch.cat([self.embedding, self.empty]), self.empty)
        return TextConditions(
            torch.cat([self.embedding, self.empty]),
            self.empty,
            torch.cat([self.pooled, self.empty_pooled]),
            self.empty_pooled,
            torch.cat([self.sizes, self.sizes]),
        )


@torch.no_grad()
def text_conditions(pipe: Any, prompts: list[str], size: tuple[int, int], device: torch.device) -> TextConditions:
    """Conditions of prompts for images of `size` (H, W); each distinct prompt is asked for by itself, so that a
    pipeline which remembers its answers encodes it once."""

    def answer(prompt: str) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = pipe.encode_prompt(
            prompt=[prompt], device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return result

    rows = {prompt: answer(prompt) for prompt in dict.fromkeys(prompts)}
    kinds = [torch.cat(kind) for kind in zip(*(rows[prompt] for prompt in prompts), strict=True)]
    if len(kinds) == 2:
        return TextConditions(*kinds)
    sizes = torch.tensor([*size, 0, 0, *size], device=device, dtype=kinds[0].dtype)
    return TextConditions(kinds[0], kinds[1], kinds[2], kinds[3], sizes.expand(len(prompts), -1))


def predict(network: Network, x: Tensor, t: Tensor, text: TextConditions, guidance: Tensor | None = None) -> Tensor:
    """Output in float32 of a UNet2DConditionModel for latents [B, C, H, W] at timestep indices t [B].

    Args:
        guidance: embedding of the guidance scale [B, time_cond_proj_dim], for networks that know it.
    """
    added = {} if text.pooled is None else {"text_embeds": text.pooled, "time_ids": text.sizes}
    output: Tensor = network(
        x,
        t.to(x.device),
        encoder_hidden_states=text.embedding,
        timestep_cond=guidance,
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    return output.float()


def copy_with_guidance(network: Network, width: int) -> Network:
    """A copy of a UNet2DConditionModel that is told the guidance scale, and as yet makes nothing of it.

    The layer on the embedding of the scale is new and zero, unless the network has it already.

    Raises:
        ValueError: it has one of another width.
    """
    known = network.config.time_cond_proj_dim
    if known not in (None, width):
        raise ValueError(f"module.time_cond_proj_dim = {width}, but the network has {known}")
    arguments = {key: value for key, value in network.config.items() if not key.startswith("_")}
    twin = type(network)(**{**arguments, "time_cond_proj_dim": width})
    missing = twin.load_state_dict(network.state_dict(), strict=False).missing_keys
    if known is None:
        assert missing == ["time_embedding.cond_proj.weight"]
        nn.init.zeros_(twin.time_embedding.cond_proj.weight)
    return twin.to(next(network.parameters()).device)


def lcm_scheduler(prediction: Prediction, timestep_scaling: float, solver_steps: int) -> Any:
    """diffusers' LCMScheduler of a prediction type and a variance-preserving schedule; latents are not clipped."""
    return build_scheduler(
        "LCMScheduler",
        prediction.schedule,
        prediction.prediction_type,
        timestep_scaling=timestep_scaling,
        original_inference_steps=solver_steps,
        clip_sample=False,
    )


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name."""
    result = hashlib.sha256()
    for name, value in sorted(state.items()):
        result.update(name.encode())
        result.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()
