"""How a tiny text-to-image model reads prompts: a tokenizer of letters, and a random CLIP with an outlier token."""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import Tensor, nn

_ENDINGS = ("<|startoftext|>", "<|endoftext|>")
# so much larger than other embeddings that the norms of the first token see nothing else
_LARGE = 1e4


def letter_tokenizer(max_length: int) -> Any:
    """A `CLIPTokenizer` of one token for each lower-case letter and digit, another where it ends a word.

    Args:
        max_length: tokens of a text with both endings, to which pipelines fill it up.
    """
    from transformers import CLIPTokenizer

    return CLIPTokenizer({name: number for number, name in enumerate(_vocabulary())}, [], model_max_length=max_length)


def letter_text_encoder(
    hidden_size: int = 32,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 2,
    max_length: int = 16,
    first_token: float = 240.0,
) -> Any:
    """A `CLIPTextModel` with random weights for `letter_tokenizer`, whose first token is an outlier.

    In pretrained text encoders one channel of the first token is some hundred times as large as all else (MixDQ, Zhao
    et al. 2024, arXiv:2405.17873). Here that is channel 0: other tokens never write into it, and their channels have
    mean 0, so that they stay 0 there through every norm.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads: as in `CLIPTextConfig`.
        max_length: most tokens of a text.
        first_token: channel 0 of the first token in what the encoder returns, where other channels have unit size.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    names = _vocabulary()
    first, last = (names.index(name) for name in _ENDINGS)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=max_length,
        bos_token_id=first,
        eos_token_id=last,
        pad_token_id=last,
    )
    made: Any = CLIPTextModel(config)
    with torch.no_grad():
        for embedding in (module for module in made.modules() if isinstance(module, nn.Embedding)):
            # of unit size, so that a random encoder tells letters and places apart
            _leave_first_channel(embedding.weight.normal_())
        for name, layer in made.named_modules():
            if name.endswith(("out_proj", "fc2")):
                _leave_first_channel(layer.weight.t())
                _leave_first_channel(layer.bias)
            if name.endswith("final_layer_norm"):
                layer.weight[0] = first_token / math.sqrt(hidden_size - 1)
        made.get_input_embeddings().weight[first, 0] = _LARGE
    return made.eval()


def _vocabulary() -> list[str]:
    letters = string.ascii_lowercase + string.digits
    return [*letters, *(f"{letter}</w>" for letter in letters), *_ENDINGS]


def _leave_first_channel(values: Tensor) -> None:
    """Channels [..., C] in place: the first is 0, and so is the mean of the others."""
    values[..., 0] = 0
    values[..., 1:] -= values[..., 1:].mean(dim=-1, keepdim=True)
