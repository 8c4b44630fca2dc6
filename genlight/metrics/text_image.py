"""How images fit their prompts, and other metrics that need no real images, computed by torchmetrics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric

from genlight.errors import UserError


class TextImageMetrics:
    """Metrics of torchmetrics that need no reference, in the place of `GenerativeMetrics`.

    Use: per batch ``set_prompts`` and ``update``, then ``compute``, ``reset``. The metrics are built when first needed.
    One whose ``update`` takes images and texts (`torchmetrics.multimodal.CLIPScore`), or a second argument that is
    called ``prompts``, is given the prompts.

    Of a video metrics are given the middle frame, and those with an attribute ``of_videos`` the whole, in [-1, 1].

    Values of each image are averaged. A metric that gives several values by name is reported as "<name>_<value>", one
    that gives mean and deviation as "<name>" and "<name>_std".

    Args:
        metrics: by the name under which they are reported, what builds them (a class, a partial) or a metric.
        float_images: names of those that take images as float in [0, 1]; the others get uint8.
        sync: merge the samples of all processes in ``compute`` (by torchmetrics).

    Attributes:
        num_samples: images of the last ``compute``.

    Raises:
        ValueError: no metrics, or a name in `float_images` that is none of theirs.
    """

    takes_videos = True

    def __init__(
        self,
        metrics: Mapping[str, Callable[[], Metric] | Metric],
        float_images: Sequence[str] = (),
        sync: bool = True,
    ) -> None:
        if not metrics:
            raise ValueError("metrics.metrics is empty: name at least one")
        unknown = [name for name in float_images if name not in metrics]
        if unknown:
            raise ValueError(f"metrics.float_images: {unknown[0]!r} is none of {', '.join(metrics)}")
        self._makers, self.float_images = dict(metrics), tuple(float_images)
        self._metrics: dict[str, Metric] | None = None
        self._counts = {"images": SumMetric(), "broken": SumMetric()}
        self._prompts: list[str] | None = None
        self._device = torch.device("cpu")
        self.num_samples = 0
        self.sync = sync

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics by name, built if need be.

        Raises:
            ValueError: one that needs more than images, or images and their prompts.
        """
        if self._metrics is None:
            built = {name: m if isinstance(m, Metric) else m() for name, m in self._makers.items()}
            for name, metric in built.items():
                _takes_prompts(name, metric)
            self._metrics = {name: metric.to(self._device) for name, metric in built.items()}
            self.sync = self._sync
        return self._metrics

    @property
    def higher_is_better(self) -> dict[str, bool | None]:
        """By name whether a higher value is better, as torchmetrics says; None where it says nothing."""
        return {name: metric.higher_is_better for name, metric in self.metrics.items()}

    @property
    def sync(self) -> bool:
        """Whether the samples of all processes are merged in `compute`."""
        return self._sync

    @sync.setter
    def sync(self, value: bool) -> None:
        self._sync = value
        for metric in (*(self._metrics or {}).values(), *self._counts.values()):
            # what it was built with is copied to the flag that is asked
            metric.sync_on_compute = metric._to_sync = value

    def to(self, device: torch.device | str) -> TextImageMetrics:
        """Itself, with its networks and sums on a device."""
        self._device = torch.device(device)
        for metric in (*(self._metrics or {}).values(), *self._counts.values()):
            metric.to(device)
        return self

    def set_prompts(self, prompts: Sequence[str]) -> None:
        """The texts of the next images, one for each."""
        self._prompts = list(prompts)

    def update(self, images: Tensor, index: Tensor | None = None) -> None:
        """Adds images [B, C, H, W] or videos [B, F, C, H, W] in [-1, 1]; grey images are given as three equal channels.

        Args:
            images: the batch.
            index: sample number of each image; not used, the results do not depend on the order.

        Raises:
            ValueError: a metric takes prompts, and there is not one for each image.
        """
        images = images.detach().float()
        broken = ~torch.isfinite(images).flatten(1).all(dim=1)
        self._counts["images"].update(len(images))
        self._counts["broken"].update(broken.sum())
        images = images.nan_to_num(0.0).clamp(-1, 1)
        unit = (middle_frame(images) + 1) / 2
        unit = unit.expand(-1, 3, -1, -1) if unit.shape[1] == 1 else unit
        whole = (unit * 255).round().to(torch.uint8)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for name, metric in self.metrics.items():
                if getattr(metric, "of_videos", False):
                    metric.update(images)
                    continue
                given = unit if name in self.float_images else whole
                if not _takes_prompts(name, metric):
                    metric.update(given)
                    continue
                prompts = self._prompts
                if prompts is None or len(prompts) != len(images):
                    found = "none" if prompts is None else len(prompts)
                    raise ValueError(f"metrics.{name} needs a prompt for each of {len(images)} images, got {found}")
                metric.update(given, prompts)
        self._prompts = None

    def compute(self) -> dict[str, float]:
        """The metrics of all images since the last reset; NaN for all of them if any image is not finite.

        Raises:
            RuntimeError: no images were seen.
        """
        self.num_samples, broken = (int(self._counts[name].compute()) for name in ("images", "broken"))
        if self.num_samples == 0:
            raise RuntimeError("metrics need at least one generated image, got 0")
        values: dict[str, float] = {}
        for name, metric in self.metrics.items():
            values |= _named(name, metric.compute())
        return dict.fromkeys(values, math.nan) if broken else values

    def reset(self) -> None:
        """Forgets the images."""
        self._prompts = None
        for metric in (*(self._metrics or {}).values(), *self._counts.values()):
            metric.reset()

    def describe(self) -> dict[str, Any]:
        """The metrics, for a report."""
        return {"metrics": {name: type(metric).__name__ for name, metric in self.metrics.items()}}


