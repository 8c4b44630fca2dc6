"""Samples too few for a Fréchet distance: what a person is told, whatever the method."""

from __future__ import annotations

from typing import Any

from genlight.metrics.generative import GenerativeMetrics


def few_samples(metrics: Any, count: int, key: str) -> list[str]:
    """A remark where the covariance of so many samples cannot have full rank.

    Args:
        metrics: of the module; others than `GenerativeMetrics` have no such distance.
        count: samples of one distance.
        key: of the config, that sets their number.
    """
    if not isinstance(metrics, GenerativeMetrics) or "fd" not in metrics.metrics:
        return []
    features = metrics.extractor.num_features
    if count >= features:
        return []
    return [
        f"{key}={count} samples are fewer than the {features} features of val/{metrics.name_of('fd')}: their "
        "covariance is singular and the distance biased; a kernel distance (kid) has no such bias"
    ]
