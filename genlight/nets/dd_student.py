"""The students of Distilled Decoding (Liu et al. 2024, arXiv 2412.17153): all tokens of an image in one pass.

A student reads one vector for each token, pure noise or the code of a token that is decided, and says at each place
what the token of that place will be: once as logits of the codes, once as a vector. Its transformer is the teacher's.
A place sees itself and the groups before its own: given the tokens before it, the teacher's token depends on its own
noise alone. With a `guidance_range` it is told the guidance scale too, which the teacher's tokens then depend on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from genlight.nets.autoregressive import AutoregressiveModel, check_guidance_range
from genlight.nets.captions import texts_of
from genlight.nets.imagegpt import ImageGPT, imagegpt_options
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer, attention_mask
from genlight.nets.var import VAR, VARTransformer


class VectorHead(nn.Module):
    """A vector for each place, normalised and then scaled and shifted by the class (PixArt-α, arXiv 2310.00426)."""

    def __init__(self, width: int, code_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.shift_scale = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, code_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, N, width] and class embeddings [B, width] to [B, N, C] float32."""
        shift, scale = (self.shift_scale + condition[:, None]).chunk(2, dim=1)
        vectors: Tensor = self.linear(self.norm(x) * (1 + scale) + shift).float()
        return vectors


class GuidanceEmbedding(nn.Module):
    """The guidance scale as a vector that is added to the class, as in guided distillation (Meng et al. 2022, arXiv
    2210.03142, section 3.1): Fourier features of its place in the range, and two linear layers.

    Args:
        width: of the class embedding.
        guidance_range: lowest and highest scale.

    Raises:
        ValueError: not 1 ≤ lowest ≤ highest.
    """

    frequencies: Tensor

    def __init__(self, width: int, guidance_range: Sequence[float]) -> None:
        super().__init__()
        self.low, self.high = check_guidance_range(guidance_range)
        # from half a turn over the whole range on, so that no two scales look the same
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(4), persistent=False)
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, width)
        # a new student does for every scale what its teacher's weights do without
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, guidance: Tensor) -> Tensor:
        """Scales [B] to [B, width]."""
        place = (guidance - self.low) / max(self.high - self.low, 1e-6)
        angles = place[:, None] * self.frequencies
        features = torch.cat((angles.cos(), angles.sin()), dim=1).to(self.first.weight.dtype)
        embedded: Tensor = self.last(functional.silu(self.first(features)))
        return embedded


