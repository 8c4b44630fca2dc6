"""The Inception v3 network of the Fréchet Inception Distance, without weights.

Szegedy et al. 2016 (https://arxiv.org/abs/1512.00567, section 6), in the variant of the TensorFlow graph of 2015-12-05
that Heusel et al. 2017 used: 1008 outputs, average pooling that leaves the padding out, and a maximum pool in the last
block. Module names are those of the weights published as ``pt_inception-2015-12-05``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation (eps 0.001), ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    """35×35 grid: 1×1, 5×5, double 3×3 and pooled branches."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 64)
        self.branch5x5_1 = ConvNorm(channels, 48)
        self.branch5x5_2 = ConvNorm(48, 64, 5)
        self.branch3x3dbl_1 = ConvNorm(channels, 64)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3)
        self.branch_pool = ConvNorm(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))], dim=1
        )


class _BlockB(nn.Module):
    """35×35 to 17×17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(channels, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = ConvNorm(channels, 64)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class _BlockC(nn.Module):
    """17×17 grid with 7×7 convolutions factorised into 1×7 and 7×1."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(channels, 192)
        self.branch7x7_1 = ConvNorm(channels, middle)
        self.branch7x7_2 = ConvNorm(middle, middle, (1, 7))
        self.branch7x7_3 = ConvNorm(middle, 192, (7, 1))
        self.branch7x7dbl_1 = ConvNorm(channels, middle)
        self.branch7x7dbl_2 = ConvNorm(middle, middle, (7, 1))
        self.branch7x7dbl_3 = ConvNorm(middle, middle, (1, 7))
        self.branch7x7dbl_4 = ConvNorm(middle, middle, (7, 1))
        self.branch7x7dbl_5 = ConvNorm(middle, 192, (1, 7))
        self.branch_pool = ConvNorm(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], dim=1)


class _BlockD(nn.Module):
    """17×17 to 8×8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(channels, 192)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = ConvNorm(channels, 192)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class _BlockE(nn.Module):
    """8×8 grid with branches that split; the last one of the network pools by maximum."""

    def __init__(self, channels: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvNorm(channels, 320)
        self.branch3x3_1 = ConvNorm(channels, 384)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvNorm(channels, 448)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1))
        self.branch_pool = ConvNorm(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(branches, dim=1)


class InceptionV3(nn.Module):
    """Images [B, 3, 299, 299] in [-1, 1] to pooled features [B, 2048]; ``fc`` gives 1008 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, same=False)
        self.Mixed_5b = _BlockA(192, pooled=32)
        self.Mixed_5c = _BlockA(256, pooled=64)
        self.Mixed_5d = _BlockA(288, pooled=64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, middle=128)
        self.Mixed_6c = _BlockC(768, middle=160)
        self.Mixed_6d = _BlockC(768, middle=160)
        self.Mixed_6e = _BlockC(768, middle=192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, max_pool=False)
        self.Mixed_7c = _BlockE(2048, max_pool=True)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # [B, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [B, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        return x.mean(dim=(2, 3))


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear resize [B, C, H, W] to [B, C, size, size] by TensorFlow 1.x's rule: source = target · H / size.

    The sampling points are not centred on the pixels (no half-pixel offset) and nothing is smoothed before shrinking.
    The published FID numbers were made with it; other resizes shift the score by whole points.
    """

    def weights(length: int) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.arange(size, dtype=torch.float64, device=images.device) * (length / size)
        low = source.floor()
        high = (low + 1).clamp(max=length - 1)
        return low.long(), high.long(), (source - low).to(images.dtype)

    top, bottom, fraction = weights(images.shape[2])
    rows = images[:, :, top] + (images[:, :, bottom] - images[:, :, top]) * fraction[:, None]  # [B, C, size, W]
    left, right, fraction = weights(images.shape[3])
    return rows[..., left] + (rows[..., right] - rows[..., left]) * fraction