def middle_frame(samples: Tensor) -> Tensor:
    """Images [B, C, H, W] as they are, and of videos [B, F, C, H, W] the middle frame."""
    return samples[:, samples.shape[1] // 2] if samples.ndim == 5 else samples


def clip_model(source: str) -> tuple[nn.Module, Any]:
    """A CLIP model and its processor from a folder or hub id, for ``CLIPScore(model_name_or_path=...)``.

    torchmetrics itself takes the names of a few models only, no folders, and expects features as tensors, which
    transformers 5 gives inside of an output object.

    Args:
        source: folder or hub id of a CLIP model of transformers, weights as safetensors.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import CLIPModel, CLIPProcessor

    if source.count("/") != 1 and not Path(source).is_dir():
        raise UserError(f"metrics: {source} is not a folder; expected one with a CLIP model, or a hub id")
    try:
        model = CLIPModel.from_pretrained(source, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(source)
    except Exception as error:  # transformers, huggingface_hub and safetensors each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"metrics: {source} cannot be loaded as a CLIP model: {reason}") from error
    return _Clip(model), processor


class _Clip(nn.Module):
    """A CLIP model whose features are tensors [B, D], whatever the version of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.config = model.config

    def get_image_features(self, *inputs: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(*inputs))

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(*inputs))


def _tensor(features: Any) -> Tensor:
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return found


def _takes_prompts(name: str, metric: Metric) -> bool:
    """Whether a metric's update takes images and texts; ValueError if it takes neither those nor images alone."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(metric).update).parameters.values()
    needed = [p for p in parameters if p.kind in kinds and p.default is p.empty and p.name != "self"]
    texts = any(kind.__module__.startswith("torchmetrics.multimodal") for kind in type(metric).__mro__)
    if len(needed) == 1:
        return False
    if len(needed) == 2 and (texts or needed[1].name == "prompts"):
        return True
    found = ", ".join(p.name for p in needed)
    raise ValueError(f"metrics.{name}: {type(metric).__name__} takes {found}; here are only images and their prompts")


def _named(name: str, value: Any) -> dict[str, float]:
    """Plain numbers by name of what a metric computes."""
    if isinstance(value, Mapping):
        return {f"{name}_{key}": float(torch.as_tensor(entry).float().mean()) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        mean, deviation = value
        return {name: float(mean), f"{name}_std": float(deviation)}
    return {name: float(torch.as_tensor(value).float().mean())}
