"""The calls that a network gets in full-precision samplings, to ask a quantized one the same questions.

Errors along the trajectory of the full precision do not mix with where earlier errors have led: that tells quantized
networks of any quality apart, and each call is compared with itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def noise_to_signal(network: nn.Module, calls: Sequence[NetworkCall]) -> float:
    """Squared error of the predictions over the squares of those recorded, summed over all calls; 0 for none.

    Raises:
        ValueError: no calls.
    """
    if not calls:
        raise ValueError("no calls were recorded")
    error, signal = 0.0, 0.0
    for call in calls:
        expected = call.output.double()
        error += float((replay(network, call).cpu().double() - expected).square().sum())
        signal += float(expected.square().sum())
    return error / signal


def decibels(ratio: float) -> float:
    """The signal-to-noise ratio in dB of a noise-to-signal ratio; 200 where there is no noise to speak of."""
    return min(200.0, -10 * math.log10(ratio)) if ratio > 0 else 200.0


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
