"""A small residual image classifier whose penultimate layer serves as a feature space for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and an identity or 1x1 shortcut (He et al. 2016, section 3.3)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return torch.relu(h + self.shortcut(x))


class Classifier(nn.Module):
    """Residual classifier: a stem, one stage per entry of ``widths`` (halving the image between stages), mean pooling.

    Args:
        image_size: height and width of the square images, in pixels.
        channels: image channels (1 grey, 3 colour).
        num_classes: number of classes, the length of the logits.
        widths: channels of each stage; the last one is the number of features.
        blocks_per_stage: residual blocks in each stage.
        stem_stride: the image is made so many times smaller before the first stage.
        dropout: probability of dropping a feature before the last linear layer, in training only.

    Raises:
        ValueError: a size is not positive, or the image is too small for ``stem_stride`` and to be halved
            ``len(widths) - 1`` times.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int,
        widths: Sequence[int] = (32, 64),
        blocks_per_stage: int = 1,
        dropout: float = 0.0,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        widths = [int(width) for width in widths]
        sizes = {"image_size": image_size, "channels": channels, "num_classes": num_classes}
        sizes |= {
            "blocks_per_stage": blocks_per_stage,
            "stem_stride": stem_stride,
            "len(widths)": len(widths),
            "min(widths)": min(widths, default=0),
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"Classifier {name} must be at least 1, got {value}")
        if image_size < stem_stride * 2 ** (len(widths) - 1):
            raise ValueError(
                f"Classifier image_size {image_size} cannot be divided by stem_stride {stem_stride} and then halved "
                f"{len(widths) - 1} times (widths)"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"Classifier dropout must be in [0, 1), got {dropout}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
            "widths": widths,
            "blocks_per_stage": blocks_per_stage,
            "dropout": dropout,
            "stem_stride": stem_stride,
        }
        self.num_features = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stride=stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        previous = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(previous, width, stride))
                previous = width
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Penultimate features of images in [-1, 1]: [B, C, H, W] to [B, num_features]."""
        features: Tensor = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [-1, 1]: [B, C, H, W] to [B, num_classes]."""
        logits: Tensor = self.head(self.dropout(self.forward_features(x)))
        return logits
