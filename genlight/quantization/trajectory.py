"""The calls that a network gets in full-precision samplings, to ask a quantized one the same questions.

Errors along the trajectory of the full precision do not mix with where earlier errors have led: that tells quantized
networks of any quality apart, and each call is compared with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genlight.memory import Halves
from genlight.quantization.calls import first_input


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One call, its tensors on the CPU.

    Attributes:
        arguments: positional ones.
        options: by name.
        output: what the network predicted, float32, without a learned variance.
    """

    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    output: Tensor

    def every(self, start: int, step: int) -> NetworkCall:
        """Every step-th row, from `start`: the rows of both halves of guidance where the number of rows allows it.

        Tensors with another number of rows belong to all rows.
        """

        def chosen(value: Tensor) -> Tensor:
            return value[start::step] if value.ndim and len(value) == len(self.output) else value

        options = {name: _mapped(value, chosen) for name, value in self.options.items()}
        return NetworkCall(_mapped(self.arguments, chosen), options, chosen(self.output))


@dataclass(frozen=True, eq=False)
class Reference:
    """What full precision makes of some noise: the calls of the network on the way, and images [N, C, H, W].

    Of a generator of videos `images` are those, [N, F, C, H, W].
    """

    noise: Tensor
    label: Tensor | None
    calls: list[NetworkCall]
    images: Tensor


@contextmanager
def recorded_calls(network: nn.Module) -> Iterator[list[NetworkCall]]:
    """The calls of the network in the block. What one call has in common with the one before is kept once."""
    calls: list[NetworkCall] = []
    before: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any], output: Any) -> None:
        here: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            kept = value.detach().to("cpu", copy=True)
            place = len(here)
            if place < len(before) and before[place].dtype == kept.dtype and torch.equal(before[place], kept):
                kept = before[place]
            here.append(kept)
            return kept

        stored = tuple(_mapped(value, keep) for value in arguments)
        named = {name: _mapped(value, keep) for name, value in options.items()}
        calls.append(NetworkCall(stored, named, _prediction(output, arguments, options).cpu()))
        before[:] = here

    handle = network.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def replay(network: nn.Module, call: NetworkCall) -> Tensor:
    """What the network, as it is now, predicts for the same arguments; float32, on its device."""
    return prepared(network, call)()


def prepared(network: nn.Module, call: NetworkCall) -> Callable[[], Tensor]:
    """What asks for that, again and again; the arguments lie on the device of the network by then."""
    device = next(network.parameters()).device

    def moved(value: Tensor) -> Tensor:
        return value.to(device)

    arguments = tuple(_mapped(value, moved) for value in call.arguments)
    options = {name: _mapped(value, moved) for name, value in call.options.items()}

    def ask() -> Tensor:
        with torch.no_grad():
            return _prediction(network(*arguments, **options), arguments, options)

    return ask


def noise_to_signal(network: nn.Module, calls: Sequence[NetworkCall], halves: Halves | None = None) -> float:
    """Squared error of the predictions over the squares of those recorded, summed over all calls; 0 for none.

    Args:
        network: as it is now.
        calls: recorded.
        halves: how many rows of a call the network is asked at a time; None: all, and fewer where memory runs out.

    Raises:
        ValueError: no calls.
        torch.OutOfMemoryError: memory does not suffice for one row.
    """
    if not calls:
        raise ValueError("no calls were recorded")
    halves = halves or Halves("rows of a call", "")
    error, signal = 0.0, 0.0
    for call in calls:
        error += halves.attempt(partial(_error, network, call), len(call.output))
        signal += float(call.output.double().square().sum())
    return error / signal


def decibels(ratio: float) -> float:
    """Signal-to-noise ratio in dB of a noise-to-signal ratio: 200 where there is no noise, -200 if it is not finite."""
    if not math.isfinite(ratio):
        return -200.0
    return min(200.0, -10 * math.log10(ratio)) if ratio > 0 else 200.0


def _error(network: nn.Module, call: NetworkCall, rows: int) -> float:
    """Squared error of the predictions for a call, at most `rows` at a time."""
    step = math.ceil(len(call.output) / rows)
    parts = [call.every(start, step) for start in range(step)]
    return sum(float((replay(network, part).cpu().double() - part.output.double()).square().sum()) for part in parts)


def _prediction(output: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
    prediction: Tensor = found.detach().float()
    channels = first_input(arguments, options).shape[1]
    return prediction[:, :channels] if prediction.shape[1] == 2 * channels else prediction


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(entry, change) for entry in value)
    if isinstance(value, dict):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    return value
