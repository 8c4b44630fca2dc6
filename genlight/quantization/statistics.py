"""What calibration keeps of the inputs of one layer: sums and extremes that can be added up in any order.

Statistics of two processes, or of two halves of a calibration that was interrupted, merge to those of the whole. Sums
differ then by rounding, and nothing else does: the sample of rows is the same too, as each row draws a key and the rows
with the least keys are kept.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlight.errors import UserError
from genlight.io import CorruptFileError, load_state, save_state
from genlight.quantization.context import SamplingContext, branch_parts

_KIND = "input statistics"


@dataclass(frozen=True)
class StatisticsSettings:
    """What is kept.

    Attributes:
        branches: guidance branches that the calibration runs.
        steps: sampling steps.
        hessian: type of the second moments, or None to keep none; they take columns² numbers.
        sample_rows: rows of the input that are kept, for searches over the layer's output.
        seed: of the choice of those rows.

    Raises:
        ValueError: a number outside its range, or a type that is no wide floating point.
    """

    branches: int = 1
    steps: int = 1
    hessian: torch.dtype | None = None
    sample_rows: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.branches < 1 or self.steps < 1 or self.sample_rows < 0:
            raise ValueError(
                f"branches = {self.branches} and steps = {self.steps} must be 1 or more, "
                f"sample_rows = {self.sample_rows} 0 or more"
            )
        if self.hessian not in (None, torch.float32, torch.float64):
            raise ValueError(f"hessian = {self.hessian} must be torch.float32 or torch.float64: sums of 16 bits drift")


@dataclass(frozen=True)
class BatchPart:
    """The samples start … stop - 1 of a batch of `size`, which goes through the network in parts.

    Which rows of the inputs are kept is the same then as for the whole batch.
    """

    start: int
    stop: int
    size: int


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Of the inputs of one layer.

    Attributes:
        absmax: largest magnitude of each channel, float32 [branches, steps, channels]; zero where nothing was seen.
        minimum: float32 [branches, steps]; +inf where nothing was seen.
        maximum: likewise, with -inf.
        rows: rows seen: tokens of a linear layer, places of a convolution.
        hessian: Σ x xᵀ over the rows, [columns, columns], columns being channels × kernel.
        sample: rows kept, float32 [kept, columns].
        sample_keys: their keys, float64 [kept], ascending.
    """

    absmax: Tensor
    minimum: Tensor
    maximum: Tensor
    rows: int = 0
    hessian: Tensor | None = None
    sample: Tensor | None = None
    sample_keys: Tensor | None = None


def empty_statistics(
    channels: int, columns: int, settings: StatisticsSettings, device: torch.device
) -> InputStatistics:
    """Statistics of no input yet."""
    table = (settings.branches, settings.steps)
    keeps = settings.sample_rows > 0
    return InputStatistics(
        torch.zeros(*table, channels, device=device),
        torch.full(table, torch.inf, device=device),
        torch.full(table, -torch.inf, device=device),
        0,
        None if settings.hessian is None else torch.zeros(columns, columns, dtype=settings.hessian, device=device),
        torch.empty(0, columns, device=device) if keeps else None,
        torch.empty(0, dtype=torch.float64) if keeps else None,
    )


def add_input(
    before: InputStatistics,
    values: Tensor,
    rows: Tensor,
    context: SamplingContext,
    settings: StatisticsSettings,
    key: str,
    part: BatchPart | None = None,
) -> InputStatistics:
    """Statistics with one more input. The tables and the Hessian of `before` are written into.

    Args:
        before: so far.
        values: the input, channels last, [batch, …, channels].
        rows: the same as the layer's matrix sees it, [rows, columns].
        context: the step, and the branches that the batch holds.
        settings: as the statistics were made with.
        key: names this input among all inputs of this layer in all processes, and with the seed decides which of its
            rows are kept.
        part: of a batch that the input belongs to, whose parts all have this key; None: the input is whole.

    Raises:
        ValueError: numbers that are not finite, a step or a branch beyond the table, or a batch that does not split.
    """
    if max(context.branches) >= settings.branches or context.step >= settings.steps:
        raise ValueError(
            f"step {context.step} of branches {context.branches} lies outside the {settings.steps} steps and "
            f"{settings.branches} branches to observe"
        )
    size = branch_parts(len(values), context)
    for own, branch in zip(torch.split(values, size), context.branches, strict=True):
        flat = own.reshape(-1, own.shape[-1]).float()
        least, most = flat.amin(dim=0), flat.amax(dim=0)
        here = (branch, context.step)
        # amin and amax pass NaN on, so that one test serves all
        if not bool(torch.isfinite(least.sum() + most.sum())):
            raise ValueError(f"the input has numbers that are not finite at step {context.step}")
        before.absmax[here] = torch.maximum(before.absmax[here], torch.maximum(-least, most))
        before.minimum[here] = torch.minimum(before.minimum[here], least.min())
        before.maximum[here] = torch.maximum(before.maximum[here], most.max())
    if before.hessian is not None:
        wide = rows.to(before.hessian.dtype)
        before.hessian.addmm_(wide.t(), wide)
    after = replace(before, rows=before.rows + len(rows))
    if before.sample is None or before.sample_keys is None:
        return after
    keys = _row_keys(len(rows), len(context.branches), settings.seed ^ zlib.crc32(key.encode()), part)
    least_keys, index = keys.sort()
    chosen = index[: settings.sample_rows]
    new = rows[chosen.to(rows.device)].float()
    sample, kept = _least(
        (before.sample, new), (before.sample_keys, least_keys[: settings.sample_rows]), settings.sample_rows
    )
    return replace(after, sample=sample, sample_keys=kept)


