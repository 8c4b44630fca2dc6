"""Common random numbers: the noise and label of evaluation sample i depend on the seed, the draw and i only."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genlight.data.sampling import DRAWS, generator


def check_draw(draw: str) -> str:
    if draw not in DRAWS:
        raise ValueError(f"data.draw={draw!r} is not one of {', '.join(DRAWS)}")
    return draw


class EvaluationNoise(Dataset[dict[str, Tensor]]):
    """Starting noise of `num_samples` generated samples, equal for any batch size, device and number of ranks.

    Sample `i` of a draw comes from its own stream, `SeedSequence(seed, spawn_key=(draw, i))`, drawn on the CPU. The
    draws "search", "select" and "report" never share a stream. Labels run 0, 1, …, num_classes - 1, 0, …, so that
    any prefix is balanced to within one sample.

    Args:
        noise_shape: shape of one sample's noise, (C, H, W) in pixel or latent space.

    Raises:
        ValueError: unknown draw.
    """

    def __init__(
        self, num_samples: int, noise_shape: Sequence[int], num_classes: int | None, seed: int, draw: str
    ) -> None:
        self.num_samples = num_samples
        self.noise_shape = tuple(noise_shape)
        self.num_classes = num_classes
        self.seed = seed
        self.draw = check_draw(draw)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch: index int64 [B], noise float32 [B, *noise_shape], label int64 [B] if there are classes."""
        noise = np.empty((len(indices), *self.noise_shape), np.float32)
        for row, sample in enumerate(indices):
            rng = generator(self.seed, DRAWS[self.draw], int(sample))
            rng.standard_normal(self.noise_shape, dtype=np.float32, out=noise[row])
        index = torch.as_tensor(np.asarray(indices, np.int64))
        batch = {"index": index, "noise": torch.from_numpy(noise)}
        if self.num_classes is not None:
            batch["label"] = index % self.num_classes
        return batch
