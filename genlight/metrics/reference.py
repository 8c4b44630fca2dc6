"""Reference statistics of real data, kept on disk, and the floor: the metrics of real images against real images."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from genlight.errors import UserError
from genlight.metrics.features import FeatureExtractor
from genlight.metrics.generative import GenerativeMetrics
from genlight.metrics.statistics import ReferenceStatistics, collect_statistics, iterate_features

FORMAT_VERSION = 1
Value = TypeVar("Value")


class RealImages(Protocol):
    """What is needed of a data module."""

    name: str
    fingerprint: str

    def reference_loader(self, split: str) -> Iterable[Mapping[str, Any]]:
        """Real images {"image": [B, C, H, W]} of a split, always in the same order."""
        ...


@dataclass(frozen=True)
class Floor:
    """The metrics between two disjoint sets of real images, and which sets they were.

    Attributes:
        metrics: values under the names of the report.
        images: the set that stood in for generated images, in words.
        num_images: its size.
        reference: the set it was compared with, in words.
        num_reference: its size.
    """

    metrics: dict[str, float]
    images: str
    num_images: int
    reference: str
    num_reference: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reference_statistics(
    loader: Iterable[Mapping[str, Any]],
    extractor: FeatureExtractor,
    key: Mapping[str, str],
    cache_folder: str | Path | None,
    *,
    keep_features: bool = False,
    device: torch.device | str = "cpu",
) -> ReferenceStatistics:
    """Statistics of the images of a loader, from the cache where they are whole and of the same key.

    Args:
        loader: batches {"image"} in fixed order; read only if the cache has no good entry.
        extractor: the features.
        key: "data" (fingerprint of data and transform) and "split".
        cache_folder: where entries lie; None keeps nothing.
        keep_features: hold every feature vector too (kid and mifd need them).
        device: where the features are computed.

    Warns:
        UserWarning: the entry was damaged or of another key, and was made again; or it could not be written.
    """
    full_key = {
        **key,
        "extractor": extractor.fingerprint,
        "features": "kept" if keep_features else "sums",
        "version": str(FORMAT_VERSION),
    }

    def compute() -> ReferenceStatistics:
        return collect_statistics(
            loader,
            extractor,
            data_fingerprint=key["data"],
            split=key["split"],
            keep_features=keep_features,
            device=device,
        )

    def read(tensors: dict[str, Tensor], values: dict[str, Any]) -> ReferenceStatistics:
        return ReferenceStatistics(
            tensors["sum"],
            tensors["outer_sum"],
            int(values["num_samples"]),
            extractor.fingerprint,
            key["data"],
            key["split"],
            tensors["features"] if keep_features else None,
        )

    def write(statistics: ReferenceStatistics) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"sum": statistics.sum, "outer_sum": statistics.outer_sum}
        if statistics.features is not None:
            tensors["features"] = statistics.features
        return tensors, {"num_samples": statistics.num_samples}

    return _cached(cache_folder, "reference", full_key, compute, read, write)


def prepare(
    metrics: GenerativeMetrics, source: RealImages, cache_folder: str | Path | None, device: torch.device | str = "cpu"
) -> ReferenceStatistics:
    """Sets the reference of ``metrics`` to the real images of its ``reference_split``."""
    split = metrics.reference_split
    statistics = reference_statistics(
        source.reference_loader(split),
        metrics.extractor,
        {"data": source.fingerprint, "split": split},
        cache_folder,
        keep_features=metrics.needs_features,
        device=device,
    )
    metrics.set_reference(statistics)
    return statistics


def prepare_part(
    metrics: GenerativeMetrics,
    source: RealImages,
    split: str,
    part: int,
    parts: int,
    cache_folder: str | Path | None,
    device: torch.device | str = "cpu",
) -> ReferenceStatistics:
    """Sets the reference of ``metrics`` to every ``parts``-th real image of a split, from number ``part`` on.

    Parts are disjoint: what is chosen by one is not judged by the same images.
    """
    positions = np.arange(part, _size(source, split), parts)
    statistics = reference_statistics(
        _select(source.reference_loader(split), positions),
        metrics.extractor,
        {"data": source.fingerprint, "split": f"{split}, part {part} of {parts}"},
        cache_folder,
        keep_features=metrics.needs_features,
        device=device,
    )
    metrics.set_reference(statistics)
    return statistics


def floor(
    metrics: GenerativeMetrics,
    source: RealImages,
    cache_folder: str | Path | None,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Floor:
    """The same metrics with real images in the place of generated ones: no generator needs to do better.

    The images are ``num_samples`` of the split that is not the reference (all of it if it has fewer), drawn by
    ``seed``. If that split has less than half as many images as could be compared otherwise, the two halves of the
    reference split are compared instead. The sizes are part of the result, because a Fréchet distance is larger for
    fewer images.

    Args:
        metrics: the metrics with their settings; its own reference and samples are left alone.
        source: the data.
        cache_folder: where results are kept; None keeps nothing.
        num_samples: number of images that stand in for generated ones; None for as many as there are.
        seed: of the choice of images.
        device: where the features are computed.
    """
    split = metrics.reference_split
    key = {
        "data": source.fingerprint,
        "settings": _digest({**metrics.describe(), "num_reference": None}),
        "num_samples": str(num_samples),
        "seed": str(seed),
        "version": str(FORMAT_VERSION),
    }

    def compute() -> Floor:
        other = "train" if split == "test" else "test"
        whole, other_size = _size(source, split), _size(source, other)
        half = whole // 2
        from_other = other_size if num_samples is None else min(other_size, num_samples)
        from_half = half if num_samples is None else min(half, num_samples)
        generator = np.random.Generator(np.random.PCG64(seed))
        if 2 * from_other >= from_half:
            chosen = np.sort(generator.permutation(other_size)[:from_other])
            words = f"all of the {other} split" if from_other == other_size else f"{from_other} of the {other} split"
            return _compare(metrics, source, (other, chosen, words), (split, None, f"all of the {split} split"), device)
        order = generator.permutation(whole)
        first = (split, np.sort(order[:from_half]), f"{from_half} from one half of the {split} split")
        second = (split, np.sort(order[half:]), f"the other half of the {split} split")
        return _compare(metrics, source, first, second, device)

    def read(tensors: dict[str, Tensor], values: dict[str, Any]) -> Floor:
        numbers = dict(zip(values.pop("names"), tensors["values"].tolist(), strict=True))
        return Floor(metrics=numbers, **values)

    def write(result: Floor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        values = result.to_dict()
        numbers = values.pop("metrics")
        return {"values": torch.tensor(list(numbers.values()), dtype=torch.float64)}, {**values, "names": list(numbers)}

    return _cached(cache_folder, "floor", key, compute, read, write)


Selection = tuple[str, np.ndarray | None, str]  # split, sorted positions or None for all, words


def _compare(
    metrics: GenerativeMetrics, source: RealImages, images: Selection, reference: Selection, device: torch.device | str
) -> Floor:
    # every process computes the whole floor by itself: merging would count the images once per process
    local = metrics.clone(sync=False)
    extractor = local.extractor
    split, positions, reference_words = reference
    local.set_reference(
        collect_statistics(
            _select(source.reference_loader(split), positions),
            extractor,
            data_fingerprint=source.fingerprint,
            split=split,
            keep_features=local.needs_features,
            device=device,
        )
    )
    split, positions, image_words = images
    for features, logits in iterate_features(_select(source.reference_loader(split), positions), extractor, device):
        local.update_features(features, logits)
    values = local.compute()
    assert local.reference is not None
    return Floor(values, image_words, local.num_samples, reference_words, local.reference.num_samples)


def _select(batches: Iterable[Mapping[str, Any]], positions: np.ndarray | None) -> Iterator[dict[str, Tensor]]:
    """The images at the given sorted positions of a loader's order."""
    start = 0
    for batch in batches:
        images = batch["image"]
        if positions is not None:
            inside = positions[(positions >= start) & (positions < start + len(images))] - start
            start += len(images)
            images = images[torch.from_numpy(inside)]
        if len(images):
            yield {"image": images}


