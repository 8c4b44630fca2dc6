"""The students of Distilled Decoding (Liu et al. 2024, arXiv 2412.17153): all tokens of an image in one pass.

A student reads one vector for each token, pure noise or the code of a token that is decided, and says at each place
what the token of that place will be: once as logits of the codes, once as a vector. Its transformer is the teacher's.
A place sees itself and the groups before its own: given the tokens before it, the teacher's token depends on its own
noise alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.nets.autoregressive import AutoregressiveModel
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer
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


class RasterStudent(nn.Module):
    """The student of a class-conditional LlamaGen: groups are single tokens in raster order.

    Args:
        code_dim: C.
        transformer: arguments of the teacher's `LlamaGenTransformer`; the embedding of token indices becomes a linear
            layer on vectors.

    Raises:
        ValueError: a text-conditional teacher, or as `LlamaGenTransformer`.
    """

    def __init__(self, code_dim: int, transformer: Mapping[str, Any]) -> None:
        super().__init__()
        backbone = LlamaGenTransformer(**transformer)
        if backbone.is_text_conditional:
            raise ValueError("text_dim must be null: students of text-conditional networks are not known")
        width = backbone.head.in_features
        self.config = {"class": type(self).__name__, "code_dim": code_dim, "transformer": dict(transformer)}
        self.group_sizes = (1,) * backbone.grid_size**2
        self.num_classes, self.code_dim = backbone.num_classes, code_dim
        self.backbone = backbone
        backbone.token_embedding = nn.Linear(code_dim, width)  # type: ignore[assignment]
        self.state_embedding = nn.Embedding(2, width)
        nn.init.normal_(self.state_embedding.weight, std=0.02)
        self.vector_head = VectorHead(width, code_dim)

    def forward(self, vectors: Tensor, is_data: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What each place will hold in the end.

        Args:
            vectors: [B, N, C], codes of tokens or noise.
            is_data: [B, N] bool, where they are codes.
            labels: [B] int64.

        Returns:
            Logits [B, N, V] and vectors [B, N, C], both float32.
        """
        backbone = self.backbone
        condition = backbone.class_embedding(labels)
        x = torch.cat((condition[:, None], backbone.token_embedding(vectors)), dim=1)
        x = backbone.dropout(x + self.state_embedding(_with_class(is_data)))
        for layer, block in enumerate(backbone.blocks):
            x = block(x, backbone.rotation, None, None, layer)
        x = x[:, 1:]
        return backbone.head(backbone.norm(x)).float(), self.vector_head(x, condition)

    @torch.no_grad()
    def take_from(self, teacher: LlamaGen) -> None:
        """The teacher's weights. The layer on vectors is the best linear guess of the embeddings of their indices.

        Raises:
            ValueError: the teacher has other sizes.
        """
        state = _fitting(self.backbone, teacher.transformer, ("token_embedding.weight", "token_embedding.bias"))
        self.backbone.load_state_dict(state, strict=False)
        codes = functional.pad(teacher.codebook.double(), (0, 1), value=1.0)
        wanted = teacher.transformer.token_embedding.weight.double()
        # the pseudo-inverse serves where codes span less than C dimensions too
        fitted = torch.linalg.pinv(codes) @ wanted
        projection = self.backbone.token_embedding
        projection.weight.copy_(fitted[:-1].T)
        projection.bias.copy_(fitted[-1])  # type: ignore[operator]


class ScaleStudent(nn.Module):
    """The student of VAR: groups are scales, and the places of one scale do not see each other.

    Noise and data are told apart at the input and, by a linear layer each, inside of every block and before the heads.

    Args:
        code_dim: C.
        transformer: arguments of the teacher's `VARTransformer`; one more scale, the class, comes before its own.

    Raises:
        ValueError: the first scale has more than one token, or as `VARTransformer`.
    """

    readable: Tensor

    def __init__(self, code_dim: int, transformer: Mapping[str, Any]) -> None:
        super().__init__()
        scales = tuple(transformer["scales"])
        if scales[0] != 1:
            raise ValueError(f"scales = {list(scales)} must begin with 1")
        backbone = VARTransformer(**{**transformer, "scales": (1, *scales)})
        width = backbone.head.in_features
        plain = {**transformer, "scales": list(scales)}
        self.config = {"class": type(self).__name__, "code_dim": code_dim, "transformer": plain}
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

    def forward(self, vectors: Tensor, is_data: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `RasterStudent.forward`."""
        backbone = self.backbone
        condition = backbone.class_embedding(labels)
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


Student = RasterStudent | ScaleStudent


def student_of(teacher: AutoregressiveModel) -> Student:
    """A student of the teacher's architecture, with random weights.

    Raises:
        ValueError: a teacher of another kind.
    """
    code_dim = teacher.codebook.shape[1]
    match teacher:
        case LlamaGen():
            return RasterStudent(code_dim, teacher.transformer.config)
        case VAR():
            return ScaleStudent(code_dim, teacher.transformer.config)
    raise ValueError(f"teacher of class {type(teacher).__name__} must be a LlamaGen or a VAR")


def take_from(student: Student, teacher: AutoregressiveModel) -> None:
    """Give a student of `student_of` the teacher's weights.

    Raises:
        ValueError: the teacher is of another kind, or has other sizes.
    """
    match student, teacher:
        case (RasterStudent(), LlamaGen()) | (ScaleStudent(), VAR()):
            student.take_from(teacher)  # type: ignore[arg-type]
        case _:
            raise ValueError(f"a {type(student).__name__} cannot begin as a {type(teacher).__name__}")


def _with_class(is_data: Tensor) -> Tensor:
    """Indices of the state embedding, [B, 1 + N]: noise 0, data 1; the class counts as data."""
    return functional.pad(is_data.long(), (1, 0), value=1)


def _fitting(own: nn.Module, given: nn.Module, new: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of `given` but those named in `new`; ValueError if others are missing or of other shapes."""
    found, wanted = given.state_dict(), own.state_dict()
    for name in wanted.keys() - set(new):
        if name not in found or found[name].shape != wanted[name].shape:
            shape = list(found[name].shape) if name in found else "missing"
            raise ValueError(f"{name} of the teacher is {shape}, not {list(wanted[name].shape)}")
    return {name: value for name, value in found.items() if name in wanted and name not in new}
