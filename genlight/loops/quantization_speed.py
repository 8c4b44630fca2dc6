"""Whether the quantized network is faster than full precision on this machine: both in turns, so that what else the
machine does meets both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.benchmark import Timer

from genlight.quantization.trajectory import prepared

if TYPE_CHECKING:
    from genlight.loops.quantization_work import QuantizationWork

SPEED = "latency"  # in the account of time
# the median of what is measured lies between the smallest and the largest of six values in 97 of 100 cases
ROUNDS = 6
# seconds of one measurement, at least
_TIMED = 0.05


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a step, that is of one call of the network for one sample: the median of each round.

    Attributes:
        full, quantized: of full precision and of the quantized network, which took turns.
    """

    full: Sequence[float]
    quantized: Sequence[float]

    def verdict(self, name: str, device: str) -> str:
        """What the report begins with; faster is what is faster in every round.

        Args:
            name: of the quantized network.
            device: on which both ran.
        """
        ratios = [full / quantized for full, quantized in zip(self.full, self.quantized, strict=True)]
        times = f"{median(self.quantized):.3g} ms against {median(self.full):.3g} ms a step of one sample"
        factor = f"{median(ratios):.3g} times as fast ({min(ratios):.3g} to {max(ratios):.3g})"
        if min(ratios) > 1:
            return f"{name} takes {times}: {factor} as full precision on this machine ({device})"
        return f"simulated: not faster on this machine ({device}): {name} takes {times}, {factor}"


def milliseconds(rounds: Sequence[float]) -> dict[str, float]:
    """Columns of a row: the median of the rounds and the ends of its interval."""
    return {"ms": median(rounds), "ms_low": min(rounds), "ms_high": max(rounds)}


def step_times(work: QuantizationWork, layers: Mapping[str, nn.Module], rounds: int = ROUNDS) -> StepTimes:
    """Times of the network as it is, and with these layers."""
    full, quantized = list[float](), list[float]()
    for _ in range(rounds):
        full.append(_milliseconds(work))
        with work.replaced(layers):
            quantized.append(_milliseconds(work))
    return StepTimes(full, quantized)


def _milliseconds(work: QuantizationWork) -> float:
    """Of a step of the network as it is, in the trainer's precision; the first calls do not count."""
    call = work.reference("search", 1).calls[0]

    def measure() -> float:
        step = prepared(work.network, call)
        timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        return 1000 * float(timer.blocked_autorange(min_run_time=_TIMED).median)

    return float(work.inside(measure))
