"""The networks of the public checkpoints of VAR and LlamaGen, and their weights, every key accounted for.

Published at FoundationVision/var and FoundationVision/LlamaGen of the Hugging Face hub, and peizesun/llamagen_t2i;
their students by Distilled Decoding at microsoft/distilled_decoding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genlight.errors import UserError
from genlight.nets.dd_student import RasterStudent, ScaleStudent
from genlight.nets.llamagen import LlamaGenTransformer
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.var import VARTransformer
from genlight.nets.vq import VectorQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer

VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# of the network for images of 512²
VAR_SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
VAR_DEPTHS = (16, 20, 24, 30, 36)
# layers, width, heads
LLAMAGEN_SIZES = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
    "3B": (24, 3200, 32),
}
VAR_STUDENT_DEPTHS = (16, 20, 24)
LLAMAGEN_STUDENT_SIZES = ("B", "L")


def var_arguments(depth: int) -> dict[str, Any]:
    """Arguments of the `VARTransformer` of a published depth."""
    large = depth == 36
    sizes = {"width": 64 * depth, "num_layers": depth, "num_heads": depth, "drop_path": depth / 240}
    scales = VAR_SCALES_512 if large else VAR_SCALES
    return {"num_codes": 4096, "code_dim": 32, "scales": scales, **sizes, "shared_modulation": large}


def llamagen_arguments(size: str, grid_size: int) -> dict[str, Any]:
    """Arguments of the class-conditional `LlamaGenTransformer` of a published size."""
    layers, width, heads = LLAMAGEN_SIZES[size]
    sizes = {"width": width, "num_layers": layers, "num_heads": heads}
    return {"num_codes": 16384, "grid_size": grid_size, **sizes, "dropout": 0.1}


def var_transformer(depth: int) -> VARTransformer:
    """``var_d<depth>.pth``, with random weights: ImageNet at 256², and of depth 36 at 512².

    Raises:
        ValueError: no such network was published.
    """
    if depth not in VAR_DEPTHS:
        raise ValueError(f"depth = {depth} must be one of {VAR_DEPTHS}")
    return VARTransformer(**var_arguments(depth))


def var_tokenizer(scales: tuple[int, ...] = VAR_SCALES) -> VQTokenizer:
    """``vae_ch160v4096z32.pth``, with random weights; it serves all scales."""
    return VQTokenizer(ResidualQuantizer(4096, 32, scales), (160, 160, 320, 320, 640), 32, quant_conv_size=3)


def llamagen_transformer(size: str, grid_size: int, text: bool = False) -> LlamaGenTransformer:
    """``c2i_<size>_<16 grid_size>.pt``, or with ``text`` ``t2i_<size>_stage…_<16 grid_size>.pt``, with random weights.

    Raises:
        ValueError: no such size was published.
    """
    if size not in LLAMAGEN_SIZES:
        raise ValueError(f"size = {size!r} must be one of {', '.join(LLAMAGEN_SIZES)}")
    return LlamaGenTransformer(**llamagen_arguments(size, grid_size), text_dim=2048 if text else None)


def var_student(depth: int) -> ScaleStudent:
    """``VAR-DD/var-d<depth>.pth``, with random weights; what is read of it are ``trainer.ema_parameters``.

    Raises:
        ValueError: no such network was published.
    """
    if depth not in VAR_STUDENT_DEPTHS:
        raise ValueError(f"depth = {depth} must be one of {VAR_STUDENT_DEPTHS}")
    return ScaleStudent(32, var_arguments(depth))


def llamagen_student(size: str) -> RasterStudent:
    """``LlamaGen-DD/llamagen-<size>.pt``, with random weights; what is read of it is ``ema``.

    Raises:
        ValueError: no such network was published.
    """
    if size not in LLAMAGEN_STUDENT_SIZES:
        raise ValueError(f"size = {size!r} must be one of {', '.join(LLAMAGEN_STUDENT_SIZES)}")
    return RasterStudent(8, llamagen_arguments(size, 16))


def llamagen_tokenizer(downsampling: Literal[8, 16] = 16) -> VQTokenizer:
    """``vq_ds16_c2i.pt``, ``vq_ds16_t2i.pt`` or ``vq_ds8_c2i.pt``, with random weights.

    Raises:
        ValueError: no such tokenizer was published.
    """
    channels = {8: (128, 256, 256, 512), 16: (128, 128, 256, 256, 512)}.get(downsampling)
    if channels is None:
        raise ValueError(f"downsampling = {downsampling} must be 8 or 16")
    return VQTokenizer(VectorQuantizer(16384, 8), channels, 256)


@dataclass(frozen=True)
class Source:
    """Where a tensor of a network comes from.

    Attributes:
        key: in the published file.
        shape: there.
        part: which third of its rows, where queries, keys and values are one tensor there; None is all.
    """

    key: str
    shape: tuple[int, ...]
    part: int | None = None


# what to replace in our names, one after the other
_VAR = (
    (r"^input_projection\.", "word_embed."),
    (r"^class_embedding\.", "class_emb."),
    (r"^start_embedding$", "pos_start"),
    (r"^position_embedding$", "pos_1LC"),
    (r"^scale_embedding\.", "lvl_embed."),
    (r"^shared_modulation\.", "shared_ada_lin.1."),
    (r"^head_modulation\.", "head_nm.ada_lin.1."),
    (r"\.modulation\.offset$", ".ada_gss"),
    (r"\.modulation\.", ".ada_lin.1."),
    (r"\.attention\.", ".attn."),
    (r"\.qkv\.", ".mat_qkv."),
    (r"\.query_bias$", ".q_bias"),
    (r"\.value_bias$", ".v_bias"),
    (r"\.log_scale$", ".scale_mul_1H11"),
    (r"\.output\.", ".proj."),
    (r"\.feed_forward\.0\.", ".ffn.fc1."),
    (r"\.feed_forward\.2\.", ".ffn.fc2."),
)
_LLAMAGEN = (
    (r"^class_embedding\.", "cls_embedding.embedding_table."),
    (r"^text_projection\.0\.", "cls_embedding.cap_proj.fc1."),
    (r"^text_projection\.2\.", "cls_embedding.cap_proj.fc2."),
    (r"^null_text$", "cls_embedding.uncond_embedding"),
    (r"^token_embedding\.", "tok_embeddings."),
    (r"^head\.", "output."),
    (r"^blocks\.", "layers."),
    (r"\.qkv\.", ".wqkv."),
    (r"\.attention\.output\.", ".attention.wo."),
    (r"\.feed_forward_norm\.", ".ffn_norm."),
    (r"\.gate\.", ".w1."),
    (r"\.down\.", ".w2."),
    (r"\.up\.", ".w3."),
)
_STUDENT = (
    (r"^backbone\.", ""),
    (r"^state_embedding\.", "n_d_embed."),
    (r"^layer_state\.", "layerwise_n_d_embed."),
    (r"^vector_head\.shift_scale$", "final_layer_conti.scale_shift_table"),
    (r"^vector_head\.", "final_layer_conti."),
)
_TOKENIZER = (
    (r"^quantizer\.", "quantize."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_out\.0\.", ".proj_out."),
)
_VAR_TOKENIZER = (
    *_TOKENIZER,
    (r"\.phi\.", ".quant_resi.qresi_ls."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.down_blocks\.", ".down."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.to_[qkv]\.", ".qkv."),
)
_LLAMAGEN_TOKENIZER = (
    *_TOKENIZER,
    (r"\.mid_block\.resnets\.0\.", ".mid.0."),
    (r"\.mid_block\.attentions\.0\.", ".mid.1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.2."),
    (r"\.(down|up)_blocks\.", ".conv_blocks."),
    (r"\.resnets\.", ".res."),
    (r"\.attentions\.", ".attn."),
    (r"\.to_([qkv])\.", r".\1."),
)


def published_sources(network: nn.Module) -> dict[str, Source]:
    """For each tensor in the state of a network its place in the published file.

    Raises:
        ValueError: a network of another class.
    """
    rules, _ = _names(network)
    return {name: _source(name, tensor, rules) for name, tensor in network.state_dict().items()}


def published_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every key of the published file that is read, with its shape."""
    return {source.key: source.shape for source in published_sources(network).values()}


