"""How far each member of a zoo is from the noise that was added, on training images: what "analytic" allocates by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.error_curves import ErrorCurve, error_curve
from genlight.diffusion.model_schedule import half_log_snr_range
from genlight.diffusion.prediction import Prediction
from genlight.io import read_record, write_record
from genlight.loops.model_costs import reason_of
from genlight.modules.exported_pipeline import network_style, predict

_POINTS = 16
_KIND, _VERSION = "error_curves", 1


def member_curves(
    module: Any, datamodule: Any, names: Sequence[str], count: int
) -> tuple[dict[str, ErrorCurve], dict[str, str]]:
    """Error curves of the members that work, and why the others fail, by name.

    Args:
        module: a `ZooModule`.
        datamodule: with training images.
        names: the members that are asked.
        count: images.
    """
    images, labels = _images(module, datamodule, count)
    schedule = module.prediction.schedule
    grid = torch.linspace(*half_log_snr_range(schedule), _POINTS, dtype=torch.float64).tolist()
    conditions = {"label": labels} if module.class_conditional else None
    found, failed = {}, {}
    for name in names:
        own = Prediction(module.zoo.predictions[name].prediction_type, schedule)
        try:
            member = _Member(module.scheduled.brought(name)).eval()
            found[name] = error_curve(member, images, own, grid, conditions=conditions)
        except Exception as error:  # whatever a network raises
            failed[name] = reason_of(error)
    return found, failed


def write_curves(path: Path, curves: Mapping[str, ErrorCurve], failed: Mapping[str, str]) -> None:
    """Keep curves by name, and why other members have none."""
    content = {"curves": {name: asdict(curve) for name, curve in curves.items()}, "failed": dict(failed)}
    write_record(path, content, kind=_KIND, version=_VERSION)


def read_curves(path: Path) -> tuple[dict[str, ErrorCurve], dict[str, str]]:
    """What `write_curves` wrote. UserError or CorruptFileError as `read_record`."""
    content = read_record(path, kind=_KIND, version=_VERSION)
    curves = {
        name: ErrorCurve(tuple(curve["half_log_snrs"]), tuple(curve["errors"]))
        for name, curve in content["curves"].items()
    }
    return curves, content["failed"]


def _images(module: Any, datamodule: Any, most: int) -> tuple[Tensor, Tensor]:
    """What the networks see of the first training images, float32 [most, C, H, W], and their labels [most]."""
    images, labels, count = [], [], 0
    for batch in datamodule.reference_loader("train"):
        x = batch["image"].to(module.device).float()
        images.append(x if module.vae is None else module.vae.encode(x, mean=True))
        labels.append(batch.get("label", torch.zeros(len(batch["image"]), dtype=torch.long)))
        count += len(batch["image"])
        if count >= most:
            break
    return torch.cat(images)[:most], torch.cat(labels)[:most].to(module.device)


class _Member(nn.Module):
    """A network of a zoo as model(x, timestep, label)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.style = network, network_style(network)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """Its prediction, float32 [B, C, H, W]."""
        return predict(self.network, self.style, x, timestep, label)
