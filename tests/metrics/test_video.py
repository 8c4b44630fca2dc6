"""Metrics of videos by features that can be counted by hand."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image import TotalVariation

from genlight.errors import UserError
from genlight.metrics.features import FeatureExtractor
from genlight.metrics.video import VideoMetrics, frechet_distance


class Quarters(FeatureExtractor):
    """The mean of each quarter of a picture."""

    name, num_features, num_logits = "quarters", 4, 1

    def setup(self) -> None: ...

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1), 2).flatten(1)
        return means, means[:, :1]


def videos(count: int, seed: int = 0) -> Tensor:
    """Noise [count, 3, 3, 16, 16], brighter from frame to frame."""
    noise = torch.randn(count, 3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return (0.3 * noise + torch.linspace(-0.3, 0.3, 3)[:, None, None, None]).clamp(-1, 1)


def test_frames_with_the_same_features_are_consistent() -> None:
    """Cosines 1 and 0: a quarter stays bright, then another one is."""
    video = torch.zeros(1, 3, 1, 4, 4)
    video[:, :2, :, :2, :2] = 0.5
    video[:, 2, :, 2:, 2:] = 0.5
    metrics = VideoMetrics(Quarters())
    metrics.update(video)
    assert metrics.compute()["video_consistency"] == pytest.approx(0.5)
    metrics.reset()
    metrics.update(torch.cat([video, video[:, :1].expand(-1, 3, -1, -1, -1)]))
    assert metrics.compute()["video_consistency"] == pytest.approx(0.75)


def test_the_distance_is_that_of_gaussians_also_of_few_vectors() -> None:
    rng = np.random.default_rng(0)
    for sizes in ((200, 300), (4, 5)):
        one, other = (rng.normal(size=(size, 8)) @ rng.normal(size=(8, 8)) + rng.normal(size=8) for size in sizes)
        first, second = np.cov(one.T), np.cov(other.T)
        expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(
            first + second - 2 * sqrtm(first @ second).real
        )
        assert frechet_distance(*map(torch.from_numpy, (one, other))) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(frechet_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2)))


def test_the_distance_is_to_the_videos_that_were_kept() -> None:
    """Of a video's vector both parts count: what frames show, and how they change."""
    metrics, name = VideoMetrics(Quarters()), "video_fd_quarters"
    metrics.update(videos(6))
    assert name not in metrics.compute()
    metrics.keep_reference()
    metrics.reset()
    metrics.update(videos(6))
    assert metrics.compute()[name] == pytest.approx(0, abs=1e-9)
    metrics.reset()
    metrics.update(videos(6).flip(1))  # backwards: the same frames and changes
    assert metrics.compute()[name] == pytest.approx(0, abs=1e-9)
    metrics.reset()
    metrics.update(videos(6)[:, [0, 2, 1]])  # the same frames in another order
    others = metrics.compute()[name]
    frames = Quarters()(videos(6).flatten(0, 1)).unflatten(0, (6, 3)).double()
    vectors = [
        torch.cat([f.mean(dim=1), (f[:, 1:] - f[:, :-1]).abs().mean(dim=1)], dim=1)
        for f in (frames[:, [0, 2, 1]], frames)
    ]
    assert others == pytest.approx(frechet_distance(*vectors), rel=1e-5) and others > 0.01


def test_batches_do_not_matter_and_further_metrics_see_the_middle_frame() -> None:
    seen = videos(5)
    metrics = VideoMetrics(Quarters(), {"variation": partial(TotalVariation, reduction="mean")}, ["variation"])
    metrics.update(videos(4, seed=1))
    metrics.keep_reference()
    whole = []
    for size in (5, 2):
        metrics.reset()
        for part in seen.split(size):
            metrics.update(part)
        whole.append(metrics.compute())
    names = ["flow_size", "flow_flicker", "video_consistency", "video_fd_quarters", "variation"]
    assert list(whole[0]) == names and whole[0] == pytest.approx(whole[1], rel=1e-5)
    middle = TotalVariation(reduction="mean")
    middle.update((seen[:, 1] + 1) / 2)
    assert whole[0]["variation"] == pytest.approx(float(middle.compute()), rel=1e-5)
    metrics.update(torch.full((1, 3, 3, 16, 16), torch.nan))
    assert all(value != value for value in metrics.compute().values())


def test_without_features_there_is_the_flow() -> None:
    metrics = VideoMetrics()
    metrics.update(videos(2))
    metrics.keep_reference()
    assert set(metrics.compute()) == {"flow_size", "flow_flicker"}


@pytest.mark.parametrize("extractor", [None, Quarters()])
def test_images_are_refused(extractor: FeatureExtractor | None) -> None:
    with pytest.raises(UserError, match="two or more frames"):
        VideoMetrics(extractor).update(torch.zeros(2, 3, 8, 8))


def worker(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metrics = VideoMetrics(Quarters())
    metrics.update(videos(4, seed=1))
    metrics.keep_reference()
    results = []
    # three and two videos; all of them on the first process
    for shares in ((slice(0, None, 2), slice(1, None, 2)), (slice(0, None), slice(0, 0))):
        metrics.reset()
        for video in videos(5)[shares[rank]].split(1):
            metrics.update(video)
        results.append([*metrics.compute().values()])
    torch.tensor(results, dtype=torch.float64).numpy().tofile(f"{folder}/result{rank}")
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    metrics = VideoMetrics(Quarters())
    metrics.update(videos(4, seed=1))
    metrics.keep_reference()
    metrics.reset()
    metrics.update(videos(5))
    expected = torch.tensor(list(metrics.compute().values()), dtype=torch.float64)
    for rank in range(2):
        found = torch.from_file(f"{tmp_path}/result{rank}", size=2 * len(expected), dtype=torch.float64)
        for row in found.reshape(2, -1):
            torch.testing.assert_close(row, expected, rtol=1e-6, atol=1e-9)
