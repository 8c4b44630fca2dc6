"""Tokenizers and autoregressive networks over their tokens, small enough to decode in milliseconds."""

from __future__ import annotations

import torch

from genlight.modules.token_folder import SavedTokenizer, TokenTeacher, Transformer, model_of
from genlight.nets.autoregressive import SamplingSettings
from genlight.nets.llamagen import LlamaGenTransformer
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.var import VARTransformer
from genlight.nets.vq import VectorQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer

CODES, CODE_DIM, CLASSES, IMAGE_SHAPE = 12, 4, 10, (1, 8, 8)


def tiny_tokenizer(kind: str = "llamagen", channels: tuple[int, ...] = (8, 8, 8)) -> VQTokenizer:
    """Of 8×8 grey images: 4 tokens in raster order, or 5 on two scales."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(CODES, CODE_DIM) if kind == "llamagen" else ResidualQuantizer(CODES, CODE_DIM, (1, 2))
    torch.nn.init.normal_(quantizer.embedding.weight)
    return VQTokenizer(quantizer, channels, 8, image_channels=1, layers_per_block=1, norm_num_groups=4)


def tiny_transformer(kind: str = "llamagen") -> Transformer:
    """Far from uniform, so that noise and labels count."""
    torch.manual_seed(1)
    network: Transformer
    if kind == "llamagen":
        network = LlamaGenTransformer(CODES, 2, 16, 2, 2, num_classes=CLASSES, multiple_of=8)
    else:
        network = VARTransformer(CODES, CODE_DIM, (1, 2), 16, 2, 2, num_classes=CLASSES)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def tiny_teacher(kind: str = "llamagen", **settings: float) -> TokenTeacher:
    tokenizer, transformer = tiny_tokenizer(kind).eval(), tiny_transformer(kind).eval()
    return TokenTeacher(model_of(transformer, tokenizer), tokenizer, SamplingSettings(**settings), IMAGE_SHAPE)


def saved(kind: str = "llamagen") -> SavedTokenizer:
    return SavedTokenizer(tiny_tokenizer(kind), IMAGE_SHAPE)
