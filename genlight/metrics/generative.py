"""The metrics of a set of generated images against a set of real ones, computed by torchmetrics.

torchmetrics has no precision and recall for generators (Kynkäänniemi et al. 2019), so neither has genlight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from genlight.metrics.features import FeatureExtractor
from genlight.metrics.statistics import ReferenceStatistics

METRICS = ("fd", "kid", "is", "mifd")
_INCEPTION_NAMES = {"fd": "fid", "kid": "kid", "is": "is", "mifd": "mifid"}
AnyMetric = TypeVar("AnyMetric", KernelInceptionDistance, InceptionScore)


class GenerativeMetrics(nn.Module):
    """Fréchet distance, kernel distance, Inception Score and memorisation-informed Fréchet distance in one object.

    Use: ``set_reference`` once, then ``update`` per batch, ``compute``, ``reset`` (which keeps the reference). The
    features of an image are computed once for all metrics, outside autocast; all sums are float64. The result does not
    depend on the batch size nor, with sample indices, on how the samples were spread over processes; subsets and splits
    are drawn by a seed of their own, and the global random state stays as it was.

    Names: with Inception features "fid", "kid", "is", "mifid"; with others "fd_<features>", "kid_<features>" and so
    on. Standard deviations over subsets (kid) or splits (is) carry the ending "_std".

    The extractor is not a child module: its weights belong in no checkpoint, optimizer, average or shard of the model
    that carries the metrics.

    Attributes:
        num_samples, num_broken: samples of the last ``compute``, and those of them that were not finite.

    Args:
        extractor: the features to measure in.
        metrics: some of "fd" (Heusel et al. 2017), "kid" (Bińkowski et al. 2018), "is" (Salimans et al. 2016),
            "mifd" (Bai et al. 2021; "mifid" in Inception features).
        kid_subsets: random subsets over which kid is averaged.
        kid_subset_size: images in a subset; at most the number of images there are.
        is_splits: parts over which the Inception Score is averaged.
        reference_split: the real images compared with, "train" or "test".
        seed: of the subsets and splits.
        sync: merge the samples of all processes in ``compute`` (by torchmetrics).
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        metrics: Sequence[str] = ("fd", "kid", "is"),
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        is_splits: int = 10,
        reference_split: str = "test",
        seed: int = 0,
        sync: bool = True,
    ) -> None:
        super().__init__()
        metrics = tuple(metrics)
        _check_names(metrics)
        counts = {"kid_subsets": kid_subsets, "kid_subset_size": kid_subset_size, "is_splits": is_splits}
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"metrics.{key} must be at least 1, got {value}")
        if reference_split not in ("train", "test"):
            raise ValueError(f'metrics.reference_split must be "train" or "test", got {reference_split!r}')
        self._extractor = (extractor,)
        self.metrics = metrics
        self.kid_subsets = kid_subsets
        self.kid_subset_size = kid_subset_size
        self.is_splits = is_splits
        self.reference_split = reference_split
        self.seed = seed
        self._sync = sync
        self.num_samples = self.num_broken = 0
        self.reference: ReferenceStatistics | None = None
        self.samples: _Samples | None = None
        self.frechet: _FrechetDistance | None = None

    @property
    def sync(self) -> bool:
        """Whether ``compute`` merges the samples of all processes; a search may switch it."""
        return self._sync

    @sync.setter
    def sync(self, value: bool) -> None:
        self._sync = value
        for metric in (self.samples, self.frechet):
            if metric is not None:
                # what it was built with is copied to the flag that is asked
                metric.sync_on_compute = metric._to_sync = value

    @property
    def extractor(self) -> FeatureExtractor:
        return self._extractor[0]

    @property
    def needs_features(self) -> bool:
        """Whether the reference must hold every feature vector, not only their sums (kid and mifd)."""
        return "kid" in self.metrics or "mifd" in self.metrics

    def name_of(self, metric: str) -> str:
        """The name under which a metric is reported: "fd" is "fid" in Inception features only."""
        return _INCEPTION_NAMES[metric] if self.extractor.is_inception else f"{metric}_{self.extractor.name}"

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """Of each metric, by the name under which it is reported."""
        return {self.name_of(metric): metric == "is" for metric in self.metrics}

    def clone(self, sync: bool) -> GenerativeMetrics:
        """The same metrics with the same extractor and neither reference nor samples."""
        return GenerativeMetrics(
            self.extractor,
            self.metrics,
            self.kid_subsets,
            self.kid_subset_size,
            self.is_splits,
            self.reference_split,
            self.seed,
            sync,
        )

    def set_reference(self, reference: ReferenceStatistics) -> None:
        """Takes the statistics of the real images; forgets the samples seen.

        Raises:
            ValueError: the statistics are of other features, or lack the feature vectors that kid and mifd need.
        """
        extractor = self.extractor
        if reference.extractor_fingerprint != extractor.fingerprint:
            raise ValueError(
                f"reference statistics were made with features {reference.extractor_fingerprint}, "
                f'these metrics use "{extractor.name}" {extractor.fingerprint}'
            )
        if self.needs_features and reference.features is None:
            raise ValueError(f"metrics {list(self.metrics)} need a reference with features (keep_features=True)")
        self.reference = reference
        self.samples = _Samples(extractor.num_features, extractor.num_logits, sync_on_compute=self.sync)
        self.frechet = None
        if "fd" in self.metrics:
            self.frechet = _FrechetDistance(extractor.num_features, reference, sync_on_compute=self.sync)

    def update(self, images: Tensor, index: Tensor | None = None) -> None:
        """Adds generated images [B, C, H, W] in [-1, 1].

        Args:
            images: the batch.
            index: sample number of each image [B], int64; makes random subsets independent of the order and the process
                in which the images come. Without it they count in order of arrival.
        """
        self._ready()
        extractor = self.extractor.to(images.device)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if "is" in self.metrics:
                features, logits = extractor.features_and_logits(images)
            else:
                features = extractor(images)
                logits = features.new_zeros(len(images), extractor.num_logits)
        self.update_features(features, logits, index)

    def update_features(self, features: Tensor, logits: Tensor, index: Tensor | None = None) -> None:
        """Adds images by their features [B, D] and logits [B, K]."""
        samples = self._ready()
        if samples.device != features.device:
            self.to(features.device)
        samples.update(features, logits, index, keep=self.metrics != ("fd",))
        # non-finite samples are counted above; they must not poison the sums of a later reset
        if self.frechet is not None:
            self.frechet.update(features, real=False)

    def compute(self) -> dict[str, float]:
        """The metrics of all samples since the last reset; NaN for all of them if any sample is not finite.

        Raises:
            RuntimeError: no reference is set, or fewer than two samples were seen.
        """
        samples = self._ready()
        samples.complete()
        features, logits, counts = samples.compute()
        self.num_samples, self.num_broken = int(counts[0]), int(counts[1])
        if self.num_samples < 2:
            raise RuntimeError(f"metrics need at least two generated images, got {self.num_samples}")
        values: dict[str, float] = {}
        if self.frechet is not None:
            # every process takes part in the merge, also when the result cannot be finite
            values[self.name_of("fd")] = float(self.frechet.compute())
        if self.num_broken:
            return {name: math.nan for name in self._names()}
        if "kid" in self.metrics:
            values |= self._kernel_distance(features)
        if "is" in self.metrics:
            values |= self._inception_score(logits)
        if "mifd" in self.metrics:
            values |= self._memorisation_distance(features)
        return values

    def reset(self) -> None:
        """Forgets the samples and keeps the reference."""
        if self.samples is not None:
            self.samples.reset()
        if self.frechet is not None:
            self.frechet.reset()

    def describe(self) -> dict[str, Any]:
        """Features and settings, for a report."""
        settings: dict[str, Any] = {"metrics": list(self.metrics), "reference_split": self.reference_split}
        if "kid" in self.metrics:
            settings |= {"kid_subsets": self.kid_subsets, "kid_subset_size": self.kid_subset_size}
        if "is" in self.metrics:
            settings["is_splits"] = self.is_splits
        if self.reference is not None:
            settings["num_reference"] = self.reference.num_samples
            settings["reference_data"] = self.reference.data_fingerprint
        return {**self.extractor.describe(), **settings}

    def _ready(self) -> _Samples:
        if self.samples is None:
            raise RuntimeError("generative metrics have no reference: call set_reference first")
        return self.samples

    def _names(self) -> list[str]:
        names = [self.name_of(metric) for metric in self.metrics]
        return names + [f"{self.name_of(m)}_std" for m in ("kid", "is") if m in self.metrics]

    def _kernel_distance(self, features: Tensor) -> dict[str, float]:
        real = self._reference_features(features)
        size = min(self.kid_subset_size, len(real), len(features))
        metric = _quiet(
            KernelInceptionDistance, _Identity(features.shape[1]), subsets=self.kid_subsets, subset_size=size, **_LOCAL
        )
        metric.update(real, real=True)
        metric.update(features.double(), real=False)
        with _seeded(self.seed):
            mean, std = metric.compute()
        return {self.name_of("kid"): float(mean), f"{self.name_of('kid')}_std": float(std)}

    def _inception_score(self, logits: Tensor) -> dict[str, float]:
        splits = min(self.is_splits, len(logits))
        metric = _quiet(InceptionScore, _Identity(logits.shape[1]), splits=splits, **_LOCAL)
        metric.update(logits.double())
        with _seeded(self.seed), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # one split has no deviation
            mean, std = metric.compute()
        name = self.name_of("is")
        return {name: float(mean), f"{name}_std": float(std) if splits > 1 else 0.0}

    def _memorisation_distance(self, features: Tensor) -> dict[str, float]:
        metric = MemorizationInformedFrechetInceptionDistance(_Identity(features.shape[1]), **_LOCAL)
        metric.update(self._reference_features(features), real=True)
        metric.update(features.double(), real=False)
        return {self.name_of("mifd"): float(metric.compute())}

    def _reference_features(self, like: Tensor) -> Tensor:
        assert self.reference is not None and self.reference.features is not None
        return self.reference.features.to(like.device, torch.float64)


