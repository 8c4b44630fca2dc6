"""VAR (Tian et al. 2024, arXiv 2404.02905, section 3.3): a transformer that decides an image's tokens scale by scale.

It reads, at the places of a scale, the features of all scales before it in the size of that scale, so that the tokens
of a scale are decided at once. The first scale reads the class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.nets.autoregressive import Nucleus
from genlight.nets.configuration import constructor_arguments
from genlight.nets.kv_cache import KeyValueCache
from genlight.nets.residual_vq import ResidualQuantizer


class CosineAttention(nn.Module):
    """Self-attention by cosines, which each head sharpens by a learned factor of at most 100: [B, S, width] to itself.

    Of the biases only those of queries and values exist.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None, layer: int) -> Tensor:
        bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        projected = self.qkv(x)
        projected = projected + bias.type_as(projected)
        query, key, value = projected.view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scale = self.log_scale.clamp(max=math.log(100.0)).exp()
        query = (functional.normalize(query, dim=-1) * scale).type_as(value)
        key = functional.normalize(key, dim=-1).type_as(value)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        attended = functional.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
        out: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return out


class Modulation(nn.Linear):
    """Scales, shifts and gates of adaptive layer normalisations: of classes [B, width] to [B, 1, parts, width]."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(width, parts * width)
        self.parts = parts

    def forward(self, condition: Tensor) -> Tensor:
        return super().forward(functional.silu(condition)).view(len(condition), 1, self.parts, -1)


class ModulationOffset(nn.Module):
    """A block's own addition to a modulation that all share: [B, 1, 6, width] to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def forward(self, modulation: Tensor) -> Tensor:
        return modulation + self.offset


class VARBlock(nn.Module):
    """Attention and feed-forward layer, each scaled, shifted and gated by the class (adaptive layer normalisation).

    Args:
        width: of the layers and of the class embedding.
        num_heads: attention heads.
        shared_modulation: whether the modulation [B, 1, 6, width] comes from outside, and the block adds an offset;
            otherwise the block computes it from the class embedding [B, width].
        drop_path: probability that the block leaves a sample as it is, in training.
    """

    def __init__(self, width: int, num_heads: int, shared_modulation: bool, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = CosineAttention(width, num_heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation: Modulation | ModulationOffset = Modulation(width, 6)
        if shared_modulation:
            self.modulation = ModulationOffset(width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache | None,
        layer: int,
        added: Tensor | None = None,
    ) -> Tensor:
        """[B, S, width] to the same shape; `added`, if given, comes between attention and feed-forward layer."""
        gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = self.modulation(condition).unbind(2)
        attended = self.attention(self.norm(x) * (1 + scale_a) + shift_a, mask, cache, layer)
        x = x + self._drop(attended * gate_a)
        x = x if added is None else x + added
        return x + self._drop(self.feed_forward(self.norm(x) * (1 + scale_f) + shift_f) * gate_f)

    @torch.no_grad()
    def shrink(self, num_layers: int) -> None:
        """Make the new block of a network of ``num_layers`` change its input little."""
        self.attention.output.weight.div_((2 * num_layers) ** 0.5)
        self.feed_forward.get_parameter("2.weight").div_((2 * num_layers) ** 0.5)
        if isinstance(self.modulation, Modulation):
            parts = self.modulation.weight.view(6, -1)
        else:
            parts = self.modulation.offset.view(6, -1)
        # gates, then scales and shifts
        parts[:2] *= 1e-5
        parts[2:] *= 0.5

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class VARTransformer(nn.Module):
    """The transformer, which knows features only; `VAR` adds the quantiser that they come from.

    Args:
        num_codes: V.
        code_dim: C.
        scales: height and width of the token maps, as in `ResidualQuantizer`.
        width: of the layers; 64 for each layer in the published networks.
        num_layers: blocks.
        num_heads: attention heads; as many as layers in the published networks.
        num_classes: classes; the label `num_classes` stands for none.
        shared_modulation: whether the blocks share one linear layer for scales, shifts and gates (published at 512²).
        drop_path: of the last block, growing in equal steps from 0 at the first (published: num_layers / 240).

    Raises:
        ValueError: a size below 1, a width that the heads do not divide, or `drop_path` outside [0, 1).
    """

    scale_of_position: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        scales: Sequence[int],
        width: int,
        num_layers: int,
        num_heads: int,
        num_classes: int = 1000,
        shared_modulation: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = constructor_arguments(locals())
        self.scales = tuple(int(scale) for scale in scales)
        sizes = {"num_codes": num_codes, "code_dim": code_dim, "min(scales)": min(self.scales, default=0)}
        sizes |= {"width": width, "num_layers": num_layers, "num_heads": num_heads, "num_classes": num_classes}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} = {size} must be at least 1")
        if width % num_heads:
            raise ValueError(f"width = {width} must be a multiple of num_heads = {num_heads}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path = {drop_path} must be in [0, 1)")
        self.num_classes = num_classes
        # where scales begin and end: 0, s₁², s₁² + s₂², …
        self.ends = tuple(itertools.accumulate((scale * scale for scale in self.scales), initial=0))
        self.input_projection = nn.Linear(code_dim, width)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.start_embedding = nn.Parameter(torch.empty(1, self.ends[1], width))
        self.position_embedding = nn.Parameter(torch.empty(1, self.ends[-1], width))
        self.scale_embedding = nn.Embedding(len(self.scales), width)
        self.shared_modulation = Modulation(width, 6) if shared_modulation else None
        rates = [drop_path * index / max(num_layers - 1, 1) for index in range(num_layers)]
        blocks = [VARBlock(width, num_heads, shared_modulation, rate) for rate in rates]
        self.blocks = nn.ModuleList(blocks)
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_modulation = Modulation(width, 2)
        self.head = nn.Linear(width, num_codes)
        scale_of_position = [index for index, scale in enumerate(self.scales) for _ in range(scale * scale)]
        self.register_buffer("scale_of_position", torch.tensor(scale_of_position), persistent=False)
        self._initialise(width)
        for block in blocks:
            block.shrink(num_layers)

    def _initialise(self, width: int) -> None:
        """A nearly uniform output; the numbers here and in `VARBlock.shrink` are those of the published trainings."""
        std = (3 * width) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_embedding, std=std)
        nn.init.trunc_normal_(self.position_embedding, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_modulation.weight.mul_(0.5)

    def new_cache(self) -> KeyValueCache:
        """An empty cache for `forward`."""
        return KeyValueCache(len(self.blocks), len(self.scale_of_position))

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor,
        cache: KeyValueCache | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        """Logits of the token at each position, given the scales before it.

        Args:
            inputs: [B, S, C], features at the places of whole scales: from the second scale on, or from where the cache
                ends. S may be 0 for the first scale alone.
            labels: [B] int64.
            cache: of `new_cache`, which the positions are added to; None for a sequence from its beginning.
            num_logits: of how many of the last positions logits are wanted; None is all.

        Returns:
            [B, num_logits, V] float32; without a cache, or an empty one, the positions of the first scale come first.

        Raises:
            ValueError: more positions than the scales have.
        """
        start = 0 if cache is None else cache.length
        condition = self.class_embedding(labels)
        x = self.input_projection(inputs)
        if start == 0:
            x = torch.cat((condition[:, None] + self.start_embedding, x), dim=1)
        end = start + x.shape[1]
        if end > len(self.scale_of_position):
            raise ValueError(f"inputs of positions {start} to {end} must end at {len(self.scale_of_position)}")
        scales = self.scale_of_position[:end]
        x = x + self.scale_embedding(scales[start:]) + self.position_embedding[:, start:end]
        # one scale alone reads all there is and needs no mask
        mask = scales[start:, None] >= scales if any(start < edge < end for edge in self.ends) else None
        modulation = condition if self.shared_modulation is None else self.shared_modulation(condition)
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation, mask, cache, layer)
        x = x if num_logits is None else x[:, -num_logits:]
        scale, shift = self.head_modulation(condition).unbind(2)
        logits: Tensor = self.head(self.head_norm(x) * (1 + scale) + shift).float()
        return logits


