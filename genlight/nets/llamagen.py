"""LlamaGen (Sun et al. 2024, arXiv 2406.06525): a Llama that reads a class or a text and then image tokens in raster
order.

Unlike Llama it turns queries and keys by row and column of the token, and those of the condition not at all: they are
multiplied by zero, as in the published weights, so that a condition is attended to by content-free, equal logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.nets.autoregressive import Nucleus
from genlight.nets.configuration import constructor_arguments
from genlight.nets.kv_cache import KeyValueCache
from genlight.nets.vq import VectorQuantizer


def rotary_table(grid_size: int, head_dim: int, condition_length: int, base: float = 10000.0) -> Tensor:
    """Cosine and sine of each position: zeros for the condition, then the grid in raster order.

    The first half of the pairs turns with the row, the second with the column, pair i by base^(-4i / head_dim) each.

    Returns:
        [condition_length + grid_size², head_dim / 2, 2].
    """
    frequencies = base ** -(torch.arange(head_dim // 4) * 4 / head_dim)
    angles = torch.outer(torch.arange(grid_size).float(), frequencies)
    rows = angles[:, None].expand(-1, grid_size, -1)
    columns = angles[None].expand(grid_size, -1, -1)
    grid = torch.cat((rows, columns), dim=-1).flatten(0, 1)
    table = torch.stack((grid.cos(), grid.sin()), dim=-1)
    return torch.cat((table.new_zeros(condition_length, head_dim // 2, 2), table))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of numbers: [B, heads, S, D] by a table [S, D / 2, 2] of cosine and sine."""
    first, second = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = rotation.unbind(-1)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.flatten(-2).type_as(x)


