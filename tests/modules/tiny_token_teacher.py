"""Folders of teachers small enough for a second: random networks whose tokens depend on each other."""

from pathlib import Path

import torch
from nets.test_teachers import randomised

from genlight.modules.token_folder import TokenTeacher, model_of, save_token_teacher
from genlight.nets.autoregressive import SamplingSettings
from genlight.nets.captions import CaptionedLlamaGen
from genlight.nets.llamagen import LlamaGenTransformer
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.var import VARTransformer
from genlight.nets.vq import VectorQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer

CODES, DIM, CLASSES = 12, 4, 10


def tiny_teacher(kind: str, settings: SamplingSettings | None = None) -> TokenTeacher:
    """ "llamagen", "captioned", "var" or "var-shared", over images of 8×8 pixels: 16 tokens, or 21 on three scales."""
    torch.manual_seed(0)
    options = {"image_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    if kind in ("llamagen", "captioned"):
        tokenizer = VQTokenizer(VectorQuantizer(CODES, DIM), (8, 16), 8, **options)
        texts = {"text_dim": 6, "text_length": 5} if kind == "captioned" else {"num_classes": CLASSES}
        transformer = LlamaGenTransformer(CODES, 4, 16, 2, 2, multiple_of=8, **texts)
    else:
        quantizer = ResidualQuantizer(CODES, DIM, (1, 2, 4), num_phi=2)
        tokenizer = VQTokenizer(quantizer, (8, 16), 8, quant_conv_size=3, **options)
        shared = kind == "var-shared"
        transformer = VARTransformer(CODES, DIM, (1, 2, 4), 16, 2, 2, CLASSES, shared_modulation=shared)
        torch.nn.init.normal_(quantizer.embedding.weight)
    randomised(transformer)
    for network in (tokenizer, transformer):
        network.eval().requires_grad_(False)
    model = model_of(transformer, tokenizer)
    if kind == "captioned":
        model = CaptionedLlamaGen(transformer, tokenizer.quantizer, tiny_captions())
    return TokenTeacher(model, tokenizer, settings or SamplingSettings(guidance_scale=1.5), (1, 8, 8))


def tiny_captions() -> torch.Tensor:
    """[10, 5, 6], of one to five features, padded at the left."""
    captions = torch.randn(CLASSES, 5, 6, generator=torch.Generator().manual_seed(4))
    for number in range(CLASSES):
        captions[number, : number % 5] = 0
    return captions


def saved_teacher(folder: Path, kind: str = "llamagen") -> Path:
    """The folder, with a teacher in it."""
    save_token_teacher(folder, tiny_teacher(kind))
    return folder
