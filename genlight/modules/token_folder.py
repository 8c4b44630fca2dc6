"""Folders of tokenizers and of the autoregressive networks over their tokens: safetensors beside a JSON record."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ImageGPTConfig

from genlight import io
from genlight.errors import UserError
from genlight.modules.described import add_weights
from genlight.modules.imagegpt_folder import imagegpt_folder, read_imagegpt
from genlight.modules.networks import check_state_dict
from genlight.nets.autoregressive import SamplingSettings
from genlight.nets.captions import CaptionedLlamaGen
from genlight.nets.imagegpt import ColourClusters, ImageGPT, imagegpt_options
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.var import VAR, VARTransformer
from genlight.nets.vq import VectorQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer

Transformer = LlamaGenTransformer | VARTransformer
TOKENIZER, AUTOREGRESSIVE = "tokenizer", "autoregressive"
CAPTIONS = "captions.safetensors"
_QUANTIZERS = {kind.__name__: kind for kind in (VectorQuantizer, ResidualQuantizer)}
_TRANSFORMERS = {kind.__name__: kind for kind in (LlamaGenTransformer, VARTransformer)}


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer and the (C, H, W) of the images that it was trained on."""

    network: VQTokenizer
    image_shape: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        if isinstance(self.network.quantizer, ResidualQuantizer):
            return sum(self.network.quantizer.group_sizes)
        _, height, width = self.image_shape
        return int((height // self.network.downsampling) * (width // self.network.downsampling))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over architecture and weights."""
        digest = hashlib.sha256(json.dumps(_tokenizer_record(self), sort_keys=True).encode())
        add_weights(digest, self.network.state_dict())
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenTeacher:
    """A trained autoregressive network with all that sampling needs.

    Attributes:
        model: decides tokens; its quantizer is that of the tokenizer.
        tokenizer: turns tokens into images.
        settings: how its samples are drawn.
        image_shape: (C, H, W).
        num_classes: labels are 0 … num_classes - 1, classes or captions; None if the network knows neither.
    """

    model: LlamaGen | VAR | ImageGPT
    tokenizer: VQTokenizer | ColourClusters
    settings: SamplingSettings
    image_shape: tuple[int, int, int]

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenTeacher:
        return self  # an averaged copy of a student's module shares it

    @property
    def num_classes(self) -> int | None:
        if self.captions is not None:
            return len(self.captions)
        return None if isinstance(self.model, ImageGPT) else self.model.transformer.num_classes

    @property
    def captions(self) -> Tensor | None:
        """[P, T, D], the texts that labels are the numbers of, of a network of texts."""
        return self.model.captions if isinstance(self.model, CaptionedLlamaGen) else None

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(N, C) of the noise of one sample: one vector for each token, in the space of the codes."""
        return sum(self.model.group_sizes), self.model.codebook.shape[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over architectures, settings and all weights."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, VQTokenizer):
            described = _tokenizer_record(SavedTokenizer(tokenizer, self.image_shape))
        else:
            described = _described(tokenizer)
        digest = hashlib.sha256(json.dumps([described, _record(self)], sort_keys=True).encode())
        for network in (self.model.transformer, self.tokenizer):
            add_weights(digest, network.state_dict())
        if self.captions is not None:
            add_weights(digest, {"captions": self.captions})
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> TokenTeacher:
        """Moves the networks; returns the same object."""
        networks: tuple[nn.Module, ...] = (self.model.transformer, self.tokenizer)
        for network in networks:
            network.to(device)
        return self


def model_of(transformer: Transformer, tokenizer: VQTokenizer) -> LlamaGen | VAR:
    """The autoregressive model of a transformer over the tokens of a tokenizer.

    Raises:
        ValueError: one has scales and the other not, or other sizes.
    """
    quantizer, found = tokenizer.quantizer, transformer.config
    wanted: dict[str, Any] = {"num_codes": quantizer.num_codes}
    if isinstance(transformer, VARTransformer):
        if not isinstance(quantizer, ResidualQuantizer):
            raise ValueError("a VARTransformer needs a tokenizer of several scales (ResidualQuantizer)")
        wanted |= {"code_dim": quantizer.code_dim, "scales": list(quantizer.scales)}
    elif isinstance(quantizer, ResidualQuantizer):
        raise ValueError("a LlamaGenTransformer needs a tokenizer of one scale (VectorQuantizer)")
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(f"network.{key} = {found[key]} must be {value}, as the tokenizer has it")
    if isinstance(transformer, VARTransformer):
        assert isinstance(quantizer, ResidualQuantizer)
        return VAR(transformer, quantizer)
    return LlamaGen(transformer, quantizer)


def save_tokenizer(folder: str | Path, tokenizer: SavedTokenizer) -> None:
    """Write tokenizer.safetensors and tokenizer.json."""
    _save(Path(folder), TOKENIZER, tokenizer.network, _tokenizer_record(tokenizer))


def read_tokenizer(source: str | Path) -> SavedTokenizer:
    """The tokenizer of a folder that `save_tokenizer` wrote, or of the run folder of its fit; frozen, on the CPU.

    Raises:
        UserError: not such a folder, damaged, or of another version.
    """
    folder, record, state = _read(source, TOKENIZER)
    with _as_user_error(folder):
        kind = _QUANTIZERS[record["quantizer"]["class"]]
        network = VQTokenizer(kind(**record["quantizer"]["config"]), **record["config"])
        channels, height, width = record["image_shape"]
    _load(network, state, folder)
    return SavedTokenizer(network, (int(channels), int(height), int(width)))


def save_token_teacher(folder: str | Path, teacher: TokenTeacher) -> None:
    """Write autoregressive.safetensors, autoregressive.json, captions.safetensors where there are captions, and the
    tokenizer in a folder of its own.

    Raises:
        ValueError: an ImageGPT, whose folder is that of transformers.
    """
    if not isinstance(teacher.tokenizer, VQTokenizer):
        raise ValueError("teacher.tokenizer must be a VQTokenizer: an ImageGPT is saved by transformers")
    if teacher.captions is not None:
        io.save_tensors(Path(folder) / CAPTIONS, {"captions": teacher.captions})
    _save(Path(folder), AUTOREGRESSIVE, teacher.model.transformer, _record(teacher))
    save_tokenizer(Path(folder) / TOKENIZER, SavedTokenizer(teacher.tokenizer, teacher.image_shape))


def read_token_teacher(source: str | Path) -> TokenTeacher:
    """An autoregressive network over tokens, frozen, on the CPU.

    Args:
        source: a folder that `save_token_teacher` wrote, the run folder of its fit, or a folder or hub id of an
            ImageGPT of transformers.

    Raises:
        UserError: not such a folder, damaged, of another version, or of texts and without captions.
    """
    if not (Path(source) / f"{AUTOREGRESSIVE}.json").is_file() and (found := imagegpt_folder(source)) is not None:
        gpt, plain = read_imagegpt(found)
        size = math.isqrt(len(gpt.group_sizes))
        return TokenTeacher(gpt, gpt.quantizer, plain, (3, size, size))
    folder, record, state = _read(source, AUTOREGRESSIVE)
    tokenizer = read_tokenizer(folder / TOKENIZER)
    with _as_user_error(folder):
        transformer = _TRANSFORMERS[record["network"]["class"]](**record["network"]["config"])
        settings = SamplingSettings(**record["sampling"])
        model = model_of(transformer, tokenizer.network)
    _load(transformer, state, folder)
    if isinstance(model, LlamaGen) and model.transformer.is_text_conditional:
        try:
            captions = io.load_tensors(folder / CAPTIONS)[0]["captions"]
        except (FileNotFoundError, KeyError) as error:
            raise UserError(f"{folder} is a network of texts and has no {CAPTIONS}, the features of texts") from error
        with _as_user_error(folder):
            model = CaptionedLlamaGen(model.transformer, model.quantizer, captions)
    return TokenTeacher(model, tokenizer.network, settings, tokenizer.image_shape)


def _described(network: nn.Module) -> dict[str, Any]:
    config = imagegpt_options(network.config) if isinstance(network.config, ImageGPTConfig) else network.config
    return {"class": type(network).__name__, "config": config}


def _tokenizer_record(tokenizer: SavedTokenizer) -> dict[str, Any]:
    return {
        "kind": TOKENIZER,
        "version": 1,
        "image_shape": list(tokenizer.image_shape),
        "quantizer": _described(tokenizer.network.quantizer),
        "config": tokenizer.network.config,
    }


def _record(teacher: TokenTeacher) -> dict[str, Any]:
    network, sampling = _described(teacher.model.transformer), asdict(teacher.settings)
    return {"kind": AUTOREGRESSIVE, "version": 1, "network": network, "sampling": sampling}


def _save(folder: Path, kind: str, network: nn.Module, record: Mapping[str, Any]) -> None:
    io.save_tensors(folder / f"{kind}.safetensors", {k: v.contiguous() for k, v in network.state_dict().items()})
    io.atomic_write_json(folder / f"{kind}.json", record)


def _read(source: str | Path, kind: str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    folder = Path(source)
    if (folder / "run.json").is_file():
        folder = folder / "artifact"
    file = folder / f"{kind}.json"
    if not file.is_file():
        raise UserError(f"{source}: {kind}.json is missing; a fit that has not finished has none")
    io.verify_if_described(folder)
    record = io.read_json(file)
    if not isinstance(record, dict) or (record.get("kind"), record.get("version")) != (kind, 1):
        raise UserError(f"{file} is not of kind {kind} in version 1")
    try:
        state, _ = io.load_tensors(folder / f"{kind}.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {kind}.safetensors") from error
    return folder, record, state


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """A record that does not build a network is the fault of its file."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} does not describe a network that is known: {error}") from error


def _load(network: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    check_state_dict(state, network.state_dict(), str(folder))
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
