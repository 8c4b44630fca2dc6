"""A pool whose true score is known: a sum over the tokens, of which each cheap score sees a part."""

import torch
from torch import Tensor

from genlight.predictors.pool import Pool

VOCABULARY = (4, 4, 4, 4, 4)
WEIGHTS = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5])


def toy(experts: int = 3, count: int = 300, seed: int = 0) -> tuple[Pool, Tensor]:
    """A pool with `experts` cheap scores, and the true score of each candidate."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, (count, 5), generator=generator)
    truth = (tokens * WEIGHTS).sum(1)
    masks = (torch.rand(5, experts, generator=generator) < 0.6).float()
    scores = (tokens * WEIGHTS) @ masks + torch.randn(count, experts, generator=generator)
    return Pool(tokens, VOCABULARY, scores, tuple(f"score{n}" for n in range(experts))), truth
