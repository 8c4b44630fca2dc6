"""Whether the quantized network is faster than full precision on this machine: both in turns, so that what else the
machine does meets both.

On a GPU much of a step without `torch.compile` is the launching of kernels, of which quantized layers have more: there
both are compiled as well, the quantized network as `genlight.quantization.fusion` says, and that decides, unless
`method.compiled` leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from genlight.modules.pretrained import first_line
from genlight.quantization.fusion import fused, share_balances
from genlight.quantization.trajectory import prepared
from genlight.reports.latency import device_name, measure_latency

if TYPE_CHECKING:
    from genlight.loops.quantization_work import QuantizationWork

SPEED = "latency"  # in the account of time
# the median of what is measured lies between the smallest and the largest of six values in 97 of 100 cases
ROUNDS = 6
# milliseconds of one measurement, at least
_TIMED = 50.0


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a step, that is of one call of the network for one sample: the median of each round.

    Attributes:
        full, quantized: of full precision and of the quantized network, which took turns.
        compiled: whether both were compiled.
    """

    full: Sequence[float]
    quantized: Sequence[float]
    compiled: bool = False

    def verdict(self, name: str, device: str) -> str:
        """What the report begins with; faster is what is faster in every round.

        Args:
            name: of the quantized network.
            device: on which both ran.
        """
        ratios = [full / quantized for full, quantized in zip(self.full, self.quantized, strict=True)]
        how = "with" if self.compiled else "without"
        times = (
            f"{median(self.quantized):.3g} ms against {median(self.full):.3g} ms a step of one sample, both {how} "
            "torch.compile"
        )
        factor = f"{median(ratios):.3g} times as fast ({min(ratios):.3g} to {max(ratios):.3g})"
        if min(ratios) > 1:
            return f"{name} takes {times}: {factor} as full precision on this machine ({device})"
        return f"simulated: not faster on this machine ({device}): {name} takes {times}: {factor}"


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        plain: without `torch.compile`.
        device: on which both ran, in words.
        compiled: with it; None where there is no GPU or it was left out, in words why it failed.
    """

    plain: StepTimes
    device: str
    compiled: StepTimes | str | None = None

    def verdict(self, name: str) -> str:
        """Of compiled networks if they were measured; `name` is that of the quantized network."""
        if isinstance(self.compiled, StepTimes):
            return self.compiled.verdict(name, self.device)
        failed = "" if self.compiled is None else f"; torch.compile failed: {self.compiled}"
        return self.plain.verdict(name, self.device) + failed


def milliseconds(rounds: Sequence[float]) -> dict[str, float]:
    """Columns of a row: the median of the rounds and the ends of its interval."""
    return {"ms": median(rounds), "ms_low": min(rounds), "ms_high": max(rounds)}


def measured_speeds(work: QuantizationWork, layers: Mapping[str, nn.Module]) -> Speeds:
    """Times of the network as it is and with these layers, on a GPU compiled as well if the method says so."""
    device, plain = work.evaluations.trainer.strategy.root_device, step_times(work, layers)
    both = device.type == "cuda" and work.method.compiled
    return Speeds(plain, device_name(device), compiled_times(work, layers) if both else None)


def step_times(work: QuantizationWork, layers: Mapping[str, nn.Module], rounds: int = ROUNDS) -> StepTimes:
    """Times of the network as it is, and with these layers."""
    return _by_turns(work, layers, rounds, (work.network, work.network))


def compiled_times(work: QuantizationWork, layers: Mapping[str, nn.Module], rounds: int = ROUNDS) -> StepTimes | str:
    """Times of both networks compiled; the first line of the error where that fails, which stops no run."""
    compiled = torch.compile(work.network), torch.compile(work.network, backend=fused)
    try:
        return _by_turns(work, layers, rounds, compiled)
    except Exception as error:  # dynamo, Triton and the system's compiler each raise their own
        return first_line(error)
    finally:
        torch._dynamo.reset()


def _by_turns(
    work: QuantizationWork, layers: Mapping[str, nn.Module], rounds: int, networks: tuple[Any, Any]
) -> StepTimes:
    """Of two callables that stand for the network, one in full precision and one with these layers."""
    full, quantized = list[float](), list[float]()
    for _ in range(rounds):
        full.append(call_milliseconds(work, networks[0]))
        with work.replaced(layers):
            quantized.append(call_milliseconds(work, networks[1]))
    return StepTimes(full, quantized, networks[0] is not work.network)


def call_milliseconds(work: QuantizationWork, network: nn.Module, samples: int = 1) -> float:
    """Of a step of the network as it is, or of what was compiled of it, in the trainer's precision; calls until times
    agree do not count.
    """
    call = work.reference("search", samples).calls[0]

    def measure() -> float | Exception:
        try:
            if network is not work.network:
                share_balances(work.network)  # once it is on its device
            step, device = prepared(network, call), next(work.network.parameters()).device
            once = measure_latency(step, device, warmup=1, repeats=1).median_ms
            return measure_latency(step, device, warmup=0, repeats=math.ceil(_TIMED / max(once, 0.5))).median_ms
        except Exception as error:  # raised below: it would end the trainer
            return error

    found: float | Exception = work.inside(measure)
    if isinstance(found, Exception):
        raise found
    return found