def _size(source: RealImages, split: str) -> int:
    """Number of images of a split; loaders of torch know it, others are counted."""
    loader = source.reference_loader(split)
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if dataset is not None else sum(len(batch["image"]) for batch in loader)


def _cached(
    folder: str | Path | None,
    kind: str,
    key: Mapping[str, str],
    compute: Callable[[], Value],
    read: Callable[[dict[str, Tensor], dict[str, Any]], Value],
    write: Callable[[Value], tuple[dict[str, Tensor], dict[str, Any]]],
) -> Value:
    """A value from the cache, or computed and put there. A bad entry costs a warning and is replaced."""
    from genlight.io import load_tensors, parse_json, save_tensors

    if folder is None:
        return compute()
    path = Path(folder) / "statistics" / f"{kind}-{_digest(key)}.safetensors"
    if path.exists():
        try:
            tensors, metadata = load_tensors(path)
            if metadata.get("kind") != kind or parse_json(metadata["key"], str(path)) != dict(key):
                raise ValueError("it was made for other data, features or settings")
            return read(tensors, parse_json(metadata["values"], str(path)))
        except (UserError, KeyError, ValueError, TypeError, OSError) as error:
            warnings.warn(f"cached statistics {path} cannot be used and are made again: {error}", stacklevel=3)
    value = compute()
    tensors, values = write(value)
    try:
        save_tensors(path, tensors, {"kind": kind, "key": json.dumps(dict(key)), "values": json.dumps(values)})
    except (OSError, UserError) as error:
        warnings.warn(f"statistics could not be kept at {path}: {error}", stacklevel=3)
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(value), sort_keys=True).encode()).hexdigest()[:24]
