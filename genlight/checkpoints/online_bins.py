"""Means of consecutive checkpoints, gathered while training, over spans that grow with age: no file per checkpoint.

As in an exponential histogram (Datar, Gionis, Indyk, Motwani 2002) the newest checkpoints stand alone and older ones
are merged, so that a few bins cover any length of training.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genlight.checkpoints.writer import Snapshot


@dataclass
class _Bin:
    first_step: int
    last_step: int
    count: int
    lr: float | None
    total: dict[str, Tensor]


class OnlineBins:
    """At most `max_bins` means of consecutive checkpoints; the size of a bin grows about in proportion to its age.

    Sums are kept in float64, in which the sum of 2^29 float32 numbers of like size is exact: the means do not depend on
    the order of merging. A bin of one checkpoint is kept in float32.

    Args:
        max_bins: at least 2.

    Raises:
        ValueError: fewer.
    """

    def __init__(self, max_bins: int = 16) -> None:
        if max_bins < 2:
            raise ValueError(f"max_bins must be at least 2, got {max_bins}")
        self.max_bins = max_bins
        self._bins: list[_Bin] = []

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def counts(self) -> list[int]:
        """Checkpoints in each bin, oldest first."""
        return [bin.count for bin in self._bins]

    def most_bytes(self, copy: int) -> int:
        """Memory that they take at most, for weights that take `copy` bytes in float32: sums take twice as much."""
        return 2 * self.max_bins * copy

    def add(self, step: int, tensors: Mapping[str, Tensor], lr: float | None = None) -> None:
        """Take in the checkpoint of `step`; the float32 tensors are kept, not copied.

        Raises:
            ValueError: the step does not follow the newest one.
        """
        if self._bins and step <= self._bins[-1].last_step:
            raise ValueError(f"step {step} cannot follow step {self._bins[-1].last_step}, the newest one")
        self._bins.append(_Bin(step, step, 1, lr, dict(tensors)))
        if len(self._bins) > self.max_bins:
            self._merge(self._most_crowded())

    def snapshots(self) -> Iterator[Snapshot]:
        """The means in float32, oldest first."""
        for bin in self._bins:
            means = {name: (total / bin.count).float() for name, total in bin.total.items()}
            yield Snapshot(bin.first_step, bin.last_step, bin.count, bin.lr, means)

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint of the trainer."""
        return {"max_bins": self.max_bins, "bins": [dict(vars(bin)) for bin in self._bins]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: it is of another number of bins.
        """
        if state["max_bins"] != self.max_bins:
            raise ValueError(f"the saved state has max_bins = {state['max_bins']}, here it is {self.max_bins}")
        self._bins = [_Bin(**{**bin, "total": dict(bin["total"])}) for bin in state["bins"]]

    def _most_crowded(self) -> int:
        """The older one of the two neighbours whose union is smallest for its age; the oldest of equals.

        The newest checkpoint, which is where others are measured from, always stands alone.
        """
        best, best_ratio = 0, float("inf")
        newer = sum(self.counts)
        for number, (old, new) in enumerate(zip(self._bins[:-1], self._bins[1:-1])):
            size = old.count + new.count
            newer -= old.count
            ratio = size / (newer - new.count + 1)
            if ratio < best_ratio:
                best, best_ratio = number, ratio
        return best

    def _merge(self, number: int) -> None:
        old, new = self._bins[number : number + 2]
        total = {}
        for name, one in old.total.items():
            # a single checkpoint may be memory that others hold: only sums of our own are changed in place
            double = one.to(torch.float64)
            total[name] = double.add_(new.total[name])
        self._bins[number : number + 2] = [
            _Bin(old.first_step, new.last_step, old.count + new.count, new.lr, total),
        ]
