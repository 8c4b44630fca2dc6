"""Metrics of generated videos, computed by torchmetrics: they need no real videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric

from genlight.errors import UserError
from genlight.metrics.features import FeatureExtractor
from genlight.metrics.motion import motion_of
from genlight.metrics.text_image import TextImageMetrics


class VideoMetrics(TextImageMetrics):
    """Metrics of videos, and beside them metrics of their middle frames.

    Names: "flow_size" and "flow_flicker", see `VideoFlow`; "video_consistency" and, once videos are kept to compare
    with, "video_fd_<features>", see `VideoFeatures`.

    Args:
        extractor: features of single frames; None: without the metrics that need them.
        metrics: further ones of the middle frame, as in `TextImageMetrics`.
        float_images: likewise.
        sync: merge the samples of all processes in ``compute`` (by torchmetrics).
    """

    def __init__(
        self,
        extractor: FeatureExtractor | None = None,
        metrics: Mapping[str, Callable[[], Metric] | Metric] | None = None,
        float_images: Sequence[str] = (),
        sync: bool = True,
    ) -> None:
        own: dict[str, Callable[[], Metric]] = {"flow": VideoFlow}
        if extractor is not None:
            own["video"] = partial(VideoFeatures, extractor)
        super().__init__({**own, **(metrics or {})}, float_images, sync)
        self.extractor = extractor

    def keep_reference(self) -> None:
        """Compare videos from now on with those seen since the last reset, such as those of full precision."""
        if self.extractor is not None:
            found: Any = self.metrics["video"]
            found.keep_reference()


class VideoFlow(Metric):
    """Motion of videos [B, F, C, H, W] in [-1, 1] by `genlight.metrics.motion`, mean over videos.

    Computes "size", its length in pixels a frame, and "flicker": the change of brightness, of 0 to 1, from a frame to
    the next that this motion does not explain.
    """

    of_videos = True
    full_state_update = False
    size: Tensor
    flicker: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("size", "flicker", "count"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, videos: Tensor) -> None:
        for video in videos.split(1):
            motion = motion_of(video)
            self.size += motion.size.sum()
            self.flicker += motion.unexplained.sum()
        self.count += len(videos)

    def compute(self) -> dict[str, Tensor]:
        return {"size": self.size / self.count, "flicker": self.flicker / self.count}


class VideoFeatures(Metric):
    """Videos [B, F, C, H, W] in [-1, 1] by features of their frames.

    Computes "consistency", the mean cosine of the features of neighbouring frames, and once there is a reference
    "fd_<features>", the Fréchet distance to it. A video's vector is the mean of the features of its frames, and beside
    it the mean magnitude of their change from a frame to the next: no network of videos is asked, so that the number
    compares with none that was measured otherwise.

    The extractor is no child module: its weights belong to no checkpoint.

    Args:
        extractor: of features of a frame.
    """

    of_videos = True
    full_state_update = False
    cosine: Tensor
    count: Tensor
    vectors: list[Tensor] | Tensor

    def __init__(self, extractor: FeatureExtractor, **options: Any) -> None:
        super().__init__(**options)
        self._extractor = (extractor,)
        self._reference: Tensor | None = None
        for name in ("cosine", "count"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("vectors", [], dist_reduce_fx="cat")

    def update(self, videos: Tensor) -> None:
        if videos.ndim != 5 or videos.shape[1] < 2:
            raise UserError(f"metrics of videos need two or more frames, [B, F, C, H, W], got {list(videos.shape)}")
        extractor = self._extractor[0].to(videos.device)
        features = extractor(videos.flatten(0, 1)).double().unflatten(0, videos.shape[:2])  # [B, F, D]
        self.cosine += cosine_similarity(features[:, :-1], features[:, 1:], dim=2).mean(dim=1).sum()
        self.count += len(videos)
        change = features.diff(dim=1).abs().mean(dim=1)
        self.vectors.append(torch.cat([features.mean(dim=1), change], dim=1))  # type: ignore[union-attr]

    def sync(self, *arguments: Any, **options: Any) -> None:
        """As torchmetrics does; a process that got no videos gives none, in the right shape."""
        empty = torch.zeros(0, 2 * self._extractor[0].num_features, dtype=torch.float64, device=self.device)
        self.vectors.append(empty)  # type: ignore[union-attr]
        super().sync(*arguments, **options)

    def keep_reference(self) -> None:
        """Measure the distance to the videos seen since the last reset, if there are two or more."""
        self._reference = self._seen() if len(self._seen()) > 1 else None

    def compute(self) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = {"consistency": self.cosine / self.count}
        if self._reference is not None and len(self._seen()) > 1:
            name = f"fd_{self._extractor[0].name}"
            values[name] = frechet_distance(self._seen(), self._reference.to(self.device))
        return values

    def _seen(self) -> Tensor:
        return self.vectors if isinstance(self.vectors, Tensor) else torch.cat(self.vectors)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians of two sets of vectors [N, D] and [M, D] (Dowson and Landau 1982).

    For fewer vectors than dimensions, as sets of videos are: with covariances A Aᵀ and B Bᵀ the trace of
    (A Aᵀ B Bᵀ)^½ is the sum of the singular values of Aᵀ B [N, M], and no D × D matrix has to be taken apart.
    NaN for vectors that are not finite.
    """
    one, other = one.double(), other.double()
    first, second = ((x - x.mean(dim=0)) / math.sqrt(len(x) - 1) for x in (one, other))
    common = first @ second.T
    if not bool(torch.isfinite(common).all()):
        return math.nan
    means = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    trace = first.square().sum() + second.square().sum() - 2 * torch.linalg.svdvals(common).sum()
    return float((means + trace).clamp(min=0))
