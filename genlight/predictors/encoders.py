"""Encoders of candidates that are sequences of steps: [batch, steps, features] with a mask to one vector each.

After the predictor of OMS-DPM (Liu et al. 2023, arXiv 2306.08860), which S³ (arXiv 2312.07243) builds on: an embedding
per step, an LSTM, its outputs averaged over the steps. Padding changes nothing.
"""

import math

import torch
from torch import Tensor, nn


class StepEmbedding(nn.Module):
    """Features of each step to `width` numbers: [batch, steps, features] → [batch, steps, width].

    The features are standardised by the mean and deviation they had in training (`set_statistics`).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    def set_statistics(self, features: Tensor, mask: Tensor) -> None:
        """Take mean and deviation from the real steps of `features`; a feature that never changes becomes 0."""
        real = features[mask]
        self.mean.copy_(real.mean(dim=0))
        deviation = real.std(dim=0, correction=0)
        self.std.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.layers((features - self.mean) / self.std)
        return embedded


class LSTMEncoder(nn.Module):
    """One-layer LSTM; its outputs are averaged over the steps: [batch, steps, width] → [batch, hidden]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True)

    def forward(self, steps: Tensor, mask: Tensor) -> Tensor:
        outputs, _ = self.lstm(steps)
        return masked_mean(outputs, mask)


class TransformerEncoder(nn.Module):
    """Small pre-norm transformer with sinusoidal positions: [batch, steps, width] → [batch, hidden]."""

    def __init__(self, width: int, hidden: int, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        if hidden % num_heads:
            raise ValueError(f"predictor.hidden = {hidden} must be a multiple of the {num_heads} attention heads")
        layer = nn.TransformerEncoderLayer(
            hidden, num_heads, 2 * hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.project = nn.Linear(width, hidden)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(hidden), enable_nested_tensor=False)

    def forward(self, steps: Tensor, mask: Tensor) -> Tensor:
        hidden = self.project(steps)
        hidden = hidden + sinusoids(hidden.shape[1], hidden.shape[2]).to(hidden)
        return masked_mean(self.layers(hidden, src_key_padding_mask=~mask), mask)


class SequenceRanker(nn.Module):
    """Step embedding, encoder and head: one score per candidate, [batch].

    Args:
        num_features: features of one step.
        encoder: "lstm" or "transformer".
        width: of the step embedding.
        hidden: of the encoder.
        head_width: of the two hidden layers of the head.
    """

    def __init__(self, num_features: int, encoder: str, width: int, hidden: int, head_width: int) -> None:
        super().__init__()
        if encoder not in ("lstm", "transformer"):
            raise ValueError(f"predictor.encoder = {encoder!r} must be 'lstm' or 'transformer'")
        self.embedding = StepEmbedding(num_features, width)
        self.encoder = LSTMEncoder(width, hidden) if encoder == "lstm" else TransformerEncoder(width, hidden)
        self.head = nn.Sequential(
            nn.Linear(hidden, head_width),
            nn.ReLU(),
            nn.Linear(head_width, head_width),
            nn.ReLU(),
            nn.Linear(head_width, 1),
        )

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        score: Tensor = self.head(self.encoder(self.embedding(features), mask))
        return score.squeeze(-1)


def masked_mean(outputs: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real steps: [batch, steps, width] → [batch, width]."""
    weights = mask.to(outputs).unsqueeze(-1)
    return (outputs * weights).sum(dim=1) / weights.sum(dim=1)


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines and cosines of geometric frequencies, float32 [length, width] (Vaswani et al. 2017, 3.5)."""
    half = (width + 1) // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
