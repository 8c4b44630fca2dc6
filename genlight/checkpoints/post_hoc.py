"""Power-function averages of any width, made of the ones that a training saved on its way (post-hoc EMA)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from genlight import io
from genlight.checkpoints.ema_profiles import power_gamma, reconstruct_power_ema
from genlight.checkpoints.trajectory import INDEX_FILE, Trajectory

WIDTHS = tuple(float(width) for width in numpy.geomspace(0.02, 0.25, 12))
_WORST = 0.05  # relative error of a profile, beyond which it is another average


@dataclass(frozen=True, eq=False)
class PostHocEMA:
    """A power-function average of all optimizer steps up to the last one saved.

    Attributes:
        sigma_rel: its width, relative to the length of the training.
        parts: what it is a sum of: a trajectory, the number of a member, and its weight.
    """

    sigma_rel: float
    parts: tuple[tuple[Trajectory, int, float], ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Float32, by parameter name; read and summed at each call, since several would fill the memory."""
        return {name: self._sum(name) for name in self.parts[0][0].names}

    def _sum(self, name: str) -> Tensor:
        total = torch.zeros(self.parts[0][0].shapes[name], dtype=torch.float64)
        for trajectory, index, weight in self.parts:
            total.add_(trajectory.read(index, name), alpha=weight)
        return total.float()


def post_hoc_averages(
    folder: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]], widths: Sequence[float] = WIDTHS
) -> list[PostHocEMA]:
    """Averages of these widths (Karras et al. 2024, section 3.2); those that the saved ones do not reach are left out.

    Args:
        folder: with trajectories ``power-…`` of power-function averages, as `EMABank` writes them.
        shapes: what each must hold: those of the trajectory they belong to.
        widths: σ_rel of each.

    Raises:
        CorruptFileError: names the folder or file whose index or header is damaged, or that holds other parameters.
    """
    saved = [Trajectory.open(path.parent, check="names") for path in sorted(Path(folder).glob(f"power-*/{INDEX_FILE}"))]
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    for trajectory in saved:
        if trajectory.shapes != wanted:
            raise io.CorruptFileError(f"{trajectory.folder} belongs to another trajectory: it holds other parameters")
    members = [(trajectory, index) for trajectory in saved for index in range(len(trajectory.members))]
    if not members:
        return []
    ends = [trajectory.members[index].last_step for trajectory, index in members]
    gammas = [float(trajectory.origin["gamma"]) for trajectory, _ in members]
    found = []
    for width in widths:
        weights, error = reconstruct_power_ema(ends, gammas, power_gamma(width), max(ends))
        if error <= _WORST:
            parts = zip(members, weights.tolist(), strict=True)
            found.append(PostHocEMA(width, tuple((*member, weight) for member, weight in parts)))
    return found
