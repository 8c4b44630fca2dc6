"""How near token sequences are to those of an autoregressive network: likelihood, agreement, pairs of neighbours."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from genlight.nets.autoregressive import AutoregressiveModel, SamplingSettings, parallel_probabilities


@torch.no_grad()
def negative_log_likelihood(
    model: AutoregressiveModel, tokens: Tensor, condition: Tensor, settings: SamplingSettings
) -> Tensor:
    """-log p of each row by the network, nats per token, [B].

    Guidance and temperature are those of `settings`; nothing is filtered, since what a filter drops has no likelihood.
    The network computes in its own precision, whatever autocast says.

    Args:
        tokens: [B, N].
        condition: B rows.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        probabilities = parallel_probabilities(model, tokens, condition, replace(settings, top_k=0, top_p=1.0))
    chosen = probabilities.gather(-1, tokens[..., None])[..., 0].double()
    return -chosen.clamp(min=torch.finfo(probabilities.dtype).tiny).log().mean(-1)


def agreement(tokens: Tensor, wanted: Tensor, part: float = 1.0) -> float:
    """Share of equal tokens in the first part of two sequences [M, N]."""
    end = max(1, round(part * tokens.shape[1]))
    return float((tokens[:, :end] == wanted[:, :end]).double().mean())


def bigram_distance(first: Tensor, second: Tensor, grid_size: int) -> float:
    """Total variation between the frequencies of pairs of codes that stand side by side, from 0 to 1.

    Two samples of one distribution have a distance too, which falls with their size.

    Args:
        first, second: tokens [M, N] and [M', N]; the last grid_size² of a row are a grid in raster order.
    """
    keys = [_pairs(tokens, grid_size) for tokens in (first, second)]
    _, place = torch.cat(keys).unique(return_inverse=True)
    size = int(place.max()) + 1
    frequencies = [
        torch.bincount(part, minlength=size).double() / len(part) for part in place.split([len(key) for key in keys])
    ]
    return float((frequencies[0] - frequencies[1]).abs().sum() / 2)


def grid_size_of(group_sizes: tuple[int, ...]) -> int:
    """Height and width of the last grid of tokens: of the last scale, or of all tokens one by one."""
    return math.isqrt(group_sizes[-1] if group_sizes[-1] > 1 else sum(group_sizes))


def _pairs(tokens: Tensor, grid_size: int) -> Tensor:
    grid = tokens[:, -(grid_size**2) :].reshape(-1, grid_size, grid_size).long()
    return (grid[:, :, :-1] * 2**31 + grid[:, :, 1:]).flatten()
