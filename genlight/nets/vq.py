"""Vector quantisation (van den Oord et al. 2017, arXiv 1711.00937): features to the nearest rows of a codebook."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.nets.configuration import constructor_arguments


def nearest_codes(vectors: Tensor, codebook: Tensor, chunk_size: int = 1024) -> Tensor:
    """Index of the nearest row of the codebook by Euclidean distance; of equally near rows the first.

    Distances are compared in at least float32, whatever autocast says, for `chunk_size` codes at a time: memory is
    N × chunk_size numbers, not N × V.

    Args:
        vectors: [N, C].
        codebook: [V, C].
        chunk_size: codes compared at a time.

    Returns:
        [N] int64.

    Raises:
        ValueError: `chunk_size` below 1, or rows of different lengths.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} must be at least 1")
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1]:
        raise ValueError(f"vectors {list(vectors.shape)} and codebook {list(codebook.shape)} must be [N, C] and [V, C]")
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    vectors, codebook = vectors.detach().to(dtype), codebook.detach().to(dtype)
    best = vectors.new_full((len(vectors),), torch.inf)
    index = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
    with torch.autocast(vectors.device.type, enabled=False):
        for start in range(0, len(codebook), chunk_size):
            codes = codebook[start : start + chunk_size]
            # half the squared distance, less what all codes share: |x|²/2
            distance, where = torch.addmm(codes.square().sum(1) / 2, vectors, codes.T, alpha=-1).min(dim=1)
            index = torch.where(distance < best, where + start, index)
            best = torch.minimum(best, distance)
    return index


@dataclass(frozen=True)
class Quantized:
    """Quantised features.

    Attributes:
        features: [B, C, H, W], the sums of codes; gradients pass to what was quantised as if nothing had happened.
        tokens: [B, N] int64, indices of codes.
        vectors: [B, N, C], what each token was chosen for.
        loss: scalar, codebook term plus weighted commitment term; it alone trains the codebook.
    """

    features: Tensor
    tokens: Tensor
    vectors: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """One code for each position of a square grid, in raster order.

    Args:
        num_codes: V, rows of the codebook.
        code_dim: C, length of a row.
        normalize: compare and use rows and features of length one (ViT-VQGAN, arXiv 2110.04627, section 3.2; LlamaGen).
        commitment_weight: β of the term that pulls features to their codes (arXiv 1711.00937, equation 3).

    Raises:
        ValueError: a size below 1, or a negative weight.
    """

    def __init__(self, num_codes: int, code_dim: int, normalize: bool = True, commitment_weight: float = 0.25) -> None:
        super().__init__()
        self.config = constructor_arguments(locals())
        for name, value in (("num_codes", num_codes), ("code_dim", code_dim)):
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        if not 0 <= commitment_weight < math.inf:
            raise ValueError(f"commitment_weight = {commitment_weight} must be at least 0")
        self.num_codes, self.code_dim = num_codes, code_dim
        self.normalize, self.commitment_weight = normalize, commitment_weight
        self.embedding = nn.Embedding(num_codes, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if normalize:
            # else a step of the optimiser would be long beside such short rows
            with torch.no_grad():
                self.embedding.weight.copy_(self.codebook)

    @property
    def codebook(self) -> Tensor:
        """[V, C], the rows as they are used: of length one with `normalize`."""
        weight: Tensor = self.embedding.weight
        return functional.normalize(weight, dim=-1) if self.normalize else weight

    def lookup(self, tokens: Tensor) -> Tensor:
        """Codes of tokens: [...] to [..., C]."""
        return functional.embedding(tokens, self.codebook)

    def features_of(self, vectors: Tensor) -> Tensor:
        """Features for the decoder of one vector for each token: [B, N, C] to [B, C, √N, √N].

        Raises:
            ValueError: N is no square number.
        """
        return to_grid(vectors)

    def forward(self, features: Tensor) -> Quantized:
        """Quantise features [B, C, H, W]. The loss is a mean over all numbers."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if self.normalize:
                features = functional.normalize(features, dim=1)
            vectors = to_rows(features.detach())
            tokens = nearest_codes(vectors.flatten(0, 1), self.codebook).view(len(features), -1)
            codes = self.lookup(tokens).transpose(1, 2).reshape(features.shape)
            codebook_loss = functional.mse_loss(codes, features.detach())
            commitment = functional.mse_loss(features, codes.detach())
            loss = codebook_loss + self.commitment_weight * commitment
            return Quantized(features + (codes - features).detach(), tokens, vectors, loss)


def to_grid(vectors: Tensor) -> Tensor:
    """Raster order to a square grid: [B, N, C] to [B, C, √N, √N]; ValueError if N is no square number."""
    size = math.isqrt(vectors.shape[1])
    if size * size != vectors.shape[1]:
        raise ValueError(f"vectors of {vectors.shape[1]} tokens must fill a square grid")
    return vectors.transpose(1, 2).reshape(len(vectors), -1, size, size)


def to_rows(features: Tensor) -> Tensor:
    """A grid to raster order: [B, C, H, W] to [B, H·W, C]."""
    return features.flatten(2).transpose(1, 2)
