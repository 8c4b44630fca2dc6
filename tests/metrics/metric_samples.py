"""Images and a feature network small enough for hand counts."""

import numpy as np
import torch

from genlight.metrics.features import FeatureExtractor
from genlight.metrics.statistics import ReferenceStatistics, collect_statistics


def images(count, seed=0, shift=0.0):
    """Grey 4×4 images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tanh(torch.randn(count, 1, 4, 4, generator=generator) * 0.5 + shift)


class TinyFeatures(FeatureExtractor):
    """A fixed random projection of the pixels with a ReLU, and four logits."""

    name = "tiny"

    def __init__(self, size=6, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(16, size, generator=generator, dtype=torch.float64), False)
        self.head = torch.nn.Parameter(torch.randn(size, 4, generator=generator, dtype=torch.float64), False)
        self.calls = 0

    def setup(self):
        pass

    @property
    def num_features(self):
        return self.weight.shape[1]

    @property
    def num_logits(self):
        return 4

    @property
    def fingerprint(self):
        return f"tiny{tuple(self.weight.shape)}"

    def features_and_logits(self, images):
        self.calls += 1
        features = torch.relu(images.double().flatten(1) @ self.weight + 0.5)
        return features, features @ self.head


def statistics_of(real, extractor, keep=True, batch_size=64):
    batches = [{"image": batch} for batch in real.split(batch_size)]
    return collect_statistics(batches, extractor, data_fingerprint="d", split="test", keep_features=keep)


def gaussian_statistics(mean, deviation, extractor, count=1000):
    """Statistics whose unbiased moments are exactly those given."""
    mean, deviation = np.asarray(mean), np.asarray(deviation)
    outer = np.diag(deviation**2) * (count - 1) + count * np.outer(mean, mean)
    return ReferenceStatistics(
        torch.from_numpy(mean * count), torch.from_numpy(outer), count, extractor.fingerprint, "gauss", "test"
    )