class LlamaGenAttention(nn.Module):
    """Self-attention of several heads: [B, S, width] to the same shape."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KeyValueCache | None, layer: int
    ) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        # without a mask: the first positions, each reading itself and those before; or one new position, reading all
        is_causal = mask is None and x.shape[1] > 1
        attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
        out: Tensor = self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv 2002.05202, section 2): [..., width] to the same shape."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.down(functional.silu(self.gate(x)) * self.up(x)))
        return out


class LlamaGenBlock(nn.Module):
    """Attention and feed-forward layer, each after an RMS normalisation and added to its input."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = LlamaGenAttention(width, num_heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-5)
        self.feed_forward = SwiGLU(width, hidden, dropout)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KeyValueCache | None, layer: int
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache, layer)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class LlamaGenTransformer(nn.Module):
    """The transformer, which knows tokens by index; `LlamaGen` adds their codebook.

    A condition is class labels [B] int64, where `num_classes` stands for none; or with `text_dim` features of a text
    [B, text_length, text_dim], padded at the left with rows of zeros, which nothing attends to but themselves.

    Args:
        num_codes: V.
        grid_size: height and width of the token grid.
        width: of the layers.
        num_layers: blocks.
        num_heads: attention heads; width / num_heads must be a multiple of 4.
        num_classes: classes of a class-conditional network.
        text_dim: length of a text feature of a text-conditional network; then there are no classes.
        text_length: text features of a condition.
        multiple_of: the hidden width of the feed-forward layers is ⌊8·width / 3⌋, rounded up to a multiple of this.
        dropout: of embeddings and of the output of each layer, in training (published: 0.1).

    Raises:
        ValueError: a size below 1, a head width that is no multiple of 4, or `dropout` outside [0, 1).
    """

    null_text: Tensor
    rotation: Tensor

    def __init__(
        self,
        num_codes: int,
        grid_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        num_classes: int = 1000,
        text_dim: int | None = None,
        text_length: int = 120,
        multiple_of: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = constructor_arguments(locals())
        sizes = {"num_codes": num_codes, "grid_size": grid_size, "width": width, "num_layers": num_layers}
        sizes |= {"num_heads": num_heads, "num_classes": num_classes, "text_length": text_length}
        for name, size in (sizes | {"multiple_of": multiple_of}).items():
            if size < 1:
                raise ValueError(f"{name} = {size} must be at least 1")
        if width % (4 * num_heads):
            raise ValueError(f"width = {width} must be a multiple of 4 * num_heads = {4 * num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout} must be in [0, 1)")
        self.grid_size, self.num_classes = grid_size, num_classes
        self.is_text_conditional = text_dim is not None
        self.condition_length = text_length if text_dim is not None else 1
        if text_dim is not None:
            self.text_projection = nn.Sequential(
                nn.Linear(text_dim, width, bias=False), nn.GELU("tanh"), nn.Linear(width, width, bias=False)
            )
            self.register_buffer("null_text", torch.randn(text_length, text_dim) / text_dim**0.5)
        else:
            self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.token_embedding = nn.Embedding(num_codes, width)
        self.dropout = nn.Dropout(dropout)
        hidden = -(-(8 * width // 3) // multiple_of) * multiple_of
        self.blocks = nn.ModuleList(LlamaGenBlock(width, num_heads, hidden, dropout) for _ in range(num_layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, num_codes, bias=False)
        table = rotary_table(grid_size, width // num_heads, self.condition_length)
        self.register_buffer("rotation", table, persistent=False)
        self.apply(_initialise)
        nn.init.zeros_(self.head.weight)

    def new_cache(self) -> KeyValueCache:
        """An empty cache for `forward`."""
        return KeyValueCache(len(self.blocks), len(self.rotation))

    def embed_condition(self, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, T, width] of conditions, and which of them are no padding, [B, T] bool; None if all are.

        Raises:
            ValueError: text features of another length.
        """
        if not self.is_text_conditional:
            return self.class_embedding(condition)[:, None], None
        if condition.shape[1] != self.condition_length:
            raise ValueError(f"condition {list(condition.shape)} must have {self.condition_length} text features")
        return self.text_projection(condition), (condition != 0).any(dim=-1)

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition that stands for none: [B], or for texts [B, T, text_dim] with the padding of `condition`."""
        if not self.is_text_conditional:
            return torch.full_like(condition, self.num_classes)
        null: Tensor = self.null_text.to(condition) * (condition != 0).any(dim=-1, keepdim=True)
        return null

    def forward(
        self,
        embeddings: Tensor,
        is_text: Tensor | None = None,
        cache: KeyValueCache | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        """Logits of the token after each position, given all positions up to it.

        Args:
            embeddings: [B, S, width], of the condition and then of tokens, without the positions in the cache.
            is_text: [B, T], from `embed_condition`.
            cache: of `new_cache`, which the positions are added to; None for a sequence from its beginning.
            num_logits: of how many of the last positions logits are wanted; None is all.

        Returns:
            [B, num_logits, V] float32.

        Raises:
            ValueError: more positions than condition and grid have.
        """
        start = 0 if cache is None else cache.length
        end = start + embeddings.shape[1]
        if end > len(self.rotation):
            raise ValueError(f"embeddings of positions {start} to {end} must end at {len(self.rotation)}")
        rotation, mask = self.rotation[start:end], attention_mask(start, end, is_text, embeddings.device)
        x = self.dropout(embeddings)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, mask, cache, layer)
        x = x if num_logits is None else x[:, -num_logits:]
        logits: Tensor = self.head(self.norm(x)).float()
        return logits


def attention_mask(start: int, end: int, is_text: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of the positions up to `end` those from `start` may attend to.

    Args:
        start, end: positions.
        is_text: [B, T], as of `LlamaGenTransformer.embed_condition`.
        device: of the mask.

    Returns:
        [..., end - start, end] bool; None where each attends to itself and those before, or one to all.
    """
    if is_text is None and (start == 0 or end - start == 1):
        return None
    keys = torch.arange(end, device=device)
    queries = torch.arange(start, end, device=device)[:, None]
    causal = keys <= queries
    if is_text is None:
        return causal
    readable = functional.pad(is_text, (0, end - is_text.shape[1]), value=True)
    return ((causal & readable[:, None]) | (keys == queries))[:, None]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


@dataclass
class LlamaGenState:
    """What `LlamaGen` has read so far."""

    cache: KeyValueCache
    is_text: Tensor | None


@dataclass(frozen=True)
class LlamaGen:
    """An `AutoregressiveModel` that decides one token after the other."""

    transformer: LlamaGenTransformer
    quantizer: VectorQuantizer
    nucleus: ClassVar[Nucleus] = "head"
    guidance_ramp: ClassVar[bool] = False

    @property
    def codebook(self) -> Tensor:
        return self.quantizer.codebook

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return (1,) * self.transformer.grid_size**2

    def null_condition(self, condition: Tensor) -> Tensor:
        return self.transformer.null_condition(condition)

    def begin(self, condition: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, LlamaGenState]:
        embeddings, is_text = self.transformer.embed_condition(condition)
        if prefix is not None:
            embeddings = torch.cat((embeddings, self.transformer.token_embedding(prefix)), dim=1)
        state = LlamaGenState(self.transformer.new_cache(), is_text)
        return self.transformer(embeddings, is_text, state.cache, num_logits=1), state

    def extend(self, state: LlamaGenState, tokens: Tensor) -> Tensor:
        embeddings = self.transformer.token_embedding(tokens)
        logits: Tensor = self.transformer(embeddings, state.is_text, state.cache, num_logits=1)
        return logits

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        embeddings, is_text = self.transformer.embed_condition(condition)
        embeddings = torch.cat((embeddings, self.transformer.token_embedding(tokens[:, :-1])), dim=1)
        logits: Tensor = self.transformer(embeddings, is_text, num_logits=tokens.shape[1])
        return logits