def load_published(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read the weights of a published checkpoint, as safetensors, into the network that it belongs to.

    Args:
        network: of one of the functions above, or one of their classes with other sizes.
        path: a safetensors file with the published keys.

    Raises:
        UserError: not there, pickled, no safetensors file; or a key that is missing, not known or of another shape,
            with the first of them.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    path = Path(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        target = path.with_suffix(".safetensors")
        raise UserError(
            f"{path} is pickled, which is not read here; once: python tools/convert_weights.py {path} {target}"
        )
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    load_published_tensors(network, tensors, str(path))


def load_published_tensors(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """As `load_published`, from tensors by their published keys; ``where`` names them in errors."""
    sources = published_sources(network)
    shapes = {source.key: source.shape for source in sources.values()}
    _, ignored = _names(network)
    problems = [f"{key} is missing" for key in shapes if key not in tensors]
    problems += [f"{key} is not known" for key in tensors if key not in shapes and not re.fullmatch(ignored, key)]
    problems += [
        f"{key} is of shape {list(tensors[key].shape)}, not {list(shape)}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{where} does not fit {type(network).__name__}: {problems[0]}{more}")
    with torch.no_grad():
        for name, held in network.state_dict().items():
            found = tensors[sources[name].key]
            part = sources[name].part
            held.copy_((found if part is None else found.chunk(3)[part]).view(held.shape))


def _names(network: nn.Module) -> tuple[tuple[tuple[str, str], ...], str]:
    """The replacements that turn our names into the published ones, and a pattern of keys that hold nothing learned."""
    match network:
        case ScaleStudent() | RasterStudent():
            rules, ignored = _names(network.backbone)
            return (*_STUDENT, *rules), ignored
        case VARTransformer():
            return _VAR, r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias"
        case LlamaGenTransformer():
            return _LLAMAGEN, r"freqs_cis"
        case VQTokenizer(quantizer=ResidualQuantizer()):
            # VAR numbers its decoder from the image inward
            levels = len(network.decoder.up_blocks)
            ups = tuple((rf"\.up_blocks\.{level}\.", f".up.{levels - 1 - level}.") for level in range(levels))
            return (*_VAR_TOKENIZER, *ups), r"quantize\.ema_vocab_hit_SV"
        case VQTokenizer():
            return _LLAMAGEN_TOKENIZER, r"quantize\.codebook_used"
    raise ValueError(f"network of class {type(network).__name__} must be one that was published")


def _source(name: str, tensor: Tensor, rules: tuple[tuple[str, str], ...]) -> Source:
    key, shape = name, tuple(tensor.shape)
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    projection = re.search(r"\.to_(q|k|v|out\.0)\.", name)
    if projection and name.endswith(".weight"):
        # the tokenizers' attention is published as convolutions of size 1; diffusers' is linear
        shape = (*shape, 1, 1)
    if projection and ".qkv." in key:
        return Source(key, (3 * shape[0], *shape[1:]), "qkv".index(projection[1]))
    return Source(key, shape)