def _row_keys(rows: int, branches: int, seed: int, part: BatchPart | None) -> Tensor:
    """A random number for each row of an input [rows]; of a part, those of its rows in the input of the whole batch."""
    generator = torch.Generator().manual_seed(seed)
    here = 0 if part is None else branches * (part.stop - part.start)
    if part is None or rows % here:  # not so many rows for each sample: one input for all of them
        return torch.rand(rows, generator=generator, dtype=torch.float64)
    whole = torch.rand(branches, part.size, rows // here, generator=generator, dtype=torch.float64)
    return whole[:, part.start : part.stop].flatten()


def merge_statistics(first: InputStatistics, second: InputStatistics, settings: StatisticsSettings) -> InputStatistics:
    """Statistics of the inputs of both, on the device of the first; neither is changed.

    Raises:
        ValueError: they are of layers of another shape, or made with other settings.
    """
    shapes = [[None if part is None else tuple(part.shape) for part in (s.absmax, s.hessian)] for s in (first, second)]
    if shapes[0] != shapes[1] or (first.sample is None) != (second.sample is None):
        raise ValueError(f"statistics of different layers or settings cannot be merged: {shapes[0]} and {shapes[1]}")
    device = first.absmax.device
    hessian = first.hessian
    if hessian is not None and second.hessian is not None:
        hessian = hessian + second.hessian.to(device)
    sample, keys = first.sample, first.sample_keys
    if sample is not None and keys is not None and second.sample is not None and second.sample_keys is not None:
        sample, keys = _least((sample, second.sample.to(device)), (keys, second.sample_keys), settings.sample_rows)
    return InputStatistics(
        torch.maximum(first.absmax, second.absmax.to(device)),
        torch.minimum(first.minimum, second.minimum.to(device)),
        torch.maximum(first.maximum, second.maximum.to(device)),
        first.rows + second.rows,
        hessian,
        sample,
        keys,
    )


def save_statistics(
    path: str | Path, statistics: dict[str, InputStatistics], *, fingerprint: str, batches: int
) -> None:
    """Write statistics by layer, atomically and with a checksum.

    Args:
        path: the file to create or replace.
        statistics: by name of the layer.
        fingerprint: of the model, the data and the settings they belong to.
        batches: how many were seen, for a calibration that goes on from here.
    """
    layers = {name: dict(vars(entry)) for name, entry in statistics.items()}
    save_state(path, {"fingerprint": fingerprint, "batches": batches, "layers": layers}, kind=_KIND)


def load_statistics(path: str | Path, *, fingerprint: str) -> tuple[dict[str, InputStatistics], int]:
    """Statistics by layer, on the CPU, and the batches they have seen.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: altered, or not written by `save_statistics`.
        UserError: they belong to another model, other data or other settings.
    """
    state: Any = load_state(path, kind=_KIND)
    try:
        stated, batches = state["fingerprint"], state["batches"]
        layers = {name: InputStatistics(**entry) for name, entry in state["layers"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} does not hold statistics of layers: {error!r}") from None
    if stated != fingerprint:
        raise UserError(
            f"{path} has the statistics of {stated!r}, and this calibration is {fingerprint!r}: go on with what it was "
            "begun with, such as its data.eval_batch_size, or choose another run.name"
        )
    return layers, batches


def _least(rows: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows of two sets with the least keys, in the order of their keys."""
    kept, index = torch.cat(keys).sort(stable=True)
    return torch.cat(rows)[index[:count].to(rows[0].device)], kept[:count]