class RasterStudent(nn.Module):
    """The student of a LlamaGen: groups are single tokens in raster order.

    That of a text-conditional one reads the features of the text before all tokens, and their mean is what scales and
    shifts its vectors.

    Args:
        code_dim: C.
        transformer: arguments of the teacher's `LlamaGenTransformer`; the embedding of token indices becomes a linear
            layer on vectors.
        guidance_range: the guidance scales that it is told, lowest and highest; None: it is told none.

    Raises:
        ValueError: a range that is none, or as `LlamaGenTransformer`.
    """

    def __init__(
        self, code_dim: int, transformer: Mapping[str, Any], guidance_range: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        backbone = LlamaGenTransformer(**transformer)
        width = backbone.head.in_features
        self.config = _config(self, code_dim, transformer, guidance_range)
        self.group_sizes = (1,) * backbone.grid_size**2
        self.num_classes, self.code_dim = backbone.num_classes, code_dim
        self.backbone = backbone
        backbone.token_embedding = nn.Linear(code_dim, width)  # type: ignore[assignment]
        self.state_embedding = nn.Embedding(2, width)
        nn.init.normal_(self.state_embedding.weight, std=0.02)
        self.vector_head = VectorHead(width, code_dim)
        self.guidance_embedding = None if guidance_range is None else GuidanceEmbedding(width, guidance_range)

    def forward(
        self, vectors: Tensor, is_data: Tensor, labels: Tensor, guidance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What each place will hold in the end.

        Args:
            vectors: [B, N, C], codes of tokens or noise.
            is_data: [B, N] bool, where they are codes.
            labels: [B] int64; of a text-conditional student texts, [B, text_length, text_dim].
            guidance: [B], the guidance scales, of a student that is told them.

        Returns:
            Logits [B, N, V] and vectors [B, N, C], both float32.

        Raises:
            ValueError: no scales where they are told, or scales where none are.
        """
        backbone = self.backbone
        embeddings, is_text = backbone.embed_condition(labels)
        prefix = _guided(embeddings, self.guidance_embedding, guidance)
        length = prefix.shape[1]
        x = torch.cat((prefix, backbone.token_embedding(vectors)), dim=1)
        x = backbone.dropout(x + self.state_embedding(_with_class(is_data, length)))
        mask = attention_mask(0, x.shape[1], is_text, x.device)
        for layer, block in enumerate(backbone.blocks):
            x = block(x, backbone.rotation, mask, None, layer)
        x = x[:, length:]
        return backbone.head(backbone.norm(x)).float(), self.vector_head(x, _mean(prefix, is_text))

    @torch.no_grad()
    def take_from(self, teacher: LlamaGen) -> None:
        """The teacher's weights. The layer on vectors is the best linear guess of the embeddings of their indices.

        Raises:
            ValueError: the teacher has other sizes.
        """
        state = _fitting(self.backbone, teacher.transformer, ("token_embedding.weight", "token_embedding.bias"))
        self.backbone.load_state_dict(state, strict=False)
        _fit(self.backbone.token_embedding, teacher.codebook, teacher.transformer.token_embedding.weight)


class ImageGPTStudent(nn.Module):
    """The student of an ImageGPT: groups are single pixels in raster order, and there are no classes.

    What stands for the start of an image keeps its place before all pixels, so there is one place more than the teacher
    has, which never reads the last pixel.

    Args:
        code_dim: C.
        transformer: of the teacher's network, as `genlight.nets.imagegpt.imagegpt_options` has it.

    Raises:
        ValueError: as `imagegpt_options`.
    """

    def __init__(self, code_dim: int, transformer: Mapping[str, Any]) -> None:
        super().__init__()
        num_tokens, width = int(transformer["n_positions"]), int(transformer["n_embd"])
        backbone = ImageGPTForCausalImageModeling(ImageGPTConfig(**{**transformer, "n_positions": num_tokens + 1}))
        self.config = _config(self, code_dim, transformer, None)
        self.group_sizes = (1,) * num_tokens
        self.num_classes, self.code_dim = 1, code_dim
        self.backbone = backbone
        # the embedding of colours by number becomes a linear layer on colours
        backbone.transformer.wte = nn.Linear(code_dim, width)  # type: ignore[assignment]
        self.start_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.state_embedding = nn.Embedding(2, width)
        nn.init.normal_(self.state_embedding.weight, std=0.02)
        self.vector_head = VectorHead(width, code_dim)

    def forward(self, vectors: Tensor, is_data: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `RasterStudent.forward`; of the labels only the number counts."""
        network = self.backbone.transformer
        condition = self.start_embedding.expand(len(vectors), -1)
        x = torch.cat((condition[:, None], network.wte(vectors)), dim=1) + self.state_embedding(_with_class(is_data))
        x = network(inputs_embeds=x, use_cache=False).last_hidden_state[:, 1:]
        return self.backbone.lm_head(x).float(), self.vector_head(x, condition)

    @torch.no_grad()
    def take_from(self, teacher: ImageGPT) -> None:
        """The teacher's weights; the new place begins as the last one, the layer on colours as in `RasterStudent`.

        Raises:
            ValueError: the teacher has other sizes.
        """
        colours, places = "transformer.wte", "transformer.wpe.weight"
        state = _fitting(self.backbone, teacher.transformer, (f"{colours}.weight", f"{colours}.bias", places))
        self.backbone.load_state_dict(state, strict=False)
        own, given = self.backbone.transformer, teacher.transformer.transformer
        own.wpe.weight.copy_(torch.cat((given.wpe.weight, given.wpe.weight[-1:])))
        self.start_embedding.copy_(given.wte.weight[-1])
        _fit(own.wte, teacher.codebook, given.wte.weight[:-1])


class ScaleStudent(nn.Module):
    """The student of VAR: groups are scales, and the places of one scale do not see each other.

    Noise and data are told apart at the input and, by a linear layer each, inside of every block and before the heads.

    Args:
        code_dim: C.
        transformer: arguments of the teacher's `VARTransformer`; one more scale, the class, comes before its own.
        guidance_range: as `RasterStudent`.

    Raises:
        ValueError: the first scale has more than one token, a range that is none, or as `VARTransformer`.
    """

    readable: Tensor

    def __init__(
        self, code_dim: int, transformer: Mapping[str, Any], guidance_range: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        scales = tuple(transformer["scales"])
        if scales[0] != 1:
            raise ValueError(f"scales = {list(scales)} must begin with 1")
        backbone = VARTransformer(**{**transformer, "scales": (1, *scales)})
        width = backbone.head.in_features
        self.config = _config(self, code_dim, {**transformer, "scales": list(scales)}, guidance_range)
        self.group_sizes = tuple(scale * scale for scale in scales)
        self.num_classes, self.code_dim = backbone.num_classes, code_dim
        self.backbone = backbone
        self.state_embedding = nn.Embedding(2, width)
        nn.init.normal_(self.state_embedding.weight, std=0.02)
        self.layer_state = nn.ModuleList(nn.Linear(width, width) for _ in range(len(backbone.blocks) + 1))
        for linear in self.layer_state:
            # a new student's blocks do what the teacher's do
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        self.vector_head = VectorHead(width, code_dim)
        scale_of = backbone.scale_of_position
        readable = (scale_of[:, None] > scale_of) | torch.eye(len(scale_of), dtype=torch.bool)
        self.register_buffer("readable", readable, persistent=False)
        self.guidance_embedding = None if guidance_range is None else GuidanceEmbedding(width, guidance_range)

    def forward(
        self, vectors: Tensor, is_data: Tensor, labels: Tensor, guidance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `RasterStudent.forward`."""
        backbone = self.backbone
        condition = _guided(backbone.class_embedding(labels)[:, None], self.guidance_embedding, guidance)[:, 0]
        x = torch.cat((condition[:, None] + backbone.start_embedding, backbone.input_projection(vectors)), dim=1)
        state = self.state_embedding(_with_class(is_data))
        x = x + backbone.scale_embedding(backbone.scale_of_position) + backbone.position_embedding + state
        modulation = condition if backbone.shared_modulation is None else backbone.shared_modulation(condition)
        for layer, block in enumerate(backbone.blocks):
            x = block(x, modulation, self.readable, None, layer, self.layer_state[layer](state))
        x = (x + self.layer_state[-1](state))[:, 1:]
        scale, shift = backbone.head_modulation(condition).unbind(2)
        logits: Tensor = backbone.head(backbone.head_norm(x) * (1 + scale) + shift).float()
        return logits, self.vector_head(x, condition)

    @torch.no_grad()
    def take_from(self, teacher: VAR) -> None:
        """The teacher's weights. The class keeps the first scale's place, the scale itself gets a new one beside it.

        Raises:
            ValueError: the teacher has other sizes.
        """
        longer = ("scale_embedding.weight", "position_embedding")
        state = _fitting(self.backbone, teacher.transformer, longer)
        self.backbone.load_state_dict(state, strict=False)
        own, given = self.backbone, teacher.transformer
        own.scale_embedding.weight[0] = given.scale_embedding.weight[0]
        own.scale_embedding.weight[2:] = given.scale_embedding.weight[1:]
        own.position_embedding[:, 0] = given.position_embedding[:, 0]
        own.position_embedding[:, 2:] = given.position_embedding[:, 1:]


Student = RasterStudent | ScaleStudent | ImageGPTStudent


@dataclass(frozen=True)
class ToldStudent:
    """A `genlight.nets.few_step.StudentNetwork` that asks a student of labels alone.

    Attributes:
        student: the network.
        guidance_scale: what it is told for all rows; None: it is told none.
        captions: [P, T, D], the texts that labels are the numbers of; texts are handed on as they are, and so are
            labels where this is None.
    """

    student: Student
    guidance_scale: float | None = None
    captions: Tensor | None = None

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return self.student.group_sizes

    def __call__(self, vectors: Tensor, is_data: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.captions is not None and not labels.is_floating_point():
            labels = texts_of(self.captions, labels)
        scale = self.guidance_scale
        told = () if scale is None else (torch.full((len(vectors),), scale, device=vectors.device),)
        found: tuple[Tensor, Tensor] = self.student(vectors, is_data, labels, *told)
        return found


def student_of(teacher: AutoregressiveModel, guidance_range: Sequence[float] | None = None) -> Student:
    """A student of the teacher's architecture, with random weights; with a range it is told guidance scales.

    Raises:
        ValueError: a teacher of another kind, or guidance scales of a teacher without classes.
    """
    code_dim = teacher.codebook.shape[1]
    match teacher:
        case LlamaGen():
            return RasterStudent(code_dim, teacher.transformer.config, guidance_range)
        case VAR():
            return ScaleStudent(code_dim, teacher.transformer.config, guidance_range)
        case ImageGPT():
            if guidance_range is not None:
                raise ValueError("guidance_range must be null: an ImageGPT knows no classes, so nothing can guide it")
            return ImageGPTStudent(code_dim, imagegpt_options(teacher.transformer.config))
    raise ValueError(f"teacher of class {type(teacher).__name__} must be a LlamaGen, a VAR or an ImageGPT")


def take_from(student: Student, teacher: AutoregressiveModel) -> None:
    """Give a student of `student_of` the teacher's weights.

    Raises:
        ValueError: the teacher is of another kind, or has other sizes.
    """
    match student, teacher:
        case (RasterStudent(), LlamaGen()) | (ScaleStudent(), VAR()) | (ImageGPTStudent(), ImageGPT()):
            student.take_from(teacher)  # type: ignore[arg-type]
        case _:
            raise ValueError(f"a {type(student).__name__} cannot begin as a {type(teacher).__name__}")


def _config(
    student: nn.Module, code_dim: int, transformer: Mapping[str, Any], guidance_range: Sequence[float] | None
) -> dict[str, Any]:
    """What the student was made with; a range only where there is one, so that older students are the same."""
    made = {"class": type(student).__name__, "code_dim": code_dim, "transformer": dict(transformer)}
    return made if guidance_range is None else made | {"guidance_range": list(guidance_range)}


def _guided(condition: Tensor, embedding: GuidanceEmbedding | None, guidance: Tensor | None) -> Tensor:
    """Embeddings of the condition [B, T, width], with that of the guidance scale where the student is told it."""
    if (embedding is None) != (guidance is None):
        raise ValueError(f"guidance must {'not ' if embedding is None else ''}be given: see guidance_range")
    return condition if embedding is None or guidance is None else condition + embedding(guidance)[:, None]


def _mean(prefix: Tensor, is_text: Tensor | None) -> Tensor:
    """The embedding of the class, or the mean over those of a text but its padding: [B, T, width] to [B, width]."""
    if is_text is None:
        return prefix[:, 0]
    weights = is_text[..., None].to(prefix.dtype)
    return (prefix * weights).sum(1) / weights.sum(1).clamp(min=1)


def _fit(layer: nn.Module, codebook: Tensor, embeddings: Tensor) -> None:
    """Make a linear layer on codes [V, C] the best guess of their embeddings [V, width] by index."""
    codes = functional.pad(codebook.double(), (0, 1), value=1.0)
    # the pseudo-inverse serves where codes span less than C dimensions too
    fitted = torch.linalg.pinv(codes) @ embeddings.double()
    assert isinstance(layer, nn.Linear)
    layer.weight.copy_(fitted[:-1].T)
    layer.bias.copy_(fitted[-1])


def _with_class(is_data: Tensor, length: int = 1) -> Tensor:
    """Indices of the state embedding, [B, length + N]: noise 0, data 1; class or text count as data."""
    return functional.pad(is_data.long(), (length, 0), value=1)


def _fitting(own: nn.Module, given: nn.Module, new: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of `given` but those named in `new`; ValueError if others are missing or of other shapes."""
    found, wanted = given.state_dict(), own.state_dict()
    for name in wanted.keys() - set(new):
        if name not in found or found[name].shape != wanted[name].shape:
            shape = list(found[name].shape) if name in found else "missing"
            raise ValueError(f"{name} of the teacher is {shape}, not {list(wanted[name].shape)}")
    return {name: value for name, value in found.items() if name in wanted and name not in new}