# for torchmetrics objects that already hold the samples of all processes
_LOCAL: dict[str, Any] = {"sync_on_compute": False}


class _Identity(nn.Module):
    """Stands where torchmetrics wants the feature network: the features are computed once, before, for all metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class _FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' Fréchet distance with a reference that every process holds whole.

    torchmetrics would add the reference up over the processes, which changes the divisor n - 1 of the covariance: the
    score would depend on the number of devices.
    """

    def __init__(self, num_features: int, reference: ReferenceStatistics, **options: Any) -> None:
        super().__init__(_Identity(num_features), reset_real_features=False, **options)
        self.add_state("real_features_sum", reference.sum.double(), dist_reduce_fx=_first)
        self.add_state("real_features_cov_sum", reference.outer_sum.double(), dist_reduce_fx=_first)
        self.add_state("real_features_num_samples", torch.tensor(reference.num_samples), dist_reduce_fx=_first)
        # a process that got no samples must be able to compute too
        self.orig_dtype = torch.float64

    def update(self, imgs: Tensor, real: bool) -> None:
        super().update(imgs.double(), real)

    def compute(self) -> Tensor:
        if not bool(torch.isfinite(self.fake_features_cov_sum).all()):
            return torch.tensor(math.nan)  # the eigenvalue routine would raise
        return super().compute()