@dataclass
class VARState:
    """What `VAR` has read so far: the features [B, C, S, S] of the first `num_scales` scales, and the cache of them."""

    cache: KeyValueCache
    labels: Tensor
    features: Tensor
    num_scales: int


@dataclass(frozen=True)
class VAR:
    """An `AutoregressiveModel` that decides one scale after the other; conditions are class labels [B] int64."""

    transformer: VARTransformer
    quantizer: ResidualQuantizer
    nucleus: ClassVar[Nucleus] = "tail"
    guidance_ramp: ClassVar[bool] = True

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return self.quantizer.group_sizes

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.transformer.num_classes)

    def begin(self, condition: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, VARState]:
        prefix = condition.new_zeros(len(condition), 0) if prefix is None else prefix
        vectors = self.quantizer.lookup(prefix)
        features, inputs = self.quantizer.features_of(vectors), self.quantizer.next_scale_inputs(vectors)
        num_scales = self.transformer.ends.index(prefix.shape[1])
        state = VARState(self.transformer.new_cache(), condition, features, num_scales)
        return self.transformer(inputs, condition, state.cache, self.group_sizes[num_scales]), state

    def extend(self, state: VARState, tokens: Tensor) -> Tensor:
        state.features = self.quantizer.add_scale(state.features, self.quantizer.lookup(tokens), state.num_scales)
        state.num_scales += 1
        inputs = self.quantizer.scale_inputs(state.features, state.num_scales)
        logits: Tensor = self.transformer(inputs, state.labels, state.cache)
        return logits

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        inputs = self.quantizer.next_scale_inputs(self.quantizer.lookup(tokens))
        logits: Tensor = self.transformer(inputs, condition)
        return logits
