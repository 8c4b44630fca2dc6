"""ImageGPT (Chen et al. 2020, "Generative Pretraining from Pixels"): a GPT that decides an image pixel by pixel.

Tokens are colours: rows of a table of some hundred, the clusters of the colours of many images. So there is no
tokenizer network; the network over the tokens is transformers'. It knows no classes: its conditions are only counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, ImageGPTConfig, ImageGPTForCausalImageModeling

from genlight.nets.autoregressive import Nucleus
from genlight.nets.vq import nearest_codes, to_grid, to_rows

_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon")
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# as in all published networks
_FIXED = {
    "activation_function": "quick_gelu",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def imagegpt_options(config: ImageGPTConfig) -> dict[str, Any]:
    """Arguments of `ImageGPTConfig` that decide what the weights compute, as JSON has them.

    Raises:
        ValueError: pixels that fill no square, or layers of another kind than those of the published networks.
    """
    for name, value in _FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} = {getattr(config, name)} must be {value}")
    if math.isqrt(config.n_positions) ** 2 != config.n_positions:
        raise ValueError(f"n_positions = {config.n_positions} must be a square number")
    return {name: getattr(config, name) for name in (*_SIZES, *_DROPOUTS)}


class ColourClusters(nn.Module):
    """Pixels as tokens: images of exactly V colours, and the nearest of them for any image.

    Args:
        colours: [V, 3], each channel in [-1, 1].

    Raises:
        ValueError: not a table of colours.
    """

    codebook: Tensor

    def __init__(self, colours: Tensor) -> None:
        super().__init__()
        if colours.ndim != 2 or colours.shape[1] != 3 or not len(colours):
            raise ValueError(f"clusters {list(colours.shape)} must be [V, 3], a table of colours")
        # a row of numbers that are no colours would otherwise only show in images
        if not (colours.abs() <= 1.001).all():
            raise ValueError("clusters must be in [-1, 1]")
        self.config = {"num_codes": len(colours)}
        self.register_buffer("codebook", colours.float())

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images in [-1, 1]: [B, 3, H, W] to [B, H·W] int64."""
        return nearest_codes(to_rows(images).flatten(0, 1), self.codebook).view(len(images), -1)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Colours as images, not clamped: [B, N, 3] to [B, 3, √N, √N]; ValueError if N is no square number."""
        return to_grid(vectors)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images in [-1, 1] of tokens: [B, N] to [B, 3, √N, √N]."""
        return self.decode_vectors(functional.embedding(tokens, self.codebook)).clamp(-1, 1)


@dataclass
class ImageGPTState:
    """Keys and values of what `ImageGPT` has read so far."""

    cache: DynamicCache


@dataclass(frozen=True)
class ImageGPT:
    """An `AutoregressiveModel` that decides one pixel after the other; of its conditions only the number counts."""

    transformer: ImageGPTForCausalImageModeling
    quantizer: ColourClusters
    nucleus: ClassVar[Nucleus] = "tail"
    guidance_ramp: ClassVar[bool] = False

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return (1,) * int(self.transformer.config.n_positions)

    def null_condition(self, condition: Tensor) -> Tensor:
        raise ValueError("guidance_scale must be 1: ImageGPT knows no classes, so nothing can guide it")

    def begin(self, condition: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, ImageGPTState]:
        state = ImageGPTState(DynamicCache(config=self.transformer.config))
        return self.extend(state, self._begun(len(condition), prefix)), state

    def extend(self, state: ImageGPTState, tokens: Tensor) -> Tensor:
        output = self.transformer(tokens, past_key_values=state.cache, use_cache=True)
        logits: Tensor = output.logits[:, -1:].float()
        return logits

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        output = self.transformer(self._begun(len(tokens), tokens[:, :-1]), use_cache=False)
        logits: Tensor = output.logits.float()
        return logits

    def _begun(self, count: int, tokens: Tensor | None) -> Tensor:
        """The token that stands for the start of an image, which is one more than the last colour, and then others."""
        start = torch.full((count, 1), len(self.codebook), device=self.codebook.device)
        return start if tokens is None else torch.cat((start, tokens), dim=1)