class _Samples(Metric):
    """The features of the generated images, in the order of their indices, merged over processes by torchmetrics."""

    full_state_update = False
    features: list[Tensor]
    logits: list[Tensor]
    index: list[Tensor]
    counts: Tensor

    def __init__(self, num_features: int, num_logits: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_features = num_features
        self.num_logits = num_logits
        for name in ("features", "logits", "index"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")  # images, images not finite

    def update(self, features: Tensor, logits: Tensor, index: Tensor | None, keep: bool) -> None:
        broken = ~torch.isfinite(features).all(dim=1)
        if index is None:
            index = int(self.counts[0]) + torch.arange(len(features), device=features.device)
        self.counts += torch.stack([torch.tensor(len(features), device=broken.device), broken.sum()])
        if keep:
            self.features.append(features.double())
            self.logits.append(logits.double())
            self.index.append(index.to(features.device))

    def complete(self) -> None:
        """Adds no rows, in the right shapes: without it a process that got no samples leaves the others waiting."""
        empty = torch.zeros(0, self.num_features, dtype=torch.float64, device=self.device)
        logits = empty.new_zeros(0, self.num_logits)
        self.update(empty, logits, torch.zeros(0, dtype=torch.long, device=self.device), keep=True)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        features, logits, index = (_cat(state) for state in (self.features, self.logits, self.index))
        order = torch.argsort(index, stable=True)
        return features[order], logits[order], self.counts


def _cat(state: list[Tensor] | Tensor) -> Tensor:
    return state if isinstance(state, Tensor) else torch.cat(state)


def _first(states: Any) -> Tensor:
    """Reduction over processes for what is equal on all of them."""
    return states[0]  # type: ignore[no-any-return]


def _quiet(metric: type[AnyMetric], feature: nn.Module, **options: Any) -> AnyMetric:
    """Builds a metric without torchmetrics' standing warning that it keeps the features in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return metric(feature, **options)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torchmetrics draws subsets from the global CPU generator: seeds it, and puts it back."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _check_names(metrics: tuple[str, ...]) -> None:
    hint = '; "fd" is reported as "fid" when the features are Inception\'s' if "fid" in metrics else ""
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metrics.metrics has unknown names {unknown}, possible are {list(METRICS)}{hint}")
    if not metrics or len(set(metrics)) != len(metrics):
        raise ValueError(f"metrics.metrics must name some of {list(METRICS)}, each once, got {list(metrics)}")
