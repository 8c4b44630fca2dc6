"""Cached statistics: found, verified, replaced when bad; the floor: known sets, deterministic."""

import warnings

import numpy as np
import pytest
import torch
from metrics.metric_samples import TinyFeatures, images, statistics_of
from scipy.linalg import sqrtm

from genlight.metrics.generative import GenerativeMetrics
from genlight.metrics.reference import floor, prepare, reference_statistics
from genlight.metrics.statistics import ReferenceStatistics

KEY = {"data": "d1", "split": "test"}


class Source:
    """Two splits of real images, counting how often they are read."""

    name = "source"

    def __init__(self, train=120, test=100, fingerprint="d1", batch_size=32):
        self.splits = {"train": images(train, seed=1), "test": images(test, seed=2)}
        self.fingerprint, self.batch_size, self.reads = fingerprint, batch_size, 0

    def reference_loader(self, split):
        return Loader(self, self.splits[split])


class Loader:
    def __init__(self, source, data):
        self.source, self.dataset = source, data

    def __iter__(self):
        self.source.reads += 1
        return iter([{"image": batch} for batch in self.dataset.split(self.source.batch_size)])


def frechet(a, b):
    left, right = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(left + right - 2 * np.real(sqrtm(left @ right)))


def equal(a: ReferenceStatistics, b: ReferenceStatistics) -> bool:
    return all(
        x.equal(y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_statistics_hold_the_moments_of_the_features():
    extractor, real = TinyFeatures(), images(50, seed=3)
    found = statistics_of(real, extractor, batch_size=7)
    features = extractor(real).numpy()
    mean = found.sum.numpy() / 50
    assert np.allclose(mean, features.mean(0), rtol=1e-12)
    assert np.allclose((found.outer_sum.numpy() - 50 * np.outer(mean, mean)) / 49, np.cov(features, rowvar=False))
    assert np.array_equal(found.features.numpy(), features)


@pytest.mark.parametrize("keep", [True, False])
def test_the_second_call_reads_the_cache_and_not_the_data(tmp_path, keep):
    source, extractor = Source(), TinyFeatures()
    loader = source.reference_loader("test")
    first = reference_statistics(loader, extractor, KEY, tmp_path, keep_features=keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = reference_statistics(loader, extractor, KEY, tmp_path, keep_features=keep)
    assert source.reads == 1 and equal(first, second) and (second.features is not None) == keep


@pytest.mark.parametrize(
    "change", [{"data": "d2"}, {"split": "train"}, {"extractor": TinyFeatures(size=5)}, {"keep_features": True}]
)
def test_every_part_of_the_key_counts(tmp_path, change):
    source = Source()
    loader = source.reference_loader("test")
    reference_statistics(loader, TinyFeatures(), KEY, tmp_path)
    key = KEY | {name: change[name] for name in ("data", "split") if name in change}
    keep = change.get("keep_features", False)
    reference_statistics(loader, change.get("extractor", TinyFeatures()), key, tmp_path, keep_features=keep)
    assert source.reads == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "swap", "empty", "pickle"])
def test_a_bad_entry_costs_one_warning_and_is_replaced(tmp_path, damage):
    source, extractor = Source(), TinyFeatures()
    loader = source.reference_loader("test")
    good = reference_statistics(loader, extractor, KEY, tmp_path)
    (entry,) = tmp_path.rglob("*.safetensors")
    data = bytearray(entry.read_bytes())
    if damage == "swap":  # a whole entry of other data under this name
        reference_statistics(loader, extractor, KEY | {"data": "d2"}, tmp_path)
        (other,) = set(tmp_path.rglob("*.safetensors")) - {entry}
        data = other.read_bytes()
    elif damage == "flip":
        data[len(data) // 2] ^= 4
    else:
        data = {"truncate": data[:-20], "empty": b"", "pickle": b"\x80\x02cos\nsystem\n."}[damage]
    entry.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="made again") as caught:
        assert equal(reference_statistics(loader, extractor, KEY, tmp_path), good)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference_statistics(loader, extractor, KEY, tmp_path)


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path):
    (tmp_path / "statistics").write_text("a file where a folder is needed")
    with pytest.warns(UserWarning, match="could not be kept"):
        reference_statistics(Source().reference_loader("test"), TinyFeatures(), KEY, tmp_path)


def test_prepare_takes_the_reference_split(tmp_path):
    source, extractor = Source(train=120, test=100), TinyFeatures()
    metrics = GenerativeMetrics(extractor, ["fd", "kid"], reference_split="train")
    assert prepare(metrics, source, tmp_path).num_samples == 120
    description = metrics.describe()
    assert description["num_reference"] == 120 and description["reference_split"] == "train"
    metrics.update(source.splits["train"])
    assert metrics.compute()["fd_tiny"] == pytest.approx(0, abs=1e-6)


def test_floor_compares_the_other_split_with_the_reference(tmp_path):
    source, extractor = Source(train=120, test=100), TinyFeatures()
    result = floor(GenerativeMetrics(extractor, ["fd"]), source, tmp_path)
    features = [extractor(source.splits[split]).numpy() for split in ("train", "test")]
    assert result.metrics == {"fd_tiny": pytest.approx(frechet(*features), rel=1e-7)}
    assert (result.images, result.num_images) == ("all of the train split", 120)
    assert (result.reference, result.num_reference) == ("all of the test split", 100)


def test_floor_draws_as_many_images_as_were_generated_and_always_the_same(tmp_path):
    source = Source(train=400, test=100)
    metrics = GenerativeMetrics(TinyFeatures(), ["fd", "is", "kid"], kid_subsets=2, kid_subset_size=20)
    first = floor(metrics, source, None, num_samples=50)
    source.batch_size = 13
    second = floor(metrics, source, None, num_samples=50)
    assert first.num_images == 50 and first.images == "50 of the train split"
    assert second.metrics == pytest.approx(first.metrics, rel=1e-9)
    assert floor(metrics, source, None, num_samples=50, seed=1).metrics != first.metrics


def test_floor_falls_back_to_halves_of_the_reference_split():
    source = Source(train=5, test=200)
    result = floor(GenerativeMetrics(TinyFeatures(), ["fd"]), source, None)
    assert (result.num_images, result.num_reference) == (100, 100)
    assert "half of the test split" in result.images and "other half" in result.reference


def test_floor_is_kept_and_its_metrics_leave_the_samples_alone(tmp_path):
    source = Source()
    metrics = GenerativeMetrics(TinyFeatures(), ["fd"])
    prepare(metrics, source, None)
    metrics.update(images(40, seed=9))
    first = floor(metrics, source, tmp_path)
    reads = source.reads
    assert floor(metrics, source, tmp_path) == first and source.reads == reads
    metrics.compute()
    assert metrics.num_samples == 40
    source.fingerprint = "d2"
    floor(metrics, source, tmp_path)
    assert source.reads > reads
