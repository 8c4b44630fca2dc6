"""A Fréchet distance of fewer samples than features is named, and nothing else is."""

from genlight.loops.few_samples import few_samples
from genlight.metrics.features import FeatureExtractor
from genlight.metrics.generative import GenerativeMetrics


class Features(FeatureExtractor):
    name, is_inception, num_features = "inception", True, 2048


def test_fewer_samples_than_features_are_named() -> None:
    (said,) = few_samples(GenerativeMetrics(Features(), ["fd"]), 2047, "search.fidelity")
    assert said.startswith("search.fidelity=2047 samples are fewer than the 2048 features of val/fid")
    assert not few_samples(GenerativeMetrics(Features(), ["fd"]), 2048, "search.fidelity")
    assert not few_samples(GenerativeMetrics(Features(), ["kid"]), 40, "search.fidelity")
    assert not few_samples(None, 40, "search.fidelity")
