"""Multi-scale residual quantisation of VAR (Tian et al. 2024, arXiv 2404.02905, section 3.2, algorithms 1 and 2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.nets.configuration import constructor_arguments
from genlight.nets.vq import Quantized, VectorQuantizer, nearest_codes, to_grid, to_rows


class ResidualQuantizer(VectorQuantizer):
    """Token maps from coarse to fine, each the codes of what the maps before it leave over.

    The features are the sum over scales of φ(upsampled codes), where φ(h) = (1 - r)·h + r·conv(h) mends what upsampling
    blurs. Scales share a few φ, chosen by where the scale lies between the first (0) and the last (1).

    Args:
        num_codes: V, rows of the codebook.
        code_dim: C, length of a row.
        scales: height and width of the token maps in the order of decoding; the last is the size of the features.
        num_phi: how many φ there are: 1 shares one, ``len(scales)`` none.
        phi_ratio: r.
        commitment_weight: as in `VectorQuantizer`.

    Raises:
        ValueError: no scales, or not increasing from at least 1; `num_phi` below 1; `phi_ratio` outside [0, 1]; or as
            `VectorQuantizer`.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        scales: Sequence[int],
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__(num_codes, code_dim, normalize=False, commitment_weight=commitment_weight)
        self.config = constructor_arguments(locals())
        self.scales = tuple(int(scale) for scale in scales)
        if not self.scales or any(a >= b for a, b in itertools.pairwise((0, *self.scales))):
            raise ValueError(f"scales = {list(self.scales)} must increase from at least 1")
        if num_phi < 1:
            raise ValueError(f"num_phi = {num_phi} must be at least 1")
        if not 0 <= phi_ratio <= 1:
            raise ValueError(f"phi_ratio = {phi_ratio} must be in [0, 1]")
        self.phi_ratio = phi_ratio
        self.phi = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(num_phi))
        self.phi_of_scale = _phi_of_scale(len(self.scales), num_phi)
        for number, phi in enumerate(self.phi):
            phi.requires_grad_(number in self.phi_of_scale)  # several processes would wait for the gradients of others

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of tokens of each scale."""
        return tuple(scale * scale for scale in self.scales)

    def add_scale(self, features: Tensor, vectors: Tensor, index: int) -> Tensor:
        """Features with one more scale: [B, C, S, S] and the scale's vectors [B, s², C] to [B, C, S, S]."""
        grid = to_grid(vectors)
        if grid.shape[-1] != self.scales[-1]:
            grid = functional.interpolate(grid, size=(self.scales[-1],) * 2, mode="bicubic")
        refined: Tensor = self.phi[self.phi_of_scale[index]](grid)
        return features + (1 - self.phi_ratio) * grid + self.phi_ratio * refined

    def scale_inputs(self, features: Tensor, index: int) -> Tensor:
        """What the transformer reads for a scale, the features so far in its size: [B, C, S, S] to [B, s², C]."""
        size = self.scales[index]
        return to_rows(functional.interpolate(features, size=(size, size), mode="area"))

    def no_features(self, batch_size: int) -> Tensor:
        """[B, C, S, S] of zeros, the features before the first scale."""
        weight: Tensor = self.embedding.weight
        return weight.new_zeros(batch_size, self.code_dim, self.scales[-1], self.scales[-1])

    def features_of(self, vectors: Tensor) -> Tensor:
        """Features of the first scales: [B, N, C], where N ends with a scale, to [B, C, S, S].

        Raises:
            ValueError: N is not the size of the first k scales for any k.
        """
        features = self.no_features(len(vectors))
        for index, part in self._by_scale(vectors):
            features = self.add_scale(features, part, index)
        return features

    def next_scale_inputs(self, vectors: Tensor) -> Tensor:
        """Inputs of scales 2 to k + 1, or K if all are given, from the vectors of the first k: [B, N, C] to [B, M, C].

        Raises:
            ValueError: as `features_of`.
        """
        features = self.no_features(len(vectors))
        inputs = [vectors[:, :0]]
        for index, part in self._by_scale(vectors):
            if index + 1 < len(self.scales):
                features = self.add_scale(features, part, index)
                inputs.append(self.scale_inputs(features, index + 1))
        return torch.cat(inputs, dim=1)

    def forward(self, features: Tensor) -> Quantized:
        """Quantise features [B, C, S, S]; the loss is the mean over scales of the loss of the sum so far.

        Raises:
            ValueError: features of another size than the last scale.
        """
        if features.shape[-2:] != (self.scales[-1], self.scales[-1]):
            raise ValueError(f"features {list(features.shape)} must be as large as the last scale, {self.scales[-1]}")
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            total = torch.zeros_like(features)
            loss = features.new_zeros(())
            tokens, vectors = [], []
            for index in range(len(self.scales)):
                vectors.append(self.scale_inputs(features.detach() - total.detach(), index))
                tokens.append(nearest_codes(vectors[-1].flatten(0, 1), self.codebook).view(len(features), -1))
                total = self.add_scale(total, self.lookup(tokens[-1]), index)
                loss = loss + functional.mse_loss(total, features.detach())
                loss = loss + self.commitment_weight * functional.mse_loss(features, total.detach())
            straight_through = features + (total - features).detach()
            loss = loss / len(self.scales)
            return Quantized(straight_through, torch.cat(tokens, dim=1), torch.cat(vectors, dim=1), loss)

    def _by_scale(self, vectors: Tensor) -> Iterator[tuple[int, Tensor]]:
        ends = list(itertools.accumulate(self.group_sizes, initial=0))
        if vectors.shape[1] not in ends:
            raise ValueError(f"vectors of {vectors.shape[1]} tokens must end with one of the scales {self.scales}")
        for index, (start, end) in enumerate(itertools.pairwise(ends[: ends.index(vectors.shape[1]) + 1])):
            yield index, vectors[:, start:end]


def _phi_of_scale(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """The φ of each scale, the nearest on a line from 0 to 1.

    Two of ten scales lie half-way between two of four φ, and the rounding of float64 decides: the published weights are
    trained with the outcome of exactly this arithmetic.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    places = [index / max(num_scales - 1, 1) for index in range(num_scales)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)
