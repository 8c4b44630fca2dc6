"""What is kept of a set of real images: sums of their features, and every feature vector where a metric needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genlight.metrics.features import FeatureExtractor


@dataclass(frozen=True)
class ReferenceStatistics:
    """Sufficient statistics of real images for a Fréchet distance, and optionally every feature vector.

    Attributes:
        sum: Σ f, float64 [D].
        outer_sum: Σ f fᵀ, float64 [D, D].
        num_samples: number of images.
        extractor_fingerprint: the features they were measured in.
        data_fingerprint: the data, transform and split they come from.
        split: "train" or "test".
        features: every feature vector [N, D] in the order of the loader, or None.
    """

    sum: Tensor
    outer_sum: Tensor
    num_samples: int
    extractor_fingerprint: str
    data_fingerprint: str
    split: str
    features: Tensor | None = None

    def __post_init__(self) -> None:
        size = self.sum.shape[0] if self.sum.ndim == 1 else -1
        if self.outer_sum.shape != (size, size):
            shapes = f"{list(self.sum.shape)} and {list(self.outer_sum.shape)}"
            raise ValueError(f"statistics have shapes {shapes}, not [D] and [D, D]")
        if self.sum.dtype != torch.float64 or self.outer_sum.dtype != torch.float64:
            raise TypeError(f"statistics must be float64, got {self.sum.dtype} and {self.outer_sum.dtype}")
        if self.num_samples < 2:
            raise ValueError(f"statistics need at least two images, got {self.num_samples}")
        if self.features is not None and self.features.shape != (self.num_samples, size):
            raise ValueError(f"statistics of {self.num_samples} images hold features {list(self.features.shape)}")
        if not bool(torch.isfinite(self.sum).all() and torch.isfinite(self.outer_sum).all()):
            raise ValueError("statistics are not finite")


def collect_statistics(
    batches: Iterable[Mapping[str, Any]],
    extractor: FeatureExtractor,
    *,
    data_fingerprint: str,
    split: str,
    keep_features: bool = False,
    device: torch.device | str = "cpu",
) -> ReferenceStatistics:
    """Statistics of all images of a loader, summed in float64.

    Raises:
        ValueError: fewer than two images.
    """
    extractor.setup()
    size = extractor.num_features
    total = torch.zeros(size, dtype=torch.float64, device=device)
    outer = torch.zeros(size, size, dtype=torch.float64, device=device)
    count = 0
    kept: list[Tensor] = []
    for features, _ in iterate_features(batches, extractor, device):
        total += features.double().sum(dim=0)
        outer += features.double().T @ features.double()
        count += len(features)
        if keep_features:
            kept.append(features.cpu())
    every = torch.cat(kept) if kept else None
    return ReferenceStatistics(total.cpu(), outer.cpu(), count, extractor.fingerprint, data_fingerprint, split, every)


@torch.no_grad()
def iterate_features(
    batches: Iterable[Mapping[str, Any]], extractor: FeatureExtractor, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, D] and logits [B, K] of each batch {"image": [B, C, H, W]}."""
    extractor.setup()
    extractor.to(device)
    for batch in batches:
        yield extractor.features_and_logits(batch["image"].to(device))
